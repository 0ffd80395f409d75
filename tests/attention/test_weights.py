"""Weights are found for any variant: they are those of the softmax where there is one, and make the output of the values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_zoo import make_attention
from attn_zoo.attention import find
from attn_zoo.attention.weights import attention_weights

B, T, N, K, H = 2, 13, 4, 2, 8
# One of each way to find the weights, and where values are added; then those whose channels are mixed, normed, or scored again.
SPECS = ["full", "strided", "random(k=3)", "star", "topk(k=3)", "lsh(bucket_size=4)", "linear", "delta", "hard", "linformer(rank=4)", "persistent"]
NOT_LINEAR = ["retention", "set", "memory_compressed"]



def make(spec, K=N, causal=True):
    """(the attention, q, k, v, which keys are valid); keys are queries where a variant shares them."""
    attention = make_attention(spec, num_heads=N, num_kv_heads=K, head_dim=H, max_len=T, causal=causal)
    q, k, v = (jax.random.normal(key, (B, T, heads, H)) for key, heads in zip(jax.random.split(jax.random.key(0), 3), (N, K, K)))
    return attention, q, q if attention.shares_query_key else k, v, jnp.arange(T) < jnp.array([[T], [T - 4]])


def weigh(attention, q, k, v, **given):
    return np.asarray(jax.jit(lambda q, k, v: attention_weights(attention, q, k, v, **given))(q, k, v))


def softmax_by_hand(q, k, valid_BS, causal) -> np.ndarray:
    """[B, N, T, S], a row at a time."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    weights = np.zeros((B, N, q.shape[1], k.shape[1]))
    for b, n, t in np.ndindex(weights.shape[:3]):
        seen = [s for s in range(k.shape[1]) if valid_BS[b, s] and (s <= t or not causal)]
        scores = np.array([q[b, t, n] @ k[b, s, n // (N // k.shape[2])] for s in seen]) / np.sqrt(H)
        weights[b, n, t, seen] = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    return weights


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_weights_of_full_attention_are_its_softmax(causal):
    """With padding, and heads that share keys."""
    attention, q, k, v, valid_BS = make("full", K, causal)
    weights = weigh(attention, q, k, v, valid_BS=valid_BS)
    np.testing.assert_allclose(weights, softmax_by_hand(q, k, valid_BS, causal), atol=1e-6)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)


def test_across_sequences_and_of_the_first_rows_alone():
    attention, q, k, v, valid_BS = make("full", K, causal=False)
    weights = weigh(attention, q[:, :5], k, v, valid_BS=valid_BS, rows=3)
    np.testing.assert_allclose(weights, softmax_by_hand(q[:, :3], k, valid_BS, False), atol=1e-6)


def test_nothing_outside_a_window_weighs_anything():
    attention, q, k, v, _ = make("local(window=2)")
    weights, (t, s) = weigh(attention, q, k, v), np.indices((T, T))
    inside = (s <= t) & (t - s <= 2)
    assert (weights[..., ~inside] == 0).all() and (weights[..., inside] > 0).all()


@pytest.mark.parametrize("spec", SPECS + NOT_LINEAR)
def test_weights_make_the_output_of_the_values(spec):
    """Of what is linear in its values, each channel by itself; up to what it adds of its own."""
    causal = find(spec)[0].causal is True
    attention, q, k, v, _ = make(spec, causal=causal)

    @jax.jit
    def run(q, k, v):
        return attention(q, k, v), attention(q, k, jnp.zeros_like(v)), attention_weights(attention, q, k, v)

    o, own, weights = map(np.asarray, run(q, k, v))
    assert np.isfinite(weights).all() and np.abs(weights).max() > 0
    made = np.einsum("BNTS,BSNH->BTNH", weights, v)
    if spec in NOT_LINEAR:
        assert not np.allclose(made + own, o, atol=1e-2)
        return
    np.testing.assert_allclose(made + own, o, atol=2e-5)
    assert (spec == "persistent") == bool(np.abs(own).max() > 0)
    if causal:
        assert (weights[..., ~np.tri(T, dtype=bool)] == 0).all()
