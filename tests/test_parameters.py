"""Parameters on disk: they come back as they were, bit for bit, and what cannot be theirs is refused by the name of the file."""

import jax
import numpy as np
import pytest

from attn_zoo import cell, train
from attn_zoo.parameters import load_parameters, parameters_path, write_parameters
from attn_zoo.spec import UserError
from attn_zoo.tasks import load_task
from tiny import MQAR, make_cell

CELL = make_cell("routing(clusters=2)", steps=2)  # which has state that is not trained


def build(a_cell):
    model = train.Model(a_cell, load_task(MQAR, 16, ""))
    return model, jax.eval_shape(model.init)


def test_what_was_written_comes_back(tmp_path):
    model, like = build(CELL)
    written = jax.tree.map(np.asarray, model.init())
    assert write_parameters(tmp_path, "abc", *written) == parameters_path(tmp_path, "abc")
    read = load_parameters(tmp_path, "abc", *like)
    assert jax.tree.structure(read) == jax.tree.structure(written) and len(jax.tree.leaves(read[1])) > 0
    for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(written)):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    assert [path.name for path in (tmp_path / "parameters").iterdir()] == ["abc.npz"]


def test_they_are_a_flat_dict_by_path(tmp_path):
    model, _ = build(CELL)
    with np.load(write_parameters(tmp_path, "abc", *model.init())) as file:
        assert "params/blocks/0/mixer/query" in file and any(name.startswith("rest/") for name in file)


def test_another_model_is_refused(tmp_path):
    write_parameters(tmp_path, "abc", *build(CELL)[0].init())
    _, like = build(make_cell("routing(clusters=2)", model={"D": 8}))
    with pytest.raises(UserError, match="abc.npz: holds the parameters of another model"):
        load_parameters(tmp_path, "abc", *like)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half", b"no archive"])
def test_a_damaged_file_is_refused(content, tmp_path):
    path = parameters_path(tmp_path, "abc")
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(UserError, match="abc.npz: cannot be read .*keep_parameters=True"):
        load_parameters(tmp_path, "abc", *build(CELL)[1])


def test_a_cell_keeps_what_it_ends_training_with(tmp_path):
    """Its evaluation is that of the parameters that it leaves."""
    record = cell.run(CELL, str(tmp_path), str(tmp_path / "data"), lambda **event: None, keep_parameters=True)
    assert record["status"] == "ok", record["message"]
    model, like = build(CELL)
    task = load_task(MQAR, 16, str(tmp_path / "data"))
    params, rest = load_parameters(tmp_path, CELL.id, *like)
    batches = task.eval_batches(train.batch_size(CELL), CELL.train.eval_tokens)
    forward = jax.jit(lambda batch: model.sums(params, rest, batch, None)[0])
    sums = [forward(batch) for batch in batches]
    loss = sum(float(s["entropy"]) for s in sums) / sum(float(s["weight"]) for s in sums)
    assert loss == pytest.approx(record["metrics"]["eval_loss"], rel=1e-5)
