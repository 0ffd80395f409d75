"""Every variant, compiled for an H200 with the backend that `auto` takes there: forward and backward, at lengths that nothing divides, and its memory."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from ahead import WITHOUT_PRODUCTS, assembled, compiled
from attn_zoo import VARIANTS, make_attention

CASES = [(name, causal) for name, variant in VARIANTS.items() for causal in ((False, True) if variant.causal is True else (False,))]
EVERY = pytest.mark.parametrize("name, causal", CASES, ids=[f"{name}-{'causal' if causal else 'bidirectional'}" for name, causal in CASES])


def layer(name, causal, T, *, dtype=jnp.bfloat16, padded=False):
    """(a loss of a layer of this variant with its gradients in queries, keys, values and parameters, the shapes that it takes)."""
    build = lambda: make_attention(name, num_heads=4, num_kv_heads=2, head_dim=64, max_len=T, causal=causal, dtype=dtype, padding="end", rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(nnx.eval_shape(build), nnx.Param, ...)
    shapes = [jax.ShapeDtypeStruct((2, T, heads, 64), dtype) for heads in (4, 2, 2)]

    def loss(params, q, k, v, rest, valid):
        return nnx.merge(graph, params, rest)(q, k, v, valid_BS=valid).astype(jnp.float32).sum()

    return jax.value_and_grad(loss, (0, 1, 2, 3)), params, *shapes, rest, jax.ShapeDtypeStruct((2, T), bool) if padded else None


@EVERY
def test_compiles_at_odd_lengths_and_multiplies_by_matrix_units(name, causal):
    """In bfloat16, padded. Products in float32 would be on the units for single numbers, at a tenth of the speed and less. Hard attention has a softmax in training alone."""
    kernels = assembled(*layer(name, causal, 333, padded=True))
    backend = make_attention(name, num_heads=4, num_kv_heads=2, head_dim=64, max_len=333, causal=causal, dtype=jnp.bfloat16, padding="end", rngs=nnx.Rngs(0)).backend(True)
    assert bool(kernels) == ("pallas" in backend and name != "hard"), f"kernels {sorted(kernels)} of {backend}"
    assert [kernel for kernel, found in kernels.items() if kernel.partition("__")[0] not in WITHOUT_PRODUCTS and not re.search(r"mma\.(mma_async|sync)", found.ptx)] == []


@EVERY
def test_compiles_in_float32(name, causal):
    compiled(*layer(name, causal, 333, dtype=jnp.float32))


@EVERY
def test_memory_grows_as_the_variant_says(name, causal):
    """Temporary bytes of forward and backward, from T = 4k to 16k."""
    peaks = [compiled(*layer(name, causal, T)).memory_analysis().temp_size_in_bytes for T in (4096, 16384)]
    assert math.log(peaks[1] / peaks[0], 4) <= VARIANTS[name].memory_order + 0.15, f"temporary bytes {peaks}"
