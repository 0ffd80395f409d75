"""The convolution along the sequence, one filter a head: both backends against its definition, and the C++ kernels under what JAX does to them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pallas_linear import assert_close, both_forms, inputs, layer, results
from tiny import ON_CPU

from attn_zoo.ops import native
from attn_zoo.ops.convolution import convolve
from attn_zoo.spec import Unsupported

BACKENDS = ("xla", pytest.param("native", marks=pytest.mark.skipif(ON_CPU != "native", reason=f"{native.library()}")))
compiled = pytest.mark.skipif(ON_CPU != "native", reason=f"{native.library()}")

SHAPES = {  # S, K, N, H, W: a chunk is 64 positions, a vector 16 channels at most, and gradients are summed for eleven taps at once
    "one-of-each": (1, 1, 1, 1, 1),
    "shorter-than-half-the-filter": (5, 1, 3, 9, 33),
    "whole-chunks": (128, 2, 4, 16, 7),
    "a-position-more": (65, 2, 2, 17, 5),
    "a-filter-longer-than-a-chunk": (200, 1, 2, 33, 131),
}


def arrays(S, K, N, H, W, dtype=jnp.float32):
    rng = np.random.default_rng(S)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in ((2, S, K, H), (N, W))]


def definition(v, taps):
    """One tap at a time."""
    (_, S, K, _), (N, W) = v.shape, taps.shape
    padded = jnp.pad(jnp.repeat(v, N // K, axis=2), ((0, 0), (W // 2, W // 2), (0, 0), (0, 0)))
    return sum(taps[:, w, None] * padded[:, w : w + S] for w in range(W))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_its_definition(shape, backend):
    args = arrays(*SHAPES[shape])
    assert_close(results(functools.partial(convolve, backend=backend), args), results(definition, args), 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_of_half_precision_is_computed_in_float32(backend, dtype):
    args = arrays(70, 1, 2, 16, 5, dtype)
    o = convolve(*args, backend=backend)
    assert o.dtype == jnp.float32
    np.testing.assert_allclose(o, definition(*(x.astype(jnp.float32) for x in args)), atol=2e-6 * abs(o).max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_refuses_filters_without_a_centre_and_heads_that_are_no_groups(backend):
    v, taps = arrays(9, 2, 4, 8, 5)
    for wrong in (taps[:, :4], taps[:3]):
        with pytest.raises(ValueError, match="W must be odd, and N a multiple of the heads"):
            convolve(v, wrong, backend=backend)


@compiled
def test_under_vmap_and_checkpoint():
    args, f = arrays(70, 1, 2, 8, 5), functools.partial(convolve, backend="native")
    expected = results(f, args)
    assert_close(results(jax.checkpoint(f), args), expected, 1e-6)
    assert_close(results(lambda v, taps: jax.vmap(lambda v: f(v[None], taps)[0])(v), args), expected, 1e-6)


@compiled
def test_refuses_float64():
    with jax.enable_x64(True), pytest.raises(Unsupported, match="the native kernels cannot serve here: it takes float32, bfloat16 or float16, not float64"):
        convolve(*arrays(9, 1, 1, 8, 5, jnp.float64), backend="native")


@compiled
def test_the_variant_equals_its_reference_on_either():
    """Outputs and gradients, those of the filters too, with ragged validity; and the record says what ran."""
    q, k, v, _ = inputs(90, R=16, H=16)
    valid = jnp.arange(90)[None] < jnp.array([[90], [61]])
    for backend, ran in (("auto", "native"), ("native", "native"), ("xla", "xla")):
        attention = layer("nystrom(landmarks=8, residual_kernel=9)", False, backend=backend)
        assert_close(*both_forms(attention, q, k, v, valid), 1e-4)  # A^+ amplifies rounding
        assert attention.plan(90, 90, True)["backend"] == attention.backend() == ran
        assert str(jax.make_jaxpr(attention)(q, k, v)).count("ffi_call") == (4 if ran == "native" else 0)  # rows, columns, inverse, values
