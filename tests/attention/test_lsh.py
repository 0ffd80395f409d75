"""LSH attention: its hash, the union of its rounds, who sees itself, and when rotations are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_zoo import make_attention
from attn_zoo.attention.lsh import bucket_factors, hash_buckets, lsh_attention, sorted_places

B, T, N, H, W = 2, 27, 2, 8, 6


def make(causal=False, max_len=64, **options):
    options = {"bucket_size": W} | options
    spec = f"lsh({', '.join(f'{name}={value}' for name, value in options.items())})"
    return make_attention(spec, num_heads=N, head_dim=H, max_len=max_len, causal=causal)


def inputs(T=T):
    """Shared queries and keys, and values."""
    qk, v = np.random.default_rng(0).normal(size=(2, B, T, N, H)).astype(np.float32)
    return jnp.asarray(qk), jnp.asarray(v)


def holes(T=T):
    valid = np.random.default_rng(1).random((B, T)) > 0.3
    valid[:, 0] = True
    return valid


def attend(attention, qk, v, valid=None, key=None):
    """The layer's fast form; rotations are drawn outside of jit, where they need compiling once."""
    valid = None if valid is None else jnp.asarray(valid)
    buckets, options, causal = attention.buckets(qk, valid, key), attention.options, attention.dims.causal
    return jax.jit(lambda *args: lsh_attention(*args, options, causal))(qk, qk, v, valid, buckets)


def by_rounds(attention, qk, v, valid):
    """Appendix A of the paper, a query at a time in float64: every round softly attends with a penalty log N, or 10^5 for i = j; the rounds are
    weighed by exp(z)."""
    o, causal, across = np.zeros(qk.shape), attention.dims.causal, attention.options.across_buckets
    buckets = np.asarray(attention.buckets(qk, jnp.asarray(valid), None))
    qk, v = np.asarray(qk, np.float64), np.asarray(v, np.float64)
    k = qk / np.linalg.norm(qk, axis=-1, keepdims=True)
    for b, n, i in np.ndindex(B, N, T):
        if not valid[b, i]:
            continue
        met = []
        for bucket in buckets[:, b, n]:
            rank = np.empty(T, int)
            rank[sorted(range(T), key=lambda j: (bucket[j], j))] = np.arange(T)
            chunk = rank // W
            sees = lambda j: chunk[i] - chunk[j] in (0, 1) and (across or bucket[i] == bucket[j]) and valid[b, j] and (j <= i or not causal)
            met.append([j for j in range(T) if sees(j)])
        z, outs = [], []
        for js in met:
            times = [sum(j in others for others in met) for j in js]
            scores = np.array([qk[b, i, n] @ k[b, j, n] - (1e5 if i == j else np.log(count)) for j, count in zip(js, times)])
            z.append(np.logaddexp.reduce(scores))
            outs.append(np.exp(scores - z[-1]) @ v[b, js, n])
        o[b, i, n] = np.exp(np.array(z) - np.logaddexp.reduce(z)) @ np.array(outs)
    return o


@pytest.mark.parametrize("across, causal", [(True, True), (True, False), (False, True)], ids=["across-causal", "across-bidirectional", "within-causal"])
def test_union_of_rounds(across, causal):
    """Also that a query sees itself only if nothing else: the first one of a causal row always does."""
    attention, (qk, v), valid = make(causal, num_hashes=3, across_buckets=across), inputs(), holes()
    o = np.where(valid[..., None, None], attend(attention, qk, v, valid), 0)
    np.testing.assert_allclose(o, by_rounds(attention, qk, v, valid), rtol=0, atol=5e-6)
    if causal:
        np.testing.assert_array_equal(o[:, 0], v[:, 0])


def test_gradients_of_shared_queries_and_keys_within_buckets():
    """What no model with the default options reaches."""
    attention, (qk, v), valid = make(True, across_buckets=False, attend_self=True), inputs(), jnp.asarray(holes())
    loss = lambda run: jax.jit(jax.grad(lambda qk, v: jnp.sin(3 * run(qk, qk, v, valid_BS=valid)).sum(), (0, 1)))(qk, v)
    for fast, slow in zip(loss(attention), loss(attention.reference)):
        np.testing.assert_allclose(fast, slow, rtol=0, atol=1e-5 * float(abs(slow).max()))


def test_rounds_that_all_saw_everything_count_once():
    qk, v = inputs()
    one, four = (attend(make(num_hashes=R, bucket_size=T), qk, v) for R in (1, 4))
    np.testing.assert_allclose(one, four, rtol=0, atol=2e-6)


def test_a_bucket_is_the_largest_coordinate_after_rotation():
    k = np.random.default_rng(0).normal(size=(B, T, N, H)).astype(np.float32)
    rotations = np.random.default_rng(1).normal(size=(3, N, H, 5)).astype(np.float32)
    rotated = np.einsum("btkh,rkhc->rbktc", k, rotations)
    buckets = hash_buckets(jnp.asarray(k), jnp.asarray(rotations), (10,))
    np.testing.assert_array_equal(buckets, np.concatenate([rotated, -rotated], axis=-1).argmax(-1))
    np.testing.assert_array_equal(hash_buckets(jnp.asarray(0.01 * k), jnp.asarray(rotations), (10,)), buckets)
    np.testing.assert_array_equal(hash_buckets(jnp.asarray(-k), jnp.asarray(rotations), (10,)), (buckets + 5) % 10)
    two = np.asarray(hash_buckets(jnp.asarray(k), jnp.asarray(rotations), (4, 6)))
    first, second = (np.concatenate([x, -x], axis=-1).argmax(-1) for x in (rotated[..., :2], rotated[..., 2:]))
    np.testing.assert_array_equal(two, first + 4 * second)


@pytest.mark.parametrize("length", [1, 64, 1000, 8192, 100_000])
def test_buckets_hold_half_a_chunk_on_average(length):
    factors = bucket_factors(length, 64)
    assert all(factor % 2 == 0 for factor in factors) and len(factors) == 1 + (length >= 65 * 64)
    assert np.prod(factors) == pytest.approx(max(2, length / 32), rel=0.2)


def test_near_vectors_meet_and_more_rounds_help():
    """The chance that some round puts both into one bucket: higher at a smaller angle, and growing with rounds as 1 - (1 - p)^R."""
    rng = np.random.default_rng(0)
    x, y = (np.linalg.qr(rng.normal(size=(2000, H, 2)))[0]).transpose(2, 0, 1)  # orthonormal
    share = {}
    for angle in (0.3, 1.0):
        pair = np.stack([x, np.cos(angle) * x + np.sin(angle) * y], axis=1).astype(np.float32)[:, :, None]
        same = np.ptp(hash_buckets(jnp.asarray(pair), jnp.asarray(rng.normal(size=(8, 1, H, 8)), jnp.float32), (16,)), axis=-1)[..., 0] == 0
        share[angle] = [same[:R].any(axis=0).mean() for R in (1, 2, 4, 8)]
        np.testing.assert_allclose(share[angle], [1 - (1 - same.mean()) ** R for R in (1, 2, 4, 8)], atol=0.05)
    assert all(near > far + 0.05 for near, far in zip(share[0.3], share[1.0])), share


def test_rotations_are_drawn_anew_for_every_key_and_kept_without_one():
    qk, _ = inputs()
    buckets = lambda key=None, seed=0: np.asarray(make(seed=seed).buckets(qk, None, None if key is None else jax.random.key(key)))
    for kwargs in ({}, {"key": 1}, {"seed": 1}):
        np.testing.assert_array_equal(buckets(**kwargs), buckets(**kwargs))
    assert (buckets(key=1) != buckets(key=2)).any() and (buckets(seed=1) != buckets()).any()
    rounds = buckets(key=1)
    assert all((rounds[r] != rounds[0]).any() for r in range(1, len(rounds)))


@pytest.mark.parametrize("most", [6, 2**28])
def test_places_are_those_of_a_stable_sort(most):
    """By one sort of whole numbers, and where they would not fit, by argsort."""
    bucket = np.random.default_rng(0).integers(0, 7, (2, 3, 50)).astype(np.int32) * (most // 6)
    order, rank = jax.jit(sorted_places, static_argnums=1)(jnp.asarray(bucket), most)
    expected = np.argsort(bucket, axis=-1, kind="stable")
    np.testing.assert_array_equal(order, expected)
    np.testing.assert_array_equal(rank, np.argsort(expected, axis=-1))
