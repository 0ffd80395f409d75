"""Luong's local attention: the paper's equations one query at a time, gradients of the predicted place, and the cost of a window."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import ON_CPU

from attn_zoo import UserError, make_attention
from attn_zoo.attention.luong_local import LuongLocal
from attn_zoo.ops.gathered import gathered_attention

B, N, K, H = 2, 4, 2, 8


def make(spec, causal=False, **kwargs) -> LuongLocal:
    return make_attention(spec, **({"num_heads": N, "num_kv_heads": K, "head_dim": H, "max_len": 64, "causal": causal, "rngs": nnx.Rngs(1)} | kwargs))


def inputs(T, S, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H))]


def by_hand(attention, q, k, v, lengths, scale):
    """Eq. 7, 9 and 10 in float64; lengths [B] are those of the sequences without padding."""
    D, local_p = attention.options.window, attention.options.align == "predictive"
    o = np.zeros(q.shape)
    for b, t, n in itertools.product(*map(range, q.shape[:3])):
        S = min(lengths[b], t + 1) if attention.dims.causal else lengths[b]
        place = t
        if local_p:
            W_p, v_p = (np.asarray(p[n], np.float64) for p in (attention.place_hidden[...], attention.place_weight[...]))
            place = S / (1 + np.exp(-v_p @ np.tanh(W_p.T @ q[b, t, n])))
        window = [s for s in range(S) if place - D <= s <= place + D]
        align = np.exp([scale * q[b, t, n] @ k[b, s, n // (N // K)] for s in window])
        for s, a in zip(window, align / align.sum()):
            o[b, t, n] += a * (np.exp(-((s - place) ** 2) / (2 * (D / 2) ** 2)) if local_p else 1) * v[b, s, n // (N // K)]
    return o


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("spec", ["luong_local(window=3)", "luong_local(window=1)", "luong_local(align='monotonic', window=2, score='dot')"])
def test_equations_by_hand(spec, causal):
    """S is where padding begins. Weights are not renormalized, and a window without keys gives zeros."""
    T, S, lengths = 15, 11, (11, 7)
    attention, args = make(spec, causal), inputs(T, S)
    valid = jnp.arange(S) < jnp.asarray(lengths)[:, None]
    scale = 1.0 if "dot" in spec else H**-0.5
    expected = by_hand(attention, *(np.asarray(x, np.float64) for x in args), lengths, scale)
    for form in (attention, attention.reference):
        np.testing.assert_allclose(jax.jit(form)(*args, valid_BS=valid), expected, rtol=0, atol=2e-6)
    if "monotonic" in spec:
        assert (expected[1, 9:] == 0).all() and (expected[1, 8] != 0).any()  # query 9 looks at 7 and later


def test_monotonic_is_the_local_window():
    args = inputs(20, 20)
    for causal in (False, True):
        luong, local = (jax.jit(make(spec, causal))(*args) for spec in ("luong_local(align='monotonic', window=4)", "local(window=4)"))
        np.testing.assert_array_equal(luong, local)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_the_place_learns(causal):
    """Gradients of W_p, v_p and queries against central differences in float64, at places no window's edge is near to."""
    with jax.enable_x64(True):
        attention = make("luong_local(window=4)", causal, dtype=jnp.float64)
        graph, params, rest = nnx.split(attention, nnx.Param, ...)
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        q, k, v = (jnp.asarray(x, jnp.float64) for x in inputs(12, 20))
        weights = jnp.asarray(np.random.default_rng(1).normal(size=q.shape))

        @jax.jit
        def loss(params, q):
            return (nnx.merge(graph, params, rest)(q, k, v) * weights).sum()

        places = nnx.merge(graph, params, rest).places(q, 20, None)
        assert abs(places - jnp.round(places)).min() > 1e-4  # or the difference below would cross it
        gradients, eps = jax.jit(jax.grad(loss, (0, 1)))(params, q), 1e-6
        assert all((abs(np.asarray(g)) > 0).any() for g in jax.tree.leaves(gradients))
        leaves, tree = jax.tree.flatten((params, q))
        rng = np.random.default_rng(2)
        for which, gradient in enumerate(jax.tree.leaves(gradients)):
            way = jnp.asarray(rng.normal(size=gradient.shape))
            moved = lambda e: loss(*jax.tree.unflatten(tree, [x + e * way if i == which else x for i, x in enumerate(leaves)]))
            assert float((moved(eps) - moved(-eps)) / (2 * eps)) == pytest.approx(float((gradient * way).sum()), rel=1e-6)


def test_the_place_learns_through_the_gaussian_alone():
    """Values that are all one make every output the sum of a Gaussian over softmax weights, whose gradient pulls the place to the heavy key."""
    attention = make("luong_local(window=3)", num_heads=1, num_kv_heads=1)
    k = jnp.zeros((1, 9, 1, H)).at[0, 6, 0].set(20.0)  # the key at 6 takes all the weight
    q = jnp.ones((1, 1, 1, H))
    attention.place_weight[...] = jnp.zeros((1, H))  # p = 4.5
    graph, params, rest = nnx.split(attention, nnx.Param, ...)
    o, gradient = jax.jit(jax.value_and_grad(lambda params: nnx.merge(graph, params, rest)(q, k, jnp.ones_like(k))[0, 0, 0, 0]))(params)
    sigma, away = 1.5, 6 - 4.5
    assert float(o) == pytest.approx(np.exp(-(away**2) / (2 * sigma**2)), rel=1e-5)
    of_place = float(o) * away / sigma**2 * 9 / 4  # d p / d (v' tanh) = S / 4
    np.testing.assert_allclose(gradient["place_weight"][...][0], of_place * np.tanh(np.asarray(attention.place_hidden[...])[0].sum(axis=0)), rtol=1e-4)


@pytest.mark.parametrize("spec", ["luong_local(window=5)", "luong_local(window=5, align='monotonic')"])
def test_the_cost_is_that_of_the_window(spec):
    """Doubling the keys adds no work: with as many queries, useful FLOPs and computed arrays stay; ten more keys a query add their products."""
    attention = make(spec, max_len=4096)
    assert attention.flops(1, 64, 2048) == attention.flops(1, 64, 4096)
    twice = make(spec.replace("window=5", "window=10"), max_len=4096)
    assert twice.flops(1, 2048, 4096) - attention.flops(1, 2048, 4096) == pytest.approx(4 * N * H * 2048 * 10, rel=0.02)
    assert attention.plan(64, 4096)["backend"] == ON_CPU
    attention = make(spec, max_len=4096, backend="xla")  # which counts the work of what it compiles
    if attention.options.align == "predictive":
        shapes = lambda S: [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 64, N, H), (1, S, K, H), (1, S, K, H))]
        flops = [jax.jit(attention).lower(*shapes(S)).compile().cost_analysis()["flops"] for S in (256, 4096)]
        assert flops[1] < 1.1 * flops[0]


def test_factors_of_gathered_attention():
    """They weigh values after the softmax, and their gradient is a weight times its value's share in the loss."""
    rng = np.random.default_rng(0)
    T, S, R = 6, 9, 4
    q, k, v = inputs(T, S)
    index = jnp.asarray(np.stack([rng.permutation(S)[:R] for _ in range(T)]))
    seen, factor = jnp.asarray(rng.random((T, R)) > 0.2), jnp.asarray(rng.random((T, R)), jnp.float32)
    attend = jax.jit(functools.partial(gathered_attention, q, k, index_TR=index, seen_TR=seen))
    plain, lse = attend(v_BSKH=v)
    once, same_lse = attend(v_BSKH=v, factor_TR=jnp.ones((T, R)))
    np.testing.assert_array_equal(once, plain)
    np.testing.assert_array_equal(same_lse, lse)
    scores = jnp.einsum("BTNH,BTRNH->BNTR", q, jnp.repeat(k, N // K, axis=2)[:, index]) * H**-0.5
    a_BNTR = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    v_BTRNH = jnp.repeat(v, N // K, axis=2)[:, index]
    o, pull = jax.vjp(lambda factor: attend(v_BSKH=v, factor_TR=factor)[0], factor)
    np.testing.assert_allclose(o, jnp.einsum("BNTR,BTRNH->BTNH", a_BNTR * factor, v_BTRNH), atol=1e-6)
    np.testing.assert_allclose(pull(o)[0], jnp.einsum("BNTR,BTRNH,BTNH->TR", a_BNTR, v_BTRNH, o), rtol=1e-5, atol=1e-5)


def test_options_are_checked():
    for spec, message in {
        "luong_local(window=0)": "window=0: must be a whole number of at least 1",
        "luong_local(align='local-p')": "align='local-p': must be one of 'predictive', 'monotonic'",
        "luong_local(score='concat')": "score='concat': must be one of 'scaled_dot', 'dot'",
    }.items():
        with pytest.raises(UserError, match=message):
            make(spec)
