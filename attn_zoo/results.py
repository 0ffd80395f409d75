"""Records on disk: one strict JSON file a cell, written whole or not at all. docs/records.md lists the keys.

A workdir holds `records/<id>.json` and, once a sweep was started in it, `sweep.json`: the experiment and its cells in the
order of the table.
"""

import json
import math
import os
import uuid
from pathlib import Path
from typing import Any

from attn_zoo.spec import UserError, check_choice

STATUSES = ("ok", "oom", "unsupported", "nan", "timeout", "error")


def record_path(workdir: str | os.PathLike, id: str) -> Path:
    """Where the record of the cell with this id stands; a cell is done when the file exists."""
    return Path(workdir) / "records" / f"{id}.json"


def write_record(workdir: str | os.PathLike, record: dict[str, Any]) -> Path:
    """Writes a record, replacing an earlier one; a reader sees the old or the new file, never part of one.

    NaN and infinities become null, since JSON has no word for them; NumPy and JAX scalars and arrays become numbers and lists.
    One key a line at the top level, so that records can be read and compared as text.
    """
    check_choice("status", record["status"], STATUSES)
    path = record_path(workdir, record["id"])
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (f"{json.dumps(str(k))}: {json.dumps(_strict(v), allow_nan=False, ensure_ascii=False)}" for k, v in record.items())
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # the same folder, hence the same file system
    try:
        with open(temporary, "x", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())  # or a crash of the machine could keep the name and lose the content
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # still there only if writing failed
    return path


def load_records(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """All records, in the order of the sweep's cells; those it does not list follow, by variant, length and seed.

    Raises UserError naming the file for a record or a sweep.json that is damaged.
    """
    order = {cell["id"]: i for i, cell in enumerate(_cells(load_sweep(workdir)))}
    records = [_load_record(path) for path in (Path(workdir) / "records").glob("*.json")]
    content = lambda r: (r["cell"]["variant"], r["cell"]["seq_len"], r["cell"]["seed"], r["id"])
    return sorted(records, key=lambda r: (order.get(r["id"], len(order)), *content(r)))


def load_with_missing(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """As load_records, and in its place a record of status 'missing' for each cell of the sweep that has none yet."""
    records = load_records(workdir)
    sweep = load_sweep(workdir)
    found = {r["id"]: r for r in records}
    missing = lambda cell: {"id": cell["id"], "status": "missing", "message": "not run yet", "cell": {**sweep["experiment"], **cell}}
    asked = [found.pop(cell["id"], None) or missing(cell) for cell in _cells(sweep)]
    return asked + list(found.values())


def load_sweep(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """The content of sweep.json: {'experiment': {...}, 'cells': [{'id', 'variant', 'seq_len', 'seed'}, ...]}, or None without one."""
    path = Path(workdir) / "sweep.json"
    if not path.exists():
        return None
    advice = "start the sweep again to write it anew; the records stay"
    sweep = _load(path, ("experiment", "cells"), advice)
    if not all(isinstance(cell, dict) and cell.keys() >= {"id", "variant", "seq_len", "seed"} for cell in sweep["cells"]):
        raise UserError(f"{path}: damaged, a cell lacks its id, variant, seq_len or seed; {advice}")
    return sweep


def _cells(sweep: dict[str, Any] | None) -> list[dict[str, Any]]:
    return sweep["cells"] if sweep else []


def _load_record(path: Path) -> dict[str, Any]:
    advice = "delete it, and the sweep runs that cell again"
    record = _load(path, ("id", "status", "cell"), advice)
    if record["id"] != path.stem:
        raise UserError(f"{path}: holds the record {record['id']!r}, not {path.stem!r}; {advice}")
    if not isinstance(record["cell"], dict) or not {"variant", "seq_len", "seed"} <= record["cell"].keys():
        raise UserError(f"{path}: not a whole record (its cell has no variant, seq_len and seed); {advice}")
    return record


def _load(path: Path, keys: tuple[str, ...], advice: str) -> dict[str, Any]:
    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except ValueError as e:  # also bytes that are not UTF-8
        raise UserError(f"{path}: damaged or half-written ({e}); {advice}") from None
    if not isinstance(content, dict) or not content.keys() >= set(keys):
        raise UserError(f"{path}: damaged, lacks one of {', '.join(keys)}; {advice}")
    return content


def _strict(value: Any) -> Any:
    """The value in JSON's own types."""
    if isinstance(value, dict):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # NumPy and JAX
        return _strict(value.tolist())
    return value
