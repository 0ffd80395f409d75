"""Sparse Sinkhorn attention: what the normalization converges to, causally and not, and which keys a query sees once R is a permutation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_zoo import make_attention
from attn_zoo.attention.sinkhorn import Options, block_of, soft_permutation, summaries

C, W, H = 4, 3, 8
T = C * W


def make(causal=False, max_len=T, N=1, **options):
    spec = f"sinkhorn({', '.join(f'{k}={v!r}' for k, v in ({'block': W} | options).items())})"
    return make_attention(spec, num_heads=N, head_dim=H, max_len=max_len, causal=causal)


def inputs(N=1, T=T, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(1, T, N, H)), jnp.float32) for _ in range(3)]


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def test_rows_and_columns_sum_to_one_in_the_limit():
    logits = jax.random.normal(jax.random.key(0), (2, 6, 6)) * 2
    R = soft_permutation(logits, jnp.ones((6, 6), bool), 200, False)
    np.testing.assert_allclose(R.sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(R.sum(axis=-2), 1, atol=1e-5)
    # Scaling of rows and columns alone: the cross ratios of exp(logits) are kept.
    log_R = np.log(np.asarray(R, np.float64)) - np.asarray(logits, np.float64)
    np.testing.assert_allclose(log_R - log_R[:, :1] - log_R[:, :, :1] + log_R[:, :1, :1], 0, atol=1e-4)


def test_blocks_left_out_have_no_weight_and_the_rest_is_normalized_alone():
    logits = jax.random.normal(jax.random.key(0), (5, 5))
    alive = jnp.asarray([True, False, True, True, False])
    R = soft_permutation(logits, alive[:, None] & alive, 30, False)
    few = np.ix_(*[np.flatnonzero(alive)] * 2)
    np.testing.assert_allclose(R[few], soft_permutation(logits[few], jnp.ones((3, 3), bool), 30, False), rtol=1e-5)
    np.testing.assert_allclose(R.sum(), R[few].sum())


def test_causal_rows_are_means_over_earlier_blocks():
    logits = jax.random.normal(jax.random.key(0), (6, 6)) * 3
    R = np.asarray(soft_permutation(logits, jnp.tril(jnp.ones((6, 6), bool), -1), 7, True))
    for block in range(6):
        np.testing.assert_allclose(R[block], [*softmax(np.asarray(logits[block, :block])), *[0] * (6 - block)] if block else 0, rtol=1e-5)


PERMUTATION = [2, 0, 3, 1]


def sorted_to(attention, order):
    """The layer, and keys, for which R is the permutation matrix of `order`: the mean of block I is the I-th unit vector."""
    attention.weight[...] = 100.0 * jnp.zeros((1, H, C)).at[0, np.arange(C), np.array(order)].set(1)
    rng = np.random.default_rng(3)
    k = rng.normal(size=(C, W, H))
    k = k - k.mean(axis=1, keepdims=True) + np.eye(C, H)[:, None]
    return jnp.asarray(k.reshape(1, T, 1, H), jnp.float32)


def test_a_query_sees_its_own_block_and_the_one_sorted_to_it():
    attention, (q, _, v) = make(), inputs()
    k = sorted_to(attention, PERMUTATION)
    o = np.asarray(jax.jit(attention)(q, k, v))[0, :, 0]
    for t in range(T):
        seen = [J * W + w for J in (t // W, PERMUTATION[t // W]) for w in range(W)]
        expected = softmax(np.asarray(q[0, t, 0] @ k[0, seen, 0].T) / np.sqrt(H)) @ np.asarray(v[0, seen, 0])
        np.testing.assert_allclose(o[t], expected, atol=1e-5)


def test_causal_takes_from_earlier_blocks_alone():
    """Logits from the bias alone: block 1 is preferred by all that come after it, block 0 by block 1, and block 0 has none to take."""
    attention, (q, k, v) = make(causal=True), inputs()
    attention.weight[...] = jnp.zeros_like(attention.weight[...])
    attention.bias[...] = jnp.asarray([[0.0, 60.0, 0.0, 120.0]])
    o = np.asarray(jax.jit(attention)(q, k, v))[0, :, 0]
    for t in range(T):
        seen = [*range(t // W * W, t + 1), *({1: range(W), 2: range(W, 2 * W), 3: range(W, 2 * W)}.get(t // W, ()))]
        expected = softmax(np.asarray(q[0, t, 0] @ k[0, seen, 0].T) / np.sqrt(H)) @ np.asarray(v[0, seen, 0])
        np.testing.assert_allclose(o[t], expected, atol=1e-5)


def test_a_causal_block_is_summarized_up_to_its_first_position():
    k = np.random.default_rng(0).normal(size=(1, C, W, 1, H))
    valid = np.random.default_rng(1).random((1, C, W)) > 0.3
    k[~valid] = 0
    actual = summaries(jnp.asarray(k), jnp.asarray(valid), True)[0, :, 0]
    keys, valid = k.reshape(T, H), valid.reshape(T)
    for block in range(C):
        seen = np.flatnonzero(valid[: block * W + 1])
        np.testing.assert_allclose(actual[block], keys[seen].mean(axis=0) if len(seen) else 0, atol=1e-6)


def test_a_slot_is_the_mean_of_its_valid_sources():
    """With equal logits a sorted block is the mean of all blocks: over valid positions alone, from blocks that have any; length 11 leaves a slot out too."""
    length = T - 1
    attention, (q, k, v) = make(), inputs(T=length)
    attention.weight[...] = jnp.zeros_like(attention.weight[...])
    valid = np.ones(T, bool)
    valid[[1, 3, 4, 5, T - 1]] = False  # block 1 has no valid key
    valid[[2, 8]] = False  # and no block a valid third slot: 2, 5, 8 and the missing 11
    k, v = (x.at[:, ~valid[:length]].set(99.0) for x in (k, v))
    o = np.asarray(jax.jit(attention)(q, k, v, valid_BS=jnp.asarray(valid[None, :length])))[0, :, 0]
    k, v = (np.concatenate([np.asarray(x[0, :, 0]), np.zeros((1, H))]) for x in (k, v))
    slots = [(0, [0, 6, 9]), (1, [7, 10])]  # slot: its valid sources
    for t in np.flatnonzero(valid[:length]):
        own = [s for s in range(t // W * W, t // W * W + W) if valid[s]]
        keys, values = (np.stack([*x[own], *(x[sources].mean(axis=0) for _, sources in slots)]) for x in (k, v))
        np.testing.assert_allclose(o[t], softmax(np.asarray(q[0, t, 0]) @ keys.T / np.sqrt(H)) @ values, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_noise_where_a_key_is_given(causal):
    attention, (q, k, v) = make(causal), inputs()
    run = jax.jit(lambda k, key: attention(q, k, v, key=key))
    a, again, b = (np.asarray(run(k, jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, again)
    assert (a != b).any()
    np.testing.assert_allclose(a, jax.jit(lambda key: attention.reference(q, k, v, key=key))(jax.random.key(0)), atol=1e-5)
    if causal:
        np.testing.assert_array_equal(a[:, :7], run(k.at[:, 7:].add(5.0), jax.random.key(0))[:, :7])


def test_logits_of_white_keys_start_with_variance_one():
    attention = make_attention("sinkhorn(temperature=1)", num_heads=2, head_dim=64, max_len=4096)
    W = attention.block
    means = jax.random.normal(jax.random.key(0), (4, 4096 // W, 2, 64)) * W**-0.5
    assert float(attention.logits(means, None).std()) == pytest.approx(1, rel=0.05)


def test_the_default_block_is_near_the_square_root():
    assert [block_of(Options(), L) for L in (10, 256, 1024, 4096, 16384)] == [16, 16, 32, 64, 128]
