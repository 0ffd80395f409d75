"""Candidates of one length, compiled first and then timed in interleaved rounds."""

import collections
import concurrent.futures
import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench.candidates import CannotRun, Lost

from attn_zoo.results import load_records

MODES = ("forward", "forward_backward")
LEAST_S = 0.02  # of a timed sample: shorter calls are made several times in one, so that dispatch and the clock weigh little
SHORT_S = 0.05  # a shorter call is made once before, untimed: right after others, it took up to twice as long
PAUSE_S = 0.02  # after a change of process, so that the threads of the one no longer spin while the other is timed


def measure(rows: list, rounds: int, jobs: int, until: float = math.inf) -> Iterator[tuple[Any, str, dict]]:
    """(row, mode, {'status', 'message' or 'speed', and what preparing gave}) of all, after all are timed; `jobs` are prepared side by side.

    What is not being prepared `until` then, on the monotonic clock, is left out, with the status 'timeout'.
    """
    each = [(row, mode) for row in rows for mode in MODES]
    outcomes = prepared(each, jobs, until)
    calls = {key: 1 for key in each if outcomes[key]["status"] == "ok"}
    seconds: dict[tuple, list[float]] = {key: [] for key in calls}

    def time_each(found: dict[tuple, list[float]]) -> None:
        """One more sample of every row that still runs; one that fails leaves with the reason, and the rest go on."""
        before = ()  # none yet; None is that of JAX
        for row, mode in list(calls):
            if row.process is not before:
                time.sleep(PAUSE_S)
                before = row.process
            try:
                if not first[row, mode] or first[row, mode][0] < SHORT_S:
                    row.seconds(mode, 1)
                found[row, mode].append(row.seconds(mode, calls[row, mode]))
            except CannotRun as e:
                outcomes[row, mode] |= without_time(e)
                del calls[row, mode]

    first: dict[tuple, list[float]] = {key: [] for key in calls}
    time_each(first)
    calls.update({key: max(1, math.ceil(LEAST_S / first[key][0])) for key in calls})
    for _ in range(rounds):
        time_each(seconds)
    for row, mode in calls:
        p20, median, p80 = np.percentile(seconds[row, mode], (20, 50, 80)).tolist()
        outcomes[row, mode]["speed"] = {"median_s": median, "p20_s": p20, "p80_s": p80, "n": rounds, "calls": calls[row, mode]}
    return ((row, mode, outcomes[row, mode]) for row, mode in each)


def prepared(each: list[tuple], jobs: int, until: float) -> dict[tuple, dict]:
    """What preparing gave, of every row and mode. Each process of PyTorch prepares one after the other, beside the others and those of JAX if `jobs` are more than
    one; what tunes itself by the clock is prepared after all else, and alone.
    """
    outcomes = {}
    for alone in (False, True):
        with contextlib.ExitStack() as stack:
            pool = lambda size: stack.enter_context(concurrent.futures.ThreadPoolExecutor(size))
            ours, theirs = pool(1 if alone else jobs), collections.defaultdict(lambda: pool(1))
            of = lambda row: ours if row.process is None or alone or jobs == 1 else theirs[row.process]
            futures = {(row, mode): of(row).submit(prepare, row, mode, until) for row, mode in each if row.tunes == alone}
            outcomes |= {key: future.result() for key, future in futures.items()}
    return outcomes


def prepare(row: Any, mode: str, until: float) -> dict:
    """The status of a row that is prepared, and what that gave."""
    if time.monotonic() > until:
        return {"status": "timeout", "message": "the time was over before it was compiled"}
    try:
        return row.prepare(mode) | {"status": "ok"}
    except CannotRun as e:
        return without_time(e)


def without_time(e: CannotRun) -> dict:
    """What is said of a row that has none; 'lost_at', on the monotonic clock, of one that is lost."""
    return {"status": e.status, "message": str(e)} | ({"lost_at": time.monotonic()} if isinstance(e, Lost) else {})


def done(out: Path, ids: set[str], common: dict) -> bool:
    """Whether all of these records are there, of rows that were neither lost nor left out, from this commit without local changes, this machine and these settings."""
    if common["provenance"]["git_dirty"] or not (out / "records").exists():
        return False
    found = {r["id"]: r for r in load_records(out)}
    same = lambda r: r["settings"] == common["settings"] and all(r["provenance"].get(key) == common["provenance"][key] for key in ("git_commit", "git_dirty", "cpu", "device_kind"))
    return ids <= found.keys() and all(same(found[id]) and found[id]["status"] != "timeout" and not found[id].get("lost") for id in ids)
