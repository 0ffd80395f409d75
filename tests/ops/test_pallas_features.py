"""The kernels of random features: interpreted on the CPU against XLA's features and float64, and lowered for NVIDIA GPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pallas_linear import assert_close, layer, lowered, results

from attn_zoo.attention.performer import LARGEST, draw, key_features, query_features
from attn_zoo.attention.rfa import random_features
from attn_zoo.ops import pallas_kernels
from attn_zoo.ops.pallas_features import MOST, positive_features, sine_features

DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["f32", "bf16", "f16"])


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels run on the CPU."""
    monkeypatch.setattr(pallas_kernels, "INTERPRET", True)


def by_head(x, w_KRH):
    """rfa's features as its layer asks XLA for them."""
    return random_features(x, jnp.repeat(w_KRH, x.shape[2] // len(w_KRH), axis=0))


KEYS = functools.partial(positive_features, largest=LARGEST)
MAPS = {"queries": (positive_features, query_features), "keys": (KEYS, key_features), "sines": (sine_features, by_head)}
MAP = pytest.mark.parametrize("name", MAPS)


def inputs(name, T, R=20, H=9, N=4, dtype=jnp.float32):
    """(vectors, directions): those of all heads, or of each of two pairs of heads."""
    x = jnp.asarray(np.random.default_rng(T).normal(size=(2, T, N, H)), dtype)
    return x, (0.5 * jax.random.normal(jax.random.key(R), (max(1, N // 2), R, H)) if name == "sines" else draw(jax.random.key(R), R, H))


SHAPES = {
    "T1": {"T": 1},
    "T63": {"T": 63, "R": 24, "H": 16},
    "T257-odd-H-and-R": {"T": 257, "R": 21, "H": 35},
    "T63-few-directions": {"T": 63, "R": 7, "H": 48},
    "T63-many-directions": {"T": 63, "R": 300, "H": 16, "N": 2},
    "T257-R256-H128": {"T": 257, "R": 256, "H": 128, "N": 1},
    "T288-whole-blocks": {"T": 288, "R": 64, "H": 64, "N": 2},  # nine of 64 positions, or 36 of 16, of which a program has eight
}


@MAP
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_equal_the_xla_features(name, shape, dtype, interpreted):
    """Outputs and gradients; performer's directions are constants. In bfloat16 outputs and both factors of W'dE are rounded, by 2^-9 each, and of keys x sum dE is near W'dE."""
    x, w = inputs(name, dtype=dtype, **SHAPES[shape])
    fixed = [] if name == "sines" else [w]
    args = (x, w)[: 2 - len(fixed)]
    actual, expected = (results(lambda *args, f=f: f(*args, *fixed), args) for f in MAPS[name])
    assert actual[0].dtype == actual[1][0].dtype == dtype
    assert_close(actual, expected, 1e-5 if dtype == jnp.float32 else 2**-6)
    if dtype == jnp.bfloat16:
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
            assert np.sqrt(np.mean((a - e) ** 2) / np.mean(e**2)) < 2**-7


@MAP
def test_of_float16_all_is_float32(name, interpreted):
    x, w = inputs(name, 40, dtype=jnp.float16)
    kernel, xla = MAPS[name]
    assert kernel(x, w).dtype == jnp.float32
    assert_close(kernel(x, w), xla(x, w), 1e-6)


def test_the_gradient_of_performers_directions_is_zero(interpreted):
    x, w = inputs("keys", 5)
    assert (jax.grad(lambda w: KEYS(x, w).sum())(w) == 0).all()


@pytest.mark.parametrize("name", ["keys", "sines"])
@pytest.mark.parametrize("T", [37, 128], ids=["part-of-a-block", "whole-blocks"])
def test_what_is_not_valid_gives_zeros_and_gets_no_gradient(name, T, interpreted):
    """Whatever stands there. The other features, and the gradients, of directions too, are as if it were not there."""
    x, w = inputs(name, T)
    valid = jnp.asarray(np.random.default_rng(0).random((2, T)) > 0.3)
    kernel, xla = MAPS[name]
    hidden = ~valid[:, :, None, None]
    phi, (dx, dw) = results(lambda x, w: kernel(x, w, valid), (jnp.where(hidden, jnp.nan, x), w))
    assert (phi[~valid] == 0).all() and (dx[~valid] == 0).all()
    expected, (expected_dx, expected_dw) = results(lambda x, w: jnp.where(hidden, 0, xla(x, w)), (x, w))
    assert_close((phi, dx), (expected, expected_dx), 3e-6)
    assert_close(dw, expected_dw if name == "sines" else jnp.zeros_like(w), 3e-6)


@MAP
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("size", [0.0, 300.0, 6e4])
def test_large_and_vanishing_vectors_have_finite_features_and_gradients(name, dtype, size, interpreted):
    x, w = inputs(name, 30, R=40, H=64)
    x = (size * x).astype(dtype)
    assert all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(results(MAPS[name][0], (x, w))))


def test_a_query_away_from_all_directions_has_finite_gradients(interpreted):
    """Its products are some -1000, and those of the directions that are padding 0."""
    w = draw(jax.random.key(0), 3, 16)
    q = jnp.broadcast_to(-100 * w.sum(axis=0), (1, 20, 1, 16)) * (1 + 0.001 * jax.random.normal(jax.random.key(1), (1, 20, 1, 16)))
    assert ((q * 16**-0.25) @ w.T).max() < -200
    assert_close(results(lambda q: positive_features(q, w), (q,)), results(lambda q: query_features(q, w), (q,)), 1e-3)


def test_a_key_that_is_a_direction_does_not_overflow(interpreted):
    """|w|^2 / 2 is 128 here: its exponential leaves float32, and is held at LARGEST, where the gradient is zero."""
    w = 2 * draw(jax.random.key(0), 64, 64)
    k = w[None, :, None] * 64**0.25
    phi, (dk,) = results(lambda k: KEYS(k, w), (k,))
    np.testing.assert_allclose(phi.max(axis=-1), np.exp(LARGEST), rtol=1e-6)
    assert np.isfinite(dk).all()
    assert_close((phi, (dk,)), results(lambda k: key_features(k, w), (k,)), 1e-5)


@DTYPES
@pytest.mark.parametrize("R", [5, 300], ids=["one-tile", "several-tiles"])
def test_the_largest_feature_of_a_query_is_exactly_one(dtype, R, interpreted):
    x, w = inputs("queries", 70, R=R, dtype=dtype)
    assert (positive_features(50 * x, w).max(axis=-1) == 1).all()


@pytest.mark.parametrize("H", [64, 128])
@pytest.mark.parametrize("long", [1.0, 2.0], ids=["as-long-as-layers-have-them", "twice-as-long"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_exponents_are_as_exact_as_promised(dtype, long, H, interpreted):
    """Of keys with |x|^2 = H and 4 H, against float64. Features in float32, whose logarithms show it."""
    w = draw(jax.random.key(0), 128, H)
    x = jax.random.normal(jax.random.key(1), (1, 500, 1, H))
    x = (long * H**0.5 * x / jnp.linalg.norm(x, axis=-1, keepdims=True)).astype(dtype)
    found = np.log(np.asarray(KEYS(x, w, wide=True), np.float64))[0, :, 0]
    x, w = np.asarray(x, np.float64)[0, :, 0] * H**-0.25, np.asarray(w, np.float64)
    exact = x @ w.T - 0.5 * (x * x).sum(axis=1, keepdims=True)
    normal = exact > -80  # beyond, the features are subnormal, or zero
    error = abs(found - exact)[normal]
    promised = (2**-17 * abs(x) @ abs(w).T + 2**-22 * (x * x).sum(axis=1, keepdims=True))[normal]
    assert (error <= promised + 2**-23).all()  # the last one is that of the feature
    assert error.max() < (1e-4 if dtype == jnp.bfloat16 else 2e-5)
    assert normal.mean() > 0.9


def test_under_vmap_they_are_the_same(interpreted):
    for name, (kernel, _) in MAPS.items():
        x, w = inputs(name, 20)
        assert_close(jax.jit(jax.vmap(kernel, (0, None)))(x[:, None], w)[:, 0], kernel(x, w), 1e-6)


def arrays_between(attention, dtype):
    """Sizes of float32 arrays of as many numbers as features, in the program of a layer, outside its kernels."""
    shapes = [jax.ShapeDtypeStruct((2, 128, heads, 16), dtype) for heads in (4, 2, 2)]
    return [
        v.aval
        for eqn in jax.make_jaxpr(attention)(*shapes).eqns
        for v in eqn.outvars
        if v.aval.dtype == jnp.float32 and v.aval.shape[:2] == (2, 128) and v.aval.shape[-1] >= 24
    ]


@pytest.mark.parametrize("spec", ["performer(features=24)", "rfa(features=12)"])
def test_layers_of_bfloat16_hold_no_features_in_float32(spec, interpreted):
    assert arrays_between(layer(spec, dtype=jnp.bfloat16, max_len=128), jnp.bfloat16) == []
    assert arrays_between(layer(spec, dtype=jnp.bfloat16, max_len=128, backend="xla"), jnp.bfloat16) != []


@pytest.mark.parametrize("name", ["performer", "rfa"])
def test_wider_heads_than_the_kernels_are_for_have_the_features_of_xla(name, interpreted):
    programs = [str(jax.make_jaxpr(layer(name, H=H))(*[jnp.zeros((2, 32, heads, H)) for heads in (4, 2, 2)])) for H in (MOST, MOST + 1)]
    kernel = {"performer": "positive_kernel", "rfa": "sines_kernel"}[name]
    assert [kernel in program for program in programs] == [True, False] and all("states_kernel" in program for program in programs)


@DTYPES
@pytest.mark.parametrize("R, H", [(128, 64), (256, 128), (21, 40)])
@MAP
def test_lowers_for_cuda(name, R, H, dtype):
    """Forward and backward, one kernel each."""
    w = jax.ShapeDtypeStruct((2, R, H) if name == "sines" else (R, H), jnp.float32)
    loss = lambda x, w: MAPS[name][0](x, w).astype(jnp.float32).sum()
    text = lowered(jax.value_and_grad(loss, (0, 1)), jax.ShapeDtypeStruct((2, 333, 4, H), dtype), w)
    kind = "sines" if name == "sines" else "positive"
    assert [text.count(f'name = "{kind}_{kernel}"') for kernel in ("kernel", "gradient_kernel")] == [1, 1]
