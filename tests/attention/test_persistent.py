"""Persistent memory: one softmax over context and slots, against NumPy, and the scales of the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_zoo import make_attention

N, K, H, R = 4, 2, 8, 5


def make(slots=R, causal=False, N=N, K=K):
    return make_attention(f"persistent(slots={slots})", num_heads=N, num_kv_heads=K, head_dim=H, max_len=32, causal=causal, rngs=nnx.Rngs(0))


def inputs(T, S):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, T, N, H), (2, S, K, H), (2, S, K, H))]


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_one_softmax_over_context_and_slots(causal):
    attention, (q, k, v) = make(causal=causal), inputs(9, 13)
    valid = np.random.default_rng(1).random((2, 13)) > 0.3
    valid[:, 0] = True
    o = jax.jit(attention)(q, k, v, valid_BS=jnp.asarray(valid))
    q, k, v, m, u = (np.asarray(x, np.float64) for x in (q, k, v, attention.keys[...], attention.values[...]))
    for b, t, n in np.ndindex(2, 9, N):
        seen = [s for s in range(13) if valid[b, s] and (s <= t or not causal)]
        keys = np.concatenate([k[b, seen, n // 2], m[n] * np.sqrt(H)])
        values = np.concatenate([v[b, seen, n // 2], u[n] * np.sqrt(R)])
        weights = np.exp(keys @ q[b, t, n] / np.sqrt(H))
        np.testing.assert_allclose(o[b, t, n], weights / weights.sum() @ values, atol=2e-6)


def test_slots_start_at_the_scale_of_the_context():
    attention = make(slots=4000)
    for used, stored, stored_std in zip(attention.memory(), (attention.keys, attention.values), (H**-0.5, 4000**-0.5)):
        assert float(stored[...].std()) == pytest.approx(stored_std, rel=0.02)
        assert float(used.std()) == pytest.approx(1, rel=0.02)
        assert abs(np.corrcoef(np.asarray(used[0]).ravel(), np.asarray(used[1]).ravel())[0, 1]) < 0.05, "heads have vectors of their own"


def test_a_query_that_points_at_a_slot_reads_its_value_whatever_the_context():
    attention, (q, k, v) = make(), inputs(6, 6)
    m, u = attention.memory()
    q = jnp.broadcast_to(500 * m[:, 3] / jnp.square(m[:, 3]).sum(-1, keepdims=True), q.shape)
    attention.keys[...] = jnp.zeros_like(m).at[:, 3].set(attention.keys[:, 3])
    o = jax.jit(attention)(q, 0.01 * k, v)
    np.testing.assert_allclose(o, jnp.broadcast_to(u[:, 3], o.shape), atol=1e-5)


def test_a_row_without_context_is_zero_although_slots_remain():
    attention, (q, k, v) = make(causal=True), inputs(7, 9)
    o = jax.jit(attention)(q, k, v, valid_BS=jnp.arange(9) >= jnp.array([[2], [9]]))
    assert (o[0, :2] == 0).all() and (o[0, 2:] != 0).all() and (o[1] == 0).all()


def test_slots_alone_tell_it_from_full():
    """slots=0 has no parameters; any other number of slots changes every output."""
    assert jax.tree.leaves(nnx.state(make(slots=0), nnx.Param)) == []
    (q, k, v) = inputs(6, 6)
    assert (jax.jit(make(slots=0))(q, k, v) != jax.jit(make(slots=1))(q, k, v)).all()
