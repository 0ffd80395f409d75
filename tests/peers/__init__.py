"""Agreement with code that others wrote, where it is installed: `make test-peers` installs it and runs these tests."""

import pytest


def peer(module: str):
    """The module, or a skip of the file that asks for it."""
    return pytest.importorskip(module, reason=f"{module.partition('.')[0]} is not installed; `make test-peers` installs the peers and runs this file")
