"""A cell: its record holds what docs/records.md promises, and whatever goes wrong becomes its status."""

import dataclasses
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest

from attn_zoo import cell, config, train
from attn_zoo.attention import VARIANTS
from attn_zoo.results import load_records, write_record
from attn_zoo.tasks import load_task
from tiny import ENV, MQAR, ON_CPU, make_cell

MODES = config.Measure.MODES
DOCUMENT = Path(__file__).parents[1] / "docs" / "records.md"


def run(a_cell, workdir, report=lambda **event: None):
    """The record, as it comes back from disk."""
    write_record(workdir, cell.run(a_cell, str(workdir), str(workdir / "data"), report))
    (record,) = load_records(workdir)
    return record


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A cell that ended well, with every mode timed and a variant that records statistics; its record, events and workdir."""
    workdir, events = tmp_path_factory.mktemp("trained"), []
    a_cell = make_cell("adaptive_span(max_span=16, init=4, ramp=4)", seed=3, checkpoint_every=20, measure={"modes": MODES, "min_steps": 3})
    record = run(a_cell, workdir, lambda **event: events.append(event))
    return types.SimpleNamespace(cell=a_cell, record=record, events=events, workdir=workdir)


@pytest.fixture(scope="module")
def record(trained):
    return trained.record


def documented() -> set[str]:
    """Dotted keys of the table in docs/records.md, where `a.b`, `.c` stands for a.b and a.c."""
    keys = set()
    for row in re.findall(r"^\| (`.*?) \|", DOCUMENT.read_text(), re.MULTILINE):
        for key in re.findall(r"`(.*?)`", row):
            if not key.startswith("."):
                parent = key.rpartition(".")[0]
            keys.add(parent + key if key.startswith(".") else key)
    return keys


def spelled_out(record) -> set[str]:
    """The documented keys, with the record's modes and floors in the places of <mode> and <name>."""
    keys = {k for k in documented() if not k.startswith(("probes.", "written.", "estimator."))}  # of tasks and variants that have some
    return {k.replace("<mode>", mode).replace("<name>", name) for k in keys for mode in MODES if mode != "decode" for name in record["floors"]}


def holds(content, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(content, dict) or part not in content:
            return False
        content = content[part]
    return True


def test_every_documented_key_is_there(record):
    of_bytes_alone = {k for k in spelled_out(record) if k.endswith("bits_per_byte")}
    assert len(spelled_out(record)) > 60
    assert sorted(k for k in spelled_out(record) - of_bytes_alone if not holds(record, k)) == []


def test_every_key_is_documented(record):
    keys = spelled_out(record)
    found = {f"{a}.{b}" for a, inner in record.items() if isinstance(inner, dict) for b in inner} | {a for a, x in record.items() if not isinstance(x, dict)}
    known = lambda key: key == "probes" or any(k == key or k.startswith(f"{key}.") or key.startswith(f"{k}.") for k in keys)
    assert sorted(k for k in found if not known(k)) == []


def test_the_record_says_which_cell_this_is(trained):
    a_cell, record = trained.cell, trained.record
    assert (record["id"], record["status"], record["message"]) == (a_cell.id, "ok", "")
    assert record["cell"] == json.loads(json.dumps(dataclasses.asdict(a_cell)))
    assert config.Cell.from_json(record["cell"]) == a_cell
    assert record["config"]["variant"] == [{"name": "adaptive_span", "max_span": 16, "ramp": 4, "penalty": 2e-6, "init": 4}]
    assert record["config"]["task"]["vocab"] == 16 and record["config"]["task"]["filler"] == "random"
    assert record["paper"] == [dataclasses.asdict(VARIANTS["adaptive_span"].paper)]


def test_metrics_are_those_of_the_curve(record):
    curve = record["curve"]
    scores = dict(record["metrics"])
    assert (scores.pop("train_loss"), scores.pop("eval_loss")) == (curve["train_loss"][-1], curve["eval_loss"][-1])
    assert set(scores) == {"eval_accuracy", "eval_exact"}
    assert curve["step"] == list(range(1, 31)) and curve["eval_step"] == [30]
    assert 0 < record["metrics"]["eval_loss"] < 10 and 0 <= scores["eval_exact"] <= scores["eval_accuracy"] <= 1
    assert record["floors"]["own values"]["eval_accuracy"] == 1 / 2


def test_speeds_are_consistent(record):
    timed = set(MODES) - {"decode"}
    assert set(record["speed"]) == set(record["compile"]) == timed
    for mode in timed:
        speed = record["speed"][mode]
        assert 0 < speed["p20_s"] <= speed["median_s"] <= speed["p80_s"] and speed["n"] >= 3
        assert min(record["compile"][mode].values()) > 0
    assert record["tokens_per_step"] == 64
    assert record["tokens_per_s"] == pytest.approx(64 / record["speed"]["train_step"]["median_s"])
    assert min(record["calibration"]["matmul_flops_per_s"].values()) > 1e8


def test_decoding_is_measured_at_the_end_of_the_context(record):
    decode = record["decode"]
    assert (decode["batch"], decode["steps"]) == (4, 16)
    assert 0 < decode["step"]["p20_s"] <= decode["step"]["median_s"] <= decode["step"]["p80_s"]
    assert decode["tokens_per_s"] == pytest.approx(4 / decode["step"]["median_s"])
    assert decode["refeed_tokens_per_s"] == pytest.approx(4 / record["speed"]["forward"]["median_s"])
    assert decode["state_bytes"] == 2 * 4 * 16 * 16  # keys and values, float32, of 16 positions and channels: the span reaches over all


def test_decoding_belongs_to_a_decoders_task(tmp_path):
    record = run(make_cell(T=32, task="listops(form='short', max_length=32, train_examples=8, validation_examples=2, test_examples=1)", measure={"modes": ("decode",)}), tmp_path)
    assert record["status"] == "error" and "'decode' generates, and listops is not a decoder's task" in record["message"]


def test_sizes_are_those_of_the_model(trained):
    record, model = trained.record, train.Model(trained.cell, load_task(MQAR, 16, ""))
    state = jax.eval_shape(lambda: train.fresh_state(model, trained.cell))
    nbytes = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    assert record["params"] == {"total": sum(x.size for x in jax.tree.leaves(state["params"])), "attention": 2}  # a span for each head
    memory = record["memory"]
    assert memory["argument_bytes"] >= nbytes(state)
    assert memory["temp_bytes"] < memory["peak_bytes"] <= memory["argument_bytes"] + memory["output_bytes"] + memory["temp_bytes"]


def test_useful_flops_are_the_sum_of_their_parts(record):
    flops = record["flops"]
    assert 0 < flops["attention_per_step"] < flops["useful_per_step"]
    assert flops["useful_per_step"] == pytest.approx(flops["attention_per_step"] + flops["model_per_step"])


def test_what_ran_in_each_layer_is_recorded(record):
    assert record["attention"]["backend"] == ON_CPU
    assert [layer["backend"] for layer in record["attention"]["layers"]] == [ON_CPU]
    ((name, spans),) = record["statistics"].items()
    assert name.endswith("spans") and len(spans) == 2 and all(0 <= z <= 16 for z in spans)
    assert (record["compilations"], record["resumed_from"]) == (1, None)


def test_provenance(record):
    provenance = record["provenance"]
    for package in ("jax", "jaxlib", "flax", "optax", "attn_zoo"):
        assert provenance[package] == importlib.metadata.version(package)
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=DOCUMENT.parent, capture_output=True, text=True)
    assert provenance["git_commit"] == (git.stdout.strip() if git.returncode == 0 else None)
    assert (provenance["platform"], provenance["device_count"], provenance["devices_used"]) == ("cpu", jax.local_device_count(), 4)
    assert provenance["data"]["dataset"] == "mqar"
    seconds = provenance["seconds"]
    assert seconds["total"] >= seconds["train"] + seconds["measure"] and min(seconds.values()) > 0


def test_events_tell_of_phases_and_steps(trained):
    events = trained.events
    assert [e["phase"] for e in events if "phase" in e] == ["prepare", "train", "measure"]
    assert [e["step"] for e in events if "step" in e] == list(range(1, 31))


def test_the_checkpoints_of_a_finished_cell_are_gone(trained):
    assert not list((trained.workdir / "checkpoints").iterdir())


def test_a_cell_keeps_no_parameters_unless_told_to(trained):
    assert not (trained.workdir / "parameters").exists()


def test_unsupported(tmp_path):
    record = run(make_cell("linformer(rank=4)"), tmp_path)  # mqar is causal
    assert (record["status"], record["message"]) == ("unsupported", f"linformer cannot be causal: {VARIANTS['linformer'].causal}")
    assert "metrics" not in record and record["config"]["variant"][0]["rank"] == 4


def test_a_forced_backend_is_what_ran_and_one_that_cannot_serve_is_an_error(tmp_path):
    forced = lambda backend: run(dataclasses.replace(make_cell(steps=1), attention=config.Attention(backend=backend)), tmp_path / backend)
    record = forced("xla")
    assert (record["status"], record["attention"]["backend"]) == ("ok", "xla")
    record = forced("splash")
    assert record["status"] == "error" and "attention.backend='splash' cannot serve here: its kernels are for TPUs" in record["message"]


def test_nan(tmp_path):
    record = run(make_cell(lr=1e30), tmp_path)
    assert record["status"] == "nan" and re.fullmatch(r"training loss is nan at step \d", record["message"])
    assert record["params"]["total"] > 0 and "speed" not in record


def test_out_of_memory(tmp_path):
    """A matrix of 2^50 bytes is more than any machine can address: refused at once, and nothing is touched."""
    record = run(make_cell(model={"D": 2**24, "N": 1, "F": 8}), tmp_path)
    assert record["status"] == "oom" and "RESOURCE_EXHAUSTED" in record["message"] and "\n" not in record["message"]
    assert record["params"]["total"] > 2**49


def test_a_memory_error_of_the_host_is_out_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(cell, "load_task", lambda *_: bytearray(2**62))
    assert run(make_cell(), tmp_path)["status"] == "oom"


def test_an_error_is_told_in_a_line_and_traced_in_the_log(tmp_path, monkeypatch, capfd):
    def fail(*_):
        raise RuntimeError("the disk is gone\nand so on")

    monkeypatch.setattr(cell, "load_task", fail)
    record = run(make_cell(), tmp_path)
    assert (record["status"], record["message"]) == ("error", "RuntimeError: the disk is gone")
    log = capfd.readouterr().err
    assert "Traceback" in log and "and so on" in log
    assert record["provenance"]["seconds"]["total"] > 0


def test_the_process_writes_events_to_stdout_and_the_record_to_disk(tmp_path):
    a_cell = make_cell("linformer(rank=4)")
    job = json.dumps({"cell": dataclasses.asdict(a_cell), "workdir": str(tmp_path), "data_dir": str(tmp_path / "data")})
    process = subprocess.run([sys.executable, "-m", "attn_zoo.cell"], input=job, capture_output=True, text=True, env=ENV, timeout=120)
    assert process.returncode == 0, process.stderr
    assert [json.loads(line) for line in process.stdout.splitlines()] == [{"phase": "prepare"}, {"phase": "done", "status": "unsupported"}]
    (record,) = load_records(tmp_path)
    assert (record["id"], record["status"], record["provenance"]["device_count"]) == (a_cell.id, "unsupported", 1)
    on_cpu = not (find_spec("jax_plugins") or find_spec("libtpu"))
    assert record["provenance"]["memory_kept"] == (on_cpu and platform.libc_ver()[0] == "glibc")
