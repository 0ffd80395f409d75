"""One cell, run in a process of its own: train, evaluate, measure, and leave a record. `python -m attn_zoo.cell` reads the job from stdin.

The job is {"cell", "workdir", "data_dir", "keep_parameters"}; events go to stdout, one JSON object a line; all else that is printed goes to stderr.
"""

import time

STARTED = time.perf_counter()

import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_zoo import estimator, measure, provenance, train
from attn_zoo.attention import find
from attn_zoo.checkpoints import Checkpoints
from attn_zoo.config import Cell
from attn_zoo.memory import keep_freed_memory
from attn_zoo.models import param_counts, read_variant
from attn_zoo.parameters import write_parameters
from attn_zoo.results import write_record
from attn_zoo.spec import Unsupported, UserError
from attn_zoo.tasks import Task, load_task

DECODE_STEPS = 64  # in one call of the measuring mode `decode`


def run(cell: Cell, workdir: str, data_dir: str, report: Callable[..., None], keep_parameters: bool = False) -> dict[str, Any]:
    """Runs the cell and returns its record; whatever goes wrong becomes its status, beside the keys that were reached."""
    record = {"id": cell.id, "status": "ok", "message": "", "cell": dataclasses.asdict(cell)}
    seconds = {"startup": time.perf_counter() - STARTED}
    try:
        _fill(record, cell, workdir, data_dir, report, seconds, keep_parameters)
    except Unsupported as e:
        record |= {"status": "unsupported", "message": str(e)}
    except train.Diverged as e:
        record |= {"status": "nan", "message": str(e)}
    except Exception as e:
        first_line = (str(e).splitlines() or [""])[0]
        record |= {"status": "oom" if measure.out_of_memory(e) else "error", "message": f"{type(e).__name__}: {first_line}"}
        traceback.print_exc()
    seconds["total"] = time.perf_counter() - STARTED
    record["provenance"] = provenance.collect() | record.get("provenance", {}) | {"seconds": seconds}
    return record


def _fill(record: dict, cell: Cell, workdir: str, data_dir: str, report: Callable[..., None], seconds: dict[str, float], keep_parameters: bool) -> None:
    clock = time.perf_counter()

    def lap(name):
        nonlocal clock
        now = time.perf_counter()
        seconds[name], clock = seconds.get(name, 0.0) + now - clock, now

    report(phase="prepare")
    entry = read_variant(cell.variant, cell.model)
    found = [(spec, *find(spec, entry.body.registry, entry.body.kind)) for spec in entry.specs]
    task = load_task(cell.task, cell.seq_len, data_dir)
    variant = [{"name": spec.name} | dataclasses.asdict(options) for spec, _, options in found]
    record["config"] = {"variant": variant, "model": dataclasses.asdict(entry.model), "task": dataclasses.asdict(task.options)}
    record["paper"] = list({p["key"]: p for p in (dataclasses.asdict(named.paper) for _, named, _ in found)}.values())
    model = train.Model(cell, task)
    record["params"] = param_counts(model.abstract)
    record["loss_name"] = task.loss_name
    record["floors"] = task.floors()
    if "decode" in cell.measure.modes and not (task.causal and task.per_token):
        raise UserError(f"measure.modes: 'decode' generates, and {task.name} is not a decoder's task; leave it out, or use e.g. bytes or mqar")
    B = train.batch_size(cell)
    mesh = train.make_mesh(B)
    record["provenance"] = {"data": task.provenance(), "devices_used": mesh.size}
    rates = {"before": measure.matmul_flops_per_s(cell.model.dtype)}
    lap("prepare")

    report(phase="train")
    directory = Path(workdir) / "checkpoints" / cell.id
    checkpoints = Checkpoints(directory) if cell.train.checkpoint_every else None
    trained = train.train(cell, task, model, mesh, checkpoints, report)
    record["metrics"] = {"train_loss": trained.curve["train_loss"][-1] if trained.curve["train_loss"] else None} | trained.scores
    if task.loss_name != "loss":
        record["metrics"] |= {name: v for name, v in task.score(trained.scores["eval_loss"], trained.scores["eval_accuracy"]).items()}
    record["probes"], record["written"] = trained.probes, trained.written
    record["curve"] = trained.curve
    record["statistics"] = model.statistics(trained.state["params"], trained.state["rest"])
    if estimator.samples(model):
        record["estimator"] = estimator.variance(model, trained.state, next(task.train_iterator(B, cell.seed)))
    record["compilations"], record["resumed_from"] = trained.compilations, trained.resumed_from
    if keep_parameters:  # before the train step is timed, to which the state is given away
        write_parameters(workdir, cell.id, trained.state["params"], trained.state["rest"])
    lap("train")

    report(phase="measure")
    bound = model.bind(trained.state["params"], trained.state["rest"])
    flops = bound.flops_per_step(B, cell.seq_len)
    record["flops"] = {"attention_per_step": flops["attention"], "model_per_step": flops["model"] - flops["attention"], "useful_per_step": flops["model"]}
    record["attention"] = _plans(bound, cell.seq_len, task)
    record["tokens_per_step"] = B * cell.seq_len
    if "decode" in cell.measure.modes:  # before the train step is timed, to which the state is given away
        record["decode"] = _measure_decode(cell, task, model, trained)
    record["compile"], record["speed"], record["memory"] = _measure(cell, task, model, mesh, trained)
    if "decode" in cell.measure.modes and "forward" in record["speed"]:
        record["decode"]["refeed_tokens_per_s"] = B / record["speed"]["forward"]["median_s"]
    if "train_step" in record["speed"]:
        record["tokens_per_s"] = record["tokens_per_step"] / record["speed"]["train_step"]["median_s"]
    record["calibration"] = {"matmul_flops_per_s": rates | {"after": measure.matmul_flops_per_s(cell.model.dtype)}}
    lap("measure")
    if checkpoints is not None:
        checkpoints.remove()


def _plans(model, T: int, task: Task) -> dict[str, Any]:
    """What ran in each layer; `backend` is one name, or those that differ, joined."""
    plans = [attention.plan(queries, keys, masked=task.padded) for attention, queries, keys in model.attentions(T)]
    return {"backend": ", ".join(dict.fromkeys(plan["backend"] for plan in plans)) or "xla", "layers": plans}


def _measure(cell: Cell, task: Task, model: train.Model, mesh, trained: train.Trained) -> tuple[dict, dict, dict]:
    """(compile, speed, memory) of the modes asked for, on one batch and the trained parameters."""
    B = train.batch_size(cell)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batch = jax.device_put(next(task.train_iterator(B, cell.seed)), split)
    steps = train.make_steps(model, cell.train, mesh)
    params, rest = trained.state["params"], trained.state["rest"]
    compiled, speed = {"train_step": trained.compile}, {}
    for mode in ("forward", "forward_backward"):
        if mode in cell.measure.modes:
            call, compiled[mode] = measure.compile_timed(getattr(steps, mode), params, rest, batch)
            speed[mode] = measure.time_calls(lambda: call(params, rest, batch), cell.measure)
    if "train_step" in cell.measure.modes:
        state = trained.state  # donated to each step, so this comes last

        def step():
            nonlocal state
            state, metrics = trained.train_step(state, batch)
            return state, metrics

        speed["train_step"] = measure.time_calls(step, cell.measure)
    return compiled, speed, measure.memory(trained.train_step)


def _measure_decode(cell: Cell, task: Task, model: train.Model, trained: train.Trained) -> dict[str, Any]:
    """Generation at a context of T: seconds of one step of a batch with the state it has then, the bytes of that state a sequence, and tokens per second.

    Steps run in one compiled loop of `DECODE_STEPS`, each fed the most probable token of the one before, and end at position T.
    """
    B, T = train.batch_size(cell), cell.seq_len
    steps = min(DECODE_STEPS, T)
    bound = model.bind(trained.state["params"], trained.state["rest"])
    graph, arrays = nnx.split(bound)
    batch = next(task.train_iterator(B, cell.seed))
    sources = {name: jnp.asarray(batch[name]) for name in ("source", "source_valid") if name in batch}
    fill = lambda cache: jax.tree.map(lambda x: jnp.asarray(T - steps, x.dtype) if x.ndim == 0 else x, cache)  # as if so many had been seen
    cache = jax.jit(lambda arrays: fill(nnx.merge(graph, arrays).start(B, T, **sources)))(arrays)

    def generate(arrays, tokens_B, cache):
        model = nnx.merge(graph, arrays)

        def step(state, _):
            logits_BV, cache = model.step(*state)
            return (logits_BV.argmax(axis=-1).astype(jnp.int32), cache), None

        return jax.lax.scan(step, (tokens_B, cache), length=steps)[0]

    call, compiled = measure.compile_timed(jax.jit(generate), arrays, jnp.zeros(B, jnp.int32), cache)
    timed = measure.time_calls(lambda: call(arrays, jnp.zeros(B, jnp.int32), cache), cell.measure)
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(cache) if x.ndim) / B
    seconds = {name: timed[name] / steps for name in ("median_s", "p20_s", "p80_s")}
    return {"step": seconds | {"n": timed["n"]}, "steps": steps, "batch": B, "tokens_per_s": B / seconds["median_s"], "state_bytes": state_bytes, "compile": compiled}


def main() -> int:
    """Runs the job on stdin; the exit status is 0 whenever a record was written."""
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not break the stream of events

    def report(**event):
        try:
            print(json.dumps(event), file=events, flush=True)
        except BrokenPipeError:  # the sweep is gone: nobody is waiting for this cell
            os._exit(1)

    keep_freed_memory()  # before JAX has threads
    jax.config.update("jax_enable_compilation_cache", False)  # or compile seconds would be those of a disk
    job = json.load(sys.stdin)
    cell = Cell.from_json(job["cell"])
    record = run(cell, job["workdir"], job["data_dir"], report, job.get("keep_parameters", False))
    write_record(job["workdir"], record)
    report(phase="done", status=record["status"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
