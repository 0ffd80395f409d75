"""Additive attention: the paper's equations by hand, the symmetries of its network, and that its hidden units exist tile by tile only."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from attn_zoo import UserError, make_attention
from attn_zoo.ops.additive import additive_attention

B, N, H = 2, 4, 8


def make(spec="additive", K=N, **kwargs):
    return make_attention(spec, num_heads=N, num_kv_heads=K, head_dim=H, max_len=256, rngs=nnx.Rngs(1), **kwargs)


def inputs(T, S, K=N, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H))]


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_equations_by_hand(causal):
    """e = v' tanh(W q + U k) and its softmax, one pair at a time in float64, with heads that share keys; no 1/sqrt(H)."""
    T, S, K = 5, 6, 2
    attention = make("additive(hidden=3)", K=K, causal=causal)
    q, k, v = (np.asarray(x, np.float64) for x in inputs(T, S, K))
    W, U, weight = (np.asarray(p[...], np.float64) for p in (attention.query, attention.key, attention.weight))
    assert (W.shape, U.shape, weight.shape) == ((N, H, 3), (K, H, 3), (N, 3))
    expected = np.zeros((B, T, N, H))
    for b, t, n in itertools.product(range(B), range(T), range(N)):
        g = n // (N // K)
        seen = range(min(t + 1, S) if causal else S)
        a = np.exp([weight[n] @ np.tanh(W[n].T @ q[b, t, n] + U[g].T @ k[b, s, g]) for s in seen])
        expected[b, t, n] = sum(a_s / a.sum() * v[b, s, g] for a_s, s in zip(a, seen))
    np.testing.assert_allclose(jax.jit(attention)(*inputs(T, S, K)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("block", [16, 64])
def test_tiles_of_any_size_equal_the_dense_form(block):
    """Also their gradients, where tiles divide neither length and some keys are invalid."""
    T, S = 50, 61
    attention = make("additive(hidden=5)", K=2, causal=True)
    q, k, v = inputs(T, S, K=2)
    valid = jnp.asarray(np.random.default_rng(1).random((B, S)) > 0.3)
    q_R, k_R = attention.project(q, k)

    def dense(q, k, weight, v):
        scores = jnp.einsum("BTSNR,NR->BNTS", jnp.tanh(q[:, :, None] + jnp.repeat(k, 2, axis=2)[:, None]), weight)
        seen = jnp.tril(jnp.ones((T, S), bool)) & valid[:, None, None]
        p = jnp.where(seen, jnp.exp(scores), 0)
        return jnp.einsum("BNTS,BSNH->BTNH", p / jnp.maximum(p.sum(axis=-1, keepdims=True), 1e-30), jnp.repeat(v, 2, axis=2))

    tiled = lambda q, k, weight, v: additive_attention(q, k, weight, v, causal=True, valid_BS=valid, block=block)
    args = q_R, k_R, attention.weight[...], v
    loss_of = lambda f: lambda *args: (lambda o: (jnp.sin(o).sum(), o))(f(*args))
    found, expected = (jax.jit(jax.grad(loss_of(f), (0, 1, 2, 3), has_aux=True))(*args) for f in (tiled, dense))
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=3e-6 * max(1, abs(e).max())), found, expected)


def test_symmetries_of_the_network():
    """tanh is odd and a sum has no order: signs and places of hidden units mean nothing. Without v all keys weigh the same."""
    attention, args = make(), inputs(7, 9)
    run = lambda: jax.jit(lambda *args: attention(*args))(*args)
    expected = run()
    params = attention.query, attention.key, attention.weight
    before = [p[...] for p in params]
    sign, order = jnp.asarray([1, -1] * (H // 2)), jnp.arange(H)[::-1]
    for p, x in zip(params, before):
        p[...] = (x * sign)[..., order]
    np.testing.assert_allclose(run(), expected, atol=1e-6)
    attention.weight[...] = jnp.zeros((N, H))
    np.testing.assert_allclose(run(), jnp.broadcast_to(args[2].mean(axis=1, keepdims=True), expected.shape), atol=1e-6)


def test_no_array_of_all_hidden_units():
    """T S R numbers are what this variant must not make; nor even T S, with gradients of the parameters too."""
    T, R = 512, 32
    attention = make_attention(f"additive(hidden={R})", num_heads=1, head_dim=H, max_len=T, causal=True, backend="xla")
    graph, params, rest = nnx.split(attention, nnx.Param, ...)
    loss = lambda params, q, k, v: nnx.merge(graph, params, rest)(q, k, v).sum()
    x = jax.ShapeDtypeStruct((1, T, 1, H), jnp.float32)
    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2, 3)))(params, x, x, x).jaxpr

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (int(np.prod(var.aval.shape)) for var in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                yield from sizes(inner)

    assert 64 * 64 * R <= max(sizes(jaxpr)) < T * T


def test_hidden_is_checked():
    assert make().weight.shape == (N, H)
    with pytest.raises(UserError, match="hidden=0: must be a whole number of at least 1, or None"):
        make("additive(hidden=0)")
