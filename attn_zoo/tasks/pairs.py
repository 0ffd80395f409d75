"""Tasks whose target is generated from a source: what their examples are made of, and what a predictor scores that never reads the source.

For an encoder and a decoder, a batch has source int32 [B, S] and source_valid bool [B, S] beside the usual arrays: inputs are the target
shifted right behind BEGIN, targets the target with END behind it. Joined, for a decoder alone, source, BEGIN, target and END are
one sequence, of which the target and END are scored; the ids of the target's vocabulary are then the first of the source's.
"""

import abc
import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from attn_zoo.spec import UserError
from attn_zoo.tasks import prepared
from attn_zoo.tasks.base import Example, RecordTask
from attn_zoo.tasks.counts import count_model_score

PAD, BEGIN, END = 0, 1, 2  # the first ids of every vocabulary here
RESERVED = 3


class PairTask(RecordTask):
    """Pairs of a source and a target. Subclasses call `lay_out` when built, and give `pair` and `text`."""

    causal = True
    per_token = True
    padded = True
    joined: bool

    def lay_out(self, *, source_vocab: int, target_vocab: int, source_len: int, target_len: int, joined: bool) -> None:
        """Sets vocabularies (with the reserved ids) and S for pairs of at most these lengths. Raises UserError where T cannot hold them."""
        self.joined = joined
        needed = source_len + 1 + target_len if joined else target_len + 1
        if self.seq_len < needed:
            what = f"a source of {source_len}, BEGIN and a target of {target_len}" if joined else f"a target of {target_len} and END"
            raise UserError(f"seq_len={self.seq_len}: must be at least {needed}, to hold {what}")
        self.num_outputs = target_vocab
        self.inputs_vocab = source_vocab if joined else target_vocab
        if not joined:
            self.source_vocab, self.source_len = source_vocab, source_len
            self.begin_end = BEGIN, END

    @abc.abstractmethod
    def pair(self, record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """(source, target) ids of a record, int32, without BEGIN and END."""

    @abc.abstractmethod
    def text(self, ids: np.ndarray, source: bool = False) -> str:
        """The words of target (or source) ids, up to END."""

    def label(self, id: int, source: bool = False) -> str:
        return reserved_label(id) or self.text(np.array([id]), source)

    def example(self, record: dict[str, Any]) -> Example:
        source, target = self.pair(record)
        return join(source, target, self.seq_len) if self.joined else pair(source, target, self.source_len, self.seq_len)

    def contexts(self, source: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
        """What the count models among the floors know, at each token of the target and at END: whole numbers, by the floor's name."""
        return {"unigram": np.zeros(len(target) + 1, np.int64), "position": np.arange(len(target) + 1)}

    def floors(self) -> dict[str, dict[str, float]]:
        """Uniform over the target's vocabulary and END, and counts of the training split plus one, by `contexts`; scored on validation.

        eval_exact is the share of targets that are whole, END included: of a uniform draw, or of each context's most frequent token.
        """
        scores = prepared.cached_json(self.builder, f"floors_{self.name}", self._floors)
        return {name: {**self.score(loss, accuracy), "eval_exact": exact} for name, (loss, accuracy, exact) in scores.items()}

    def _floors(self) -> dict[str, tuple[float, float, float]]:
        """(loss, accuracy, exact match) by name."""
        train, validation = self._outcomes("train"), self._outcomes("validation")
        V = self.num_outputs - END  # an outcome is END or what comes after it
        lengths = np.diff(np.append(validation.starts, len(validation.tokens)))
        scores = {"uniform": (math.log(V), 1 / V, float((V**-lengths.astype(float)).mean()))}
        for name, seen in validation.contexts.items():
            C = 1 + max(seen.max(), train.contexts[name].max())
            counts = 1 + _histogram(train.contexts[name], train.tokens, C, V)
            # The best token at each place, given the true ones before, is right everywhere exactly if greedy decoding is.
            hits = counts.argmax(axis=1)[seen] == validation.tokens
            exact = float(np.logical_and.reduceat(hits, validation.starts).mean())
            scores[name] = (*count_model_score(counts, _histogram(seen, validation.tokens, C, V)), exact)
        return scores

    def _outcomes(self, split: str) -> "Outcomes":
        records = self.builder.as_data_source(split=split)
        pairs = [self.pair(record) for record in records.__getitems__(range(len(records)))]
        contexts = [self.contexts(source, target) for source, target in pairs]
        lengths = np.array([len(target) + 1 for _, target in pairs])
        return Outcomes(
            tokens=np.concatenate([np.append(target, END) for _, target in pairs]) - END,
            starts=lengths.cumsum() - lengths,
            contexts={name: np.concatenate([c[name] for c in contexts]) for name in contexts[0]},
        )


@dataclasses.dataclass
class Outcomes:
    """All targets of a split with END behind each, one after the other."""

    tokens: np.ndarray  # counted from END
    starts: np.ndarray  # where each target begins
    contexts: dict[str, np.ndarray]


def previous(target: np.ndarray) -> np.ndarray:
    """The context of a bigram: the token before each of the target and END."""
    return np.append(BEGIN, target)


def reserved_label(id: int) -> str:
    """The name of a reserved id, or nothing."""
    return {PAD: "PAD", BEGIN: "BEGIN", END: "END"}.get(int(id), "")


def content(ids: Iterable[int]) -> list[int]:
    """Ids up to END or padding."""
    return list(itertools.takewhile(lambda i: i >= RESERVED, map(int, ids)))


def pair(source: np.ndarray, target: np.ndarray, S: int, T: int) -> Example:
    """For an encoder and a decoder."""
    return {"source": _padded(source, S), "source_valid": np.arange(S) < len(source), **shifted(target, T)}


def shifted(target: np.ndarray, T: int) -> Example:
    """For a decoder: what it reads and what it is to say, whatever its source."""
    valid = np.arange(T) <= len(target)
    return {
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
        "targets": _padded(tokens[1:], T) * (t >= len(source)),  # not what is not scored: ids of the source alone are no outputs
        "weights": ((t >= len(source)) & (t < len(tokens) - 1)).astype(np.float32),
        "valid": t < len(tokens) - 1,
    }


def _histogram(contexts: np.ndarray, tokens: np.ndarray, C: int, V: int) -> np.ndarray:
    """How often each token occurred in each context, [C, V]."""
    return np.bincount(contexts.astype(np.int64) * V + tokens, minlength=C * V).reshape(C, V)


def _padded(ids: np.ndarray, n: int) -> np.ndarray:
    return np.pad(np.asarray(ids, np.int32), (0, n - len(ids)), constant_values=PAD)
