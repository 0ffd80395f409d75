"""Code that chooses by the device is told that there is an H200."""

import importlib.util

import jax
import pytest

from attn_zoo.ops import backends, tuning

from ahead import H200


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """JAX says that it runs on one; without a plugin that compiles for it, the test is skipped."""
    if importlib.util.find_spec("jax_plugins") is None or not any(importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13)):
        pytest.skip("JAX's CUDA plugin is not installed; `make test-cuda` installs it and runs this file")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(backends, "_compute_capability", lambda: 9.0)
    monkeypatch.setattr(tuning, "_device_kind", lambda: H200)
