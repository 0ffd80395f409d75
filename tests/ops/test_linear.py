"""Linearized attention in chunks, against the sum over all pairs in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_zoo.attention import make_attention
from attn_zoo.attention.linear import FEATURE_MAPS
from attn_zoo.ops import linear
from attn_zoo.ops.linear import linear_attention


def features(T, S, N=2, K=2, R=6, H=5, dtype=jnp.float32):
    """Features of queries and keys, and values."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(x, dtype) for x in (rng.gamma(1, size=(2, T, N, R)), rng.gamma(1, size=(2, S, K, R)), rng.normal(size=(2, S, K, H)))]


def quadratic(q, k, v, causal):
    """Every pair's weight phi(q_i)' phi(k_j), normalized over the pairs seen."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    weights = jnp.einsum("BTNR,BSNR->BNTS", q, k)
    weights = jnp.where(np.tri(*weights.shape[2:], dtype=bool), weights, 0) if causal else weights
    return jnp.einsum("BNTS,BSNH->BTNH", weights / weights.sum(axis=-1, keepdims=True), v)


@functools.partial(jax.jit, static_argnums=0)
def results(f, args):
    """(output, gradients) of a loss that weighs every output differently."""
    weights = np.random.default_rng(5).normal(size=(*args[0].shape[:3], args[2].shape[-1]))

    def loss(q, k, v):
        o = f(q, k, v)
        return (o * weights.astype(o.dtype)).sum(), o

    (_, o), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*args)
    return o, gradients


def exact(args, causal, gradients=True):
    """The quadratic form's results, or its output alone, in float64."""
    form = functools.partial(quadratic, causal=causal)
    with jax.enable_x64(True):
        args = [jnp.asarray(np.asarray(x, np.float32), jnp.float64) for x in args]
        return jax.tree.map(np.asarray, results(form, args) if gradients else form(*args))


def assert_close(actual, expected, tolerance):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), e, rtol=0, atol=tolerance * max(1.0, abs(e).max()))


SHAPES = {  # T, S, N, K; a chunk is 16 positions here
    "T1": (1, 1, 2, 2),
    "T32-whole-chunks": (32, 32, 2, 1),
    "T67-S30-fewer-keys": (67, 30, 4, 2),
    "T30-S67-more-keys": (30, 67, 2, 2),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_causal_scan_is_the_sum_over_pairs(shape, monkeypatch):
    monkeypatch.setattr(linear, "CHUNK", 16)
    args = features(*SHAPES[shape])
    actual, expected = results(lambda q, k, v: linear_attention(q, k, v, causal=True), args), exact(args, True)
    assert actual[0].dtype == jnp.float32
    assert_close(actual, expected, 3e-6)


def test_bidirectional_is_the_sum_over_pairs():
    args = features(67, 30, 4, 2)
    assert_close(results(lambda q, k, v: linear_attention(q, k, v, causal=False), args), exact(args, False), 3e-6)


def test_the_chunk_changes_nothing(monkeypatch):
    args = features(300, 300)
    expected = linear_attention(*args, causal=True)  # at the chunk that runs, which 300 is not a multiple of
    assert 300 % linear.CHUNK and linear.CHUNK < 300
    monkeypatch.setattr(linear, "CHUNK", 7)
    assert_close(linear_attention(*args, causal=True), np.asarray(expected), 1e-6)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_a_row_without_weight_gives_zeros_and_finite_gradients(causal):
    q, k, v = features(20, 20)
    q, k = q.at[0, 7].set(0), k.at[:, :3].set(0)  # a query without features; the first keys without any
    o, gradients = results(lambda q, k, v: linear_attention(q, k, v, causal=causal), (q, k, v))
    assert (o[0, 7] == 0).all() and (o[1, 7] != 0).any()
    assert not causal or (o[:, :3] == 0).all()
    assert all(np.isfinite(x).all() for x in (o, *gradients))
    assert (gradients[2][:, :3] == 0).all()


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_half_precision_features_are_summed_in_float32(causal):
    """Nothing is rounded after the features themselves."""
    args = features(512, 512, dtype=jnp.bfloat16)
    o = linear_attention(*args, causal=causal)
    assert o.dtype == jnp.float32
    assert_close(o, exact(args, causal, gradients=False), 1e-5)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_features_that_can_vanish_follow_the_reference(causal):
    """With relu, whole rows have no weight at all; there too the gradients of the fast and the slow form agree."""
    attention = make_attention("linear(feature_map='relu')", num_heads=2, head_dim=3, max_len=20, causal=causal)
    args = list(jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 20, 2, 3)), jnp.float32))
    (o, gradients), expected = results(attention, args), results(attention.reference, args)
    assert (o == 0).all(axis=-1).any() and (o != 0).any()
    assert_close((o, gradients), jax.tree.map(np.asarray, expected), 1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_elu_features_keep_their_relative_precision(dtype):
    """phi(x) = elu(x) + 1 is exp(x) below zero. Weights are ratios of such features: a far negative one may be small, never zero."""
    x = jnp.linspace(-30, 5, 141).astype(dtype)
    expected = np.where(x > 0, np.asarray(x, np.float64) + 1, np.exp(np.minimum(np.asarray(x, np.float64), 0)))
    np.testing.assert_allclose(np.asarray(FEATURE_MAPS["elu"](x), np.float64), expected, rtol=4 * float(jnp.finfo(dtype).eps))
    slope = jax.vmap(jax.grad(FEATURE_MAPS["elu"]))(x)
    np.testing.assert_allclose(np.asarray(slope, np.float64), np.minimum(expected, 1), rtol=4 * float(jnp.finfo(dtype).eps))
