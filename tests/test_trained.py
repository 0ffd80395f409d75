"""A model comes back from a sweep with the parameters that were kept, and writes what they say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_zoo import train
from attn_zoo.models.generation import sample
from attn_zoo.parameters import write_parameters
from attn_zoo.results import write_record
from attn_zoo.spec import UserError
from attn_zoo.tasks import load_task
from attn_zoo.tasks.pairs import BEGIN, END
from attn_zoo.trained import load_trained
from tiny import make_cell

REVERSE = "reverse(vocab=8, min_length=4, max_length=6, longest=6, train_examples=32, validation_examples=4, test_examples=1)"


def keep(workdir, a_cell, scale):
    """What a sweep leaves of a cell that ended well: its record, and its parameters, here its first ones times `scale`."""
    model = train.Model(a_cell, load_task(a_cell.task, a_cell.seq_len, ""))
    write_record(workdir, {"id": a_cell.id, "status": "ok", "message": "", "cell": dataclasses.asdict(a_cell)})
    params, rest = model.init()
    write_parameters(workdir, a_cell.id, jax.tree.map(lambda x: scale * x, params), rest)
    return model.bind(jax.tree.map(lambda x: scale * x, params), rest)


def test_the_model_of_a_record_writes_as_it_did(tmp_path):
    cells = [make_cell(T=7, task=REVERSE, seed=seed, model={"remat": True}) for seed in (0, 1)]
    models = {a_cell.id: keep(tmp_path, a_cell, scale=3.0) for a_cell in cells}
    written = []
    for a_cell in cells:
        model, task = load_trained(tmp_path, a_cell.id, data_dir=str(tmp_path / "data"))
        (batch,) = task.eval_batches(4, 28)
        source = {name: jnp.asarray(batch[name]) for name in ("source", "source_valid")}
        write = lambda model: np.asarray(sample(model.step, model.start(4, 7, **source), jnp.full((4, 1), BEGIN), 8, end=END)[0])
        np.testing.assert_array_equal(write(model), write(models[a_cell.id]))
        written.append(write(model))
    assert (written[0] != written[1]).any(), "each cell has its own parameters"
    first, _ = load_trained(tmp_path, data_dir=str(tmp_path / "data"))
    np.testing.assert_array_equal(write(first), written[0])


def test_a_cell_that_kept_nothing_is_refused(tmp_path):
    a_cell = make_cell(T=7, task=REVERSE)
    keep(tmp_path, a_cell, scale=1.0)
    with pytest.raises(UserError, match=f"no cell 'abc' kept its parameters; those that did: {a_cell.id}"):
        load_trained(tmp_path, "abc")
