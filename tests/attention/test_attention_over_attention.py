"""Attention over attention: the paper's sums in NumPy, and the laws they imply."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_zoo import Unsupported, make_attention

N, K, H = 4, 2, 8


def make(**kwargs):
    return make_attention("attention_over_attention", num_heads=N, num_kv_heads=K, head_dim=H, max_len=32, **kwargs)


def inputs(T, S):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, T, N, H), (2, S, K, H), (2, S, K, H))]


def softmax(x, axis):
    weights = np.exp(x - x.max(axis=axis, keepdims=True))
    return weights / weights.sum(axis=axis, keepdims=True)


def test_formula():
    """Over words that are there, as a reader of unpadded texts has them: M, alpha, beta, their product, and the values."""
    attention, (q, k, v) = make(), inputs(7, 11)
    rng = np.random.default_rng(1)
    valid_T, valid_S = rng.random((2, 7)) > 0.3, rng.random((2, 11)) > 0.3
    o = jax.jit(attention)(q, k, v, valid_BS=jnp.asarray(valid_S), valid_BT=jnp.asarray(valid_T))
    for b, n in np.ndindex(2, N):
        M_TS = np.asarray(q[b, valid_T[b], n], np.float64) @ np.asarray(k[b, valid_S[b], n // 2], np.float64).T / np.sqrt(H)
        beta_T = softmax(M_TS, axis=0).mean(axis=1)
        attended_S = beta_T @ softmax(M_TS, axis=1)
        assert beta_T.sum() == pytest.approx(1) and attended_S.sum() == pytest.approx(1)
        expected = attended_S @ np.asarray(v[b, valid_S[b], n // 2], np.float64)
        np.testing.assert_allclose(o[b, :, n], np.broadcast_to(expected, (7, H)), atol=2e-6)


def test_the_order_of_queries_and_of_keys_is_of_no_account():
    attention, (q, k, v) = jax.jit(make()), inputs(7, 11)
    o = attention(q, k, v)
    np.testing.assert_allclose(o, attention(q[:, ::-1], k[:, ::-1], v[:, ::-1]), atol=1e-6)
    assert (abs(o - attention(q[:, ::-1], k[:, ::-1], v)) > 1e-3).any()


def test_a_query_word_that_the_document_answers_decides():
    """A query far stronger than the rest on every key gets all of the weight: the result is its own attention."""
    attention, (q, k, v) = make(), inputs(7, 11)
    k = jnp.abs(k) + 1
    q = (0.01 * q).at[:, 3].set(5.0)
    full = make_attention("full", num_heads=N, num_kv_heads=K, head_dim=H, max_len=32)
    np.testing.assert_allclose(jax.jit(attention)(q, k, v)[:, 0], jax.jit(full)(q, k, v)[:, 3], atol=1e-5)


def test_causal_is_unsupported_with_the_reason():
    with pytest.raises(Unsupported, match="attention_over_attention cannot be causal: its one attended vector mixes all queries"):
        make(causal=True)
