"""`listops`: the value of a nested list expression, one of ten classes, from its tokens. Nangia and Bowman 2018, by the rules of
Long Range Arena (Tay et al. 2021): a node less than ten deep is an operator with probability 1/4, else a digit; an operator
has two to ten arguments; of the trees so drawn, those of the lengths asked for are kept.

Tokens are as LRA trains on them, without the parentheses of its binary trees, so an operator is '[MIN' and ']': two tokens.
"""

import dataclasses
import functools
import itertools

import numpy as np
import tensorflow_datasets as tfds

from attn_zoo.spec import UserError, check, check_choice, check_int
from attn_zoo.tasks import prepared
from attn_zoo.tasks.base import Example, RecordTask
from attn_zoo.tasks.counts import count_model_score
from attn_zoo.tasks.listops_trees import CLS, OPERATOR, PAD, VOCABULARY, generate

FORMS = {"lra": (500, 2000), "short": (16, 128)}  # min_length < tokens < max_length


@dataclasses.dataclass(frozen=True)
class Options:
    """Lengths are those of the form ('lra': 500 to 2000 tokens, 'short': 16 to 128, both exclusive) unless given.

    LRA has 96,000 / 2,000 / 2,000 examples; the defaults take a fifth of the time to prepare.
    """

    form: str = "lra"
    min_length: int | None = None
    max_length: int | None = None
    train_examples: int = 20_000
    validation_examples: int = 1_000
    test_examples: int = 1_000

    def __post_init__(self):
        check_choice("form", self.form, FORMS)
        for name in ("train_examples", "validation_examples", "test_examples"):
            check_int(name, getattr(self, name), 1)
        # Up to 12 tokens an expression may be flat; such would come up twice, in training and in evaluation.
        check_int("min_length", self.min_length, 12, optional=True)
        check_int("max_length", self.max_length, 18, optional=True)
        shortest, longest = self.lengths
        enough = -(-3 * shortest // 2)
        check(longest >= enough, "max_length", longest, f"must be at least 1.5 * min_length = {enough}, or few trees fit")
        check(shortest <= 2000, "min_length", shortest, "must be at most 2000: trees ten deep are rarely longer")

    @property
    def lengths(self) -> tuple[int, int]:
        """(min_length, max_length), both exclusive."""
        shortest, longest = FORMS[self.form]
        return self.min_length or shortest, self.max_length or longest


class ListOps(RecordTask):
    """Classification of list expressions, an encoder's task; each begins with [CLS] and is padded to T."""

    name = "listops"
    Options = Options
    causal = False
    per_token = False
    padded = True
    inputs_vocab = len(VOCABULARY)
    num_outputs = 10

    def __init__(self, options: Options, seq_len: int, data_dir: str):
        super().__init__(options, seq_len, data_dir)
        longest = options.lengths[1]
        if seq_len < longest:  # the longest expression has max_length - 1 tokens, and [CLS] goes before it
            raise UserError(f"seq_len={seq_len}: must be at least max_length={longest}, which listops(form={options.form!r}) goes up to")

    @functools.cached_property
    def builder(self) -> prepared.Builder:
        sizes = {split: getattr(self.options, f"{split}_examples") for split in prepared.SPLITS}
        name = "-".join(map(str, ("length", *self.options.lengths, *sizes.values())))
        return prepared.prepare(ListOpsBuilder, prepared.Config(name=name, options=(*self.options.lengths, sizes)), self.data_dir)

    def example(self, record: dict) -> Example:
        inputs = np.full(self.seq_len, PAD, np.int32)
        length = 1 + len(record["tokens"])
        inputs[0], inputs[1:length] = CLS, record["tokens"]
        return {
            "inputs": inputs,
            "targets": np.asarray(record["value"], np.int32),
            "weights": np.ones((), np.float32),
            "valid": np.arange(self.seq_len) < length,
        }

    def label(self, id: int, source: bool = False) -> str:
        return VOCABULARY[id]

    def floors(self) -> dict[str, dict[str, float]]:
        """Class counts of the training split plus one, over all and by the operator at the root, scored on validation."""

        def compute():
            counts, seen = np.ones((4, 10)) + self._classes_by_root("train"), self._classes_by_root("validation")
            majority = count_model_score(counts.sum(axis=0, keepdims=True), seen.sum(axis=0, keepdims=True))
            return {"majority class": majority, "root operator": count_model_score(counts, seen)}

        return {name: self.score(*score) for name, score in prepared.cached_json(self.builder, "floors", compute).items()}

    def _classes_by_root(self, split: str) -> np.ndarray:
        """How many examples of a split have each root operator and class, [4, 10]."""
        source = self.builder.as_data_source(split=split)
        counts = np.zeros((4, 10))
        for record in source.__getitems__(range(len(source))):
            counts[record["tokens"][0] - OPERATOR, record["value"]] += 1
        return counts


class ListOpsBuilder(prepared.Builder):
    """List expressions as tokens, without [CLS] and padding, and their values."""

    name = "listops"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The rules of Long Range Arena, drawn level by level on RandomState."}

    def features(self):
        return {"tokens": prepared.raw_array(np.uint8, None), "value": tfds.features.Scalar(np.int64)}

    def generate(self, split):
        shortest, longest, sizes = self.builder_config.options
        for tokens, value in itertools.islice(generate(shortest, longest, seed=prepared.SPLITS.index(split)), sizes[split]):
            yield {"tokens": tokens, "value": value}
