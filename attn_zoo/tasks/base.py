"""The contract of a task, which is all that training knows of the data.

A task is built for one sequence length T. A batch is a dict of numpy arrays:
inputs int32 [B, T], targets int32 [B, T] or [B], weights float32 like targets (1 where scored), valid bool [B, T] (False at padding, which stands at the end).
Where something is generated from a source, which an encoder reads, there are also source int32 [B, S] and source_valid bool [B, S], or,
of a picture, source float32 [B, height, width, channels] alone. A picture that is all a model reads is itself the inputs, float32 [B, height, width, channels];
T is then the number of cells of the grid of features on which attention stands.
"""

import abc
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np

from attn_zoo.tasks import prepared

Example = dict[str, np.ndarray]  # one row of a batch
Batch = dict[str, np.ndarray]


class Task(abc.ABC):
    """Batches to train and evaluate on, and the trivial predictors to beat.

    Building one checks the options against the length and is free; the data are prepared under `data_dir` on first use.
    """

    name: ClassVar[str]
    Options: ClassVar[type]  # frozen dataclass of what the spec may set
    causal: bool  # decoder, or encoder
    inputs_vocab: int  # number of input ids, with mask, padding and CLS; 0 where there are none, but a picture
    num_outputs: int  # logits
    per_token: bool  # targets are [B, T]; else one class a sequence, [B]
    padded: bool = False  # whether any position may be invalid: if not, models need no key validity
    source_vocab: int = 0  # number of source ids; 0 where there is no source, or it is a picture
    source_len: int = 0  # S
    image_shape: tuple[int, int, int] | None = None  # of a picture: the source, or where inputs_vocab is 0 the inputs
    probes: tuple[str, ...] = ()  # further splits that eval_batches knows, each scored by itself at the end (one length, one language ...)
    begin_end: tuple[int, int] | None = None  # ids around a target, where a model can write whole ones by itself, from their sources
    judges_writing: bool = False  # whether `written_scores` has something to say of those
    loss_name: str = "loss"  # the headline: nats, or "bits_per_byte" (nats / ln 2)
    allow_download: bool = False  # whether preparing may fetch what is not on this machine

    def __init__(self, options: Any, seq_len: int, data_dir: str):
        self.options = options
        self.seq_len = seq_len
        self.data_dir = data_dir

    def train_iterator(self, batch_size: int, seed: int):
        """An endless grain DatasetIterator of batches, a function of the seed alone: reshuffled and drawn anew each epoch.

        Its state (get_state, set_state, or grain.checkpoint through Orbax) resumes it bit for bit.
        """
        import grain

        # Grain's own endless repeat is sys.maxsize long, and a batch of one overflows it; nobody trains a million epochs.
        examples = grain.MapDataset.source(self.train_source()).seed(seed).shuffle().repeat(10**6).random_map(self.train_example)
        # Two threads keep a few batches ready and then sleep, so that they do not disturb what is being timed.
        return iter(examples.batch(batch_size).to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))

    def eval_batches(self, batch_size: int, tokens: int, split: str = "validation") -> list[Batch]:
        """The same batches at every call: about tokens / T sequences, at least one, no sequence twice.

        All batches have the same shape; missing rows of the last one have weight 0 and no valid position.
        """
        examples = list(self.eval_examples(tokens, split))
        empty = {name: np.zeros_like(array) for name, array in examples[0].items()}
        examples += [empty] * (-len(examples) % batch_size)
        groups = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
        return [{name: np.stack([e[name] for e in group]) for name in empty} for group in groups]

    def prepare(self) -> None:
        """Does now what first use would do, so that the cells of a sweep find it done."""
        self.train_source()
        self.floors()

    @abc.abstractmethod
    def train_source(self) -> Sequence:
        """The records of the training split, by index."""

    @abc.abstractmethod
    def train_example(self, record: Any, rng: np.random.Generator) -> Example:
        """A training example of a record; `rng` belongs to this example of this epoch."""

    @abc.abstractmethod
    def eval_examples(self, tokens: int, split: str) -> Iterable[Example]:
        """The evaluation examples, about `tokens` tokens of them."""

    @abc.abstractmethod
    def floors(self) -> dict[str, dict[str, float]]:
        """Scores on the validation split of predictors that need no model: {name: {eval_loss, eval_accuracy, ...}}."""

    @abc.abstractmethod
    def provenance(self) -> dict[str, Any]:
        """Which data these are, for the record."""

    def written_scores(self, written_BT: np.ndarray, targets_BT: np.ndarray) -> dict[str, float]:
        """Scores of targets that a model wrote by itself, one after the other word; rows without a target count nothing. Where it `judges_writing`."""
        raise NotImplementedError

    def label(self, id: int, source: bool = False) -> str:
        """How a figure names an id of the inputs and targets, or of the source."""
        return str(id)

    def score(self, loss: float, accuracy: float) -> dict[str, float]:
        """A floor's entry; the loss is in nats."""
        bits = {"eval_bits_per_byte": float(loss) / math.log(2)} if self.loss_name == "bits_per_byte" else {}
        return {"eval_loss": float(loss), "eval_accuracy": float(accuracy), **bits}


class RecordTask(Task):
    """A task whose examples are the records of a prepared dataset, one for one, the same in every epoch."""

    builder: prepared.Builder

    @abc.abstractmethod
    def example(self, record: dict[str, Any]) -> Example:
        """The example of a record."""

    def train_source(self) -> Sequence:
        return self.builder.as_data_source(split="train")

    def train_example(self, record: dict[str, Any], rng: np.random.Generator) -> Example:
        return self.example(record)

    def eval_examples(self, tokens: int, split: str) -> Iterable[Example]:
        source = self.builder.as_data_source(split=split)
        return (self.example(source[i]) for i in range(min(len(source), max(1, tokens // self.seq_len))))

    def provenance(self) -> dict[str, Any]:
        return prepared.describe(self.builder)
