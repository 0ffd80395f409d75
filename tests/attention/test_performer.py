"""FAVOR+: its directions, its kernel estimate and how fast the error falls, and when features are drawn anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_zoo import UserError, make_attention
from attn_zoo.attention.performer import draw, exponents

T, N, H = 24, 2, 8


def make(features=64, redraw=False, causal=False, seed=0, head_dim=H):
    spec = f"performer(features={features}, redraw={redraw})"
    return make_attention(spec, num_heads=N, head_dim=head_dim, max_len=T, causal=causal, rngs=nnx.Rngs(seed))


def inputs(seed=0):
    return list(jnp.asarray(np.random.default_rng(seed).normal(size=(3, 2, T, N, H)), jnp.float32))


def test_directions_are_orthogonal_in_blocks_and_as_long_as_gaussian_vectors():
    w = np.asarray(draw(jax.random.key(0), 20, H))
    for block in (w[:8], w[8:16], w[16:]):
        gram = block @ block.T
        np.testing.assert_allclose(gram - np.diag(np.diag(gram)), 0, atol=1e-4)
    many = np.asarray(draw(jax.random.key(1), 8000, H))
    assert np.square(many).sum(axis=1).mean() == pytest.approx(H, rel=0.05)
    assert np.square(many).sum(axis=1).var() == pytest.approx(2 * H, rel=0.1)  # chi squared


def test_directions_point_everywhere_alike():
    """Plain QR would hand back directions of one half space: their mean must vanish, coordinate by coordinate and row by row of a block."""
    blocks = np.asarray(draw(jax.random.key(2), 1000 * H, H)).reshape(1000, H, H)
    np.testing.assert_allclose(blocks.mean(axis=0), 0, atol=5 / np.sqrt(1000))


def unit(key):
    """Ten queries and ten keys of length one: the variance of the estimate grows as exp(|q + k|^2)."""
    x = jax.random.normal(key, (2, 10, H))
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def kernel(q, k, w):
    """The estimate of exp(q'k / sqrt(H)) for all pairs, float64."""
    phi_q, phi_k = (np.exp(np.asarray(exponents(x[None, :, None], w), np.float64))[0, :, 0] for x in (q, k))
    return phi_q @ phi_k.T / len(w)


def test_the_kernel_estimate_is_unbiased():
    q, k = unit(jax.random.key(3))
    np.testing.assert_allclose(kernel(q, k, draw(jax.random.key(4), 100_000, H)), np.exp(q @ k.T / np.sqrt(H)), rtol=0.02)


def test_the_error_falls_as_one_over_the_root_of_the_features():
    q, k = unit(jax.random.key(5))
    exact = np.exp(q @ k.T / np.sqrt(H))
    counts = (16, 128, 1024)
    errors = [np.sqrt(np.mean([np.square(kernel(q, k, draw(key, R, H)) / exact - 1) for key in jax.random.split(jax.random.key(6), 20)])) for R in counts]
    assert np.polyfit(np.log(counts), np.log(errors), 1)[0] == pytest.approx(-0.5, abs=0.1)


def test_orthogonal_directions_err_less_than_independent_ones():
    q, k = unit(jax.random.key(7))
    exact, keys = np.exp(q @ k.T / np.sqrt(H)), jax.random.split(jax.random.key(8), 200)
    error = lambda draw: np.mean([np.square(kernel(q, k, draw(key)) / exact - 1) for key in keys])
    assert error(lambda key: draw(key, H, H)) < error(lambda key: jax.random.normal(key, (H, H)))


@pytest.mark.parametrize("redraw", [False, True])
def test_new_features_are_drawn_in_training_only_and_kept(redraw):
    attention, (q, k, v) = make(redraw=redraw), inputs()
    first, o = attention.directions[...], attention(q, k, v)
    np.testing.assert_array_equal(attention(q, k, v), o)
    trained = attention(q, k, v, key=jax.random.key(1))
    assert ((attention.directions[...] != first).any(), (trained != o).any()) == (redraw, redraw)
    np.testing.assert_allclose(attention(q, k, v), trained, atol=1e-6)  # evaluation uses the last
    other = attention(q, k, v, key=jax.random.key(2))
    assert (other != trained).any() == redraw
    np.testing.assert_allclose(attention.reference(q, k, v, key=jax.random.key(2)), other, atol=1e-5)


def test_directions_are_no_parameters():
    attention = make()
    assert not jax.tree.leaves(nnx.state(attention, nnx.Param)) and len(jax.tree.leaves(nnx.state(attention))) == 1
    assert (make(seed=1).directions[...] != attention.directions[...]).any()


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_long_keys_lose_their_weight_but_never_overflow(causal):
    """Half the keys so long that their features vanish: the outputs are those of the others alone; a row that sees no others is zero."""
    q, k, v = inputs()
    long = jnp.arange(T) % 2 == 0
    attention = make(causal=causal)
    o = attention(q, jnp.where(long[:, None, None], 100 * k, k), v)
    expected = attention(q, k, v, valid_BS=jnp.broadcast_to(~long, (2, T)))
    np.testing.assert_allclose(o, expected, atol=1e-5)
    assert (o[:, 0] == 0).all() == causal
    wide = make_attention("performer(features=256)", num_heads=1, head_dim=256, max_len=256, causal=causal)
    k = wide.directions[...][None, :, None] * 256**0.25  # each the longest key that a direction can answer to: exp(|w|^2 / 2) would be 1e55
    assert np.isfinite(np.asarray(wide(k, k, k))).all()


def test_it_needs_a_feature():
    with pytest.raises(UserError, match="features=0"):
        make(features=0)
