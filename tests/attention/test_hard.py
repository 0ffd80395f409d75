"""Hard attention: draws follow the softmax, its estimators have the right mean, and the train step gives samples the loss that they caused."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding, PartitionSpec as P

from attn_zoo import UserError, VARIANTS, make_attention, train
from attn_zoo.attention.base import Loss, ScoreFunction
from attn_zoo.attention.hard import HARD, Hard
from attn_zoo.checkpoints import Checkpoints
from attn_zoo.ops import pallas_kernels
from tiny import ON_CPU, Staircase, make_cell

N, K, H = 4, 2, 8
SCORE = "hard(expected=0, entropy_weight=0)"
BACKENDS = ("xla", "native", "pallas") if ON_CPU == "native" else ("xla", "pallas")


def make(spec="hard", causal=False, **kwargs) -> Hard:
    return make_attention(spec, **({"num_heads": N, "num_kv_heads": K, "head_dim": H, "max_len": 4096, "causal": causal} | kwargs))


def inputs(T, S, B=3, N=N, K=K, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H))]


def probabilities(q, k, mask):
    """Softmax weights [B, N, T, S], densely."""
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, jnp.repeat(k, q.shape[2] // k.shape[2], axis=2), precision="highest") * H**-0.5
    return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))


def test_draws_follow_the_softmax():
    """Causal, with an invalid key, over 2,000 draws of 3 queries by 4 heads that share keys; heads and queries draw independently."""
    draws, T = 2000, 3
    attention = make(causal=True)
    q, k, _ = (jnp.broadcast_to(x, (draws, *x.shape[1:])) for x in inputs(T, T, B=1))
    valid = jnp.asarray([[True, False, True]])
    seeds = jax.random.randint(jax.random.key(0), (draws, N, 2), 0, 2**24).astype(jnp.float32)
    index = np.asarray(jax.jit(attention.choose)(q, k, jnp.broadcast_to(valid, (draws, T)), seeds))
    expected = np.asarray(probabilities(q[:1], k[:1], jnp.tril(jnp.ones((T, T), bool)) & valid[:, None, None])[0])
    found = (index[..., None] == np.arange(T)).mean(axis=0)
    assert (found[:, :2] == [1, 0, 0]).all()  # queries 0 and 1 see key 0 alone
    assert (abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / draws)).all()
    assert expected.min(axis=(0, 1)).max() < 0.9 and abs(np.corrcoef((index[:, :, 2] == 0).T) - np.eye(N)).max() < 4 / draws**0.5


@pytest.mark.parametrize("spec, backend", [*(("hard", backend) for backend in BACKENDS), ("hard(estimator='straight_through', temperature=0.7)", "auto")])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_a_training_call_equals_its_reference(spec, backend, causal, monkeypatch):
    """Draws, averages and gradients, over several blocks of keys: the noise of a pair does not depend on its tile."""
    monkeypatch.setattr(pallas_kernels, "INTERPRET", True)
    T, S = 40, 300
    attention, args = make(spec, causal, backend=backend), inputs(T, S)
    valid = jnp.asarray(np.random.default_rng(0).random((3, S)) > 0.2)

    def run(form):
        loss = lambda *args: (lambda o: (jnp.sin(o).sum(), o))(form(*args, valid_BS=valid, key=jax.random.key(1)))
        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*args)

    found, expected = run(lambda *args, **kwargs: attention(*args, **kwargs)), run(attention.reference)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * max(1, abs(e).max())), found, expected)
    assert all((abs(np.asarray(g)) > 0).any() for g in found[0])


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_what_it_leaves_has_the_same_gradients_on_every_backend(causal, monkeypatch):
    """Of log-probabilities and entropy by queries and keys; and in evaluation the native kernels look where XLA does."""
    monkeypatch.setattr(pallas_kernels, "INTERPRET", True)
    args = inputs(40, 130)
    valid = jnp.asarray(np.random.default_rng(0).random((3, 130)) > 0.2)

    def run(backend):
        attention = make("hard(expected=0, entropy_weight=0.1)", causal, backend=backend)
        loss = lambda *args: (lambda o, log_prob, loss: ((jnp.cos(jnp.arange(3.0)) * log_prob).sum() + loss, o))(*left(attention, *args, valid_BS=valid))
        plan = attention.plan(40, 130, True)
        assert plan["backend"] == (backend if backend == "xla" else f"{backend} + xla") and plan["without_key"] == ("native" if backend == "native" else "xla")
        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(*args), jax.jit(lambda *args: attention(*args, valid_BS=valid))(*args)

    (gradients, o), evaluated = run("xla")
    for backend in BACKENDS[1:]:
        (found, drawn), looked = run(backend)
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * max(1, abs(e).max())), found, gradients)
        np.testing.assert_array_equal(drawn, o)
        np.testing.assert_array_equal(looked, evaluated)


def left(attention, *args, **kwargs):
    """(output, log-probabilities, own loss) of a training call."""
    graph, state = nnx.split(attention)
    inner = nnx.merge(graph, state)
    o = inner(*args, key=jax.random.key(2), **kwargs)
    (log_prob,), (loss,) = (jax.tree.leaves(nnx.state(inner, kind)) for kind in (ScoreFunction, Loss))
    return o, log_prob, loss


def test_what_is_left_is_the_log_probability_of_each_example_and_the_entropy_bonus():
    """And neither knows of padding, even of queries that are not numbers."""
    T = 20
    attention = make("hard(expected=0, score_weight=0.5, entropy_weight=0.1)", causal=True)
    valid = jnp.arange(T) < jnp.asarray([20, 13, 1])[:, None]
    q, k, v = (jnp.where(valid[:, :, None, None], x, jnp.nan) for x in inputs(T, T))
    v = jnp.broadcast_to(jnp.arange(T, dtype=jnp.float32)[None, :, None, None], v.shape)  # each value is its position
    o, log_prob, loss = jax.jit(lambda *a: left(attention, *a, valid_BS=valid))(q, k, v)
    p = np.asarray(probabilities(*(jnp.nan_to_num(x) for x in (q, k)), jnp.tril(jnp.ones((T, T), bool)) & valid[:, None, None]), np.float64)
    rows = np.asarray(valid)
    chosen = np.take_along_axis(p, np.asarray(o[..., 0]).transpose(0, 2, 1)[..., None].astype(int), axis=-1)[..., 0]
    by_hand = np.where(rows[:, None], np.log(chosen), 0).sum(axis=(1, 2))
    np.testing.assert_allclose(log_prob, 0.5 * by_hand, rtol=1e-5, atol=1e-6)
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(axis=-1)
    assert float(loss) == pytest.approx(-0.1 * entropy[np.broadcast_to(rows[:, None], entropy.shape)].mean(), rel=1e-5)


def test_examples_that_take_the_average_have_no_score_term():
    args = inputs(6, 9, B=40)
    o, log_prob, _ = jax.jit(lambda *args: left(make("hard(expected=0.5)"), *args))(*args)
    sampled, average = np.asarray(log_prob) != 0, np.asarray(jax.jit(make("full"))(*args))
    assert 8 < sampled.sum() < 32
    same = np.isclose(o, average, atol=1e-6).all(axis=(1, 2, 3))
    assert (same == ~sampled).all()


def test_evaluation_takes_the_largest_score_and_leaves_nothing():
    attention, (q, k, v) = make(), inputs(5, 9)
    graph, state = nnx.split(attention)

    @jax.jit
    def trained_then_evaluated(q, k, v):
        inner = nnx.merge(graph, state)
        inner(q, k, v, key=jax.random.key(0))
        return inner(q, k, v), nnx.to_pure_dict(nnx.state(inner, (ScoreFunction, Loss)))

    o, leaves = trained_then_evaluated(q, k, v)
    assert leaves == {"log_prob": 0, "bonus": 0} and leaves["log_prob"].shape == ()
    best = probabilities(q, k, True).argmax(axis=-1)  # [B, N, T]
    for b, n in itertools.product(range(3), range(N)):
        np.testing.assert_array_equal(o[b, :, n], v[b, best[b, n], n // (N // K)])
    dq, dk, dv = jax.jit(jax.grad(lambda *args: attention(*args).sum(), (0, 1, 2)))(q, k, v)
    assert not dq.any() and not dk.any() and (dv.sum(axis=(1, 2, 3)) == 5 * N * H).all()


class Forced(Hard):
    """Looks where it is told, so that all samples can be gone through; rows of `forced` are those of all devices."""

    def __init__(self, options, dims, B=2, T=2):
        super().__init__(options, dims)
        self.forced = nnx.Variable(jnp.zeros((B, dims.num_heads, T), jnp.int32))

    def choose(self, q_BTNH, k_BSKH, valid_BS, seeds_BN2):
        rows = q_BTNH.shape[0]
        device = jax.lax.axis_index("data") if rows < self.forced.shape[0] else 0
        return jax.lax.dynamic_slice_in_dim(self.forced[...], device * rows, rows)


@pytest.mark.parametrize("baseline", [0.0, 3.0])
def test_the_estimator_has_the_gradient_of_the_expected_loss(baseline):
    """Over all samples of 2 queries and 3 keys: sum of p (dL + (L - baseline) d log p) = d sum of p L."""
    T, S = 2, 3
    template = make(SCORE, num_heads=1, num_kv_heads=1)
    attention = Forced(template.options, template.dims, B=1)
    attention.variant = template.variant
    graph, state = nnx.split(attention)
    args = inputs(T, S, B=1, N=1, K=1)
    weights = jnp.asarray(np.random.default_rng(5).normal(size=(T, H)), jnp.float32)
    samples = jnp.asarray(list(itertools.product(range(S), repeat=T)))[:, None, None]

    def run(sample, q, k, v):
        """(a loss in which both queries' outputs interact, log p) of one sample."""
        layer = nnx.merge(graph, state)
        layer.forced = layer.forced.replace(sample)
        o = layer(q, k, v, key=jax.random.key(0))[0, :, 0]
        return jnp.tanh((o * weights).sum()) ** 2 + (o[0] * o[1]).sum(), layer.log_prob[...][0]

    def surrogate(sample, *args):
        loss, log_prob = run(sample, *args)
        return loss + jax.lax.stop_gradient(loss - baseline) * log_prob, log_prob

    def expected_loss(*args):
        losses, _ = jax.vmap(run, (0, None, None, None))(samples, *args)
        p = probabilities(args[0], args[1], True)[0, 0]
        return (p[0, samples[:, 0, 0, 0]] * p[1, samples[:, 0, 0, 1]] * losses).sum()

    estimates, log_probs = jax.jit(jax.vmap(jax.grad(surrogate, (1, 2, 3), has_aux=True), (0, None, None, None)))(samples, *args)
    assert float(jnp.exp(log_probs).sum()) == pytest.approx(1, abs=1e-6)
    mean = [jnp.einsum("X,X...->...", jnp.exp(log_probs), g) for g in estimates]
    exact = jax.jit(jax.grad(expected_loss, (0, 1, 2)))(*args)
    assert all(abs(e).max() > 0.01 for e in exact)
    jax.tree.map(lambda m, e: np.testing.assert_allclose(m, e, rtol=0, atol=1e-5), mean, list(exact))


@pytest.mark.parametrize("devices, remat", [(1, True), (2, False)], ids=["1-device-remat", "2-devices"])
def test_training_steps_have_the_gradient_of_the_expected_loss(monkeypatch, devices, remat):
    """Over all samples of two sequences of two tokens, with unequal numbers of targets: whatever the baseline and on any mesh."""
    monkeypatch.setitem(VARIANTS, "hard", dataclasses.replace(HARD, build=lambda options, dims, *, shared, rngs: Forced(options, dims)))
    monkeypatch.setattr(train, "make_optimizer", lambda c: optax.sgd(1.0))  # so that a step is a gradient
    cell = make_cell(SCORE, T=2, tokens_per_step=4, model={"N": 1, "remat": remat})
    task, mesh = Staircase(2), train.make_mesh(devices)
    model = train.Model(cell, task)
    batch = task.eval_batches(2, 4)[0] | {"weights": np.array([[1, 1], [0, 1]], np.float32)}
    step = train.make_steps(model, cell.train, mesh).train
    start = jax.device_get(train.fresh_state(model, cell) | {"step": jnp.asarray(7), "baseline": jnp.asarray(1.3)})
    # Query 0 sees key 0 alone; query 1 of each sequence sees two.
    samples = [jnp.asarray([[[0, a]], [[0, b]]], jnp.int32) for a, b in itertools.product((0, 1), repeat=2)]

    def with_sample(rest, sample):
        return jax.tree.map(lambda x: sample if x.shape == (2, 1, 2) else jnp.asarray(x), rest)

    def run(params, sample):
        """(mean loss over the targets, log p) of one sample, outside of the step."""
        layer = model.bind(params, with_sample(start["rest"], sample))
        logits = layer(jnp.asarray(batch["inputs"]), key=jax.random.key(0))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]) * batch["weights"]
        (log_prob,) = jax.tree.leaves(nnx.state(layer, ScoreFunction))
        return losses.sum() / batch["weights"].sum(), log_prob.sum()

    def expected_loss(params):
        losses, log_probs = zip(*(run(params, sample) for sample in samples))
        return sum(jnp.exp(log_p) * loss for loss, log_p in zip(losses, log_probs)), jnp.exp(jnp.stack(log_probs))

    exact, p = jax.jit(jax.grad(expected_loss, has_aux=True))(start["params"])
    assert float(p.sum()) == pytest.approx(1, abs=1e-6)
    mean = jax.tree.map(np.zeros_like, start["params"])
    for sample, p_sample in zip(samples, p):
        state = jax.device_put(start | {"rest": with_sample(start["rest"], sample)}, NamedSharding(mesh, P()))
        after, metrics = step(state, jax.device_put(batch, NamedSharding(mesh, P("data"))))
        mean = jax.tree.map(lambda m, a, b: m + p_sample * (a - np.asarray(b)), mean, start["params"], after["params"])
        assert float(after["baseline"]) == pytest.approx(0.9 * 1.3 + 0.1 * float(metrics["loss"]))
        assert jax.tree.map(jnp.shape, after["rest"]) == jax.tree.map(jnp.shape, start["rest"])
    jax.tree.map(lambda m, e: np.testing.assert_allclose(m, e, rtol=0, atol=1e-5), mean, exact)
    query = exact["blocks"][0]["mixer"]["query"]
    assert abs(query).max() > 1e-3, "the sampled position learns nothing here: the test is void"


def test_checkpoints_carry_the_baseline(tmp_path):
    """A run that went on from its middle ends bit for bit as it did the first time; the average is that of the curve."""
    cell = make_cell("hard", steps=4, checkpoint_every=2)
    task = Staircase(cell.seq_len)

    def run():
        checkpoints = Checkpoints(tmp_path)
        trained = train.train(cell, task, train.Model(cell, task), train.make_mesh(1), checkpoints, lambda **event: None)
        checkpoints.manager.close()
        return trained

    whole, resumed = run(), run()
    assert (whole.resumed_from, resumed.resumed_from) == (None, 2)
    assert whole.curve["train_loss"] == resumed.curve["train_loss"] and whole.scores == resumed.scores
    average = 0.0
    for loss in whole.curve["train_loss"]:
        average = 0.9 * average + 0.1 * loss
    for trained in (whole, resumed):
        assert float(trained.state["baseline"]) == pytest.approx(average, rel=1e-5)


@pytest.mark.parametrize("spec", [SCORE, "hard", "hard(estimator='straight_through')"])
def test_both_estimators_learn_where_to_look(spec):
    """One query that is rewarded for looking at key 2 of 4: it comes to do so."""
    attention = make(spec, num_heads=1, num_kv_heads=1)
    graph, state = nnx.split(attention)
    B, S = 16, 4
    k, v = (jnp.broadcast_to(x * jnp.eye(S, H)[None, :, None], (B, S, 1, H)) for x in (H**0.5, 1.0))

    def objective(q, key):
        layer = nnx.merge(graph, state)
        losses = 1 - layer(jnp.broadcast_to(q, (B, 1, 1, H)), k, v, key=key)[:, 0, 0, 2]
        log_probs = sum(jax.tree.leaves(nnx.state(layer, ScoreFunction)))
        own = sum(jax.tree.leaves(nnx.state(layer, Loss)))
        return (losses + jax.lax.stop_gradient(losses - 0.5) * log_probs).mean() + own

    @jax.jit
    def learn(q):
        return jax.lax.scan(lambda q, key: (q - jax.grad(objective)(q, key), None), q, jax.random.split(jax.random.key(0), 100))[0]

    assert float(jax.nn.softmax(learn(jnp.zeros(H))[:S])[2]) > 0.9


@pytest.mark.parametrize("spec", ["hard", "hard(estimator='straight_through')"])
def test_training_makes_no_quadratic_array(spec):
    T = 2048
    attention = make(spec, True, num_heads=2)
    graph, state = nnx.split(attention)

    def objective(q, k, v):
        layer = nnx.merge(graph, state)
        return layer(q, k, v, key=jax.random.key(0)).sum() + sum(x.sum() for x in jax.tree.leaves(nnx.state(layer, (ScoreFunction, Loss))))

    x = jax.ShapeDtypeStruct((1, T, 2, H), jnp.float32)
    jaxpr = jax.make_jaxpr(jax.grad(objective, (0, 1, 2)))(x, x, x).jaxpr

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (int(np.prod(var.aval.shape)) for var in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                yield from sizes(inner)

    assert max(sizes(jaxpr)) < T * T


def test_options_are_checked():
    for spec, message in {
        "hard(estimator='reinforce')": "estimator='reinforce': must be one of 'score', 'straight_through'",
        "hard(temperature=0)": "temperature=0: must be above 0",
        "hard(expected=1.5)": "expected=1.5: must be a number of at least 0 and at most 1",
    }.items():
        with pytest.raises(UserError, match=message):
            make(spec)
