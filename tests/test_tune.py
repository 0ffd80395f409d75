"""experiments/tune.py, interpreted on the CPU: what it chooses is the fastest of what it measured, and ops.tuning reads it."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from attn_zoo.ops import tuning
from attn_zoo.ops.patterns import CAUSAL
from attn_zoo.ops.tuning import KERNELS, Tile
from tiny import ENV

SCRIPT = Path(__file__).parent.parent / "experiments" / "tune.py"
SIZES = dict(B=1, N=1, T=32, window=8, dtypes="float32", head_dims=16, blocks=16, warps=4, stages=2, rounds=1)


def run(out, *options, **sizes):
    """In a process of its own: absl's flags are global, and launch.py has some of the same names."""
    command = [sys.executable, str(SCRIPT), f"--out={out}", *options, *(f"--{name}={value}" for name, value in sizes.items())]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENV)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    process = run(folder, "--interpret", **SIZES)
    assert process.returncode == 0, process.stderr
    return folder


def read(folder):
    return json.loads((folder / "records.json").read_text())


def test_every_tile_that_computes_what_xla_does_is_timed(folder):
    records = read(folder)["records"]
    for kernel in KERNELS:
        for problem in ("causal", "window"):
            tiles = [tuple(r["tile"]) for r in records if (r["kernel"], r["problem"]) == (kernel, problem)]
            assert sorted(tiles) == [(16, 16, 4, 2), (32, 32, 4, 2)], "the candidate and the present tile, the default of float32"
    assert all(r["status"] == "ok" and r["speed"]["median_s"] > 0 for r in records)
    assert all(r["present"] == (r["tile"][0] == 32) for r in records)


def test_the_choice_is_the_fastest_and_ops_tuning_reads_it(folder, monkeypatch):
    content, entries = read(folder), json.loads((folder / "tuning.json").read_text())
    device = content["provenance"]["device_kind"]
    assert {name: entry for name, entry in entries.items() if name != device} == tuning.table(), "other devices keep theirs"
    assert (folder / "tuning.json").read_text().startswith(tuning.PATH.read_text().removesuffix("\n}\n")), "and their lines"
    monkeypatch.setattr(tuning, "table", lambda: entries)
    for kernel in KERNELS:
        chosen = tuning.tile(kernel, CAUSAL, 2**16, 2**16, jnp.float32, 16, device=device)
        seconds = {}
        for r in content["records"]:
            if r["kernel"] == kernel:
                seconds.setdefault(Tile(*r["tile"]), []).append(r["speed"]["median_s"])
        assert math.prod(seconds[chosen]) == min(map(math.prod, seconds.values()))
        for H, dtype in ((64, jnp.float32), (16, jnp.bfloat16)):  # not measured
            assert tuning.tile(kernel, CAUSAL, 2**16, 2**16, dtype, H, device=device) == tuning.tile(kernel, CAUSAL, 2**16, 2**16, dtype, H, device="default")


def test_the_table_follows_from_the_records_and_counts_what_is_left_out(folder, tmp_path):
    shutil.copy(folder / "records.json", tmp_path)
    assert run(tmp_path, "--report_only").returncode == 0
    assert (tmp_path / "table.md").read_text() == (folder / "table.md").read_text()
    content = read(folder)
    failed = [r for r in content["records"] if r["kernel"] == "dq" and r["tile"][0] == 16]
    for n, r in enumerate(failed):
        r |= {"status": "failed", "message": f"XlaRuntimeError: shared memory: {1000 + n} bytes"}
    content["done"].remove(["float32", 16, "dkv"])
    (tmp_path / "records.json").write_text(json.dumps(content))
    assert run(tmp_path, "--report_only").returncode == 0
    text, entries = (tmp_path / "table.md").read_text(), json.loads((tmp_path / "tuning.json").read_text())
    assert "- 2 × XlaRuntimeError: shared memory: # bytes" in text and "1 of 2" in text and "Not all candidates measured: float32 H=16 dkv." in text
    assert entries[content["provenance"]["device_kind"]]["float32"]["16"]["dq"][0] == 32, "a tile that fails is none to choose"


@pytest.mark.parametrize(
    "options, sizes, message",
    [
        ((), {}, "kernels for NVIDIA GPUs, and this runs on cpu"),
        (("--report_only",), {}, "there is no"),
        (("--interpret",), {"blocks": 48}, "--blocks=48: must be a power of two of at least 16; nearest: 64"),
        (("--interpret",), {"dtypes": "float8"}, "--dtypes='float8': must be one of"),
        (("--interpret",), {"stages": "two"}, "--stages='two': must be a whole number"),
    ],
    ids=["no-gpu", "no-records", "blocks", "dtypes", "stages"],
)
def test_what_cannot_be_measured_costs_one_line(options, sizes, message, tmp_path):
    process = run(tmp_path, *options, **sizes)
    assert process.returncode == 2 and process.stderr.count("\n") == 1 and message in process.stderr
    assert not list(tmp_path.iterdir())


def test_interpreted_times_are_not_written_into_the_package(folder):
    before = tuning.PATH.read_text()
    process = run(folder, "--report_only", "--write")
    assert process.returncode == 2 and "interpreted" in process.stderr and tuning.PATH.read_text() == before
