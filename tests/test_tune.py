"""experiments/tune.py, interpreted on the CPU: what it chooses is the fastest of what it measured, and ops.tuning reads it."""

import dataclasses
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
from attn_zoo.ops.tuning import KERNELS, FeatureTile, ScanTile, Tile
from tiny import ENV

SCRIPT = Path(__file__).parent.parent / "experiments" / "tune.py"
SIZES = dict(B=1, N=1, T=32, window=8, dtypes="float32", head_dims=16, blocks=16, warps=4, stages=2, rounds=1)
ATTENTION, SCANS, FEATURES = ({"kernels": ",".join(kernels)} for kernels in (tuning.KERNELS, tuning.SCANS, tuning.FEATURES))
RUNS = {"states": 2, "output": 1, "dv": 1, "dqk": 1}  # of a scan's kernels in a train step: states forwards, and their gradients

# tune.py, where tiles of 16 queries fail in one kernel of attention and compute something else in another, as does a kernel of scans at a chunk of 128, and one of features in tiles
# of 16 positions.
BROKEN = f"""
import runpy, sys
from attn_zoo.ops import pallas_features, pallas_scan
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

outputs = pallas_scan.Run.outputs

def doubled(self, *args):
    o, norm = outputs(self, *args)
    return o * self.plan.chunk / 64, norm

pallas_scan.Run.outputs = doubled

sines = pallas_features.Run.sines
pallas_features.Run.sines = lambda self: sines(self) * (2 if self.tile.positions == 16 else 1)
sys.path.insert(0, {str(SCRIPT.parent)!r})
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
    process = run(folder, "--interpret", script=BROKEN, **SIZES, **ATTENTION)
    assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune_scans")
    process = run(folder, "--interpret", script=BROKEN, **SIZES | SCANS | dict(T=256, warps="4,8"))
    assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune_features")
    process = run(folder, "--interpret", script=BROKEN, **SIZES | FEATURES | dict(T=40, blocks="16,32", stages=1, head_dims="16,256"))
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
    assert all(entries[engine] == tuning.table()[engine] for engine in ("scans", "features"))
    assert {name: entry for name, entry in entries["attention"].items() if name != device} == tuning.table()["attention"], "other devices keep theirs"
    assert set(tuning.PATH.read_text().replace("},", "}").splitlines()) < set((folder / "tuning.json").read_text().replace("},", "}").splitlines()), "and their lines"
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


def test_scans_are_held_to_what_xla_does_at_every_chunk(scans):
    found = {(r["kernel"], r["problem"], *r["tile"]): r["status"] for r in read(scans)["records"]}
    tiles = {}
    for kernel in tuning.SCANS:
        default = tuning.scan_tile(kernel, jnp.float32, 16, device="default")
        chunks = (64,) if kernel in tuning.DELTA else (64, 128)  # a delta rule has a chunk of its own
        tiles[kernel] = {(chunk, 16, 16, warps, 2) for chunk in chunks for warps in (4, 8)} | {(64, 16, 16, default.num_warps, default.num_stages)}
    assert found == {
        (kernel, problem, *tile): "wrong" if (kernel, tile[0]) == ("output", 128) else "ok"
        for kernel in tuning.SCANS
        for problem in (["delta"] if kernel in tuning.DELTA else ["linear", "decayed"])
        for tile in tiles[kernel]
    }


@pytest.mark.parametrize("slower", [1, 1000], ids=["measured", "short-chunks-slow"])
def test_the_chunk_is_the_fastest_of_those_that_all_kernels_serve(scans, slower, tmp_path, monkeypatch):
    """Times of 64 positions are multiplied; 128 is the choice only when the records say that every kernel serves it."""
    content = read(scans)
    for serves in (False, True):
        for r in content["records"]:
            if serves and r["status"] == "wrong":
                r |= {"status": "ok", "bytes": 1, "speed": {"median_s": 1e-9}}
            if not serves and r["status"] == "ok" and r["tile"][0] == 64:
                r["speed"]["median_s"] *= slower
        (tmp_path / "records.json").write_text(json.dumps(content))
        assert run(tmp_path, "--report_only").returncode == 0
        entries = json.loads((tmp_path / "tuning.json").read_text())
        monkeypatch.setattr(tuning, "table", lambda: entries)
        device = content["provenance"]["device_kind"]
        seconds = {}
        for r in content["records"]:
            if r["status"] == "ok":
                seconds.setdefault((r["kernel"], r["tile"][0]), {}).setdefault(tuple(r["tile"][1:]), []).append(r["speed"]["median_s"])
        best = {key: min(tiles, key=lambda tile: math.prod(tiles[tile])) for key, tiles in seconds.items()}
        chunks = [64, 128] if serves else [64]
        total = lambda chunk: math.prod(sum(n * seconds[kernel, chunk][best[kernel, chunk]][p] for kernel, n in RUNS.items()) for p in (0, 1))
        chunk = min(chunks, key=total)
        assert slower == 1 or chunk == max(chunks)
        assert tuning.scan_chunk(jnp.float32, 16, device=device) == chunk
        for kernel in tuning.SCANS:
            tile = ScanTile(*best[kernel, 64 if kernel in tuning.DELTA else chunk])
            assert tuning.scan_tile(kernel, jnp.float32, 16, device=device) == tile
            assert tuning.scan_tile(kernel, jnp.float32, 64, device=device) == tuning.scan_tile(kernel, jnp.float32, 64, device="default")


def test_features_are_held_to_what_xla_does_and_ops_tuning_reads_the_choice(features, monkeypatch):
    """And there are none of wide heads."""
    content, entries = read(features), json.loads((features / "tuning.json").read_text())
    device, present = content["provenance"]["device_kind"], {kernel: tuning.feature_tile(kernel, "float32", 16, device="default") for kernel in tuning.FEATURES}
    problems = {"random": ["exponentials", "sines"], "positive_gradient": ["exponentials"], "sines_gradient": ["sines"]}
    tiles = lambda kernel: {(p, d, 4, 1) for p in (16, 32) for d in ([1] if kernel.startswith("normalized") else [16, 32])} | {dataclasses.astuple(present[kernel])}
    found = {(r["H"], r["kernel"], r["problem"], *r["tile"]): r["status"] for r in content["records"]}
    assert found == {
        (16, kernel, problem, *tile): "wrong" if (problem, kernel, tile[0]) == ("sines", "random", 16) else "ok"
        for kernel in tuning.FEATURES
        for problem in problems.get(kernel, ["delta"])
        for tile in tiles(kernel)
    }
    monkeypatch.setattr(tuning, "table", lambda: entries)
    for kernel in tuning.FEATURES:
        seconds = {}
        for r in content["records"]:
            if r["kernel"] == kernel and r["status"] == "ok":
                seconds.setdefault(tuple(r["tile"]), []).append(r["speed"]["median_s"])
        whole = {tile: math.prod(at) for tile, at in seconds.items() if len(at) == len(problems.get(kernel, ["delta"]))}
        assert tuning.feature_tile(kernel, "float32", 16, device=device) == FeatureTile(*min(whole, key=whole.get))
        assert tuning.feature_tile(kernel, "float16", 64, device=device) == tuning.feature_tile(kernel, "float32", 64, device="default")


def test_a_dtype_has_the_same_tiles_by_its_name():
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        for kernel in tuning.SCANS:
            named, typed = (tuning.scan_tile(kernel, x, 64, device="NVIDIA H200") for x in (jnp.dtype(dtype).name, dtype))
            assert named == typed
    assert tuning.scan_tile("states", "bfloat16", 64, device="NVIDIA H200") != tuning.scan_tile("states", "float32", 64, device="NVIDIA H200")


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
        (("--interpret",), {"chunks": 32}, "--chunks=32: must be a power of two of at least 64; nearest: 64"),
        (("--interpret",), {"kernels": "dqkv"}, "--kernels='dqkv': must be one of"),
        (("--interpret",), {"dtypes": "float8"}, "--dtypes='float8': must be one of"),
        (("--interpret",), {"stages": "two"}, "--stages='two': must be a whole number"),
    ],
    ids=["no-gpu", "no-records", "blocks", "chunks", "kernels", "dtypes", "stages"],
)
def test_what_cannot_be_measured_costs_one_line(options, sizes, message, tmp_path):
    process = run(tmp_path, *options, **sizes)
    assert process.returncode == 2 and process.stderr.count("\n") == 1 and message in process.stderr
    assert not list(tmp_path.iterdir())


def test_interpreted_times_are_not_written_into_the_package(folder):
    before = tuning.PATH.read_text()
    process = run(folder, "--report_only", "--write")
    assert process.returncode == 2 and "interpreted" in process.stderr and tuning.PATH.read_text() == before
