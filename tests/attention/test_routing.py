"""Routing attention: whom centroids take, what a query in none or several clusters gets, and how centroids move."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import ON_CPU

from attn_zoo import UserError, make_attention
from attn_zoo.attention import Statistic
from attn_zoo.attention.routing import Centroids, memberships, on_sphere
from attn_zoo.models.multi_head import MultiHeadAttention

B, T, N, H, C, W = 2, 24, 2, 8, 4, 6


@functools.cache
def made(spec, causal):
    return nnx.split(make_attention(spec, num_heads=N, head_dim=H, max_len=T, causal=causal))


def make(causal=False, **options):
    options = {"clusters": C} | options
    return nnx.merge(*made(f"routing({', '.join(f'{name}={value}' for name, value in options.items())})", causal))


def inputs():
    """q, k, v."""
    return [jnp.asarray(x, jnp.float32) for x in np.random.default_rng(0).normal(size=(3, B, T, N, H))]


def holes():
    valid = np.random.default_rng(1).random((B, T)) > 0.2
    valid[1, 3:] = False  # fewer than a window
    return valid


def sphere(x):
    x = np.asarray(x, np.float64)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def taken_by_definition(x, centroids, valid, window=W):
    """The set of positions that each centroid takes, [b][n][c]."""
    affinity = np.where(valid[:, None, None], np.einsum("bthn,nch->bnct", sphere(x).swapaxes(2, 3), centroids), -np.inf)
    best = np.argsort(-affinity, axis=-1)[..., :window]
    return [[[{int(t) for t in best[b, n, c] if valid[b, t]} for c in range(centroids.shape[1])] for n in range(N)] for b in range(B)]


def centroids_of(attention):
    return np.asarray(attention.centroids[...], np.float64)


@pytest.mark.skipif(ON_CPU != "native", reason="no native kernels here")
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_clusters_on_the_native_kernels_and_on_xla(causal):
    """Outputs and gradients, with holes; and the record says what ran."""
    graph, rest = made(f"routing(clusters={C})", causal)
    valid = jnp.asarray(holes())

    def run(backend):
        attention = nnx.merge(graph, rest)
        attention.dims = dataclasses.replace(attention.dims, backend=backend)
        assert attention.plan(T, T, True)["backend"] == {"auto": "native"}.get(backend, backend)
        f = lambda q, k, v: attention(q, k, v, valid_BS=valid)
        assert ("ffi_call" in str(jax.make_jaxpr(f)(*inputs()))) == (backend != "xla")
        return jax.jit(f)(*inputs()), *jax.jit(jax.grad(lambda *args: jnp.sin(f(*args)).sum(), (0, 1, 2)))(*inputs())

    for backend in ("auto", "native"):
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=2e-6 * max(1, abs(e).max())), run(backend), run("xla"))


def test_every_centroid_takes_the_same_number_of_its_nearest_in_rising_order():
    q, valid, attention = inputs()[0], holes(), make()
    index, member = (np.asarray(x) for x in jax.jit(memberships, static_argnums=3)(on_sphere(q), attention.centroids[...], jnp.asarray(valid), W))
    assert index.shape == (B, N, C, W) and (np.diff(index) > 0).all()
    expected = taken_by_definition(q, centroids_of(attention), valid)
    for b, n, c in np.ndindex(B, N, C):
        assert set(index[b, n, c][member[b, n, c]].tolist()) == expected[b][n][c]
        assert member[b, n, c].sum() == min(W, valid[b].sum())
    spread = np.array([sum(t in cluster for cluster in expected[0][0]) for t in range(T) if valid[0, t]])
    assert (spread == 0).any() and (spread > 1).any(), "some tokens are in no cluster and some in several, or the next test tests little"


@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_outputs_are_averaged_over_the_clusters_of_a_query(causal, normalize):
    """A query at a time in float64, with keys that are the queries when causal."""
    attention, valid = make(causal, normalize=normalize), holes()
    q, k, v = inputs()
    k = q if causal else k
    o = np.asarray(jax.jit(attention)(q, k, v, valid_BS=jnp.asarray(valid)))
    clusters_q, clusters_k = (taken_by_definition(x, centroids_of(attention), valid) for x in (q, k))
    q, k, v = [sphere(x) if normalize and x is not v else np.asarray(x, np.float64) for x in (q, k, v)]
    for b, n, t in np.ndindex(B, N, T):
        outs = []
        for mine, theirs in zip(clusters_q[b][n], clusters_k[b][n]):
            if t in mine:
                js = [j for j in theirs if j <= t or not causal]
                p = np.exp(k[b, js, n] @ q[b, t, n] / np.sqrt(H))
                outs.append(p / p.sum() @ v[b, js, n])
        np.testing.assert_allclose(o[b, t, n], np.mean(outs, axis=0) if outs else 0, rtol=0, atol=3e-6)


def called(attention, valid=None, key=0, **kwargs):
    """(centroids, balance) after a call that is merged inside jit, as in a training step; key=None is evaluation."""
    graph, rest = nnx.split(attention)

    @jax.jit
    def step(rest, q, k, v, valid, key):
        layer = nnx.merge(graph, rest)
        layer(q, k, v, valid_BS=valid, key=key)
        return nnx.state(layer)

    after = nnx.merge(graph, step(rest, *inputs(), valid, None if key is None else jax.random.key(key)))
    return centroids_of(after), np.asarray(after.balance[...])


def test_centroids_move_to_the_mean_of_the_nearest_queries_and_keys():
    decay, valid, attention = 0.9, holes(), make(decay=0.9)
    before = np.array(centroids_of(attention))
    before[0, 1] = (before[0, 0] + before[0, 2]) / 2  # nearest to none: a mean of dot products is not the largest
    attention.centroids[...] = jnp.asarray(before, jnp.float32)
    after, balance = called(attention, jnp.asarray(valid))
    tokens = np.concatenate([sphere(x)[valid] for x in inputs()[:2]])  # [queries and keys, N, H]
    nearest = np.einsum("xnh,nch->xnc", tokens, before).argmax(-1)
    assert (nearest[:, 0] != 1).all()
    for n, c in np.ndindex(N, C):
        mine = tokens[nearest[:, n] == c, n]
        expected = decay * before[n, c] + (1 - decay) * mine.mean(0) if len(mine) else before[n, c]
        np.testing.assert_allclose(after[n, c], expected, rtol=0, atol=2e-6)
    share = np.stack([np.bincount(nearest[:, n], minlength=C) / len(nearest) for n in range(N)])
    entropy = -np.sum(share * np.log(np.where(share > 0, share, 1)), axis=1)
    np.testing.assert_allclose(balance, np.exp(entropy) / C, rtol=1e-5)


def test_centroids_move_in_training_calls_alone():
    attention = make()
    kept, balance = called(attention, key=None)
    np.testing.assert_array_equal(kept, centroids_of(attention))
    assert (balance == 0).all(), "nothing was counted"
    assert (called(attention)[0] != centroids_of(attention)).any()
    assert not jax.tree.leaves(nnx.state(attention, nnx.Param)), "and by no gradient"
    assert len(jax.tree.leaves(nnx.state(attention, Centroids))) == len(jax.tree.leaves(nnx.state(attention, Statistic))) == 1


def test_centroids_find_the_clusters_of_tokens():
    """Tokens around C directions: after many calls every token has a centroid close by, whose direction it had not at first."""
    rng = np.random.default_rng(0)
    middle = sphere(rng.normal(size=(C, H)))
    x = jnp.asarray((middle[np.arange(T) % C] + 0.1 * rng.normal(size=(B, T, H)))[:, :, None].repeat(N, axis=2), jnp.float32)
    graph, rest = nnx.split(make(decay=0.8))

    @jax.jit
    def train(rest):
        def step(rest, _):
            layer = nnx.merge(graph, rest)
            layer(x, x, x, key=jax.random.key(0))
            return nnx.state(layer), None

        return jax.lax.scan(step, rest, length=60)[0]

    cosine = lambda m: (sphere(x)[..., None, :] * m / np.linalg.norm(m, axis=-1, keepdims=True)).sum(-1).max(-1) / np.sqrt(H)
    before, after = (cosine(centroids_of(nnx.merge(graph, state))).mean() for state in (rest, train(rest)))
    assert before < 0.75 and after > 0.85, (before, after)


def test_a_causal_layer_shares_queries_and_keys_and_a_bidirectional_one_does_not():
    for causal in (True, False):
        mha = MultiHeadAttention(make(causal), D=16, rngs=nnx.Rngs(0))
        assert hasattr(mha, "key") != causal


def test_default_sizes_follow_the_longest_length_and_the_one_at_hand():
    layer = make_attention("routing", num_heads=1, head_dim=4, max_len=100)
    assert layer.centroids.shape == (1, 10, 4)
    assert [layer.plan(T, T)["window"] for T in (100, 95, 7)] == [10, 10, 1]
    for spec, message in (("clusters=0", "clusters=0: must be a whole number"), ("decay=1.5", "decay=1.5: must be a number")):
        with pytest.raises(UserError, match=message):
            make_attention(f"routing({spec})", num_heads=1, head_dim=4, max_len=8)
