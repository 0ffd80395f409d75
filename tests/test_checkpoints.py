"""Checkpoints: everything comes back, damage is reported and passed over, and a killed run ends as one that was not."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_zoo.checkpoints import Checkpoints
from attn_zoo.config import Cell
from attn_zoo.results import record_path
from tiny import ENV, Staircase, make_cell

STATE = {"params": {"matrix": np.arange(2000.0, dtype=np.float32).reshape(40, 50)}, "key": np.array([0, 7], np.uint32), "step": np.int32(5)}


def batches():
    return Staircase(8).train_iterator(2, seed=0)


def state(step=5):
    return jax.tree.map(jnp.asarray, STATE | {"step": np.int32(step)})


def curve(step):
    return {"step": list(range(1, step + 1)), "train_loss": [1 / i for i in range(1, step + 1)]}


def saved(directory: Path, *steps: int) -> Checkpoints:
    """Checkpoints after so many steps, each of which took one batch."""
    checkpoints, taken = Checkpoints(directory), batches()
    for step in range(1, max(steps) + 1):
        next(taken)
        if step in steps:
            checkpoints.save(step, state(step), taken, curve(step), step / 7)
    checkpoints.manager.wait_until_finished()
    return checkpoints


def assert_restored(found, taken, step):
    """What stood at `step` has come back bit for bit, and `taken` goes on with the batch after it."""
    restored, restored_curve, seconds = found
    bits = lambda tree: jax.tree.map(lambda x: (x.dtype, np.asarray(x).tobytes()), tree)
    assert bits(restored) == bits(state(step))
    assert (restored_curve, seconds) == (curve(step), step / 7)
    assert_goes_on(taken, after=step)


def assert_goes_on(taken, after):
    expected = batches()
    for _ in range(after):
        next(expected)
    jax.tree.map(np.testing.assert_array_equal, next(taken), next(expected))


def damage(folder: Path) -> None:
    """Cuts the files under it in half, as a full disk does."""
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        os.truncate(path, path.stat().st_size // 2)


def test_the_newest_comes_back_whole_and_two_are_kept(tmp_path):
    checkpoints, taken = saved(tmp_path, 2, 3, 5), batches()
    assert sorted(checkpoints.manager.all_steps()) == [3, 5]
    assert_restored(checkpoints.restore(state(), taken), taken, step=5)


def test_another_process_finds_them(tmp_path):
    saved(tmp_path, 3).manager.close()
    taken = batches()
    assert_restored(Checkpoints(tmp_path).restore(state(), taken), taken, step=3)


def test_without_a_checkpoint_nothing_is_restored(tmp_path):
    taken = batches()
    assert Checkpoints(tmp_path).restore(state(), taken) is None
    assert_goes_on(taken, after=0)


def test_what_is_saved_is_what_stood_when_save_was_called(tmp_path):
    """Saving goes on while training does: donated buffers are written over, and the curve grows."""

    class Slow(dict):
        def items(self):
            time.sleep(0.3)
            return super().items()

    checkpoints, taken, growing, now = Checkpoints(tmp_path), batches(), Slow(curve(5)), state(5)
    for _ in range(5):
        next(taken)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0).lower(now).compile()
    checkpoints.save(5, now, taken, growing, 5 / 7)
    for i in range(20):
        now = step(now)
        growing["step"].append(6 + i)
        next(taken)
    jax.block_until_ready(now)
    checkpoints.manager.wait_until_finished()
    assert_restored(checkpoints.restore(state(), taken), taken, step=5)


@pytest.mark.parametrize("part", ["state", "state/ocdbt.process_0/d", "data", "meta"])
def test_a_damaged_checkpoint_is_reported_in_a_line_and_an_older_one_taken(tmp_path, capfd, part):
    saved(tmp_path, 2, 4).manager.close()
    assert (tmp_path / "4" / part).is_dir()
    damage(tmp_path / "4" / part)
    checkpoints, taken = Checkpoints(tmp_path), batches()
    capfd.readouterr()
    assert_restored(checkpoints.restore(state(), taken), taken, step=2)
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 1 and str(tmp_path / "4") in lines[0] and "older" in lines[0]


@pytest.mark.parametrize("part", ["state", "data", "meta"])
def test_when_all_are_damaged_training_starts_from_the_first_batch(tmp_path, part):
    saved(tmp_path, 2, 4).manager.close()
    for step in ("2", "4"):
        damage(tmp_path / step / part)
    taken = batches()
    assert Checkpoints(tmp_path).restore(state(), taken) is None
    assert_goes_on(taken, after=0)


def test_a_step_that_was_damaged_is_saved_anew(tmp_path):
    saved(tmp_path, 2, 4).manager.close()
    damage(tmp_path / "4")
    checkpoints, taken = Checkpoints(tmp_path), batches()
    checkpoints.restore(state(), taken)
    for _ in range(2):
        next(taken)
    checkpoints.save(4, state(4), taken, curve(4), 4 / 7)
    checkpoints.manager.close()
    taken = batches()
    assert_restored(Checkpoints(tmp_path).restore(state(), taken), taken, step=4)


def test_remove_leaves_nothing(tmp_path):
    saved(tmp_path / "cell", 2, 4).remove()
    assert not list(tmp_path.iterdir())


# A learned window, dropout and data that are drawn anew: whatever a step depends on must come back.
CELL = make_cell(
    "[local(window=4), adaptive_span(max_span=16, ramp=4, init=4)]", task="bytes", model={"layers": 2, "dropout": 0.1}, checkpoint_every=5
)


def run_cell(cell: Cell, workdir: Path, data_dir: Path, kill_at: int | None = None) -> dict | None:
    """The cell's record, or None if it was killed, with SIGKILL, at the event of a step."""
    job = json.dumps({"cell": dataclasses.asdict(cell), "workdir": str(workdir), "data_dir": str(data_dir)})
    with open(workdir / "log", "a") as log:
        process = subprocess.Popen([sys.executable, "-m", "attn_zoo.cell"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=ENV)
        process.stdin.write(job)
        process.stdin.close()
        for line in process.stdout:
            if json.loads(line).get("step", 0) == kill_at:
                process.kill()
        returncode = process.wait()
    if kill_at is not None:
        assert returncode == -signal.SIGKILL, (workdir / "log").read_text()
        return None
    assert returncode == 0, (workdir / "log").read_text()
    return json.loads(record_path(workdir, cell.id).read_text())


def assert_same_result(record, expected):
    """Bit for bit: JSON keeps every bit of a float."""
    assert (record["status"], record["message"]) == ("ok", "")
    for name in ("step", "train_loss", "eval_step", "eval_loss"):
        assert record["curve"][name] == expected["curve"][name]
    assert record["metrics"] == expected["metrics"] and record["statistics"] == expected["statistics"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir):
    """The record of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    record = run_cell(CELL, workdir, data_dir)
    assert record["resumed_from"] is None and not (workdir / "checkpoints" / CELL.id).exists()
    return record


@pytest.fixture(scope="module")
def killed(tmp_path_factory, data_dir):
    """The workdir of a run that was killed twice: as a checkpoint begins, and between two."""
    workdir = tmp_path_factory.mktemp("killed")
    for step in (10, 23):
        run_cell(CELL, workdir, data_dir, kill_at=step)
    return workdir


def test_a_killed_run_ends_bit_for_bit_as_one_that_was_not(killed, whole, data_dir, tmp_path):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    record = run_cell(CELL, tmp_path, data_dir)
    assert_same_result(record, whole)
    assert record["resumed_from"] in (15, 20)  # 20 may not have been whole yet
    assert not (tmp_path / "checkpoints" / CELL.id).exists()


@pytest.mark.parametrize("which", ["the newest", "all"])
def test_damaged_checkpoints_cost_time_and_nothing_else(which, killed, whole, data_dir, tmp_path):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    steps = sorted(int(p.name) for p in (tmp_path / "checkpoints" / CELL.id).iterdir() if p.name.isdigit())
    for step in steps if which == "all" else steps[-1:]:
        damage(tmp_path / "checkpoints" / CELL.id / str(step) / "state")
    record = run_cell(CELL, tmp_path, data_dir)
    assert_same_result(record, whole)
    assert record["resumed_from"] == (None if which == "all" else steps[-2])
    assert f"checkpoint {tmp_path / 'checkpoints' / CELL.id / str(steps[-1])} cannot be read" in (tmp_path / "log").read_text()
