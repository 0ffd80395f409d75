"""Informer's ProbSparse attention: M by its definition, which queries it makes active, and what the others get."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_zoo import make_attention
from attn_zoo.attention.informer import count, mean_values, rows_attention, sparsity

T, N, H = 40, 2, 4


def make(factor=2, causal=False):
    return make_attention(f"informer(factor={factor})", num_heads=N, head_dim=H, max_len=T, causal=causal)


def inputs(B=1, S=T):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, T, N, H), (B, S, N, H), (B, S, N, H))]


def full(q, k, v, causal):
    scores = np.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(H)
    scores = np.where(np.tri(T, dtype=bool) | (not causal), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("BNTS,BSNH->BTNH", weights / weights.sum(axis=-1, keepdims=True), v)


def test_counts_grow_with_the_logarithm():
    assert [count(5, length) for length in (1, 2, 20, 1024, 8192)] == [1, 2, 15, 35, 50]


@pytest.mark.parametrize("size", [5, 30])
def test_sparsity_is_max_minus_mean_over_the_sampled_valid_keys(size):
    """With 30 of them asked for, one sequence has fewer than that."""
    q, k, _ = inputs(B=2, S=35)
    rng = np.random.default_rng(1)
    order, valid = rng.random(35).astype(np.float32), rng.random((2, 35)) > np.array([[0.1], [0.5]])
    M = sparsity(q, k, jnp.asarray(order), jnp.asarray(valid), size)
    for b, n in np.ndindex(2, N):
        sample = sorted(np.flatnonzero(valid[b]), key=lambda s: -order[s])[:size]
        scores = np.asarray(q[b, :, n] @ k[b, sample, n].T) / np.sqrt(H)
        np.testing.assert_allclose(M[b, n], scores.max(axis=1) - scores.mean(axis=1), atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_peaked_queries_are_active_and_the_others_take_the_mean(causal):
    """Twice ln 40 is 8 queries: the eight long ones, wherever they stand; another eight in the other head."""
    q, k, v = inputs()
    long = np.random.default_rng(2).permuted(np.tile(np.arange(T), (N, 1)), axis=1)[:, :8]
    for n in range(N):
        q = q.at[:, long[n], n].multiply(50.0)
    attention = make(causal=causal)
    assert all(set(attention.active(q, k, None, None, None)[0, n].tolist()) == set(long[n].tolist()) for n in range(N))
    o, expected = np.asarray(jax.jit(attention)(q, k, v)), full(q, k, v, causal)
    means = np.cumsum(v, axis=1) / np.arange(1, T + 1)[:, None, None] if causal else np.broadcast_to(np.mean(v, axis=1, keepdims=True), v.shape)
    for n in range(N):
        lazy = np.setdiff1d(np.arange(T), long[n])
        np.testing.assert_allclose(o[:, long[n], n], expected[:, long[n], n], atol=1e-5)
        np.testing.assert_allclose(o[:, lazy, n], means[:, lazy, n], atol=1e-5)


def test_invalid_queries_are_never_active():
    q, k, _ = inputs()
    valid = jnp.asarray(np.random.default_rng(2).random((1, T)) > 0.5)
    active = make().active(jnp.where(valid[..., None, None], q, 50 * q), k, valid, valid, None)  # by their scores, invalid ones would be the first
    assert np.asarray(valid)[0, active].all()


@pytest.mark.parametrize("backend", ["xla", "native"])
def test_means_leave_out_invalid_values(backend):
    v = jnp.asarray([[1.0, 0.0, 5.0]])[..., None, None]
    valid = jnp.asarray([[True, False, True]])
    assert mean_values(v, valid, 2, False, backend).ravel().tolist() == [3, 3]
    assert mean_values(v, valid, 4, True, backend).ravel().tolist() == [1, 1, 3, 3]
    assert mean_values(0 * v, valid & False, 2, True, backend).ravel().tolist() == [0, 0]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["xla", "native"])
def test_chosen_rows_are_those_of_full_attention(backend, causal):
    q, k, v = inputs()
    rows = jnp.asarray([[[3, 39, 0, 7, 20], [1, 2, 38, 5, 4]]])
    chosen = jnp.take_along_axis(q.swapaxes(1, 2), rows[..., None], axis=2)
    found = jax.jit(lambda *args: rows_attention(*args, None, backend))(chosen, k, v, rows if causal else None)
    expected = jnp.take_along_axis(full(q, k, v, causal).swapaxes(1, 2), rows[..., None], axis=2)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_sample_is_drawn_by_the_key():
    q, k, _ = inputs()
    attention = make(factor=1)
    chosen = [attention.active(q, k, None, None, key)[0, 0].tolist() for key in (None, None, *jax.random.split(jax.random.key(0), 8))]
    assert chosen[0] == chosen[1] and len(set(map(tuple, chosen[2:]))) > 1
