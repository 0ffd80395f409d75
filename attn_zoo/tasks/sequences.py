"""`copy`, `reverse` and `sort`: a sequence of symbols, the same, backwards, or in order; trained on some lengths, evaluated on more.

Lengths are uniform over min_length .. max_length, symbols over the vocabulary. A sequence is training's, validation's or test's by
its hash, so none is evaluated that may be trained on. The probes length_N are of validation's kind, all of N symbols, trained lengths and longer.
"""

import dataclasses
import functools

import numpy as np
import tensorflow_datasets as tfds

from attn_zoo.spec import check, check_choice, check_int
from attn_zoo.tasks import prepared
from attn_zoo.tasks.pairs import RESERVED, PairTask, content, previous


@dataclasses.dataclass(frozen=True)
class Options:
    """`longest` is the greatest length evaluated, by default twice max_length; `joined` makes one sequence, for a decoder alone."""

    vocab: int = 26
    min_length: int = 4
    max_length: int = 16
    longest: int | None = None
    joined: bool = False
    train_examples: int = 20_000
    validation_examples: int = 1_000
    test_examples: int = 1_000

    def __post_init__(self):
        for name in ("min_length", "train_examples", "validation_examples", "test_examples"):
            check_int(name, getattr(self, name), 1)
        check_int("vocab", self.vocab, 2)
        check_int("max_length", self.max_length, self.min_length)
        check_int("longest", self.longest, self.max_length, optional=True)
        check_choice("joined", self.joined, (False, True))
        # A split of 1 in 20 then has at least twice as many sequences of the least length as are asked for.
        needed, fits = 40 * max(self.validation_examples, self.test_examples), self.min_length
        while self.vocab**fits < needed:
            fits += 1
        rule = f"there are {self.vocab**self.min_length} of that length with vocab={self.vocab}, too few to set some apart; use at least {fits}"
        check(fits == self.min_length, "min_length", self.min_length, rule)

    @property
    def lengths(self) -> "Lengths":
        return Lengths(self.min_length, self.max_length, self.longest or 2 * self.max_length)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Training has shortest .. trained, evaluation goes on to longest; all are inclusive."""

    shortest: int
    trained: int
    longest: int

    def probed(self) -> tuple[int, ...]:
        """The least, middle and greatest trained length, and four steps beyond."""
        beyond = self.longest - self.trained
        return tuple(sorted({self.shortest, (self.shortest + self.trained) // 2, *(self.trained + beyond * i // 4 for i in range(5))}))


class Sequences(PairTask):
    """A sequence of symbols, and what `rewrite` makes of it; a decoder's task, with an encoder or alone."""

    Options = Options

    def __init__(self, options: Options, seq_len: int, data_dir: str):
        super().__init__(options, seq_len, data_dir)
        V, S = RESERVED + options.vocab, options.lengths.longest
        self.lay_out(source_vocab=V, target_vocab=V, source_len=S, target_len=S, joined=options.joined)
        self.probes = tuple(f"length_{n}" for n in options.lengths.probed())

    @staticmethod
    def rewrite(symbols: np.ndarray) -> np.ndarray:
        """The target of a source."""
        raise NotImplementedError

    @functools.cached_property
    def builder(self) -> prepared.Builder:
        o = self.options
        sizes = {split: getattr(o, f"{split}_examples") for split in prepared.SPLITS}
        name = "-".join(map(str, (f"V{o.vocab}-length", *dataclasses.astuple(o.lengths), *sizes.values())))
        return prepared.prepare(SequencesBuilder, prepared.Config(name=name, options=(o.vocab, o.lengths, sizes)), self.data_dir)

    def pair(self, record: dict) -> tuple[np.ndarray, np.ndarray]:
        return RESERVED + record["symbols"], RESERVED + self.rewrite(record["symbols"])

    def text(self, ids: np.ndarray, source: bool = False) -> str:
        return " ".join(str(i - RESERVED) for i in content(ids))

    def contexts(self, source: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
        """Also the token before, and the position with the source's length, which tells where END is."""
        known = super().contexts(source, target)
        return {**known, "bigram": previous(target), "position and length": known["position"] + len(source) * (len(source) + 1) // 2}


class Copy(Sequences):
    """The same sequence."""

    name = "copy"

    @staticmethod
    def rewrite(symbols: np.ndarray) -> np.ndarray:
        return symbols


class Reverse(Sequences):
    """The sequence backwards."""

    name = "reverse"

    @staticmethod
    def rewrite(symbols: np.ndarray) -> np.ndarray:
        return symbols[::-1]


class Sort(Sequences):
    """The symbols in order, repeated ones side by side."""

    name = "sort"

    @staticmethod
    def rewrite(symbols: np.ndarray) -> np.ndarray:
        return np.sort(symbols)


def generate(vocab: int, shortest: int, longest: int, split: str, seed: int):
    """Yields int32 symbols 0 .. vocab - 1 of sequences of a split (train, validation, test), without end; none twice, but in training.

    RandomState, because NumPy has frozen its streams and so these data; the streams of its successor may change (NEP 19).
    """
    rng, evaluated = np.random.RandomState(seed), set()
    while True:
        symbols = rng.randint(vocab, size=rng.randint(shortest, longest + 1), dtype=np.int32)
        key = " ".join(map(str, symbols.tolist()))
        if prepared.split_of(key) == split and key not in evaluated:
            if split != "train":
                evaluated.add(key)
            yield symbols


class SequencesBuilder(prepared.Builder):
    """Sequences of symbols, of which each task makes its own target."""

    name = "sequences"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Uniform lengths and symbols on RandomState, split 90 / 5 / 5 by the SHA-256 of the symbols."}

    def features(self):
        return {"symbols": prepared.raw_array(np.int32, None)}

    def probes(self):
        return tuple(f"length_{n}" for n in self.builder_config.options[1].probed())

    def generate(self, split):
        vocab, lengths, sizes = self.builder_config.options
        if split in prepared.SPLITS:
            symbols = generate(vocab, lengths.shortest, lengths.trained, split, seed=prepared.SPLITS.index(split))
        else:
            n = int(split.removeprefix("length_"))
            symbols = generate(vocab, n, n, "validation", seed=len(prepared.SPLITS) + n)
        for _, example in zip(range(sizes.get(split, sizes["validation"])), symbols):
            yield {"symbols": example}
