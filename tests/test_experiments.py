"""Experiments cannot rot: each one loads, its cells are valid, and its models build."""

import ast
import dataclasses
import runpy
from pathlib import Path

import pytest

from attn_zoo import sweep, train
from attn_zoo.attention import VARIANTS, parse_variant
from attn_zoo.config import overlay
from attn_zoo.models import read_variant
from attn_zoo.spec import Unsupported
from attn_zoo.tasks import load_task

FOLDER = Path(__file__).parents[1] / "experiments"


def defines_experiment(path: Path) -> bool:
    names = {target.id for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign) for target in node.targets if isinstance(target, ast.Name)}
    return "experiment" in names


FILES = [path for path in sorted(FOLDER.glob("*.py")) if defines_experiment(path)]


def load(path: Path):
    return runpy.run_path(str(path))["experiment"]


def test_there_are_experiments():
    assert {path.stem for path in FILES} >= {"seq_len", "causal_lm", "seq_len_gpu"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_is_named_as_its_file_which_says_how_to_run_it(path):
    assert load(path).name == path.stem, "its results go to results/<name>"
    assert f"experiments/{path.name}" in path.read_text() or "make sweep" in path.read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_model_of_an_experiment_builds(path, tmp_path):
    experiment = load(path)
    shortest_and_longest = dataclasses.replace(experiment, seq_lens=(min(experiment.seq_lens), max(experiment.seq_lens)), seeds=experiment.seeds[:1])
    assert len(sweep.cells(experiment, str(tmp_path))) == len(experiment.variants) * len(experiment.seq_lens) * len(experiment.seeds)
    for cell in sweep.cells(shortest_and_longest, str(tmp_path)):
        task = load_task(cell.task, cell.seq_len, str(tmp_path))
        entry = read_variant(cell.variant, cell.model)
        # A variant that stands in cross-attention alone need not be causal; other bodies have no causal attention.
        causal = task.causal and entry.model.body == "transformer" and "decoder" in entry.model.where
        refused = [spec.name for spec in entry.specs if causal and VARIANTS[spec.name].causal is not True]
        if refused:
            with pytest.raises(Unsupported, match=refused[0]):
                train.Model(cell, task)
        else:  # and its dry run has what it prints
            model = train.Model(cell, task).abstract
            assert model.flops_per_step(2, cell.seq_len)["model"] > 0 and model.activation_bytes(2, cell.seq_len) > 0
    assert not list(tmp_path.iterdir()), "building a model prepares no data"


def test_recall_trains_every_variant_where_it_can(tmp_path):
    recall = runpy.run_path(str(FOLDER / "recall.py"))
    of = lambda experiment: {spec.name for text in experiment.variants for spec in parse_variant(text)}
    assert of(recall["listops"]) == set(VARIANTS)
    assert of(recall["mqar"]) == {name for name, v in VARIANTS.items() if v.causal is True}
    for experiment in (recall["mqar"], recall["listops"]):
        for cell in sweep.cells(experiment, str(tmp_path)):
            train.Model(cell, load_task(cell.task, cell.seq_len, str(tmp_path)))


def test_captions_are_also_written_by_a_transformer(tmp_path):
    """With the settings of the second command in the file's docstring."""
    experiment = overlay(dataclasses.replace(load(FOLDER / "captions.py"), variants=("full, hard",), seeds=(0,)), ["model.body=transformer"])
    cells = sweep.cells(experiment, str(tmp_path))
    assert [cell.variant for cell in cells] == ["full", "hard"]
    for cell in cells:
        model = train.Model(cell, load_task(cell.task, cell.seq_len, str(tmp_path))).abstract
        crossing = [attention.variant.name for attention, queries, keys in model.attentions(cell.seq_len) if queries != keys]
        assert crossing == [cell.variant] * cell.model.layers
