"""A sweep: its cells, each in a process of its own with a time limit, skipping what is done and going on where it stopped."""

import contextlib
import dataclasses
import datetime
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from attn_zoo import train
from attn_zoo.config import Attention, Cell, Experiment
from attn_zoo.models import Entry, read_variants
from attn_zoo.ops.backends import check_backend
from attn_zoo.parameters import parameters_path
from attn_zoo.progress import Display
from attn_zoo.results import load_records, load_sweep, record_path, write_record
from attn_zoo.spec import UserError
from attn_zoo.summary import disturbed
from attn_zoo.tasks import Task, load_task

FAILED = ("error", "timeout")  # statuses that make a sweep exit with 1; oom, nan and unsupported are results
SHARED = ("name", "task", "model", "attention", "train", "measure")  # what all records of one workdir have in common


def cells(experiment: Experiment, data_dir: str) -> list[Cell]:
    """Length by length, every variant, every seed; with variants in canonical form. Raises UserError for anything no cell could run with."""
    entries = [entry for text in experiment.variants for entry in read_variants(text, experiment.model)]
    backend = experiment.attention.backend
    check_backend(backend)
    if backend not in ("auto", "xla") and not any(entry.body.has_backends for entry in entries):
        raise UserError(f"attention.backend={backend!r} serves attention of the zoo, of which there is none in {', '.join(entry.text for entry in entries)}; use auto or xla")
    tasks = [load_task(experiment.task, T, data_dir) for T in experiment.seq_lens]
    shared = {name: getattr(experiment, name) for name in ("task", "model", "attention", "train", "measure")}
    every = [Cell(entry.text, T, seed, **shared) for T in experiment.seq_lens for entry in entries for seed in experiment.seeds]
    for entry in {(entry.model, len(entry.specs)): entry for entry in entries}.values():
        for task in tasks:
            _check_model(entry, every[0], task, named=entry.model != experiment.model or len(entry.specs) > 1)
    return list(dict.fromkeys(every))


def _check_model(entry: Entry, cell: Cell, task: Task, named: bool) -> None:
    """Raises UserError for what no variant of the entry's model can do with the task: what one variant cannot do is a row.

    Nothing here starts the accelerator, which belongs to the cells.
    """
    plainest = f"[{', '.join([entry.body.plainest] * len(entry.specs))}]"
    plain = dataclasses.replace(cell, variant=plainest, seq_len=task.seq_len, model=dataclasses.replace(entry.model, remat=False), attention=Attention())
    try:
        train.Model(plain, task)
    except UserError as e:
        raise UserError(f"{entry.text}: {e}" if named else str(e)) from None


def claim(workdir: str, experiment: Experiment, cells: list[Cell]) -> None:
    """Writes workdir/sweep.json; cells of earlier runs stay in it. Raises UserError if the workdir belongs to another sweep."""
    mine = dataclasses.asdict(experiment)
    listed = [{"id": c.id, "variant": c.variant, "seq_len": c.seq_len, "seed": c.seed} for c in cells]
    earlier = _earlier(workdir, experiment)
    if earlier is not None:
        ids = {c["id"] for c in listed}
        listed += [c for c in earlier["cells"] if c["id"] not in ids]
    Path(workdir).mkdir(parents=True, exist_ok=True)
    temporary = Path(workdir, f".sweep.json.{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"experiment": mine, "cells": listed}, indent=1) + "\n")
    os.replace(temporary, Path(workdir, "sweep.json"))


def _earlier(workdir: str, experiment: Experiment) -> dict[str, Any] | None:
    """What sweep.json says of earlier runs in the workdir. Raises UserError if they are of another sweep."""
    earlier = load_sweep(workdir)
    if earlier is not None:
        check_same_sweep(workdir, json.loads(json.dumps(dataclasses.asdict(experiment))), earlier["experiment"])
    return earlier


def check_same_sweep(workdir: str, mine: dict, theirs: dict) -> None:
    """Raises UserError naming the first setting in which two sweeps differ; variants, lengths, seeds, time limit and what is kept may."""
    for name in SHARED:
        if mine[name] != theirs.get(name):
            a, b = mine[name], theirs.get(name)
            key = next((k for k in a if not isinstance(b, dict) or a[k] != b.get(k)), None) if isinstance(a, dict) else None
            where, a, b = (name, a, b) if key is None else (f"{name}.{key}", a[key], b.get(key) if isinstance(b, dict) else None)
            raise UserError(f"workdir {workdir} belongs to another sweep: there {where} is {b!r}, here {a!r}; choose another --workdir")


def run(
    experiment: Experiment, workdir: str, data_dir: str, display: Display, retry: bool = False, allow_download: bool = False, retry_disturbed: bool = False
) -> list[dict[str, Any]]:
    """Runs the cells that have no record yet, one at a time, and returns the records of all.

    With `retry`, also those that failed; with `retry_disturbed`, those that ended ok while something else used the machine.

    Where parameters are to be kept, a cell that ended ok without keeping them runs again.

    On KeyboardInterrupt the running cell is stopped with its children, and the interrupt goes on to the caller.
    """
    todo = cells(experiment, data_dir)
    for flag, folder in (("workdir", workdir), ("data_dir", data_dir)):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"--{flag}={folder}: the folder cannot be made ({e.strerror})") from None
    lock = filelock.FileLock(Path(workdir, ".lock"), timeout=0)
    try:
        with lock:
            _earlier(workdir, experiment)
            return _run_claimed(experiment, todo, workdir, data_dir, display, retry, allow_download, retry_disturbed)
    except filelock.Timeout:
        raise UserError(f"another sweep is running in {workdir}; wait for it, or choose another --workdir") from None


def _run_claimed(experiment, todo, workdir, data_dir, display, retry, allow_download, retry_disturbed):
    asked = {cell.id for cell in todo}
    done = {r["id"]: r for r in load_records(workdir) if r["id"] in asked}
    lacks = lambda cell: experiment.keep_parameters and done[cell.id]["status"] == "ok" and not parameters_path(workdir, cell.id).exists()
    marked = disturbed(list(done.values())) if retry_disturbed else ()
    left = [c for c in todo if c.id not in done or (retry and done[c.id]["status"] in FAILED) or c.id in marked or lacks(c)]
    with display:
        display.begin(len(todo), len(todo) - len(left))
        if left:
            # Once, before anything is timed; the longest sequences ask most of the data.
            display.note(f"preparing {experiment.task}")
            load_task(experiment.task, max(experiment.seq_lens), data_dir, allow_download).prepare()
        claim(workdir, experiment, todo)  # after what may refuse the task's options
        for cell in left:
            display.start(cell)
            done[cell.id] = run_cell(cell, workdir, data_dir, experiment.timeout_s, display, experiment.keep_parameters)
            display.finish(done[cell.id])
    return [done[cell.id] for cell in todo]


def run_cell(cell: Cell, workdir: str, data_dir: str, timeout_s: float, display: Display, keep_parameters: bool = False) -> dict[str, Any]:
    """Runs one cell in a process and returns its record, which stands on disk by then, whatever became of the process."""
    log = Path(workdir, "logs", f"{cell.id}.log")
    log.parent.mkdir(exist_ok=True)
    path = record_path(workdir, cell.id)
    for earlier in (path, parameters_path(workdir, cell.id)):
        earlier.unlink(missing_ok=True)
    job = {"cell": dataclasses.asdict(cell), "workdir": str(workdir), "data_dir": str(data_dir), "keep_parameters": keep_parameters}
    oom_kills, started = _oom_kills(), time.monotonic()
    with open(log, "w") as stderr:
        # A session of its own: Ctrl-C reaches this process alone, which then stops the cell with all its children.
        process = subprocess.Popen(
            [sys.executable, "-m", "attn_zoo.cell"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True
        )
        timed_out = False
        try:
            with contextlib.suppress(BrokenPipeError):  # it died at once: its log and exit status say why
                process.stdin.write(json.dumps(job))
                process.stdin.close()
            for event in _events(process, started + timeout_s):
                display.event(event)
        except TimeoutError:
            timed_out = True
        finally:
            stop(process)
    if not path.exists():
        seconds = time.monotonic() - started
        status, message = _explain(process.returncode, timed_out, timeout_s, _oom_kills() > oom_kills, log)
        provenance = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "seconds": {"total": seconds}}
        write_record(workdir, {"id": cell.id, "status": status, "message": message, "cell": dataclasses.asdict(cell), "provenance": provenance})
    return json.loads(path.read_text())


def stop(process: subprocess.Popen, patience_s: float = 3.0) -> None:
    """Ends the process and its whole process group: asks, waits, then kills whatever of it is left."""
    for sig in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sig)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)


def _events(process: subprocess.Popen, deadline: float) -> Iterator[dict]:
    """The process's events until it closes its output. Raises TimeoutError at the deadline."""
    lines: queue.Queue = queue.Queue()

    def read():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise TimeoutError from None
            return
        yield json.loads(line)


def _explain(returncode: int, timed_out: bool, timeout_s: float, oom_killed: bool, log: Path) -> tuple[str, str]:
    """(status, message) of a cell that left no record."""
    if timed_out:
        return "timeout", f"stopped after timeout_s={timeout_s:g}"
    if returncode == -signal.SIGKILL and oom_killed:
        return "oom", "killed by the system, which ran out of memory"
    how = f"killed by {signal.Signals(-returncode).name}" if returncode < 0 else f"exit status {returncode}"
    last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
    return "error", f"{how}: {last}" if last else how


def _oom_kills() -> int:
    """How often Linux has killed for memory since it started; 0 where it does not tell."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
