import hashlib

import numpy as np
import pytest
import tiny_translation  # noqa: F401: registers a set with TFDS

from attn_zoo.spec import parse_one
from attn_zoo.tasks import TASKS, Bytes, Cloze, load_task


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def corpus_root(tmp_path_factory):
    """120 small files, an empty one, one that is not UTF-8, and what must be left out."""
    root = tmp_path_factory.mktemp("stdlib")
    for i in range(120):
        path = root / f"package_{i % 7}" / f"module_{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"def f_{i}_{j}(x):\n    return {i} * x + {j * j % 89}\n" for j in range(i % 13 + 3)))
    (root / "empty.py").touch()
    (root / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'Gödel'\n".encode("latin-1"))
    (root / "notes.txt").write_text("not Python")
    for excluded in ("site-packages", "package_1/test", "package_2/__pycache__"):
        (root / excluded).mkdir()
        (root / excluded / "excluded.py").write_text("raise SystemExit")
    return root


MODULE = '''"""Reads row_{i} of a table into table_{i}. {colours}. The limit tells how many rows there are.

It keeps row_{i} in the cache until the limit is reached.
"""

class Table_{i}:
    """The cache of module {i} holds every table_{i} that was read. {colours}."""

    def read(self, limit, cache):
        """Return row_{i}, or the {j}th one before the limit of table_{i}. {colours}. It fills the cache of Table_{i} first."""
        row_{i} = table_{i} = cache
'''


@pytest.fixture(scope="session")
def docs_root(tmp_path_factory):
    """120 small files with docstrings, and one that no Python reads."""
    root = tmp_path_factory.mktemp("documented")
    for i in range(120):
        path = root / f"package_{i % 7}" / f"module_{i}.py"
        path.parent.mkdir(exist_ok=True)
        colours = " ".join(("red", "blue")[i >> bit & 1] for bit in range(7))  # tell files apart even where their own words are unknown
        path.write_text(MODULE.format(i=i, j=i * i % 89, colours=colours))
    (root / "broken.py").write_text('"""It is no Python, says the parser of it."""\nparser = = 1')
    return root


@pytest.fixture(scope="session")
def make_task(data_dir, corpus_root, docs_root):
    """load_task, with a small corpus in the place of the standard library."""
    roots = {Bytes: corpus_root, Cloze: docs_root}

    def make(spec: str, seq_len: int):
        parsed = parse_one(spec)
        if (task := TASKS[parsed.name]) in roots:
            return task(parsed.resolve("task", task.Options), seq_len, data_dir, root=str(roots[task]))
        return load_task(spec, seq_len, data_dir, allow_download=True)  # of tiny_translation, which has nothing to download

    return make


@pytest.fixture(scope="session")
def checksum():
    """12 hex digits over arrays or numbers: what is pinned cannot drift in silence."""

    def of(*arrays) -> str:
        digest = hashlib.sha256()
        for array in map(np.asarray, arrays):
            digest.update(f"{array.dtype.str}{array.shape}".encode() + array.tobytes())
        return digest.hexdigest()[:12]

    return of
