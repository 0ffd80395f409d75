"""A trained model back from what a sweep kept of it."""

import dataclasses
import os
from typing import Any

import jax
from flax import nnx

from attn_zoo import config, train
from attn_zoo.parameters import load_parameters, parameters_path
from attn_zoo.results import load_records
from attn_zoo.spec import UserError
from attn_zoo.tasks import Task, load_task


def kept(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of the cells that kept their parameters, in the order of the table. Raises UserError where there are none."""
    records = load_records(workdir)
    if not records:
        raise UserError(f"{workdir}: there are no records; give the workdir of a sweep, e.g. results/dates")
    found = [r for r in records if r["status"] == "ok" and parameters_path(workdir, r["id"]).exists()]
    if not found:
        raise UserError(f"{workdir}: no cell kept its parameters; run the sweep again with --set keep_parameters=True")
    return found


def load_trained(workdir: str | os.PathLike, id: str | None = None, *, data_dir: str = "data") -> tuple[nnx.Module, Task]:
    """(model, task) of a cell of a sweep that kept its parameters: the one whose record has this id, or the first of the table.

    The model computes the same function in the form whose derivative can be taken: nothing recomputed, by the backend that serves everything.
    Raises UserError where there is no such cell, or its file is damaged.
    """
    records = kept(workdir)
    record = next((r for r in records if id in (None, r["id"])), None)
    if record is None:
        raise UserError(f"{workdir}: no cell {id!r} kept its parameters; those that did: {', '.join(r['id'] for r in records)}")
    cell = config.Cell.from_json(record["cell"])
    plain = dataclasses.replace(cell, model=dataclasses.replace(cell.model, remat=False), attention=config.Attention(backend="xla"))
    task = load_task(cell.task, cell.seq_len, data_dir)
    model = train.Model(plain, task)
    params, rest = load_parameters(workdir, record["id"], *jax.eval_shape(model.init))
    model.specialize(params, rest)
    return model.bind(params, rest), task
