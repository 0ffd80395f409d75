"""Adaptive span: the gradient of a span, its penalty, its bounds, and the window that follows it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_zoo import UserError, make_attention
from attn_zoo.attention import Loss, Statistic

B, T, N, H = 2, 40, 2, 8
RAMP, MAX_SPAN = 6, 50


def make(causal=True, max_len=256, N=N, **options):
    options = {"max_span": MAX_SPAN, "ramp": RAMP, "init": 0} | options
    spec = f"adaptive_span({', '.join(f'{name}={value}' for name, value in options.items())})"
    return make_attention(spec, num_heads=N, head_dim=H, max_len=max_len, causal=causal)


def set_spans(attention, spans):
    attention.ratio[...] = jnp.asarray(spans, jnp.float32) / attention.options.max_span


def inputs(T=T):
    """q, k, v and the weights of the outputs in the loss, in float64."""
    return np.random.default_rng(0).normal(size=(4, B, T, N, H))


def holes():
    valid = np.random.default_rng(1).random((B, T)) > 0.3
    valid[1, T // 2 :] = False
    return valid


def loss_by_definition(spans, causal, valid):
    """sum of w * o with o = sum_j exp(s_ij) m(|i - j|) v_j / sum_j exp(s_ij) m(|i - j|), in float64."""
    q, k, v, w = inputs()
    i, j = np.arange(T)[:, None], np.arange(T)[None, :]
    m = np.clip((RAMP + np.reshape(spans, (N, 1, 1)) - abs(i - j)) / RAMP, 0, 1) * ((j <= i) | (not causal)) * valid[:, None, None, :]
    weights = np.exp(np.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(H)) * m
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bnts,bsnh,btnh->", weights / np.where(total == 0, 1, total), v, w)


def layer_loss(attention, run, valid, dtype=jnp.float32):
    """(params -> loss, params) of the layer, with its own penalty left out."""
    graph, params, rest = nnx.split(attention, nnx.Param, ...)
    q, k, v, w = (jnp.asarray(x, dtype) for x in inputs())
    loss = lambda params: (getattr(nnx.merge(graph, params, rest), run)(q, k, v, valid_BS=jnp.asarray(valid)) * w).sum()
    return loss, jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


SPANS = {"causal": (3.3, 17.6), "bidirectional": (12.4, 0.2)}  # off the whole numbers, where m has kinks


@pytest.mark.parametrize("direction", SPANS)
def test_the_gradient_of_a_span_is_that_of_finite_differences(direction):
    """In positions: by the chain rule, the parameter z / max_span has max_span times the gradient of z."""
    spans, causal, valid, step = np.array(SPANS[direction]), direction == "causal", holes(), 1e-5
    ahead, behind = ([loss_by_definition(spans + s * step * unit, causal, valid) for unit in np.eye(N)] for s in (1, -1))
    expected = np.subtract(ahead, behind) / (2 * step)
    attention = make(causal)
    set_spans(attention, spans)
    attention.specialize()

    loss, params = layer_loss(attention, "__call__", valid)
    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    scale = max(abs(expected).max(), 0.1)
    assert float(value) == pytest.approx(loss_by_definition(spans, causal, valid), abs=1e-4)
    np.testing.assert_allclose(np.asarray(gradient["ratio"][...]) / MAX_SPAN, expected, rtol=0, atol=2e-4 * scale)

    with jax.enable_x64(True):
        loss, params = layer_loss(attention, "reference", valid, jnp.float64)
        params = jax.tree.map(lambda x: jnp.asarray(spans / MAX_SPAN), params)  # not through float32
        gradient = jax.jit(jax.grad(loss))(params)["ratio"][...]
        np.testing.assert_allclose(np.asarray(gradient) / MAX_SPAN, expected, rtol=0, atol=1e-7 * scale)
    assert (abs(expected) > 1e-3).any()


def run_in_step(attention, q, k, v):
    """As a training step does: merged inside jit. ({Loss: [...], Statistic: [...]}, gradient of the layer's own loss with respect to z)."""
    graph, params, rest = nnx.split(attention, nnx.Param, ...)

    def own_loss(params):
        layer = nnx.merge(graph, params, rest)
        layer(q, k, v)
        losses, statistics = (jax.tree.leaves(nnx.state(layer, kind)) for kind in (Loss, Statistic))
        return sum(losses), (losses, statistics)

    gradient, (losses, statistics) = jax.jit(jax.grad(own_loss, has_aux=True))(params)
    return losses, statistics, np.asarray(gradient["ratio"][...]) / attention.options.max_span


def test_penalty_and_learned_spans_leave_the_layer():
    """The penalty is `penalty` times the mean span of the heads, in positions, and nothing else in the loss."""
    attention = make(penalty=0.25)
    set_spans(attention, [4, 10])
    losses, statistics, gradient = run_in_step(attention, *jnp.asarray(inputs()[:3], jnp.float32))
    assert [x.shape for x in losses] == [()] and float(losses[0]) == pytest.approx(0.25 * 7)
    [spans] = statistics
    np.testing.assert_allclose(spans, [4, 10], rtol=1e-6)
    np.testing.assert_allclose(gradient, [0.125, 0.125], rtol=1e-6)


@pytest.mark.parametrize("ratio", [-0.02, 0.0, 1.0, 1.02])
def test_at_its_bounds_a_span_moves_inward_only(ratio):
    attention = make()
    graph, params, rest = nnx.split(attention, nnx.Param, ...)
    params = jax.tree.map(lambda x: jnp.full_like(x, ratio), params)
    spans = lambda params: nnx.merge(graph, params, rest).learned_spans()
    np.testing.assert_array_equal(spans(params), 0 if ratio <= 0 else MAX_SPAN)
    descent = {sign: -np.asarray(jax.grad(lambda p: sign * spans(p).sum())(params)["ratio"][...]) for sign in (1, -1)}
    shrink, grow = descent[1], descent[-1]
    if ratio <= 0:
        assert (shrink == 0).all() and (grow == MAX_SPAN).all()
    else:
        assert (grow == 0).all() and (shrink == -MAX_SPAN).all()


def test_a_span_comes_back_from_its_bound():
    """Gradient descent on (z - 5)^2 from either side reaches z = 5."""
    graph, params, rest = nnx.split(make(), nnx.Param, ...)
    loss = lambda params: jnp.square(nnx.merge(graph, params, rest).learned_spans() - 5).sum()
    step = jax.jit(lambda params: jax.tree.map(lambda x, g: x - 1e-4 * g, params, jax.grad(loss)(params)))
    params = jax.tree.map(lambda x: jnp.array([-0.1, 1.1]), params)
    for _ in range(60):
        params = step(params)
    np.testing.assert_allclose(np.asarray(params["ratio"][...]) * MAX_SPAN, 5, atol=1e-3)


WINDOWS = {  # spans, ramp, max_len -> the largest distance with m > 0, rounded up to 64, at most max_len
    "own-position-alone": ((0, 0), 1, 512, 0),
    "within-a-block": ((3, 10), 32, 512, 64),
    "the-largest-head-counts": ((100, 3), 32, 512, 192),
    "just-a-block": ((33, 0), 32, 512, 64),
    "just-over-a-block": ((33.5, 0), 32, 512, 128),
    "at-most-max-len": ((100, 97), 32, 150, 150),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_specialize_covers_the_largest_span(case):
    spans, ramp, max_len, window = WINDOWS[case]
    attention = make(max_span=128, ramp=ramp, max_len=max_len)
    set_spans(attention, spans)
    attention.specialize()
    assert attention.window == attention.plan(max_len, max_len)["window"] == window
    last = max(x for x in range(600) if ramp + max(spans) - x > 0)
    assert min(last, max_len) <= window < last + 64


@pytest.mark.parametrize("max_span, init, ramp", [(1024, 128, 32), (1000, 161, 32), (290, 161, 32), (77, 33, 32)])
def test_a_fresh_layer_is_specialized(max_span, init, ramp):
    """Also where z / max_span has no exact float32: the first step compiles once."""
    attention = make(max_span=max_span, init=init, ramp=ramp)
    window = attention.window
    attention.specialize()
    assert attention.window == window


def test_specializing_to_shorter_spans_changes_the_cost_and_nothing_else():
    attention = make(max_span=256, init=120, ramp=32, causal=False)
    q, k, v = jnp.asarray(inputs(200)[:3], jnp.float32)

    def run():
        graph, params, rest = nnx.split(attention, nnx.Param, ...)
        f = lambda params: (lambda o: (jnp.sin(o).sum(), o))(nnx.merge(graph, params, rest)(q, k, v))
        return jax.jit(jax.grad(f, has_aux=True))(params), attention.plan(200, 200)

    set_spans(attention, [2.5, 20])
    (wide_gradient, wide), before = run()
    attention.specialize()
    (narrow_gradient, narrow), after = run()
    assert (before["window"], after["window"]) == (192, 64) and after["computed_density"] < before["computed_density"]
    np.testing.assert_allclose(narrow, wide, rtol=0, atol=1e-6)
    np.testing.assert_allclose(narrow_gradient["ratio"][...], wide_gradient["ratio"][...], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["called", "closed-over", "merged"])
def test_a_span_beyond_the_compiled_window_does_not_pass_unnoticed(how):
    """Without `specialize`, a grown span is either served in full, refused, or makes NaN, which stops a cell; never silently cut."""
    attention = make(ramp=1)
    assert attention.window == 0
    set_spans(attention, [30, 30])
    args = jnp.asarray(inputs()[:3], jnp.float32)
    expected = attention.reference(*args)
    graph, state = nnx.split(attention)
    run = {
        "called": lambda: attention(*args),
        "closed-over": lambda: jax.jit(attention)(*args),
        "merged": lambda: jax.jit(lambda state: nnx.merge(graph, state)(*args))(state),
    }
    try:
        o = run[how]()
    except UserError as refused:
        assert "specialize" in str(refused)
        return
    if np.isnan(o).all():
        return
    np.testing.assert_allclose(o, expected, atol=1e-5)


@pytest.mark.parametrize("max_len", [T, 256], ids=["whole-window", "part-window"])
def test_spans_that_are_no_numbers_are_left_to_the_loss(max_len):
    """After a step that made the parameters NaN, the next loss is NaN and says so; nothing in between may fail first."""
    attention = make(init=20, max_len=max_len)
    window = attention.window
    set_spans(attention, [math.nan, 3])
    attention.specialize()
    assert attention.window == window
    assert np.isnan(attention(*jnp.asarray(inputs()[:3], jnp.float32))[:, :, 0]).all()


def test_flops_follow_the_learned_spans_and_serve_an_abstract_layer():
    attention = make(init=20)
    at_init = attention.flops(B, T, T)
    assert nnx.eval_shape(functools.partial(make, init=20)).flops(B, T, T) == at_init
    set_spans(attention, [0, 20])
    half = attention.flops(B, T, T)
    set_spans(attention, [0, 0])
    assert at_init - half == half - attention.flops(B, T, T) > 0
    reach = RAMP - 1  # keys at 0 to 5 positions back have m > 0 at z = 0
    assert attention.flops(B, T, T) == 4 * B * N * H * sum(min(i, reach) + 1 for i in range(T))
