"""The layers around the attention, against their papers' formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_zoo.models.layers import NORMS, Embedding, FeedForward, default_ffn_dim, dropout, normal, rotate, sinusoids


def test_sinusoids_at_points_of_the_formula():
    small = sinusoids(4, 4)
    np.testing.assert_allclose(small[0], [0, 1, 0, 1], atol=1e-7)
    np.testing.assert_allclose(small[3], [math.sin(3), math.cos(3), math.sin(0.03), math.cos(0.03)], rtol=1e-5)
    large = sinusoids(11, 512)
    assert large[10, 128] == pytest.approx(math.sin(10 * 0.1), rel=1e-5)  # 10000^(-128/512) = 0.1
    assert large[10, 257] == pytest.approx(math.cos(10 * 0.01), rel=1e-5)  # 10000^(-256/512) = 0.01


def test_sinusoids_of_an_odd_dim_end_in_a_sine():
    table = sinusoids(6, 5)
    assert table.shape == (6, 5)
    assert table[2, 4] == pytest.approx(math.sin(2 * 10000 ** (-4 / 5)), rel=1e-5)


@pytest.mark.parametrize("start", [0, 100])
def test_rotation_is_the_papers_complex_product(start):
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 6))
    turned = rotate(jnp.asarray(x, jnp.float32), start)
    turns = np.exp(1j * np.arange(start, start + 5)[:, None, None] * 10000.0 ** (-np.arange(3) / 3))
    expected = (x[..., :3] + 1j * x[..., 3:]) * turns
    np.testing.assert_allclose(turned, np.concatenate([expected.real, expected.imag], -1), atol=1e-5)


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = (jnp.broadcast_to(jax.random.normal(key, (1, 1, 2, 16)), (1, 20, 2, 16)) for key in jax.random.split(jax.random.key(0)))
    q_TH, k_SH = (np.asarray(rotate(x))[0, :, 0] for x in (q, k))
    scores = q_TH @ k_SH.T
    for distance in range(-19, 20):
        along = np.diagonal(scores, distance)
        np.testing.assert_allclose(along, along[0], atol=1e-5)
    assert np.ptp(scores) > 1  # and they do depend on it


def test_rotation_keeps_dtype_and_is_computed_in_float32():
    x = jax.random.normal(jax.random.key(0), (1, 300, 1, 8), jnp.bfloat16)
    turned = rotate(x)
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_array_equal(turned, rotate(x.astype(jnp.float32)).astype(jnp.bfloat16))


@pytest.mark.parametrize("kind", NORMS)
def test_norms_match_their_formula(kind):
    x = np.random.default_rng(0).normal(3, 2, size=(4, 5, 8))
    norm = NORMS[kind](8)
    norm.scale[...] = jnp.linspace(0.5, 2, 8)
    if kind == "layernorm":
        norm.bias[...] = jnp.linspace(-1, 1, 8)
        expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * np.linspace(0.5, 2, 8) + np.linspace(-1, 1, 8)
    else:
        expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.linspace(0.5, 2, 8)
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, atol=1e-5)


@pytest.mark.parametrize("kind", NORMS)
def test_norms_compute_bfloat16_in_float32(kind):
    x = (100 + jax.random.normal(jax.random.key(0), (50, 16))).astype(jnp.bfloat16)
    y = NORMS[kind](16)(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, NORMS[kind](16)(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_dropout_keeps_the_stated_share_and_the_expectation():
    n, rate = 100_000, 0.3
    dropped = np.asarray(dropout(jnp.ones(n), rate, jax.random.key(0)))
    kept = np.count_nonzero(dropped) / n
    assert abs(kept - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / n)
    np.testing.assert_allclose(dropped[dropped != 0], 1 / (1 - rate), rtol=1e-6)


def test_dropout_is_a_function_of_its_key():
    x = jnp.arange(1.0, 101.0)
    one, same, other = (dropout(x, 0.5, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    np.testing.assert_array_equal(dropout(x, 0.5, None), x)
    np.testing.assert_array_equal(dropout(x, 0.0, jax.random.key(0)), x)
    assert dropout(x.astype(jnp.bfloat16), 0.5, jax.random.key(0)).dtype == jnp.bfloat16


@pytest.mark.parametrize("D, kind, F", [(64, "relu", 256), (64, "gelu", 256), (64, "swiglu", 176), (96, "swiglu", 256), (1, "swiglu", 8)])
def test_default_ffn_dims(D, kind, F):
    assert default_ffn_dim(D, kind) == F


def test_feed_forward_kinds_match_their_formula():
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    for kind in ("relu", "gelu", "swiglu"):
        ffn = FeedForward(8, 16, kind, jnp.float32, 1.0, nnx.Rngs(0))
        up, down = x @ np.asarray(ffn.up[...]), np.asarray(ffn.down[...])
        if kind == "relu":
            hidden = np.maximum(up, 0)
        elif kind == "gelu":  # x Phi(x), which the tanh form meets to 1e-3
            hidden = up * 0.5 * (1 + np.vectorize(math.erf)(up / math.sqrt(2)))
        else:
            gate = x @ np.asarray(ffn.gate[...])
            hidden = gate / (1 + np.exp(-gate)) * up
        np.testing.assert_allclose(ffn(jnp.asarray(x)), hidden @ down, atol=2e-3 if kind == "gelu" else 1e-5)


def test_what_each_position_encoding_adds_at_the_input():
    inputs = jnp.array([[3, 1, 3]])
    made = {kind: Embedding(5, 8, kind, 6, jnp.float32, nnx.Rngs(0)) for kind in ("learned", "sinusoidal", "sinusoidal_concat", "rotary", "none")}
    x = {kind: np.asarray(embedding(inputs)) for kind, embedding in made.items()}
    tokens = np.asarray(made["none"].tokens[...])[inputs] * math.sqrt(8)
    np.testing.assert_allclose(x["none"], tokens, rtol=1e-6)
    np.testing.assert_array_equal(x["rotary"], x["none"])
    np.testing.assert_allclose(x["learned"] - tokens, np.asarray(made["learned"].positions[...])[None, :3] * math.sqrt(8), atol=1e-6)
    np.testing.assert_allclose(x["sinusoidal"] - tokens, np.asarray(sinusoids(3, 8))[None], atol=1e-6)
    mix = np.asarray(made["sinusoidal_concat"].mix[...])
    np.testing.assert_allclose(x["sinusoidal_concat"], tokens @ mix[:8] + np.asarray(sinusoids(3, 8)) @ mix[8:], atol=1e-5)


def test_parameters_are_drawn_with_the_stated_deviation():
    drawn = np.asarray(normal(jax.random.key(0), (200, 10, 20), 0.3)[...])
    assert drawn.dtype == np.float32
    assert abs(drawn.std() / 0.3 - 1) < 5 / math.sqrt(2 * drawn.size)
    assert abs(drawn.mean()) < 5 * 0.3 / math.sqrt(drawn.size)
