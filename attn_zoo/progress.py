"""What a person sees of a running sweep: a live bar on a terminal, plain lines elsewhere, and each row as it comes."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from attn_zoo.config import Cell

PLAIN_EVERY_S = 20  # between lines about one cell where there is no terminal


class Display:
    """Shows cells, steps and rows; a context manager, so that the terminal is left as it was found."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self.live = self.console.is_terminal
        columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TimeElapsedColumn(), TextColumn("{task.fields[left]}"), TextColumn("{task.description}", markup=False))
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not self.live)
        self.task = None
        self.seconds: list[float] = []  # of the cells run so far

    def __enter__(self) -> "Display":
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def begin(self, total: int, done: int) -> None:
        """Before the first cell."""
        self.total, self.done = total, done
        self.task = self.bar.add_task("", total=total, completed=done, left="")
        self.print(f"{total} cells" + (f", {done} of them done before" if done else ""))

    def note(self, text: str) -> None:
        """What goes on between cells."""
        self.bar.update(self.task, description=text)

    def start(self, cell: Cell) -> None:
        """A cell begins."""
        self.cell, self.started, self.shown = cell, time.monotonic(), time.monotonic()
        self.label = f"{cell.variant} T={cell.seq_len} seed={cell.seed}"
        self.note(self.label)

    def event(self, event: dict[str, Any]) -> None:
        """News from the running cell."""
        if "step" in event:
            rate = f"{event['tokens_per_s']:,.0f} tokens/s"
            left = (self.cell.train.steps - event["step"]) * self.cell.train.tokens_per_step / max(event["tokens_per_s"], 1e-9)
            text = f"{self.label}: step {event['step']}/{self.cell.train.steps}, loss {event['loss']:.3f}, {rate}, {left:.0f} s left"
        else:
            text = f"{self.label}: {event['phase']}"
        self.note(text)
        if not self.live and "step" in event and time.monotonic() - self.shown > PLAIN_EVERY_S:
            self.shown = time.monotonic()
            self.print(text)

    def finish(self, record: dict[str, Any]) -> None:
        """A cell's record: its row."""
        self.done += 1
        self.seconds.append(time.monotonic() - self.started)
        left = f"about {(self.total - self.done) * sum(self.seconds) / len(self.seconds) / 60:.0f} min left" if self.done < self.total else ""
        self.bar.update(self.task, completed=self.done, left=left)
        self.print(f"[{self.done}/{self.total}] {row(record)}, {self.seconds[-1]:.0f} s")

    def print(self, text: str) -> None:
        """One line, above the bar if there is one."""
        self.bar.console.print(text, markup=False, soft_wrap=True)


def row(record: dict[str, Any]) -> str:
    """A record in one line."""
    cell, metrics = record["cell"], record.get("metrics")
    head = f"{cell['variant']} T={cell['seq_len']} seed={cell['seed']}"
    if record["status"] != "ok":
        return f"{head}: {record['status']}: {record['message']}"
    name = f"eval_{record['loss_name']}"
    rate = f", {record['tokens_per_s']:,.0f} tokens/s" if record.get("tokens_per_s") else ""
    return f"{head}: {name.replace('eval_', '').replace('_', ' ')} {metrics[name]:.3f}, accuracy {metrics['eval_accuracy']:.3f}{rate}"
