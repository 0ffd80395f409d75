"""`bytes`: language modelling of bytes on the source of the running Python's standard library, which every machine has.

The .py files are split by file, by a hash of their path, into 90 / 5 / 5 percent; the files of a split, in sorted order with a
zero byte between two, are one long array, from which windows of any length are cut.
"""

import dataclasses
import functools
import hashlib
import math
import os
import platform
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from attn_zoo.spec import UserError, check, check_choice, check_int, check_number
from attn_zoo.tasks import prepared
from attn_zoo.tasks.base import Example, Task
from attn_zoo.tasks.counts import count_model_score
from attn_zoo.tasks.prepared import split_of

MASK = 256  # the id after the 256 bytes
SEPARATOR = b"\0"  # between two files; Python source holds none

# Installed packages are not the library, and distributions differ in which tests they ship.
EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Options:
    """objective 'causal' predicts the next byte, 'masked' the bytes hidden behind [MASK].

    Every byte is hidden with probability mask_rate, at least one a window, and always by [MASK] (BERT keeps or swaps a fifth).
    Evaluation cuts stretches of `eval_segment` bytes, spread over the split, into windows: all T that divide it score the same bytes.
    """

    objective: str = "causal"
    mask_rate: float = 0.15
    eval_segment: int = 4096

    def __post_init__(self):
        check_choice("objective", self.objective, ("causal", "masked"))
        check_number("mask_rate", self.mask_rate, 0.01, 0.9)
        check(self.objective == "masked" or self.mask_rate == Options.mask_rate, "mask_rate", self.mask_rate, "needs objective='masked'")
        check_int("eval_segment", self.eval_segment, 2)


class Bytes(Task):
    """Language modelling of bytes, causal (decoder) or masked (encoder), in bits per byte.

    `root` is the directory whose .py files are the corpus; by default the standard library.
    """

    name = "bytes"
    Options = Options
    num_outputs = 256
    per_token = True
    loss_name = "bits_per_byte"

    def __init__(self, options: Options, seq_len: int, data_dir: str, root: str | None = None):
        super().__init__(options, seq_len, data_dir)
        self.root = root or sysconfig.get_paths()["stdlib"]
        self.causal = options.objective == "causal"
        self.inputs_vocab = 256 if self.causal else MASK + 1

    @functools.cached_property
    def corpus(self) -> "Corpus":
        return read_corpus(self.root)

    @functools.cached_property
    def builder(self) -> prepared.Builder:
        name = f"py{platform.python_version()}-{self.corpus.sha256[:12]}"
        config = prepared.Config(name=name, description="The standard library of one Python.", options=self.corpus)
        return prepared.prepare(StdlibBytes, config, self.data_dir)

    def split(self, name: str) -> np.ndarray:
        """All bytes of a split, uint8, memory-mapped. Raises UserError where it is shorter than a window."""

        def concatenate():
            files = self.builder.as_data_source(split=name)
            return np.frombuffer(SEPARATOR.join(files[i]["source"].tobytes() for i in range(len(files))), np.uint8)

        array = prepared.cached_array(self.builder, name, concatenate)
        if len(array) <= self.seq_len:
            raise UserError(f"seq_len={self.seq_len}: the {name} split has {len(array)} bytes; use at most {len(array) - 1}")
        return array

    @functools.cached_property
    def train_bytes(self) -> np.ndarray:
        return self.split("train")

    def train_source(self) -> range:
        """Windows by number: as many as fit side by side, so that an epoch covers about every byte once."""
        return range(len(self.train_bytes) // self.seq_len)

    def train_example(self, record: int, rng: np.random.Generator) -> Example:
        """Window `record`, moved by a random part of its length; a window has T + 1 bytes in both objectives."""
        start = min(record * self.seq_len + int(rng.integers(self.seq_len)), len(self.train_bytes) - self.seq_len - 1)
        numbers = None if self.causal else rng.random(self.seq_len)
        return self._example(self.train_bytes[start : start + self.seq_len + 1], numbers)

    def eval_examples(self, tokens: int, split: str) -> Iterable[Example]:
        T = self.seq_len
        array = self.split(split)
        scored = len(array) - 1  # the first byte has nothing before it
        segment = T * max(1, min(-(-self.options.eval_segment // T), tokens // T, scored // T))
        segments = min(max(1, tokens // segment), scored // segment)
        # One number a byte of the split: a byte is hidden, or not, whatever the window it falls in.
        numbers = None if self.causal else np.random.RandomState(0).random_sample(len(array))
        for i in range(segments):
            begin = i * (scored // segments)
            for start in range(begin, begin + segment, T):
                yield self._example(array[start : start + T + 1], None if self.causal else numbers[start + 1 : start + T + 1])

    def _example(self, window: np.ndarray, numbers: np.ndarray | None) -> Example:
        """Scored are the last T bytes of a window of T + 1; masked hides those of them whose `numbers`, uniform in [0, 1), are low."""
        window = window.astype(np.int32)
        targets, valid = window[1:], np.ones(self.seq_len, bool)
        if self.causal:
            return {"inputs": window[:-1], "targets": targets, "weights": np.ones(self.seq_len, np.float32), "valid": valid}
        hidden = numbers <= max(self.options.mask_rate, numbers.min())  # at least one
        inputs = np.where(hidden, np.int32(MASK), targets)
        return {"inputs": inputs, "targets": targets, "weights": hidden.astype(np.float32), "valid": valid}

    def label(self, id: int, source: bool = False) -> str:
        return "MASK" if id == MASK else chr(id)  # a byte of more than ASCII as Latin-1 has it

    def floors(self) -> dict[str, dict[str, float]]:
        """Uniform, and byte counts of the training split, alone or given the (true) byte before, plus one, scored on validation."""

        def compute():
            counts = np.ones((256, 256)) + _pair_counts(self.split("train"))
            seen = _pair_counts(self.split("validation"))
            unigram = count_model_score(counts.sum(axis=0, keepdims=True), seen.sum(axis=0, keepdims=True))
            return {"unigram": unigram, "bigram": count_model_score(counts, seen)}

        scores = {"uniform": (math.log(256), 1 / 256), **prepared.cached_json(self.builder, "floors", compute)}
        return {name: self.score(*score) for name, score in scores.items()}

    def provenance(self) -> dict[str, Any]:
        corpus = {"sha256": self.corpus.sha256, "bytes": self.corpus.num_bytes, "files": len(self.corpus.paths)}
        return {**prepared.describe(self.builder), "corpus": corpus, "python": platform.python_version()}


def _pair_counts(array: np.ndarray) -> np.ndarray:
    """How often a byte follows another, [256 previous, 256 next]."""
    return np.bincount(array[:-1].astype(np.int64) * 256 + array[1:], minlength=256 * 256).reshape(256, 256)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The .py files under a directory, as sorted relative paths, and what identifies their content."""

    root: str
    paths: tuple[str, ...]
    sha256: str  # of path, size and content of each file in order
    num_bytes: int


def read_corpus(root: str) -> Corpus:
    """Finds and hashes the corpus (0.2 s for 12 MB). Raises UserError where there is none, as in a Python without sources."""
    paths, digest, num_bytes = [], hashlib.sha256(), 0
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [d for d in subdirectories if d not in EXCLUDED]
        paths += [Path(directory, f).relative_to(root).as_posix() for f in files if f.endswith(".py")]
    for path in sorted(paths):
        content = Path(root, path).read_bytes()
        digest.update(f"{path}\0{len(content)}\0".encode() + content)
        num_bytes += len(content)
    missing = [split for split in prepared.SPLITS if split not in map(split_of, paths)]
    if missing:
        raise UserError(
            f"{root} has {len(paths)} .py files, none for {', '.join(missing)}: run a Python that has its standard library as source"
        )
    return Corpus(str(root), tuple(sorted(paths)), digest.hexdigest(), num_bytes)


class StdlibBytes(prepared.Builder):
    """The .py files of a Python's standard library, one example a file, split by file."""

    name = "stdlib_bytes"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Split 90 / 5 / 5 by the SHA-256 of the relative path; no tests, no installed packages."}

    def features(self):
        return {"path": tfds.features.Text(), "source": prepared.raw_array(np.uint8, None)}

    def generate(self, split):
        corpus = self.builder_config.options
        for path in corpus.paths:
            if split_of(path) == split:
                yield {"path": path, "source": np.frombuffer(Path(corpus.root, path).read_bytes(), np.uint8)}
