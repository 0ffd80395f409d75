"""Star attention: the ring closes, the relay carries what the ring does not, and both stand in one softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ON_CPU

from attn_zoo import Unsupported, make_attention
from attn_zoo.ops import softmax_mean

B, T, N, K, H = 2, 19, 4, 2, 8
DIRECTION = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])


def make(causal, ring=1, relay=True, seed=None, scale=1.0, backend="auto"):
    attention = make_attention(f"star(ring={ring}, relay={relay})", num_heads=N, num_kv_heads=K, head_dim=H, max_len=32, causal=causal, backend=backend)
    if seed is not None:
        attention.relay_query[...] = scale * jax.random.normal(jax.random.key(seed), (N, H))
    return attention


def inputs():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.float32) for heads in (N, K, K)]


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def by_definition(q, k, v, relay_query, ring, causal, valid):
    """One query at a time, in float64: the relay's key and value from all it has seen, then one softmax over ring and relay."""
    q, k, v, relay_query = (np.asarray(x, np.float64) for x in (q, k, v, relay_query))
    o = np.zeros(q.shape)
    for b, i, n in np.ndindex(B, T, N):
        keys, values = k[b, :, n // (N // K)], v[b, :, n // (N // K)]
        seen = [j for j in range(T) if valid[b, j] and (j <= i or not causal)]
        near = [j for j in seen if abs(i - j) <= ring or (not causal and T - abs(i - j) <= ring)]
        if seen:
            share = softmax(keys[seen] @ relay_query[n] * H**-0.5)
            keys, values = np.vstack([keys[near], share @ keys[seen]]), np.vstack([values[near], share @ values[seen]])
            o[b, i, n] = softmax(keys @ q[b, i, n] * H**-0.5) @ values
    return o


@DIRECTION
@pytest.mark.parametrize("backend", ["auto", "xla"])
@pytest.mark.parametrize("ring, scale", [(1, 0.0), (2, 1.0), (0, 40.0)], ids=["relay is the mean", "ring of two", "sharp relay"])
def test_equals_its_definition(causal, ring, scale, backend, monkeypatch):
    monkeypatch.setattr(softmax_mean, "CHUNK", 4)  # the running softmax crosses chunks, and does not fill the last
    valid = np.random.default_rng(1).random((B, T)) < 0.7
    valid[1, :6] = False  # what a causal query sees at first is nothing at all
    q, k, v = inputs()
    attention = make(causal, ring, seed=3, scale=scale, backend=backend)
    expected = by_definition(q, k, v, attention.relay_query[...], ring, causal, valid)
    np.testing.assert_allclose(attention(q, k, v, valid_BS=jnp.asarray(valid)), expected, rtol=0, atol=5e-6)


@pytest.mark.skipif(ON_CPU != "native", reason="no native kernels here")
def test_the_running_mean_as_a_sum_that_fades():
    """Against the running softmax, over several chunks of the kernels: scores that jump, positions left out, and none at first."""
    rng = np.random.default_rng(0)
    score, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, 200, N), (B, 200, N, 20)))
    score = score.at[:, 70:, 1].add(30).at[:, 130, 2].add(90).at[:, ::3, 3].set(-jnp.inf).at[1, :80].set(-jnp.inf)

    def run(backend):
        f = lambda score, x: softmax_mean.softmax_mean(score, x, causal=True, backend=backend)
        loss = lambda score, x: jnp.sin(f(score, x)[0]).sum()
        return f(score, x), jax.jit(jax.grad(loss, (0, 1)))(score, x)

    (mean, seen), gradients = run("native")
    (expected, expected_seen), expected_gradients = run("xla")
    np.testing.assert_array_equal(seen, expected_seen)
    assert not seen[1, :80].any() and seen[0].all(axis=0).sum() == N - 1
    np.testing.assert_allclose(mean, expected, atol=1e-5)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=2e-5 * max(1, abs(e).max())), gradients, expected_gradients)


@DIRECTION
def test_without_a_relay_only_the_ring_is_seen_and_with_it_everything(causal):
    def reach(attention):
        """Whether output i depends on value j, [T, T]."""
        q, k, v = inputs()
        return np.asarray(jax.jit(jax.jacobian(lambda v: attention(q, k, v)[0, :, 0].sum(-1)))(v)[:, 0, :, 0].any(-1))

    i, j = np.arange(T)[:, None], np.arange(T)[None, :]
    visible = (j <= i) | (not causal)
    near = (abs(i - j) <= 2) | ((T - abs(i - j) <= 2) & (not causal))
    np.testing.assert_array_equal(reach(make(causal, ring=2, relay=False)), near & visible)
    np.testing.assert_array_equal(reach(make(causal, ring=2)), np.broadcast_to(visible, (T, T)))


def test_a_relay_that_starts_as_the_mean_learns():
    q, k, v = inputs()

    def loss(relay_query):
        attention = make(False)
        attention.relay_query[...] = relay_query
        return (attention(q, k, v) ** 2).sum()

    assert (abs(np.asarray(jax.grad(loss)(jnp.zeros((N, H))))) > 0).all()


def test_flops_count_ring_relay_and_the_relays_own_attention():
    assert make(False, ring=1).flops(B, T, T) == 4 * B * N * H * (3 + 1) * T + 6 * B * N * T * H
    assert make(True, ring=1, relay=False).flops(B, T, T) == 4 * B * N * H * (2 * T - 1)
    assert make(False, ring=30, relay=False).flops(B, T, T) == 4 * B * N * H * T * T


def test_two_sequences_have_no_ring():
    q, k, v = inputs()
    with pytest.raises(Unsupported, match="ring joins neighbours"):
        make(False)(q[:, :5], k, v)
