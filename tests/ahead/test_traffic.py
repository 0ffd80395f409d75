"""What the sums of linearized attention read and write on a GPU, by the compiled program: it bounds the rate at which they can run, before any is timed."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from ahead import compiled
from attn_zoo import make_attention
from attn_zoo.ops.pallas_wy import chunk_solutions

B, T, N, H = 8, 4096, 16, 64
UNIT = 2 * B * T * N * H  # bytes of q, and of each of k, v and o
BYTES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")


def traffic(program: str) -> float:
    """Bytes of all arguments and results of the kernels of an optimized HLO module, as if each was read or written once and no cache helped."""
    entry = program[program.index("\nENTRY") :]
    sizes, total = {}, 0
    for line in entry[: entry.index("\n}")].splitlines()[2:]:
        name, shape, op, arguments = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(?:,|$)", line).groups()
        assert op not in ("while", "call", "conditional"), f"{op} runs kernels of its own"
        sizes[name] = sum(BYTES[dtype] * math.prod(map(int, filter(None, dims.split(",")))) for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape))
        if op not in FREE:
            total += sizes[name] + sum(sizes[argument] for argument in re.findall(r"%([\w.-]+)", arguments))
    return total


def test_traffic_is_counted():
    """Of a sum both terms and the result once; of a kernel with two results these too."""
    x = jax.ShapeDtypeStruct((512, 1024), jnp.bfloat16)
    assert traffic(compiled(lambda x, y: x + y, x, x).as_text()) == 3 * 2 * 512 * 1024
    k, v, beta = [jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16)] * 2 + [jax.ShapeDtypeStruct((2, 128, 4), jnp.float32)]
    both = lambda *args: chunk_solutions(*args, chunk=64)
    assert traffic(compiled(both, k, v, beta).as_text()) == 4 * 2 * (2 * 128 * 4 * 64) + 4 * (2 * 128 * 4)


# Units, forward and forward + backward: what is moved now, rounded up. A quarter of a copy's rate leaves 16 and 32, of 4 and 8 that must be.
LIMITS = {
    ("linear", True): (9, 28),
    ("linear", False): (5, 17),
    ("performer", True): (20, 58),
    ("performer", False): (13, 39),
    ("rfa", True): (20, 59),
    ("rfa", False): (13, 40),
    ("retention", True): (9, 29),
    ("delta(feature_map='elu')", True): (20, 58),
    ("delta", True): (30, 89),
}


@pytest.mark.parametrize("spec, causal", LIMITS, ids=lambda x: x if isinstance(x, str) else "causal" if x else "bidirectional")
def test_linearized_attention_moves_little(spec, causal):
    attention = make_attention(spec, num_heads=N, head_dim=H, max_len=T, causal=causal, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert attention.backend() == "pallas"
    q, k, v, do = [jax.ShapeDtypeStruct((B, T, N, H), jnp.bfloat16)] * 4

    def with_gradients(q, k, v, do):
        o, pull = jax.vjp(attention, q, k, v)
        return o, pull(do)

    moved = traffic(compiled(attention, q, k, v).as_text()) / UNIT, traffic(compiled(with_gradients, q, k, v, do).as_text()) / UNIT
    print(f"{spec}: {moved[0]:.1f} and {moved[1]:.1f} units")
    assert all(at_most - 1 < units <= at_most for units, at_most in zip(moved, LIMITS[spec, causal])), moved
