"""What the C library does with memory that was freed."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import jax, numpy as np
from attn_zoo.memory import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
if sys.argv[2] == "jax":
    x, negative = jax.numpy.ones(2**23), jax.jit(jax.numpy.negative)
    call = lambda: jax.block_until_ready(negative(x))
else:
    call = lambda: np.full(2**22, 1.0)
for n in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(int(kept), faults)
"""


@pytest.mark.parametrize("whose", ["numpy", "jax"])
def test_memory_that_was_freed_is_not_asked_for_again(whose):
    """Beside a process that is not told to: 32 MiB are 8192 pages of 4 KiB, or 16 of 2 MiB. JAX computes in threads of its own."""
    process = lambda how: subprocess.run([sys.executable, "-c", SCRIPT, how, whose], capture_output=True, text=True, check=True)
    (_, fresh), (kept, faults) = (map(int, process(how).stdout.split()) for how in ("leave", "keep"))
    if not kept:
        pytest.skip("the C library is not glibc, or there is an accelerator")
    assert faults < 8 and fresh > 8
