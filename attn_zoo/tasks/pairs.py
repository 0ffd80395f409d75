"""Tasks whose target is generated from a source: what their examples are made of.

For an encoder and a decoder, a batch has source int32 [B, S] and source_valid bool [B, S] beside the usual arrays: inputs are the target
shifted right behind BEGIN, targets the target with END behind it. Joined, for a decoder alone, source, BEGIN, target and END are
one sequence, of which the target and END are scored.
"""

import abc
from typing import Any

import numpy as np

from attn_zoo.tasks.base import Example, RecordTask

PAD, BEGIN, END = 0, 1, 2  # the first ids of every vocabulary here
RESERVED = 3


class PairTask(RecordTask):
    """Pairs of a source and a target. Subclasses set vocabularies, `source_len` and `joined`, and give `pair`."""

    causal = True
    per_token = True
    padded = True
    joined: bool

    @abc.abstractmethod
    def pair(self, record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """(source, target) ids of a record, int32, without BEGIN and END."""

    @abc.abstractmethod
    def text(self, ids: np.ndarray, source: bool = False) -> str:
        """The words of target (or source) ids, up to END."""

    def example(self, record: dict[str, Any]) -> Example:
        source, target = self.pair(record)
        return join(source, target, self.seq_len) if self.joined else pair(source, target, self.source_len, self.seq_len)


def pair(source: np.ndarray, target: np.ndarray, S: int, T: int) -> Example:
    """For an encoder and a decoder."""
    valid = np.arange(T) <= len(target)
    return {
        "source": _padded(source, S),
        "source_valid": np.arange(S) < len(source),
        "inputs": _padded(np.append(BEGIN, target), T),
        "targets": _padded(np.append(target, END), T),
        "weights": valid.astype(np.float32),
        "valid": valid,
    }


def join(source: np.ndarray, target: np.ndarray, T: int) -> Example:
    """For a decoder alone."""
    tokens = np.concatenate([source, [BEGIN], target, [END]])
    t = np.arange(T)
    return {
        "inputs": _padded(tokens[:-1], T),
        "targets": _padded(tokens[1:], T),
        "weights": ((t >= len(source)) & (t < len(tokens) - 1)).astype(np.float32),
        "valid": t < len(tokens) - 1,
    }


def _padded(ids: np.ndarray, n: int) -> np.ndarray:
    return np.pad(np.asarray(ids, np.int32), (0, n - len(ids)), constant_values=PAD)
