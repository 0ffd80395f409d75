"""Compile time, step time and memory of one jitted function, and what the device's matrix product does at that moment."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn_zoo.config import Measure


def compile_timed(function: Callable, *args: Any) -> tuple[Callable, dict[str, float]]:
    """(compiled, {'lower_s', 'compile_s'}): tracing and lowering apart from XLA's own work.

    Honest only in a process whose persistent compilation cache is off.
    """
    start = time.perf_counter()
    lowered = function.lower(*args)
    middle = time.perf_counter()
    compiled = lowered.compile()
    return compiled, {"lower_s": middle - start, "compile_s": time.perf_counter() - middle}


def out_of_memory(e: Exception) -> bool:
    """Whether that is why something failed; a kernel that needs more shared memory than there is has another fault, of which XLA says the same."""
    return isinstance(e, MemoryError) or ("RESOURCE_EXHAUSTED" in str(e) and not any(words in str(e).lower() for words in ("shared memory", "vmem")))


def time_calls(call: Callable[[], Any], measure: Measure) -> dict[str, float]:
    """{'median_s', 'p20_s', 'p80_s', 'n'} of calls that each end in block_until_ready, after warm-up: at least min_steps and min_seconds."""
    for _ in range(measure.warmup):
        jax.block_until_ready(call())
    seconds = []
    while len(seconds) < measure.min_steps or sum(seconds) < measure.min_seconds:
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    p20, median, p80 = np.percentile(seconds, (20, 50, 80)).tolist()
    return {"median_s": median, "p20_s": p20, "p80_s": p80, "n": len(seconds)}


def memory(compiled: Any) -> dict[str, int | None]:
    """Bytes that XLA plans for one call on one device (peak: all that live at once), and the device's own peak in this process, if it tells."""
    analysis = compiled.memory_analysis()
    stats = jax.local_devices()[0].memory_stats() or {}
    argument, output, temp = analysis.argument_size_in_bytes, analysis.output_size_in_bytes, analysis.temp_size_in_bytes
    return {
        "peak_bytes": argument + output + temp - analysis.alias_size_in_bytes,  # donated arguments are outputs too
        "temp_bytes": temp,
        "argument_bytes": argument,
        "output_bytes": output,
        "device_peak_bytes": stats.get("peak_bytes_in_use"),
    }


def matmul_flops_per_s(dtype: Any) -> float:
    """The rate of a large square matrix product on one device now: the best of some 0.3 s of products of random matrices."""
    n = 8192 if jax.default_backend() in ("gpu", "tpu") else 1024
    a, b = (jax.random.normal(jax.random.key(i), (n, n)).astype(dtype) for i in range(2))
    return 2 * n**3 / _fastest(jax.jit(jnp.matmul), a, b)


def copy_bytes_per_s() -> float:
    """The rate, in bytes read and written, of copying a large array on one device now: the best of some 0.3 s of copies."""
    n = 2**28 if jax.default_backend() in ("gpu", "tpu") else 2**24
    x = jax.random.normal(jax.random.key(0), (n,))
    return 2 * x.nbytes / _fastest(jax.jit(jnp.negative), x)  # a plain copy could be an alias


def _fastest(call: Callable, *args: Any) -> float:
    """Seconds of the fastest of some 0.3 s of calls, after one to warm up."""
    jax.block_until_ready(call(*args))
    best, until = float("inf"), time.perf_counter() + 0.3
    while time.perf_counter() < until:
        start = time.perf_counter()
        jax.block_until_ready(call(*args))
        best = min(best, time.perf_counter() - start)
    return best
