"""Luna: both forms against the paper's equations in NumPy, and what packing implies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_zoo import make_attention

N, K, H, R = 4, 2, 8, 3


def make(causal, memory=R):
    return make_attention(f"luna(memory={memory})", num_heads=N, num_kv_heads=K, head_dim=H, max_len=300, causal=causal, rngs=nnx.Rngs(0))


def inputs(T, S):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, T, N, H), (2, S, K, H), (2, S, K, H))]


def softmax(x):
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_equations(causal):
    """One head and, where causal, one step after the other with the running sums of the authors' code."""
    attention, (q, k, v) = make(causal), inputs(11, 9)
    valid = np.random.default_rng(1).random((2, 9)) > 0.3
    o = jax.jit(attention)(q, k, v, valid_BS=jnp.asarray(valid))
    q, k, v, p = (np.asarray(x, np.float64) for x in (q, k, v, attention.packing[...]))
    for b, n in np.ndindex(2, N):
        h = n // 2
        if not causal:
            pack = softmax(p[h] @ k[b, valid[b], h].T / np.sqrt(H))
            keys, values = pack @ k[b, valid[b], h], pack @ v[b, valid[b], h]
            np.testing.assert_allclose(o[b, :, n], softmax(q[b, :, n] @ keys.T / np.sqrt(H)) @ values, atol=2e-6)
            continue
        keys, values, count = np.zeros((R, H)), np.zeros((R, H)), 0
        for t in range(11):
            if t < 9 and valid[b, t]:
                score = p[h] @ k[b, t, h] / np.sqrt(H)
                pack = np.where(score > 0, score + 1, np.exp(score))
                keys, values, count = keys + np.outer(pack, k[b, t, h]), values + np.outer(pack, v[b, t, h]), count + 1
            mean = max(count, 1)
            np.testing.assert_allclose(o[b, t, n], softmax(keys / mean @ q[b, t, n] / np.sqrt(H)) @ values / mean, atol=3e-6)


def test_one_slot_gives_every_query_the_same():
    q, k, v = inputs(6, 9)
    o = jax.jit(make(False, memory=1))(q, k, v)
    np.testing.assert_allclose(o[:, :, ::2], jnp.broadcast_to(o[:, :1, ::2], o[:, :, ::2].shape), atol=1e-6)
    assert (abs(o[:, :, 0] - o[:, :, 2]) > 1e-3).any()  # but every key head packs for itself


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_keys_of_zero_give_the_mean_of_the_visible_values(causal):
    q, k, v = inputs(10, 10)
    o = jax.jit(make(causal))(q, jnp.zeros_like(k), v)
    mean = np.cumsum(v, axis=1) / np.arange(1, 11)[:, None, None] if causal else np.broadcast_to(v.mean(axis=1, keepdims=True), v.shape)
    np.testing.assert_allclose(o, np.repeat(mean, 2, axis=2), atol=1e-6)


def test_the_causal_state_crosses_chunks():
    """Over several chunks of the scan: the last output is that of the whole past."""
    run, (q, k, v) = jax.jit(make(True)), inputs(290, 290)
    backwards = run(q[:, ::-1], k[:, ::-1], v[:, ::-1])[:, -1]  # its past is the same set in another order
    np.testing.assert_allclose(backwards, run(q.at[:, -1].set(q[:, 0]), k, v)[:, -1], atol=1e-5)
    assert (abs(backwards - run(q, k, v)[:, -1]) > 1e-4).any()


def test_flops_are_linear_in_both_lengths():
    attention = make(False)
    assert attention.flops(2, 10, 30) == 2 * 2 * N * H * R * (3 * 30 + 2 * 10)
