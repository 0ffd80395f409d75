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


# tune.py, where tiles of 16 queries fail in one kernel and compute something else in another.
BROKEN = f"""
import runpy
from attn_zoo.ops.pallas_attention import Run

dq, dkv = Run.dq, Run.dkv

def failing(self, *args):
    if self.tile.q_block == 16:
        raise RuntimeError(f"shared memory: {{len(self.mask.part_block)}} bytes")
    return dq(self, *args)

def wrong(self, *args):
    dk, dv = dkv(self, *args)
    return dk, dv.at[0, 0, 0, 0].set(float("nan")) if self.tile.q_block == 16 else dv

Run.dq, Run.dkv = failing, wrong
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def run(out, *options, script=None, **sizes):
    """In a process of its own: absl's flags are global, and launch.py has some of the same names."""
    command = [sys.executable, *([str(SCRIPT)] if script is None else ["-c", script])]
    command += [f"--out={out}", *options, *(f"--{name}={value}" for name, value in sizes.items())]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENV)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    process = run(folder, "--interpret", script=BROKEN, **SIZES)
    assert process.returncode == 0, process.stderr
    return folder


def read(folder):
    return json.loads((folder / "records.json").read_text())


def test_every_tile_that_computes_what_xla_does_is_timed(folder):
    status = {"forward": "ok", "dq": "failed", "dkv": "wrong"}  # of the tile of 16; the present one is the default of float32
    found = {(r["kernel"], r["problem"], *r["tile"], r["present"]): r for r in read(folder)["records"]}
    assert {key: r["status"] for key, r in found.items()} == {
        (kernel, problem, size, size, 4, 2, size == 32): "ok" if size == 32 else status[kernel]
        for kernel in KERNELS
        for problem in ("causal", "window")
        for size in (16, 32)
    }
    assert all(r["speed"]["median_s"] > 0 if r["status"] == "ok" else r["message"] for r in found.values())


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
            if r["kernel"] == kernel and r["status"] == "ok":
                seconds.setdefault(Tile(*r["tile"]), []).append(r["speed"]["median_s"])
        assert math.prod(seconds[chosen]) == min(map(math.prod, seconds.values()))
        for H, dtype in ((64, jnp.float32), (16, jnp.bfloat16)):  # not measured
            assert tuning.tile(kernel, CAUSAL, 2**16, 2**16, dtype, H, device=device) == tuning.tile(kernel, CAUSAL, 2**16, 2**16, dtype, H, device="default")


def test_the_table_follows_from_the_records_and_counts_what_is_left_out(folder, tmp_path):
    shutil.copy(folder / "records.json", tmp_path)
    assert run(tmp_path, "--report_only").returncode == 0
    assert (tmp_path / "table.md").read_text() == (folder / "table.md").read_text()
    content = read(folder)
    content["done"].remove(["float32", 16, "dkv"])
    (tmp_path / "records.json").write_text(json.dumps(content))
    assert run(tmp_path, "--report_only").returncode == 0
    text, unfinished = (tmp_path / "table.md").read_text(), "Not all candidates measured: float32 H=16 dkv."
    for line in ("2 × RuntimeError: shared memory: # bytes", "2 × differs from XLA by nan of the largest value", unfinished):
        assert line in text


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
