"""The delta-rule fast weight programmer: a key overwrites what its like has written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_zoo import Unsupported, UserError, make_attention
from attn_zoo.attention.linear import dpfp

T, N, H = 20, 2, 8


def make(spec="delta", causal=True, rate=None, **kwargs):
    """With a `rate`, beta is that everywhere."""
    attention = make_attention(spec, num_heads=N, head_dim=H, max_len=T, causal=causal, rngs=nnx.Rngs(1), **kwargs)
    if rate is not None:
        attention.rate_kernel[...] = jnp.zeros((N, H))
        attention.rate_bias[...] = jnp.full((N,), float(np.log(rate / (1 - rate))))
    return attention


def inputs(seed=0):
    return list(jnp.asarray(np.random.default_rng(seed).normal(size=(3, 2, T, N, H)), jnp.float32))


def by_definition(attention, q, k, v):
    """The rule in float64, one position at a time, with its features and rates written out."""
    q, k, v, w, b = (np.asarray(x, np.float64) for x in (q, k, v, attention.rate_kernel[...], attention.rate_bias[...]))

    def phi(x):
        r = np.maximum(np.concatenate([x, -x], axis=-1), 0)
        features = r * r[..., np.arange(2 * H) - 1]  # r_i r_{i - 1}, the first times the last
        return features / features.sum(axis=-1, keepdims=True)

    phi_q, phi_k, o = phi(q), phi(k), np.zeros(v.shape)
    beta = 1 / (1 + np.exp(-np.einsum("BTNH,NH->BTN", k, w) - b))
    for B in range(2):
        for n in range(N):
            S = np.zeros((H, 2 * H))
            for t in range(T):
                S += beta[B, t, n] * np.outer(v[B, t, n] - S @ phi_k[B, t, n], phi_k[B, t, n])
                o[B, t, n] = S @ phi_q[B, t, n]
    return o


def test_definition():
    attention, (q, k, v) = make(), inputs()
    forward = by_definition(attention, q, k, v)
    np.testing.assert_allclose(jax.jit(attention)(q, k, v), forward, atol=3e-6)
    backward = by_definition(attention, *(x[:, ::-1] for x in (q, k, v)))[:, ::-1]
    np.testing.assert_allclose(jax.jit(make(causal=False))(q, k, v), forward + backward, atol=3e-6)


def one_hot_keys(order):
    """Keys whose DPFP features are one-hot: two neighbouring channels are on, [1, T, N, H]."""
    order = jnp.asarray(order)
    k = jax.nn.one_hot(order, H) + jax.nn.one_hot(order + 1, H)
    return jnp.broadcast_to(k[None, :, None], (1, len(order), N, H))


def test_a_key_reads_back_what_was_written_last():
    """Full rate and one-hot features: a memory with a slot a key. A repeated key overwrites; a sum rule would give the sum of both values."""
    k, v = one_hot_keys([0, 2, 4, 2, 0, 4]), jax.random.normal(jax.random.key(0), (1, 6, N, H))
    np.testing.assert_array_equal((dpfp(k[:, :3]) > 0).sum(axis=-1), 1)
    o = make(rate=1 - 1e-7)(jnp.roll(k, -1, axis=1), k, v)  # every position asks for the next position's key
    last = [None, None, 1, 0, 2]  # where the key of position t + 1 was last written, up to t
    np.testing.assert_allclose(o[:, 0], 0, atol=1e-5)
    np.testing.assert_allclose(o[:, 1], 0, atol=1e-5)
    for t, source in enumerate(last):
        if source is not None:
            np.testing.assert_allclose(o[:, t], v[:, source], atol=1e-5)
    np.testing.assert_allclose(o[:, 5], v[:, 4], atol=1e-5)  # the roll asks for key 0, overwritten at 4


def test_the_rate_says_how_much_is_overwritten():
    """beta = 1/4, written twice at one key: v + (w - v) / 4 of what is there."""
    k, v = one_hot_keys([3, 3]), jax.random.normal(jax.random.key(0), (1, 2, N, H))
    o = make(rate=0.25)(k, k, v)
    np.testing.assert_allclose(o[:, 0], v[:, 0] / 4, atol=1e-6)
    np.testing.assert_allclose(o[:, 1], 3 / 16 * v[:, 0] + v[:, 1] / 4, atol=1e-6)


def test_as_keys_tend_to_zero_it_is_a_running_average():
    """elu + 1 features of nothing are 1 / H each, so every key is the same and the memory moves by beta / H towards each value."""
    (q, _, v), memory, expected = inputs(), 0.0, []
    for t in range(T):
        memory = memory + 0.5 / H * (np.asarray(v[:, t]) - memory)
        expected.append(memory)
    o = make("delta(feature_map='elu')", rate=0.5)(q, jnp.zeros_like(q), v)
    np.testing.assert_allclose(o, np.stack(expected, axis=1), atol=2e-6)


@pytest.mark.parametrize("spec, R", [("delta", 2 * H), ("delta(nu=3)", 6 * H), ("delta(feature_map='elu')", H)])
def test_features_sum_to_one(spec, R):
    phi = make(spec).features(inputs()[0])
    assert phi.shape[-1] == R and (phi >= 0).all()
    np.testing.assert_allclose(phi.sum(axis=-1), 1, atol=1e-6)


def test_the_rate_is_learned_from_the_key():
    attention, (q, k, v) = make(), inputs()
    graph, params, rest = nnx.split(attention, nnx.Param, ...)
    gradients = jax.tree.leaves(jax.jit(jax.grad(lambda params: jnp.square(nnx.merge(graph, params, rest)(q, k, v)).sum()))(params))
    assert [x.shape for x in gradients] == [(N,), (N, H)] and all((x != 0).all() for x in gradients)


def test_what_it_refuses():
    q, k, v = inputs()
    with pytest.raises(Unsupported, match="in the order of one sequence"):
        make()(q[:, :5], k, v)
    with pytest.raises(UserError, match="nu=2: belongs to feature_map='dpfp', not to 'elu'"):
        make("delta(feature_map='elu', nu=2)")
    grouped = make_attention("delta", num_heads=N, num_kv_heads=1, head_dim=H, max_len=T)
    assert grouped.flops(1, T, T) == make(causal=False).flops(1, T, T) * 2 / 3, "one memory less is read and written"
