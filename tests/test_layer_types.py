"""Table 1 of Vaswani et al. 2017 as experiments/layer_types.py measures it: what no clock tells is exact, and the table follows from the records."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import ENV

SCRIPT = Path(__file__).parent.parent / "experiments" / "layer_types.py"
T, D, WINDOW, KERNEL = 32, 8, 4, 3


def run(out, *options):
    """In a process of its own: absl's flags are global, and launch.py has some of the same names."""
    command = [sys.executable, str(SCRIPT), f"--out={out}", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENV)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layer_types")
    sizes = dict(seq_lens=T, widths=D, path_lens=T, T=T, D=D, H=D, window=WINDOW, kernel=KERNEL, rounds=1)
    process = run(folder, *(f"--{name}={value}" for name, value in sizes.items()))
    assert process.returncode == 0, process.stderr
    return folder


def records(folder, kind, key):
    content = json.loads((folder / "records.json").read_text())
    return {r["name"]: r[key] for r in content["records"] if r["kind"] == kind}


def test_every_layer_is_timed(folder):
    assert set(records(folder, "time", "status").values()) == {"ok"}
    assert all(speed["median_s"] > 0 for speed in records(folder, "time", "speed").values())


def test_only_a_recurrence_takes_one_operation_after_the_other(folder):
    operations = records(folder, "operations", "as_defined")
    assert operations.pop("recurrent (GRU)") == T
    assert len(operations) == 6 and set(operations.values()) == {1}


def test_paths_are_as_long_as_the_geometry_of_the_layers_says(folder):
    restricted = math.ceil((T - 1) / WINDOW)
    assert records(folder, "path", "length") == {
        "self-attention": 1,
        "self-attention, without projections": 1,
        "recurrent (GRU)": T,
        "convolutional, contiguous": math.ceil((T - 1) / (KERNEL - 1)),
        "convolutional, dilated": math.ceil(math.log2((T - 1) / (KERNEL - 1) + 1)),  # 1 + 2 + 4 + ... dilations, each KERNEL - 1 times
        "self-attention, restricted": restricted,
        "self-attention, restricted, without projections": restricted,
    }


def test_exponents_are_those_of_the_recorded_times(folder, tmp_path):
    """Of times that grow as T^2 and as D^1.5 in every layer."""
    content = json.loads((folder / "records.json").read_text())
    timed = [r for r in content["records"] if r["kind"] == "time"]
    grown = lambda r, T, D: r | {"T": T, "D": D, "speed": {"median_s": 1e-3 * (T / 32) ** 2 * (D / 8) ** 1.5}}
    content["records"] += [grown(r, T, D) for r in timed for T, D in ((64, 8), (128, 8), (32, 16), (32, 64))]
    for r in timed:
        r |= grown(r, 32, 8)
    (tmp_path / "records.json").write_text(json.dumps(content))
    process = run(tmp_path, "--report_only")
    assert process.returncode == 0, process.stderr
    rows = [line for line in (tmp_path / "table.md").read_text().splitlines() if "±" in line]
    assert len(rows) == 7
    for row in rows:
        assert row.count("2.00 ± 0.00") == 2 and row.count("1.50 ± 0.00") == 2


def test_a_width_that_heads_do_not_divide_is_one_line(tmp_path):
    process = run(tmp_path, "--H=64", "--widths=64,100")
    message = "layer_types.py: D=100: must be a multiple of the head dim --H=64"
    assert process.returncode == 2 and process.stderr.splitlines()[-1] == message and not list(tmp_path.iterdir())
