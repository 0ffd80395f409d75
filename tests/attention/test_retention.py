"""Retention: its recurrence, its decays, and what its group norm makes of scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ON_CPU

from attn_zoo import Unsupported, UserError, make_attention
from attn_zoo.ops import decayed
from attn_zoo.ops.decayed import EPSILON

T, N, H = 37, 2, 8


def make(first=2.0, causal=True, N=N, K=None, T=T, backend="auto"):
    return make_attention(f"retention(first={first})", num_heads=N, num_kv_heads=K, head_dim=H, max_len=T, causal=causal, backend=backend)


def inputs(N=N, K=N, T=T, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(2, T, heads, H)), jnp.float32) for heads in (N, K, K)]


def normalized(o):
    return o / np.sqrt(np.square(o).mean(axis=-1, keepdims=True) + EPSILON)


def recurrence(q, k, v, gamma):
    """S_t = gamma S_{t-1} + k_t v_t', o_t = S_t' q_t (eq. 6) in float64, and sum_j gamma^(t - j) (q_t' k_j), the same with ones for values."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    v = np.concatenate([v, np.ones_like(v[..., :1])], axis=-1)
    state, o = np.zeros((*k.shape[:1], *k.shape[2:], H + 1)), np.zeros_like(v)
    for t in range(q.shape[1]):
        state = gamma[:, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        o[:, t] = np.einsum("BNRH,BNR->BNH", state, q[:, t])
    return o[..., :-1], o[..., -1:]


@pytest.mark.parametrize("backend", ["xla", ON_CPU] if ON_CPU != "xla" else ["xla"])
def test_causal_is_the_recurrence(backend, monkeypatch):
    """Across chunks, which the native kernels have of 64."""
    monkeypatch.setattr(decayed, "CHUNK", 16)
    T = 150
    q, k, v = inputs(T=T)
    gamma = 1 - 2.0 ** -(2.0 + np.arange(N))
    o, scores = recurrence(q, k, v, gamma)
    geometric = np.cumsum(gamma ** np.arange(T)[:, None], axis=0)  # sum_{j <= t} gamma^(t - j), [T, N]
    scale = 1 / np.sqrt(H * geometric)[..., None]
    o, scores = o * scale, scores * scale
    np.testing.assert_allclose(jax.jit(make(T=T, backend=backend))(q, k, v), normalized(o / np.maximum(abs(scores), 1)), atol=1e-5)


def test_heads_forget_at_the_rates_of_the_paper():
    """gamma = 1 - 2^(-5 - h), eq. 8: of a key at position 0 alone, position t keeps gamma^t."""
    gamma = np.exp(make(first=5.0, N=4).log_decays())
    np.testing.assert_allclose(gamma, [1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128, 1 - 1 / 256], rtol=1e-12)


def test_what_is_far_weighs_less():
    """Two keys of equal score, with opposite values: the nearer one wins at every later position, on either side of the two if not causal."""
    q = jnp.ones((1, T, N, H))
    k = jnp.zeros((1, T, N, H)).at[:, jnp.array([10, 20])].set(1.0)
    v = jnp.zeros((1, T, N, H)).at[:, 10].set(1.0).at[:, 20].set(-1.0)
    causal, both = (jax.jit(make(causal=causal))(q, k, v) for causal in (True, False))
    assert (causal[:, :10] == 0).all() and (causal[:, 10:20] > 0.99).all() and (causal[:, 20:] < 0).all()
    assert (both[:, :15] > 0).all() and (both[:, 16:] < 0).all()
    np.testing.assert_allclose(both[:, 15], 0, atol=1e-2)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_outputs_have_length_sqrt_H_whatever_the_scale_of_the_scores(causal):
    q, k, v = inputs()
    attention = jax.jit(make(causal=causal))
    o = attention(q, k, v)
    np.testing.assert_allclose(np.square(o).mean(axis=-1), 1, atol=1e-2)
    np.testing.assert_allclose(attention(q, 30 * k, v), o, atol=1e-2)


def test_bidirectional_decays_by_distance():
    """All pairs written out, gamma^|t - j|, and the same read backwards."""
    q, k, v = inputs()
    attention = jax.jit(make(causal=False))
    decay = (1 - 2.0 ** -(2.0 + np.arange(N)))[:, None, None] ** abs(np.arange(T)[:, None] - np.arange(T))
    scores = np.einsum("BTNH,BSNH->BNTS", *(np.asarray(x, np.float64) for x in (q, k))) * decay / np.sqrt(H * decay.sum(axis=-1, keepdims=True))
    scores = scores / np.maximum(abs(scores.sum(axis=-1, keepdims=True)), 1)
    np.testing.assert_allclose(attention(q, k, v), normalized(np.einsum("BNTS,BSNH->BTNH", scores, v)), atol=1e-5)
    np.testing.assert_allclose(attention(*(x[:, ::-1] for x in (q, k, v)))[:, ::-1], attention(q, k, v), atol=1e-5)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_invalid_keys_weigh_nothing(causal):
    """A sequence with 10 invalid positions behind it gives what it gives alone."""
    q, k, v = inputs()
    valid = jnp.arange(T)[None, :] < jnp.array([[T - 10], [T - 10]])
    attention = jax.jit(make(causal=causal))
    alone = attention(*(x[:, : T - 10] for x in (q, k, v)))
    np.testing.assert_allclose(attention(q, k, v, valid_BS=valid)[:, : T - 10], alone, atol=1e-3)


def test_grouped_heads_share_their_decay_and_their_state():
    q, k, v = inputs(N=4, K=2)
    grouped = make(N=4, K=2)
    np.testing.assert_allclose(jax.jit(grouped)(q, k, v)[:, :, ::2], jax.jit(make(N=2))(q[:, :, ::2], k, v), atol=1e-6)
    assert grouped.flops(1, T, T) == 0.75 * make(N=4).flops(1, T, T), "two states are updated, and read by four heads"


def test_what_it_refuses():
    q, k, v = inputs()
    with pytest.raises(Unsupported, match="distance between two positions of one sequence"):
        make()(q[:, :20], k, v)
    with pytest.raises(UserError, match="first=0"):
        make(first=0)
