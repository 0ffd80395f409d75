"""What a person sees of a sweep: a live bar on a terminal, lines elsewhere."""

import dataclasses
import io
import types

import pytest
from rich.console import Console

from attn_zoo import progress
from attn_zoo.progress import Display
from attn_zoo.results import STATUSES
from tiny import make_cell

CELL = make_cell()


@pytest.fixture
def display():
    return Display(Console(file=io.StringIO(), width=80))


def record(status="ok", variant="full", **rest):
    metrics = {"metrics": {"eval_loss": 1.23456, "eval_accuracy": 0.5}, "loss_name": "loss", "tokens_per_s": 98765.4}
    return {"status": status, "message": "" if status == "ok" else "because", "cell": {"variant": variant, "seq_len": 16, "seed": 0}, **metrics, **rest}


MIXED = "[local(window=4), adaptive_span(max_span=1024, init=64), linear]"


def show(display, step=10):
    """A sweep of two cells of which the first was done before."""
    with display:
        display.begin(2, 1)
        display.note("preparing bytes")
        display.start(dataclasses.replace(CELL, variant=MIXED))
        display.event({"phase": "train"})
        display.event({"step": step, "loss": 2.34567, "tokens_per_s": 640.0})
        display.bar.refresh()
        display.finish(record(variant=MIXED))
    return display.console.file.getvalue()


def test_elsewhere_than_on_a_terminal_a_row_is_a_line(display):
    lines = show(display).splitlines()
    assert lines == ["2 cells, 1 of them done before", f"[2/2] {MIXED} T=16 seed=0: loss 1.235, accuracy 0.500, 98,765 tokens/s, 0 s"]


def test_elsewhere_than_on_a_terminal_a_long_cell_tells_of_itself_now_and_then(display, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", -1)
    assert f"{MIXED} T=16 seed=0: step 10/30, loss 2.346, 640 tokens/s, 2 s left" in show(display).splitlines()


def test_on_a_terminal_a_bar_shows_cell_step_loss_rate_and_time_left():
    text = show(Display(Console(file=io.StringIO(), force_terminal=True, width=200, highlight=False)))
    assert "\x1b[" in text and "1/2" in text
    assert f"{MIXED} T=16 seed=0: step 10/30, loss 2.346, 640 tokens/s, 2 s left" in text
    assert f"[2/2] {MIXED} T=16 seed=0: loss 1.235" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is shown again"


@pytest.mark.parametrize("status", STATUSES[1:])
def test_the_row_of_a_cell_without_result_says_why(status, display):
    display.begin(1, 0)
    display.start(CELL)
    display.finish(record(status))
    assert display.console.file.getvalue().splitlines()[-1] == f"[1/1] full T=16 seed=0: {status}: because, 0 s"


def test_the_time_left_is_that_of_the_cells_so_far(display, monkeypatch):
    now = iter((0.0, 0.0, 600.0))
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
    display.begin(4, 1)
    display.start(CELL)
    display.finish(record())
    assert display.bar.tasks[0].fields["left"] == "about 20 min left"
