"""`mqar`: multi-query associative recall. Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language Models".

The sequence begins with `pairs` pairs of a key and its value; later each key comes once more, and there, and only there,
its value is to be predicted. Keys are 1 .. V/2 - 1, values V/2 .. V - 1, both distinct within a sequence.
"""

import dataclasses
import functools
import itertools
import math

import numpy as np
import tensorflow_datasets as tfds

from attn_zoo.spec import UserError, check_choice, check_int, check_number
from attn_zoo.tasks import prepared
from attn_zoo.tasks.base import Example, RecordTask


@dataclasses.dataclass(frozen=True)
class Options:
    """The defaults suit models that train in minutes: they fit every T >= 32, and 255 keys are told apart by D = 64.

    The paper has vocab 8192 and 4 to 64 pairs. `power` is a of the law p(gap) ~ gap^(a - 1) by which keys return; 1 is uniform.
    All other tokens are filler, drawn from the whole vocabulary: 'random' may repeat a key by accident, 'clean' never does.
    """

    vocab: int = 512
    pairs: int = 8
    power: float = 0.01
    filler: str = "random"
    train_examples: int = 20_000
    validation_examples: int = 1_000
    test_examples: int = 1_000

    def __post_init__(self):
        for name in ("pairs", "train_examples", "validation_examples", "test_examples"):
            check_int(name, getattr(self, name), 1)
        check_int("vocab", self.vocab, 2 * self.pairs + 2)  # as many keys, 0 is none, and as many values
        check_number("power", self.power, 0, 10)
        check_choice("filler", self.filler, ("random", "clean"))


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the dataset depends on, besides how many examples are asked for."""

    vocab: int
    pairs: int
    power: float
    seq_len: int


class Mqar(RecordTask):
    """Multi-query associative recall, a decoder's task."""

    name = "mqar"
    Options = Options
    causal = True
    per_token = True

    def __init__(self, options: Options, seq_len: int, data_dir: str):
        super().__init__(options, seq_len, data_dir)
        most = seq_len // 4
        if options.pairs > most:
            nearest = f"pairs={most} or " if most else ""
            raise UserError(
                f"pairs={options.pairs}: seq_len={seq_len} holds at most {most}, 2 tokens for a pair and 2 for its query; "
                f"use {nearest}seq_len={4 * options.pairs}"
            )
        self.inputs_vocab = self.num_outputs = options.vocab

    @functools.cached_property
    def builder(self) -> prepared.Builder:
        o = self.options
        sizes = {split: getattr(o, f"{split}_examples") for split in prepared.SPLITS}
        counts = "-".join(map(str, sizes.values()))
        config = prepared.Config(
            name=f"V{o.vocab}-pairs{o.pairs}-power{float(o.power)}-T{self.seq_len}-{counts}",
            options=(Layout(o.vocab, o.pairs, o.power, self.seq_len), sizes),
        )
        return prepared.prepare(MqarBuilder, config, self.data_dir)

    def example(self, record: dict) -> Example:
        """The sequence of a record, which names its filler by a seed: at T = 64k the tokens themselves would be gigabytes."""
        T, keys, values, queries = self.seq_len, record["keys"], record["values"], record["queries"]
        rng = np.random.RandomState(np.random.PCG64(record["filler_seed"]))  # ten times faster to seed than the default
        inputs = fill(rng, self.options.vocab, T, keys if self.options.filler == "clean" else keys[:0])
        context = 2 * len(keys)
        inputs[0:context:2], inputs[1:context:2], inputs[queries] = keys, values, keys
        targets, weights = np.zeros(T, np.int32), np.zeros(T, np.float32)
        targets[queries], weights[queries] = values, 1
        return {"inputs": inputs, "targets": targets, "weights": weights, "valid": np.ones(T, bool)}

    def floors(self) -> dict[str, dict[str, float]]:
        """A guess among all values, and among the values of the sequence: as these are distinct, both have a closed form."""
        choices = {"uniform over values": self.options.vocab - self.options.vocab // 2, "own values": self.options.pairs}
        return {name: self.score(math.log(n), 1 / n) for name, n in choices.items()}


def fill(rng: np.random.RandomState, vocab: int, n: int, without: np.ndarray) -> np.ndarray:
    """n tokens of the vocabulary, uniform over those not in `without` (distinct), int32 [n]."""
    rank = rng.randint(vocab - len(without), size=n)
    # The r-th allowed token is r plus the number of forbidden ones at or below it.
    return (rank + np.searchsorted(np.sort(without) - np.arange(len(without)), rank, side="right")).astype(np.int32)


def draw_distinct(rng: np.random.RandomState, p: np.ndarray, n: int, k: int) -> np.ndarray:
    """n rows of k distinct indices, each row drawn one after the other by p without replacement, in that order; int32 [n, k].

    As an exponential race: clocks of rate p ring in the order of such draws (Efraimidis and Spirakis 2006).
    """
    rings = rng.standard_exponential((n, len(p))) / p
    first = np.argpartition(rings, k - 1, axis=1)[:, :k]
    return np.take_along_axis(first, np.take_along_axis(rings, first, axis=1).argsort(axis=1), axis=1).astype(np.int32)


def generate(layout: Layout, seed: int):
    """Yields examples without end; the first n are the same whatever n.

    RandomState, because NumPy has frozen its streams and so these data; the streams of its successor may change (NEP 19).
    """
    rng = np.random.RandomState(seed)
    half = layout.vocab // 2
    slots = (layout.seq_len - 2 * layout.pairs) // 2  # a query stands in the first place of a slot of two
    law = np.arange(1, slots + 1) ** (layout.power - 1.0)
    rows = 64
    while True:
        keys = 1 + draw_distinct(rng, np.ones(half - 1), rows, layout.pairs)
        values = half + draw_distinct(rng, np.ones(layout.vocab - half), rows, layout.pairs)
        queries = 2 * layout.pairs + 2 * draw_distinct(rng, law, rows, layout.pairs)
        seeds = rng.randint(2**32, size=rows, dtype=np.uint32)
        for i in range(rows):
            yield {"keys": keys[i], "values": values[i], "queries": queries[i], "filler_seed": int(seeds[i])}


class MqarBuilder(prepared.Builder):
    """Multi-query associative recall: keys, values, the positions of the queries, and a seed for the filler."""

    name = "mqar"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Keys, values and gaps by exponential races on RandomState."}

    def features(self):
        pairs = self.builder_config.options[0].pairs
        fields = {name: prepared.raw_array(np.int32, pairs) for name in ("keys", "values", "queries")}
        return {**fields, "filler_seed": tfds.features.Scalar(np.int64)}

    def generate(self, split):
        layout, sizes = self.builder_config.options
        return itertools.islice(generate(layout, seed=prepared.SPLITS.index(split)), sizes[split])
