"""A sweep: which cells, whose workdir, and a process for each, which leaves a record and nothing else, whatever becomes of it.

Shell scripts stand in for cells here; tests/test_launch.py runs real ones.
"""

import contextlib
import dataclasses
import importlib.util
import io
import json
import subprocess
import sys
import textwrap
import time

import filelock
import psutil
import pytest
from rich.console import Console

from attn_zoo import sweep
from attn_zoo.config import Experiment
from attn_zoo.parameters import parameters_path
from attn_zoo.progress import Display
from attn_zoo.results import STATUSES, load_records, load_sweep
from attn_zoo.spec import UserError
from tiny import ENV, MQAR, make_cell

CELL = make_cell()
EXPERIMENT = Experiment("tiny", MQAR, ("full",), (16,), model=CELL.model, attention=CELL.attention, train=CELL.train, measure=CELL.measure)


def change(experiment=EXPERIMENT, **changes) -> Experiment:
    return dataclasses.replace(experiment, **changes)


def test_cells_go_length_by_length_and_variant_by_variant(tmp_path):
    asked = change(variants=("linear, [local(window=256), full]", "full"), seq_lens=(32, 16), seeds=(0, 1), model=dataclasses.replace(CELL.model, layers=2))
    found = [(c.seq_len, c.variant, c.seed) for c in sweep.cells(asked, str(tmp_path))]
    assert found == [(T, variant, seed) for T in (32, 16) for variant in ("linear", "[local, full]", "full") for seed in (0, 1)]


def test_one_meaning_is_one_cell(tmp_path):
    texts = ("local", "local(window=256)", "['local']", "local()")
    cells = sweep.cells(change(variants=texts, seeds=(0, 0)), str(tmp_path))
    assert [c.variant for c in cells] == ["local"]
    assert {sweep.cells(change(variants=(text,)), str(tmp_path))[0].id for text in texts} == {cells[0].id}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"variants": ("ful",)}, "there is no attention variant 'ful'; did you mean 'full'?"),
        ({"variants": ("local(windw=3)",)}, "did you mean 'window'?"),
        ({"variants": ("[full, full]",)}, "[full, full]: a list of 2 variants, where layers=1"),
        ({"attention": dataclasses.replace(CELL.attention, backend="xls")}, "did you mean 'xla'?"),
        ({"task": "byte"}, "there is no task 'byte'; did you mean 'bytes'?"),
        ({"task": "bytes(objective='mask')"}, "did you mean 'masked'?"),
        ({"task": "listops"}, "seq_len=16: must be at least max_length=2000"),
        ({"variants": ("full", "recurrent(additive, D=8)")}, "recurrent(additive, D=8): a recurrent model reads a source"),
        ({"task": "cloze", "variants": ("recurrent(additive)",), "seq_lens": (48,)}, "a recurrent model writes its target token by token"),
        ({"task": "cloze", "variants": ("convolutional(dilated)",), "seq_lens": (48,)}, "a convolutional model with a source writes its target token by token"),
        ({"task": "shapes(objective='same')", "variants": ("convnet(full, D=8, layers=3)",), "seq_lens": (256, 1024, 16)}, "must be the cells of a grid that the network has"),
        ({"variants": ("full", "transformer(full, full, D=8)")}, "a list of 2 variants, where layers=1"),
        ({"task": "dates", "variants": ("recurrent(additive)",), "attention": dataclasses.replace(CELL.attention, backend="cudnn")}, "'cudnn' serves attention of the zoo, of which there is none"),
        ({"model": dataclasses.replace(CELL.model, body="reader"), "variants": ("attention_sum",)}, "use the task cloze"),
        ({"model": dataclasses.replace(CELL.model, where=("cross",))}, "this model has no such place"),
    ],
)
def test_what_no_cell_could_run_with_is_refused_before_any_does(changes, message, tmp_path):
    with pytest.raises(UserError) as error:
        sweep.cells(change(**changes), str(tmp_path))
    assert message in str(error.value)


def test_several_models_are_rows_of_one_sweep(tmp_path):
    asked = change(variants=("full, convolutional(dilated, layers=2), convolutional(dilated, D=16)",))
    cells = sweep.cells(asked, str(tmp_path))
    assert [c.variant for c in cells] == ["full", "convolutional(dilated, layers=2)", "convolutional(dilated)"]
    assert {c.model for c in cells} == {asked.model}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="there is a TPU's library to start")
def test_the_accelerator_is_left_to_the_cells():
    """A process that had started it would hold its memory. Here there is none to start, so that trying would be an error."""
    code = """
        from attn_zoo import sweep
        from attn_zoo.config import Attention, Experiment, Model
        model = Model(D=16, layers=1, N=2, remat=True)
        print(len(sweep.cells(Experiment("x", "dates", ("full, recurrent(dot), convolutional(dilated)",), (12,), model=model, attention=Attention("cudnn")), "")))
        import jax
        try:
            jax.devices()
        except RuntimeError as e:
            print("none", "libtpu" in str(e))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=ENV | {"JAX_PLATFORMS": "tpu"}, check=True)
    assert run.stdout.split() == ["3", "none", "True"]


def claim(workdir, experiment):
    sweep.claim(str(workdir), experiment, sweep.cells(experiment, ""))


def test_an_extended_sweep_keeps_its_earlier_cells(tmp_path):
    claim(tmp_path, EXPERIMENT)
    claim(tmp_path, change(variants=("linear", "local"), seq_lens=(32,), seeds=(1,), timeout_s=5.0, keep_parameters=True))
    content = load_sweep(tmp_path)
    assert [(c["variant"], c["seq_len"], c["seed"]) for c in content["cells"]] == [("linear", 32, 1), ("local", 32, 1), ("full", 16, 0)]
    assert content["cells"][-1]["id"] == sweep.cells(EXPERIMENT, "")[0].id
    claim(tmp_path, EXPERIMENT)
    assert len(load_sweep(tmp_path)["cells"]) == 3


@pytest.mark.parametrize(
    "changes, where",
    [
        ({"name": "other"}, "name is 'tiny', here 'other'"),
        ({"task": "bytes"}, f"task is {MQAR!r}, here 'bytes'"),
        ({"model": dataclasses.replace(CELL.model, D=32)}, "model.D is 16, here 32"),
        ({"attention": dataclasses.replace(CELL.attention, backend="xla")}, "attention.backend is 'auto', here 'xla'"),
        ({"train": dataclasses.replace(CELL.train, lr=0.5)}, "train.lr is 0.02, here 0.5"),
        ({"measure": dataclasses.replace(CELL.measure, modes=("forward",))}, "measure.modes is [], here ['forward']"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_workdir_belongs_to_one_sweep(changes, where, tmp_path):
    claim(tmp_path, EXPERIMENT)
    before = (tmp_path / "sweep.json").read_bytes()
    with pytest.raises(UserError) as error:
        claim(tmp_path, change(**changes))
    assert f"workdir {tmp_path} belongs to another sweep: there {where}; choose another --workdir" == str(error.value)
    assert (tmp_path / "sweep.json").read_bytes() == before


def test_two_sweeps_at_once_in_one_workdir_are_refused(tmp_path, display):
    with filelock.FileLock(tmp_path / ".lock"):
        with pytest.raises(UserError, match=f"another sweep is running in {tmp_path}"):
            sweep.run(EXPERIMENT, str(tmp_path), str(tmp_path / "data"), display)
    assert not (tmp_path / "sweep.json").exists()


@pytest.fixture
def display():
    return Display(Console(file=io.StringIO(), width=80))


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Puts a shell script in the place of the process of a cell."""

    def put(script: str) -> None:
        path = tmp_path / "child"
        path.write_text("#!/bin/sh\n" + textwrap.dedent(script))
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return put


def run_cell(tmp_path, display, timeout_s=60.0):
    display.begin(1, 0)
    display.start(CELL)
    record = sweep.run_cell(CELL, str(tmp_path), str(tmp_path / "data"), timeout_s, display)
    assert load_records(tmp_path) == [record] and record["id"] == CELL.id
    assert record["cell"] == json.loads(json.dumps(dataclasses.asdict(CELL))) and record["provenance"]["seconds"]["total"] < 10
    return record["status"], record["message"]


def pids(tmp_path, names):
    return [int((tmp_path / name).read_text()) for name in names]


def assert_gone(pids):
    """Ended within a second: whether init reaps an orphan at once, late or (in many containers) never, is not ours to test."""

    def alive():
        for process in map(psutil.Process, filter(psutil.pid_exists, pids)):
            with contextlib.suppress(psutil.NoSuchProcess):  # reaped between the two questions
                if process.status() != psutil.STATUS_ZOMBIE:
                    yield process

    deadline = time.monotonic() + 1
    while (left := list(alive())) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == []


@pytest.mark.parametrize(
    "script, expected",
    [
        ("kill -KILL $$", ("error", "killed by SIGKILL")),
        ("echo first >&2; echo last words >&2; kill -SEGV $$", ("error", "killed by SIGSEGV: last words")),
        ("echo no such module >&2; exit 3", ("error", "exit status 3: no such module")),
        ("exit 0", ("error", "exit status 0")),
        ("exec sleep 60", ("timeout", "stopped after timeout_s=0.5")),
        ("exec sleep 60 >&-", ("timeout", "stopped after timeout_s=0.5")),  # its output is closed, and it does not end
        ("trap '' TERM; while :; do sleep 1; done", ("timeout", "stopped after timeout_s=0.5")),
    ],
)
def test_a_process_that_leaves_no_record_gets_one(script, expected, child, tmp_path, display):
    child(script)
    assert run_cell(tmp_path, display, timeout_s=0.5 if expected[0] == "timeout" else 60.0) == expected


def test_a_process_killed_while_the_system_runs_out_of_memory_is_out_of_memory(child, tmp_path, display, monkeypatch):
    kills = iter((4, 5))
    monkeypatch.setattr(sweep, "_oom_kills", lambda: next(kills))
    child("kill -KILL $$")
    assert run_cell(tmp_path, display) == ("oom", "killed by the system, which ran out of memory")


GRANDCHILDREN = """
    echo $$ > child.pid
    sleep 60 & echo $! > grandchild.pid
    (trap '' TERM; exec sleep 60) & echo $! > stubborn.pid
    sleep 0.2  # the trap is set
    echo '{"phase": "train"}'
    wait
"""


def test_a_timeout_ends_the_process_with_all_its_children(child, tmp_path, display, monkeypatch):
    monkeypatch.chdir(tmp_path)
    child(GRANDCHILDREN)
    assert run_cell(tmp_path, display, timeout_s=1.0)[0] == "timeout"
    assert_gone(pids(tmp_path, ("child.pid", "grandchild.pid", "stubborn.pid")))


def test_an_interrupt_ends_the_process_with_all_its_children_and_goes_on(child, tmp_path, display, monkeypatch):
    def interrupt(event):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(display, "event", interrupt)
    child(GRANDCHILDREN)
    with pytest.raises(KeyboardInterrupt):
        run_cell(tmp_path, display)
    assert_gone(pids(tmp_path, ("child.pid", "grandchild.pid", "stubborn.pid")))
    assert load_records(tmp_path) == [], "a cell that was stopped is not done"


def test_a_record_stands_although_its_process_did_not_end(child, tmp_path, display):
    """Or a library that hangs at exit would cost the result."""
    (tmp_path / "records").mkdir()
    record = {"id": CELL.id, "status": "ok", "message": "", "cell": dataclasses.asdict(CELL), "provenance": {"seconds": {"total": 1.0}}}
    (tmp_path / "left.json").write_text(json.dumps(record))
    child(f"cp {tmp_path}/left.json {tmp_path}/records/{CELL.id}.json; exec sleep 60")
    assert run_cell(tmp_path, display, timeout_s=0.5) == ("ok", "")


FAKE = """
import json, sys
from attn_zoo.config import Cell
from attn_zoo.results import STATUSES, write_record

job = json.load(sys.stdin)
cell = Cell.from_json(job["cell"])
with open("started", "a") as f:
    print(cell.seed, file=f)
content = {"metrics": {"eval_loss": 1.5, "eval_accuracy": 0.5}, "loss_name": "loss"}
write_record(job["workdir"], {"id": cell.id, "status": STATUSES[cell.seed], "message": "because", "cell": job["cell"], **content})
"""


def test_what_is_done_is_not_run_again(child, tmp_path, display, monkeypatch):
    """Seed s ends in the s-th status; failures run again on request, results never."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.chdir(tmp_path)
    child(f"exec {sys.executable} fake.py")
    experiment = change(seeds=tuple(range(len(STATUSES) - 1)))

    def started(experiment, **options):
        (tmp_path / "started").write_text("")
        records = sweep.run(experiment, "work", "data", display, **options)
        assert [r["cell"]["seed"] for r in records] == list(experiment.seeds)
        assert [r["status"] for r in records] == [STATUSES[seed] for seed in experiment.seeds]
        return [STATUSES[int(seed)] for seed in (tmp_path / "started").read_text().split()]

    assert started(experiment) == list(STATUSES[:-1])
    assert started(experiment) == []
    extended = change(seeds=tuple(range(len(STATUSES))))
    assert started(extended) == [STATUSES[-1]]
    assert started(extended, retry=True) == ["timeout", "error"]
    assert started(experiment) == []
    assert len(load_records("work")) == len(STATUSES)


DISTURBED = """
import json, sys
from attn_zoo.config import Cell
from attn_zoo.results import write_record

job = json.load(sys.stdin)
cell = Cell.from_json(job["cell"])
with open("started", "a+") as f:
    f.seek(0)
    again = str(cell.seed) in f.read().split()
    print(cell.seed, file=f)
rates = {"before": 2e11, "after": 2e11 if cell.seed != 1 or again else 1e11}
content = {"calibration": {"matmul_flops_per_s": rates}, "metrics": {"eval_loss": 1.5, "eval_accuracy": 0.5}, "loss_name": "loss"}
write_record(job["workdir"], {"id": cell.id, "status": "ok", "message": "", "cell": job["cell"], **content})
"""


def test_what_was_disturbed_runs_again_on_request(child, tmp_path, display, monkeypatch):
    (tmp_path / "fake.py").write_text(DISTURBED)
    monkeypatch.chdir(tmp_path)
    child(f"exec {sys.executable} fake.py")
    for options in ({}, {"retry": True}, {"retry_disturbed": True}, {"retry_disturbed": True}):
        sweep.run(change(seeds=(0, 1, 2)), "work", "data", display, **options)
    assert (tmp_path / "started").read_text().split() == ["0", "1", "2", "1"]


KEEPING = FAKE + """
from attn_zoo.parameters import parameters_path

if job["keep_parameters"]:
    path = parameters_path(job["workdir"], cell.id)
    path.parent.mkdir(exist_ok=True)
    path.touch()
"""


def test_a_cell_that_ended_well_without_keeping_its_parameters_runs_again_where_they_are_asked_for(child, tmp_path, display, monkeypatch):
    """Seed s ends in the s-th status; of what did not end well there is nothing to keep."""
    (tmp_path / "fake.py").write_text(KEEPING)
    monkeypatch.chdir(tmp_path)
    child(f"exec {sys.executable} fake.py")
    experiment = change(seeds=(0, 1, 2))

    def started(experiment):
        (tmp_path / "started").write_text("")
        sweep.run(experiment, "work", "data", display)
        return (tmp_path / "started").read_text().split()

    assert sweep.cells(experiment, "") == sweep.cells(change(experiment, keep_parameters=True), ""), "what is kept is no part of a cell"
    assert started(experiment) == ["0", "1", "2"] and not (tmp_path / "work" / "parameters").exists()
    assert started(change(experiment, keep_parameters=True)) == ["0"]
    (kept,) = (tmp_path / "work" / "parameters").iterdir()
    assert kept.name == f"{sweep.cells(experiment, '')[0].id}.npz"
    assert started(change(experiment, keep_parameters=True)) == started(experiment) == []


def test_parameters_of_an_earlier_run_do_not_outlive_it(child, tmp_path, display):
    path = parameters_path(tmp_path, CELL.id)
    path.parent.mkdir()
    path.write_text("earlier")
    child("exit 1")
    assert run_cell(tmp_path, display)[0] == "error" and not path.exists()
