"""What the C library does with memory that was freed."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import numpy as np
from attn_zoo.memory import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
for n in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.full(2**22, 1.0)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(int(kept), faults)
"""


def test_memory_that_was_freed_is_not_asked_for_again():
    """Beside a process that is not told to: 32 MiB are 8192 pages of 4 KiB, or 16 of 2 MiB."""
    process = lambda how: subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
    (_, fresh), (kept, faults) = (map(int, process(how).stdout.split()) for how in ("leave", "keep"))
    if not kept:
        pytest.skip("the C library is not glibc")
    assert faults < 8 and fresh > 8
