"""The tasks, by the name that a spec gives: load_task("mqar(pairs=16)", seq_len=512, data_dir="data")."""

from attn_zoo.spec import UserError, nearest, parse_one
from attn_zoo.tasks.base import Batch, Example, Task
from attn_zoo.tasks.bytes import Bytes
from attn_zoo.tasks.cloze import Cloze
from attn_zoo.tasks.dates import Dates
from attn_zoo.tasks.listops import ListOps
from attn_zoo.tasks.mqar import Mqar
from attn_zoo.tasks.sequences import Copy, Reverse, Sort
from attn_zoo.tasks.shapes import Shapes
from attn_zoo.tasks.translate import Translate

TASKS: dict[str, type[Task]] = {
    "bytes": Bytes,
    "mqar": Mqar,
    "listops": ListOps,
    "copy": Copy,
    "reverse": Reverse,
    "sort": Sort,
    "dates": Dates,
    "cloze": Cloze,
    "shapes": Shapes,
    "translate": Translate,
}


def load_task(spec: str, seq_len: int, data_dir: str, allow_download: bool = False) -> Task:
    """The task of a spec at one length. Raises UserError for what the spec or the length cannot be.

    Nothing is prepared yet: the first use of the data does that, under data_dir, once for all processes. What it must download it does only if allowed to.
    """
    parsed = parse_one(spec)
    if parsed.name not in TASKS:
        raise UserError(f"there is no task {parsed.name!r}; {nearest(parsed.name, TASKS)}")
    task = TASKS[parsed.name]
    loaded = task(parsed.resolve("task", task.Options), seq_len, data_dir)
    loaded.allow_download = allow_download
    return loaded
