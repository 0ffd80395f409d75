"""Experiments and cells: every setting is checked, every cell has one identity, and --set knows the type of each key."""

import dataclasses
import json
import subprocess
import sys
import typing

import pytest

from attn_zoo.config import Attention, Cell, Experiment, Measure, Model, Train, overlay
from attn_zoo.spec import UserError
from tiny import ENV

EXPERIMENT = Experiment(name="x", task="bytes", variants=("full",), seq_lens=(64,))
CELL = Cell("local(window=128)", 512, 0, "bytes(objective='masked')", Model(D=64, layers=2), Attention(), Train(steps=100), Measure())

# Every field of every group, with a value that is allowed and not the default.
OTHER = {
    "model": dict(D=128, layers=3, N=2, K=2, H=16, F=32, norm="rmsnorm", norm_position="post", ffn="relu", positions="rotary", dropout=0.1)
    | dict(tie_embeddings=False, pool="first", dtype="bfloat16", remat=True)
    | dict(share_embeddings=True, encoder_layers=2, where=("cross",), cross="linear", body="recurrent", cell="lstm"),
    "attention": dict(backend="xla"),
    "train": dict(steps=3, tokens_per_step=64, lr=0.1, warmup=2, final_lr=0.5, weight_decay=0.0, b1=0.5, b2=0.5, clip=2.0, log_every=2, eval_every=5)
    | dict(eval_tokens=32, checkpoint_every=7, schedule="inverse_sqrt", label_smoothing=0.1),
    "measure": dict(modes=("forward",), warmup=1, min_steps=3, min_seconds=0.5),
}
SETTINGS = [(group, name, value) for group, values in OTHER.items() for name, value in values.items()]


@pytest.mark.parametrize("group", OTHER)
def test_no_setting_is_forgotten_here(group):
    assert set(OTHER[group]) == {f.name for f in dataclasses.fields(getattr(EXPERIMENT, group))}


@pytest.mark.parametrize("group, name, value", SETTINGS, ids=lambda x: str(x))
def test_set_reaches_every_setting_and_nothing_else(group, name, value):
    changed = overlay(EXPERIMENT, [f"{group}.{name}={value}"])
    assert getattr(getattr(changed, group), name) == value
    assert dataclasses.replace(changed, **{group: getattr(EXPERIMENT, group)}) == EXPERIMENT


@pytest.mark.parametrize("group, name, value", SETTINGS, ids=lambda x: str(x))
def test_the_id_depends_on_every_setting(group, name, value):
    changed = dataclasses.replace(CELL, **{group: dataclasses.replace(getattr(CELL, group), **{name: value})})
    assert changed.id != CELL.id


@pytest.mark.parametrize("name, value", [("variant", "full"), ("seq_len", 513), ("seed", 1), ("task", "bytes")])
def test_the_id_depends_on_every_axis(name, value):
    assert dataclasses.replace(CELL, **{name: value}).id != CELL.id


def test_the_id_is_pinned():
    """Records on disk are found by it: should it have to change, old workdirs are run again."""
    assert CELL.id == "9382022c74e3"


def test_the_id_is_the_same_in_every_process():
    code = f"from attn_zoo.config import *\nprint(({CELL!r}).id)"
    for seed in ("1", "2"):
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV | {"PYTHONHASHSEED": seed}, check=True)
        assert found.stdout.strip() == CELL.id


def test_a_cell_comes_back_from_json():
    cells = [CELL] + [dataclasses.replace(CELL, **{group: dataclasses.replace(getattr(CELL, group), **values)}) for group, values in OTHER.items()]
    for cell in cells:
        back = Cell.from_json(json.loads(json.dumps(dataclasses.asdict(cell))))
        assert back == cell and back.id == cell.id and hash(back) == hash(cell)


@pytest.mark.parametrize(
    "setting, message",
    [
        ("train.steps", "write key=value"),
        ("train.stps=3", "there is no 'train.stps'; did you mean 'train.steps'?"),
        ("trian.steps=3", "there is no 'trian'; did you mean 'train'?"),
        ("train=3", "'train' is a group; set one of its fields: train.steps, "),
        ("name.x=3", "'name' has no fields"),
        ("train.steps.x=3", "'train.steps' has no fields"),
        ("train.steps=many", "train.steps='many': must be of type int"),
        ("train.steps=1.5", "must be of type int"),
        ("train.steps=True", "must be of type int"),
        ("train.steps=-1", "steps=-1: must be a whole number of at least 0"),
        ("train.lr=fast", "must be of type float"),
        ("train.lr=True", "must be of type float"),
        ("train.lr=-1", "lr=-1.0: must be a number of at least 0"),
        ("model.remat=1", "must be of type bool"),
        ("model.norm=layernrm", "must be one of 'layernorm', 'rmsnorm'; did you mean 'layernorm'?"),
        ("model.N=3", "must be a multiple of N=3"),
        ("model.K=3", "K=3: must divide N=4"),
        ("model.K=two", "must be of type int"),
        ("model.D=0", "D=0: must be a whole number of at least 1"),
        ("model.dropout=1", "at most 0.99"),
        ("measure.modes=backward", "must be one of 'forward', 'forward_backward', 'train_step', 'decode'; did you mean"),
        ("measure.min_seconds=forever", "must be of type float"),
        ("attention.backend=3", "must be of type str"),
        ("timeout_s=0", "must be a number of at least 0.001"),
        ("seq_lens=512,1024.5", "must be of type int"),
        ("seq_lens=[]", "must not be empty"),
        ("seq_lens=1", "seq_lens=1: must be a whole number of at least 2"),
        ("seeds=-1", "seeds=-1: must be a whole number of at least 0"),
        ("=3", "there is no ''"),
    ],
)
def test_a_wrong_setting_is_told_in_a_line_with_its_key(setting, message):
    with pytest.raises(UserError) as error:
        overlay(EXPERIMENT, [setting])
    assert str(error.value).startswith("--set ") and setting.partition("=")[0] in str(error.value)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_settings_apply_in_order_and_take_what_loses_nothing():
    changed = overlay(EXPERIMENT, ["train.lr=1", "train.steps=5", "train.steps=7", "seq_lens=64,128", "model.K=None", " model.norm=rmsnorm", "measure.modes=[]"])
    assert (changed.train.lr, type(changed.train.lr), changed.train.steps) == (1.0, float, 7)
    assert (changed.seq_lens, changed.model.K, changed.model.norm, changed.measure.modes) == ((64, 128), None, "rmsnorm", ())
    assert overlay(EXPERIMENT, []) is EXPERIMENT


@pytest.mark.parametrize("field", ["variants", "seq_lens", "seeds"])
def test_an_experiment_has_at_least_one_of_each(field):
    with pytest.raises(UserError, match=f"{field}=.*must not be empty"):
        dataclasses.replace(EXPERIMENT, **{field: ()})


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Model) if typing.get_origin(typing.get_type_hints(Model)[f.name]) is typing.Literal])
def test_a_model_built_in_python_is_checked_too(name):
    with pytest.raises(UserError, match=f"{name}='x': must be one of"):
        Model(**{name: "x"})


def test_dims_that_follow_from_others():
    assert (Model(D=96, N=3).head_dim, Model(D=96, N=3).num_kv_heads) == (32, 3)
    assert (Model(D=100, N=3, H=7).head_dim, Model(N=4, K=2).num_kv_heads) == (7, 2)
