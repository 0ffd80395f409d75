"""Training: the state, the jitted steps, the loop, and resuming from Orbax checkpoints.

Data-parallel over a one-axis mesh of local devices: the state is replicated, batches are split. Inside shard_map every device runs
the model on its own rows, so no variant has to know how its loops would be partitioned, and gradients are summed across devices.
The model is split into a static graph and pure dicts, which cost a third of a Flax State to dispatch.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from attn_zoo import config
from attn_zoo.attention import Drawn, Loss, ScoreFunction, Statistic
from attn_zoo.measure import compile_timed
from attn_zoo.models import compiler_options, read_variant
from attn_zoo.models.generation import write
from attn_zoo.tasks.base import Batch, Task

if TYPE_CHECKING:
    from attn_zoo.checkpoints import Checkpoints

State = dict[str, Any]  # params, rest (variables that are not trained), optimizer, baseline, key, step: one pytree of arrays
BASELINE_DECAY = 0.9  # of the moving average of the loss that samples are judged by. Xu et al. 2015, sec. 4.1


class Diverged(Exception):
    """The training loss is no longer finite."""


class Model:
    """A model as a static graph and two pure dicts of arrays: what is trained, and the rest."""

    def __init__(self, cell: config.Cell, task: Task):
        entry = read_variant(cell.variant, cell.model)

        def build() -> nnx.Module:
            return entry.body.build(
                entry.model,
                variant=list(entry.specs),
                attention=cell.attention,
                inputs_vocab=task.inputs_vocab,
                num_outputs=task.num_outputs,
                max_len=cell.seq_len,
                causal=task.causal,
                per_token=task.per_token,
                source_vocab=task.source_vocab,
                source_len=task.source_len,
                image_shape=task.image_shape,
                rngs=nnx.Rngs(cell.seed),
            )

        self._build = build
        self.padded = task.padded
        self.compiler_options = compiler_options(entry.model)
        self.abstract = nnx.eval_shape(build)
        self.graph, self._params, self._rest = nnx.split(self.abstract, nnx.Param, ...)
        self.drawn = nnx.to_pure_dict(jax.tree.map(lambda x: isinstance(x, Drawn), self._rest, is_leaf=lambda x: isinstance(x, nnx.Variable)))
        # Only such layers make the loop look at parameter values between steps.
        self.specializes = any(attention.specializes for attention, _, _ in self.abstract.attentions(cell.seq_len))

    def init(self) -> tuple[dict, dict]:
        """(params, rest), drawn in one jitted call."""

        def init():
            _, params, rest = nnx.split(self._build(), nnx.Param, ...)
            return nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

        return jax.jit(init)()

    def bind(self, params: dict, rest: dict) -> nnx.Module:
        """The module with these arrays in it."""
        states = []
        for template, pure in ((self._params, params), (self._rest, rest)):
            state = jax.tree.map(lambda x: x, template)
            nnx.replace_by_pure_dict(state, pure)
            states.append(state)
        return nnx.merge(self.graph, *states)

    def specialize(self, params: dict, rest: dict) -> bool:
        """Renews what layers derive from parameter values (adaptive span's window); True if steps must be compiled again."""
        model = self.bind(params, rest)
        for attention, _, _ in model.attentions(model.max_len):
            attention.specialize()
        graph = nnx.graphdef(model)
        changed, self.graph = graph != self.graph, graph
        return changed

    def statistics(self, params: dict, rest: dict) -> dict[str, Any]:
        """What layers left to be recorded, by path."""
        leaves = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(self.bind(params, rest), Statistic)))[0]
        return {".".join(str(k.key) for k in path): np.asarray(value).tolist() for path, value in leaves}

    def logits(self, model: nnx.Module, batch: Batch, key: jax.Array | None) -> jax.Array:
        """What the model makes of a batch."""
        source = {"source": batch["source"], "source_valid": batch.get("source_valid")} if "source" in batch else {}
        source |= {"candidates": batch["candidates"]} if "candidates" in batch else {}
        return model(batch["inputs"], valid_BT=batch["valid"] if self.padded else None, key=key, **source)

    def sums(
        self, params: dict, rest: dict, batch: Batch, key: jax.Array | None, baseline: jax.Array | float = 0.0, smoothing: float = 0.0
    ) -> tuple[dict[str, jax.Array], dict]:
        """Over the scored targets of the batch, sums of {entropy (nats), correct, weight}, and of the layers' own terms. And the rest afterwards.

        `exact` counts the examples (`examples`) of which every scored target is predicted: greedy generation would write them without a mistake, since up
        to the first one it has read what teacher forcing reads. `objective` is the entropy with label smoothing, where there is any. `own` is the layers' own loss. `score` has a meaning only as a term of the objective beside `entropy`: its gradient is, over examples, the
        sum of (entropy - baseline a target) d log p(what layers sampled).
        """
        model = self.bind(params, rest)
        logits = self.logits(model, batch, key)
        weights = batch["weights"]
        entropies = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]) * weights
        objectives = entropies
        if smoothing:  # the other share goes to all outputs alike: their mean cross-entropy
            uniform = jax.nn.logsumexp(logits, axis=-1) - logits.mean(axis=-1)
            objectives = (1 - smoothing) * entropies + smoothing * uniform * weights
        correct = logits.argmax(axis=-1) == batch["targets"]
        scored = per_example(weights) > 0
        _, _, scores, others = nnx.split(model, nnx.Param, ScoreFunction, ...)
        advantages = jax.lax.stop_gradient(per_example(entropies) - baseline * per_example(weights))
        sums = {
            "entropy": entropies.sum(),
            "objective": objectives.sum(),
            "correct": (correct * weights).sum(),
            "exact": (scored & (per_example(~correct & (weights > 0)) == 0)).sum(),
            "examples": scored.sum(),
            "weight": weights.sum(),
            "own": sum((jnp.sum(x) for x in jax.tree.leaves(nnx.state(model, Loss))), jnp.zeros(())),
            "score": sum(((advantages * log_probs).sum() for log_probs in jax.tree.leaves(scores)), jnp.zeros(())),
        }
        # What was sampled is of this step and this device's rows: it does not stay.
        rest = nnx.merge_state(others, jax.tree.map(lambda _: jnp.zeros(()), scores))
        return sums, nnx.to_pure_dict(rest)


def baseline_of(state: State) -> jax.Array:
    """What the losses of samples are compared with, nats a target.

    The average starts at zero, and what it lacks in the first steps is made up for; before the first, there is nothing to compare with.
    """
    return state["baseline"] / jnp.maximum(1 - BASELINE_DECAY ** state["step"], 1 - BASELINE_DECAY)


def per_example(x: jax.Array) -> jax.Array:
    """The sum over all that belongs to an example, [B]."""
    return x.reshape(len(x), -1).sum(axis=1)


def make_mesh(batch: int) -> Mesh:
    """All local devices in one axis, or as many of them as divide the batch."""
    devices = jax.local_devices()
    return Mesh(np.array(devices[: math.gcd(batch, len(devices))]), "data")


def make_optimizer(train: config.Train) -> optax.GradientTransformation:
    """AdamW with linear warm-up, decay and clipping; what has two axes or more decays, what has one (norms, biases, spans) does not."""
    if train.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(0.0, train.lr, train.warmup, max(train.steps, train.warmup + 1), train.lr * train.final_lr)
    else:
        schedule = lambda step: train.lr * jnp.minimum((step + 1) / train.warmup, jnp.sqrt(train.warmup / (step + 1)))
    matrices = lambda params: jax.tree.map(lambda x: x.ndim >= 2, params)
    adamw = optax.adamw(schedule, b1=train.b1, b2=train.b2, weight_decay=train.weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(train.clip), adamw)


class Steps(NamedTuple):
    """Jitted functions of one model; batches are split over the mesh, all else is replicated."""

    train: Callable  # (state, batch) -> (state, metrics); the state is donated
    forward: Callable  # (params, rest, batch) -> sums
    forward_backward: Callable  # (params, rest, batch) -> (metrics, gradients, rest)


def make_steps(model: Model, train: config.Train, mesh: Mesh) -> Steps:
    """The steps of `model` as it is specialized now."""
    optimizer = make_optimizer(train)
    devices = mesh.size

    def gradients(params, rest, batch, key, baseline):
        """Metrics over the global batch, gradients of mean cross-entropy plus what the layers add to it, and the rest; on one device's rows."""

        def objective(params):
            sums, after = model.sums(params, rest, batch, key, baseline, train.label_smoothing if key is not None else 0.0)
            weight = jax.lax.psum(sums["weight"], "data")
            return (sums["objective"] + sums["score"]) / weight + sums["own"] / devices, (sums, after)

        grads, (sums, after) = jax.grad(objective, has_aux=True)(params)
        sums, grads = jax.lax.psum((sums, grads), "data")
        after = jax.tree.map(across_devices, after, model.drawn)
        metrics = {"loss": sums["entropy"] / sums["weight"], "accuracy": sums["correct"] / sums["weight"], "own_loss": sums["own"] / devices}
        return metrics, grads, after

    def across_devices(x, drawn):
        """State that all devices agree on: the mean of what each made of its rows, or the first one's draw."""
        if drawn:
            return jax.lax.psum(jnp.where(jax.lax.axis_index("data") == 0, x, jnp.zeros_like(x)), "data")
        return jax.lax.pmean(x, "data") if jnp.issubdtype(x.dtype, jnp.floating) else x

    def train_step(state, batch):
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
        metrics, grads, rest = gradients(state["params"], state["rest"], batch, jax.random.fold_in(key, jax.lax.axis_index("data")), baseline_of(state))
        updates, opt_state = optimizer.update(grads, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        moved = {"baseline": BASELINE_DECAY * state["baseline"] + (1 - BASELINE_DECAY) * metrics["loss"], "step": state["step"] + 1}
        return state | {"params": params, "rest": rest, "optimizer": opt_state} | moved, metrics

    def forward(params, rest, batch):
        return jax.lax.psum(model.sums(params, rest, batch, None)[0], "data")

    def forward_backward(params, rest, batch):
        return gradients(params, rest, batch, None, 0.0)

    def sharded(function, arguments, **jit):
        # Replication is by construction (everything returned was summed over devices); tracking it through custom gradients would fail.
        specs = (P(),) * (arguments - 1) + (P("data"),)
        inside = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
        return jax.jit(inside, compiler_options=model.compiler_options, **jit)

    return Steps(sharded(train_step, 2, donate_argnums=0), sharded(forward, 3), sharded(forward_backward, 3))


def fresh_state(model: Model, cell: config.Cell) -> State:
    """The state before the first step."""
    params, rest = model.init()
    key = jax.random.key_data(jax.random.key(cell.seed, impl="threefry2x32"))
    optimizer = jax.jit(make_optimizer(cell.train).init)(params)
    return {"params": params, "rest": rest, "optimizer": optimizer, "baseline": jnp.zeros(()), "key": key, "step": jnp.zeros((), jnp.int32)}


def batch_size(cell: config.Cell) -> int:
    """Sequences a step: as many as tokens_per_step allows, at least one."""
    return max(1, cell.train.tokens_per_step // cell.seq_len)


@dataclasses.dataclass
class Trained:
    """What training leaves: the state, the curve, the scores on held-out data, and what it took."""

    state: State
    curve: dict[str, list]
    scores: dict[str, float]
    probes: dict[str, dict[str, float]]  # the same on each further split of the task
    written: dict[str, float]  # what the task says of targets that the model wrote by itself, where it says anything
    compile: dict[str, float]  # of the first compilation
    compilations: int
    train_step: Callable  # compiled, as the model is specialized at the end
    resumed_from: int | None  # step


def train(cell: config.Cell, task: Task, model: Model, mesh: Mesh, checkpoints: "Checkpoints | None", report: Callable[..., None]) -> Trained:
    """Trains one cell to its last step and evaluates it, from its newest readable checkpoint if there is one. Raises Diverged on NaN.

    `report(step=, loss=, tokens_per_s=)` hears of progress. The curve's seconds are of training alone: no compilation, evaluation or saving.
    """
    c, B = cell.train, batch_size(cell)
    split, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    batches = task.train_iterator(B, cell.seed)
    state = jax.device_put(fresh_state(model, cell), replicated)
    curve = {"step": [], "train_loss": [], "seconds": [], "eval_step": [], "eval_loss": []}
    elapsed, resumed_from = 0.0, None
    if checkpoints is not None and (restored := checkpoints.restore(state, batches)) is not None:
        state, curve, elapsed = restored
        resumed_from = int(state["step"])

    model.specialize(state["params"], state["rest"])
    steps = make_steps(model, c, mesh)
    example = jax.device_put(task.eval_batches(B, B * cell.seq_len)[0], split)
    train_step, compiled = compile_timed(steps.train, state, example)
    compilations, eval_batches = 1, None
    wait_for_each = mesh.size > 1 and jax.default_backend() == "cpu"  # several CPU devices deadlock on queued collectives

    clock, done_before = time.perf_counter(), elapsed
    for step in range(int(state["step"]) + 1, c.steps + 1):
        state, metrics = train_step(state, jax.device_put(next(batches), split))
        if wait_for_each:
            jax.block_until_ready(metrics)
        evaluate_now = c.eval_every and step % c.eval_every == 0 and step < c.steps
        save_now = checkpoints is not None and step % c.checkpoint_every == 0 and step < c.steps
        if step == 1 or step % c.log_every == 0 or step == c.steps or evaluate_now or save_now or model.specializes:
            loss = float(metrics["loss"])  # waits for the step; between such steps nothing waits
            elapsed, clock = elapsed + time.perf_counter() - clock, time.perf_counter()
            if not math.isfinite(loss):
                raise Diverged(f"training loss is {loss} at step {step}")
        if step == 1 or step % c.log_every == 0 or step == c.steps:
            for name, value in (("step", step), ("train_loss", loss), ("seconds", elapsed)):
                curve[name].append(value)
            report(step=step, loss=loss, tokens_per_s=(step - (resumed_from or 0)) * B * cell.seq_len / (elapsed - done_before))
        if model.specializes and model.specialize(state["params"], state["rest"]):
            steps = make_steps(model, c, mesh)
            train_step, _ = compile_timed(steps.train, state, example)
            compilations += 1
        if evaluate_now:
            eval_batches = eval_batches or task.eval_batches(B, c.eval_tokens)
            curve["eval_step"].append(step)
            curve["eval_loss"].append(evaluate(steps.forward, state, eval_batches, split, step)["eval_loss"])
        if save_now:
            checkpoints.save(step, state, batches, curve, elapsed)
        if evaluate_now or save_now or model.specializes:
            clock = time.perf_counter()

    scores = evaluate(steps.forward, state, eval_batches or task.eval_batches(B, c.eval_tokens), split, c.steps)
    probes = {name: evaluate(steps.forward, state, task.eval_batches(B, c.eval_tokens, name), split, c.steps) for name in task.probes}
    written = evaluate_written(model, state, task, eval_batches or task.eval_batches(B, c.eval_tokens)) if task.judges_writing else {}
    curve["eval_step"].append(c.steps)
    curve["eval_loss"].append(scores["eval_loss"])
    return Trained(state, curve, scores, probes, written, compiled, compilations, train_step, resumed_from)


def evaluate(forward: Callable, state: State, batches: list[Batch], sharding: NamedSharding, step: int) -> dict[str, float]:
    """{'eval_loss' (nats), 'eval_accuracy'} over all scored targets of the batches, and 'eval_exact' over examples. Raises Diverged if the loss is not finite."""
    totals = dict.fromkeys(("entropy", "correct", "weight", "exact", "examples"), 0.0)
    for batch in batches:
        sums = forward(state["params"], state["rest"], jax.device_put(batch, sharding))
        totals = {name: total + float(sums[name]) for name, total in totals.items()}
    if not math.isfinite(totals["entropy"]):
        raise Diverged(f"evaluation loss is {totals['entropy']} at step {step}")
    per_target = {"eval_loss": totals["entropy"] / totals["weight"], "eval_accuracy": totals["correct"] / totals["weight"]}
    return per_target | {"eval_exact": totals["exact"] / totals["examples"]}


def evaluate_written(model: Model, state: State, task: Task, batches: list[Batch]) -> dict[str, float]:
    """The task's scores of the targets that the model writes by itself, greedily, from the sources of the batches: no true word comes to its help."""
    graph, arrays = nnx.split(model.bind(state["params"], state["rest"]))
    write_targets = jax.jit(lambda arrays, sources: write(nnx.merge(graph, arrays), *task.begin_end, task.seq_len, **sources))
    written = [write_targets(arrays, {name: batch[name] for name in ("source", "source_valid") if name in batch}) for batch in batches]
    return task.written_scores(np.concatenate(written), np.concatenate([batch["targets"] for batch in batches]))
