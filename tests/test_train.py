"""Training: one golden step, AdamW and the loss against plain NumPy, and what must change nothing: devices, windows, evaluations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec as P

from attn_zoo import train
from attn_zoo.attention.adaptive_span import AdaptiveSpan
from attn_zoo.config import Train
from attn_zoo.tasks import load_task
from tiny import Staircase, make_cell

SPANS = "adaptive_span(max_span=16, ramp=4, init=6, penalty=0.01)"


def run(cell, devices=1, model=None, report=lambda **event: None) -> train.Trained:
    task = Staircase(cell.seq_len)
    return train.train(cell, task, model or train.Model(cell, task), train.make_mesh(devices), None, report)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Many of these tests need the same program, and compiling is what they wait for."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # or the settings of its first use would stay
        if values is settings:
            yield


@pytest.fixture(scope="module")
def plain(compiled_once):
    """The tiny cell, trained."""
    return run(make_cell())


def steps_of(cell, devices=1):
    """(model, steps, params, rest, one batch of 4 rows), placed on so many devices."""
    task, mesh = Staircase(cell.seq_len), train.make_mesh(devices)
    model = train.Model(cell, task)
    batch = jax.device_put(task.eval_batches(4, 4 * cell.seq_len)[0], NamedSharding(mesh, P("data")))
    params, rest = jax.device_put(model.init(), NamedSharding(mesh, P()))
    return model, train.make_steps(model, cell.train, mesh), params, rest, batch


def assert_close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


def entropy_and_correct(model, params, rest, batch):
    """Each scored target's cross-entropy and whether it is the most likely, in float64, outside of shard_map and jit."""
    logits = np.asarray(model.bind(params, rest)(jnp.asarray(batch["inputs"])), np.float64)
    targets, scored = np.asarray(batch["targets"]), np.asarray(batch["weights"]) == 1
    picked = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (np.log(np.exp(logits).sum(axis=-1)) - picked)[scored], (logits.argmax(axis=-1) == targets)[scored]


def test_golden_step():
    cell = make_cell()
    model, steps, params, rest, batch = steps_of(cell)
    losses, state = [], train.fresh_state(model, cell)
    for _ in range(2):
        state, metrics = steps.train(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses == pytest.approx([2.078758, 1.996894], abs=1e-5), (
        "One training step gives other losses than it did. If initialization, model, loss or optimizer were changed on purpose, "
        f"pin the new ones here: {losses}"
    )


def test_loss_falls_far_below_chance(plain):
    losses = plain.curve["train_loss"]
    assert losses[0] == pytest.approx(math.log(8), abs=0.5) and losses[-1] < 0.5


def test_optimizer_is_adamw_that_clips_and_decays_matrices_only():
    c = Train(steps=8, warmup=3, lr=0.1, final_lr=0.2, weight_decay=0.3, b1=0.8, b2=0.9, clip=1.0)
    rng = np.random.default_rng(0)
    shapes = {"matrix": (3, 4), "heads": (2, 3, 2), "vector": (5,), "scalar": ()}
    draw = lambda scale: {name: np.asarray(rng.normal(size=shape) * scale) for name, shape in shapes.items()}
    by_hand, m, v = draw(1.0), {name: 0.0 for name in shapes}, {name: 0.0 for name in shapes}
    optimizer = train.make_optimizer(c)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), by_hand)
    state = optimizer.init(params)
    for t, scale in enumerate((10.0, 0.01, 3.0, 0.05, 0.1, 5.0)):  # some are clipped, some are not
        grads = draw(scale)
        updates, state = optimizer.update(jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        lr = c.lr * (t / 3 if t < 3 else 0.2 + 0.8 * (1 + math.cos(math.pi * (t - 3) / 5)) / 2)
        shrink = min(1.0, c.clip / math.sqrt(sum((g**2).sum() for g in grads.values())))
        for name, g in grads.items():
            m[name] = c.b1 * m[name] + (1 - c.b1) * shrink * g
            v[name] = c.b2 * v[name] + (1 - c.b2) * (shrink * g) ** 2
            step = m[name] / (1 - c.b1 ** (t + 1)) / (np.sqrt(v[name] / (1 - c.b2 ** (t + 1))) + 1e-8)
            decay = c.weight_decay * by_hand[name] if by_hand[name].ndim >= 2 else 0.0
            by_hand[name] = by_hand[name] - lr * (step + decay)
        assert_close(params, by_hand)


@pytest.mark.parametrize("batch, devices", [(1, 1), (2, 2), (3, 1), (4, 4), (6, 2), (8, 4)])
def test_the_mesh_divides_the_batch(batch, devices):
    assert train.make_mesh(batch).size == devices


@pytest.mark.parametrize("variant", ["full", SPANS])
def test_devices_change_nothing(variant):
    cell = make_cell(variant, steps=4, lr=1e-3)
    one, four = run(cell, devices=1), run(cell, devices=4)
    assert_close(four.curve["train_loss"], one.curve["train_loss"])
    assert_close(four.scores, one.scores)
    assert_close(four.state["params"], one.state["params"])
    assert_close(four.state["rest"], one.state["rest"])  # statistics and own losses are those of one device


def test_devices_keep_the_draw_of_the_first_of_them():
    """The mean of their random directions would not be orthogonal, nor as long."""
    cell = make_cell("performer(features=8, redraw=True)")
    model, steps, _, rest, batch = steps_of(cell, devices=4)
    [before] = jax.tree.leaves(jax.tree.map(np.asarray, rest))
    state = jax.device_put(train.fresh_state(model, cell), NamedSharding(train.make_mesh(4), P()))
    [found] = jax.tree.leaves(steps.train(state, batch)[0]["rest"])
    assert found.shape == (8, 8) and not np.allclose(found, before)
    products = np.asarray(found @ found.T)
    np.testing.assert_allclose(products, np.diag(np.diag(products)), atol=1e-4)
    assert len({np.asarray(shard.data).tobytes() for shard in found.addressable_shards}) == 1


@pytest.mark.parametrize("devices", [1, 4])
def test_the_loss_is_the_mean_over_all_scored_targets_of_the_batch(devices):
    model, steps, params, rest, batch = steps_of(make_cell(), devices)
    per_row = np.asarray(batch["weights"]).sum(axis=1)
    assert len(set(per_row)) > 1, "rows with as many targets each would not tell a mean of means from the mean"
    entropies, correct = entropy_and_correct(model, params, rest, batch)
    metrics = steps.forward_backward(params, rest, batch)[0]
    assert float(metrics["loss"]) == pytest.approx(entropies.mean(), abs=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx(correct.mean(), abs=1e-6)


def test_a_layers_own_loss_joins_the_objective():
    """Adaptive span's penalty is penalty * max_span * mean(ratio) a layer: its gradient is the same for every head, and no other's."""
    grads, own = {}, {}
    for penalty in (0.0, 0.01):
        cell = make_cell(f"adaptive_span(max_span=16, ramp=4, init=6, penalty={penalty})", model={"layers": 2})
        _, steps, params, rest, batch = steps_of(cell, devices=4)
        metrics, grads[penalty], _ = steps.forward_backward(params, rest, batch)
        own[penalty] = float(metrics["own_loss"])
    assert own == {0.0: 0.0, 0.01: pytest.approx(2 * 0.01 * 6)}
    of_penalty = jax.tree_util.tree_leaves_with_path(jax.tree.map(jnp.subtract, grads[0.01], grads[0.0]))
    assert sum(path[-1].key == "ratio" for path, _ in of_penalty) == 2
    for path, grad in of_penalty:
        assert_close(grad, np.full(grad.shape, 0.01 * 16 / 2 if path[-1].key == "ratio" else 0.0), atol=1e-6)


def test_evaluation_is_the_mean_over_the_targets_of_every_sequence_once():
    cell = make_cell(eval_tokens=16 * 7)  # 7 sequences in batches of 4: the last has an empty row
    trained, task = run(cell), Staircase(cell.seq_len)
    model = train.Model(cell, task)
    rows = [{name: array[None] for name, array in example.items()} for example in task.eval_examples(16 * 7, "validation")]
    scores = [entropy_and_correct(model, trained.state["params"], trained.state["rest"], row) for row in rows]
    assert len(scores) == 7
    entropies, correct = (np.concatenate(x) for x in zip(*scores))
    assert trained.scores == {"eval_loss": pytest.approx(entropies.mean(), abs=1e-5), "eval_accuracy": pytest.approx(correct.mean(), abs=1e-6), "eval_exact": np.mean([c.all() for _, c in scores])}


def test_evaluations_on_the_way_fill_the_curve_and_change_nothing(plain):
    events = []
    watched = run(make_cell(log_every=7, eval_every=8), report=lambda **event: events.append(event))
    assert watched.curve["step"] == [1, 7, 14, 21, 28, 30]
    assert watched.curve["train_loss"] == [plain.curve["train_loss"][step - 1] for step in watched.curve["step"]]  # bit for bit
    assert watched.curve["eval_step"] == [8, 16, 24, 30] and plain.curve["eval_step"] == [30]
    assert watched.curve["eval_loss"][-1:] == plain.curve["eval_loss"] == [plain.scores["eval_loss"]]
    seconds = watched.curve["seconds"]
    assert len(seconds) == 6 and 0 < seconds[0] and seconds == sorted(seconds)
    assert [(e["step"], e["loss"]) for e in events] == list(zip(watched.curve["step"], watched.curve["train_loss"]))
    assert all(e["tokens_per_s"] > 0 for e in events)
    assert (watched.compilations, watched.resumed_from) == (1, None)


def test_a_step_may_be_of_one_sequence():
    batch = next(Staircase(8).train_iterator(1, seed=0))
    assert {name: array.shape for name, array in batch.items()} == dict.fromkeys(("inputs", "targets", "weights", "valid"), (1, 8))


def test_the_seed_decides_parameters_data_and_dropout(plain):
    first, again, other = (run(make_cell(seed=seed, model={"dropout": 0.3})).curve["train_loss"] for seed in (0, 0, 1))
    assert first == again
    assert all(a != b for a, b in zip(first, other)) and all(a != b for a, b in zip(first, plain.curve["train_loss"]))


def test_a_loss_that_is_not_finite_stops_training():
    with pytest.raises(train.Diverged, match="nan at step [234]$"):
        run(make_cell(lr=1e30))


def test_a_divergence_that_only_evaluation_sees_is_one():
    """The loss of a step is that before its update: what the last update has done, only evaluation can tell."""
    with pytest.raises(train.Diverged):
        run(make_cell(steps=1, lr=1e30))


def test_remat_changes_nothing_but_memory():
    found = []
    for remat in (False, True):
        _, steps, params, rest, batch = steps_of(make_cell(SPANS, model={"remat": remat}))
        found.append(steps.forward_backward(params, rest, batch))
    assert_close(*found)


def test_bfloat16_trains_float32_parameters(plain):
    rounded = run(make_cell(model={"dtype": "bfloat16"}))
    assert {x.dtype for x in jax.tree.leaves(rounded.state["params"])} == {jnp.dtype("float32")}
    losses = rounded.curve["train_loss"]
    assert losses[0] == pytest.approx(plain.curve["train_loss"][0], abs=0.01) and losses != plain.curve["train_loss"]
    assert losses[-1] < 0.5


class Watched(train.Model):
    """Notes (window, span of every head) of its one layer whenever the loop has looked at the parameters."""

    def specialize(self, params, rest):
        changed = super().specialize(params, rest)
        attention = self.bind(params, rest).blocks[0].mixer.attention
        self.seen = getattr(self, "seen", []) + [(attention.window, np.asarray(attention.learned_spans()))]
        return changed


def test_the_computed_window_follows_the_spans_and_changes_nothing_but_cost(monkeypatch):
    cell = make_cell("adaptive_span(max_span=160, ramp=16, init=16, penalty=0)", T=160, tokens_per_step=320, steps=6, lr=0.1, eval_every=1)
    model = Watched(cell, Staircase(160))
    trained = run(cell, model=model)
    windows = [window for window, _ in model.seen]
    assert len(windows) == 1 + 6, "before the first step and after every one"
    for window, spans in model.seen:
        assert window >= math.ceil(16 + spans.max()) - 1, "a key with a weight is not computed"
        assert window < 16 + spans.max() + 64, "more is computed than the spans need"
    assert max(windows) > windows[0], "no span grew over a block: the run does not test what it should"
    assert trained.compilations == 1 + sum(a != b for a, b in zip(windows, windows[1:]))
    ((name, spans),) = model.statistics(trained.state["params"], trained.state["rest"]).items()
    assert name.endswith("spans") and spans == pytest.approx(model.seen[-2][1].tolist(), abs=1e-3)  # those of the last step

    monkeypatch.setattr(AdaptiveSpan, "_window", lambda self, span: self.dims.max_len)
    widest = run(cell)
    assert widest.compilations == 1
    for loss in ("train_loss", "eval_loss"):
        assert_close(trained.curve[loss], widest.curve[loss], atol=1e-4)  # the large steps magnify what rounding differs


def test_label_smoothing_is_cross_entropy_with_smoothed_targets_in_training_alone():
    import optax

    model, _, params, rest, batch = steps_of(make_cell())
    logits = model.bind(params, rest)(jnp.asarray(batch["inputs"]))
    smoothed = optax.smooth_labels(jax.nn.one_hot(batch["targets"], logits.shape[-1]), 0.2)
    expected = (optax.softmax_cross_entropy(logits, smoothed) * batch["weights"]).sum()
    sums, _ = model.sums(params, rest, batch, None, smoothing=0.2)
    assert float(sums["objective"]) == pytest.approx(float(expected), rel=1e-5)
    plain, _ = model.sums(params, rest, batch, None)
    assert float(plain["objective"]) == float(plain["entropy"]) == pytest.approx(float(sums["entropy"]))


def test_exact_match_counts_examples_without_a_mistake():
    """Batches hold rows without any scored target (padding of the last one), which count nowhere."""
    model, steps, params, rest, batch = steps_of(make_cell())
    logits = np.asarray(model.bind(params, rest)(jnp.asarray(batch["inputs"])))
    targets, weights = logits.argmax(axis=-1), np.ones(logits.shape[:2], np.float32)
    targets[1, 3] = (targets[1, 3] + 1) % 8
    targets[2, 5], weights[2, 5] = (targets[2, 5] + 1) % 8, 0  # a mistake that is not scored
    weights[3] = 0
    sums = steps.forward(params, rest, {**batch, "targets": jnp.asarray(targets), "weights": jnp.asarray(weights)})
    assert (int(sums["exact"]), int(sums["examples"])) == (2, 3)


def test_what_a_model_writes_is_judged_by_the_task(tmp_path):
    """Greedily, each word the likeliest behind those that it wrote itself, from the picture alone; no word behind the end."""
    cell = make_cell("dot", T=11, task="shapes(max_shapes=2, train_examples=8, validation_examples=5, test_examples=1)", model={"body": "recurrent", "D": 8})
    task = load_task(cell.task, cell.seq_len, str(tmp_path))
    begin, end = task.begin_end
    model = train.Model(cell, task)
    params, rest = model.init()
    readout = params["readout"]
    params["readout"] = readout.at[end].set(0.3 * readout.mean(axis=0)) * 30  # says many things, and ends now and then
    batches = task.eval_batches(4, tokens=10**6)
    judged = []
    assert task.judges_writing
    task.written_scores = lambda *arrays: judged.extend(arrays) or {"eval_slots": 0.5}
    assert train.evaluate_written(model, {"params": params, "rest": rest}, task, batches) == {"eval_slots": 0.5}
    written, targets = judged
    np.testing.assert_array_equal(targets, np.concatenate([batch["targets"] for batch in batches]))
    bound, source = model.bind(params, rest), jnp.concatenate([batch["source"] for batch in batches])
    inputs, ended = np.full((8, 12), begin), np.zeros(8, bool)
    for t in range(11):
        inputs[:, t + 1] = np.where(ended, 0, np.asarray(bound(jnp.asarray(inputs[:, :-1]), source=source))[:, t].argmax(axis=-1))
        ended |= inputs[:, t + 1] == end
    np.testing.assert_array_equal(written, inputs[:, 1:])


def test_a_network_for_pictures_trains_and_its_gate_is_recorded(tmp_path):
    task = "shapes(objective='same', train_examples=32, validation_examples=8, test_examples=1)"
    cell = make_cell("axial(width=8)", T=64, task=task, tokens_per_step=4 * 64, steps=3, model={"body": "convnet", "D": 4, "layers": 3, "N": 1})
    loaded = load_task(cell.task, cell.seq_len, str(tmp_path))
    model = train.Model(cell, loaded)
    trained = train.train(cell, loaded, model, train.make_mesh(2), None, lambda **event: None)
    assert len(trained.curve["train_loss"]) == 3 and trained.probes == {}
    ((name, gate),) = model.statistics(trained.state["params"], trained.state["rest"]).items()
    assert name == "net.attention.learned_gate" and 0 < abs(gate) < 0.1  # two steps of 0.02, before the third
