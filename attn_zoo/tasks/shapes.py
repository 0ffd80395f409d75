"""`shapes`: drawn pictures of up to three shapes, to be described or compared.

objective='captions': "a large red circle above a small blue square". A caption is a function of its picture. Larger shapes are named first, and of one size
the colours go by the alphabet; no two shapes share both. Each is said to be above, below, left of or right of the one named next, by the axis on which their
centres are farther apart, by MARGIN pixels more at least: "a large red circle left of a small blue square that is below a small red triangle".

objective='same': have two of the shapes the same colour? All are small and far apart (scenes.FAR), so that the answer lies in no one place, and neither what
each looks like by itself nor how many they are tells it. Same and different are what convolutional networks are poor at (Kim et al. 2018, "Not-So-CLEVR").

Splits share no caption, and of what is compared none either: its checksum says where it belongs, so what is evaluated are combinations never seen in training.
"""

import collections
import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow_datasets as tfds

from attn_zoo.spec import UserError, check, check_choice, check_int, check_number
from attn_zoo.tasks import prepared
from attn_zoo.tasks.base import Example, RecordTask
from attn_zoo.tasks.counts import count_model_score
from attn_zoo.tasks.pairs import BEGIN, END, RESERVED, reserved_label, shifted
from attn_zoo.tasks.scenes import COLOURS, FORMS, RADII, SIDE, Shape, draw, draw_comparison, draw_scene

OBJECTIVES = ("captions", "same")
GRIDS = tuple((SIDE >> halvings) ** 2 for halvings in range(SIDE.bit_length() - 1))  # cells of the picture, halved any number of times
RELATIONS = ("above", "below", "left", "right")  # the last two are followed by 'of'
WORDS = ("a", "that", "is", "of", *RELATIONS, *RADII, *COLOURS, *FORMS)
IDS = {word: RESERVED + i for i, word in enumerate(WORDS)}
KINDS = {word: kind for kind, words in (("size", RADII), ("colour", COLOURS), ("form", FORMS), ("relation", RELATIONS)) for word in words}


@dataclasses.dataclass(frozen=True)
class Options:
    """max_shapes: a picture has 1 to so many, to be compared 2 to so many, all equally often.

    noise: the largest deviation of a colour channel, of 1, once by shape and once by pixel.
    """

    objective: str = "captions"
    max_shapes: int = 3
    noise: float = 0.05
    train_examples: int = 20_000
    validation_examples: int = 1_000
    test_examples: int = 1_000

    def __post_init__(self):
        check_choice("objective", self.objective, OBJECTIVES)
        check_int("max_shapes", self.max_shapes, 1)
        check(self.max_shapes <= 3, "max_shapes", self.max_shapes, f"must be at most 3: more large shapes do not fit into {SIDE} pixels")
        check(self.objective != "same" or self.max_shapes > 1, "max_shapes", self.max_shapes, "must be at least 2 with objective='same'")
        check_number("noise", self.noise, 0, 0.1)
        for name in ("train_examples", "validation_examples", "test_examples"):
            check_int(name, getattr(self, name), 1)

    @property
    def longest(self) -> int:
        """Words of the longest caption: four a shape, 'left of' before all but the first, and 'that is' before that from the third on."""
        return 4 * self.max_shapes + 2 * (self.max_shapes - 1) + 2 * max(0, self.max_shapes - 2)


class Shapes(RecordTask):
    """Captions of drawn pictures, word by word, or whether two of their shapes have the same colour.

    A picture is the source of its caption; to be compared, it is all that is given, and T is the number of cells of the grid of features that attention sees,
    which says where in a convolutional network it stands.
    """

    name = "shapes"
    Options = Options
    image_shape = (SIDE, SIDE, 3)

    def __init__(self, options: Options, seq_len: int, data_dir: str):
        super().__init__(options, seq_len, data_dir)
        captions = options.objective == "captions"
        self.causal = self.per_token = self.padded = captions
        self.inputs_vocab = RESERVED + len(WORDS) if captions else 0
        self.num_outputs = RESERVED + len(WORDS) if captions else 2
        self.begin_end, self.judges_writing = (BEGIN, END) if captions else None, captions
        if captions and seq_len <= options.longest:
            raise UserError(f"seq_len={seq_len}: must be at least {options.longest + 1}, the longest caption of max_shapes={options.max_shapes} and its end")
        if not captions:
            rule = f"must be the cells of a grid of features, {SIDE} x {SIDE} halved any number of times: {', '.join(map(str, GRIDS))}"
            check(seq_len in GRIDS, "seq_len", seq_len, rule)

    @functools.cached_property
    def builder(self) -> prepared.Builder:
        o = self.options
        sizes = {split: getattr(o, f"{split}_examples") for split in prepared.SPLITS}
        name = "-".join(map(str, (f"max{o.max_shapes}", f"noise{float(o.noise)}", *sizes.values())))
        builder = ShapesBuilder if o.objective == "captions" else SameBuilder
        return prepared.prepare(builder, prepared.Config(name=name, options=(o.max_shapes, float(o.noise), sizes)), self.data_dir)

    def example(self, record: dict) -> Example:
        picture = self.picture(record).astype(np.float32) / 255
        if self.options.objective == "captions":
            return {"source": picture, **shifted(record["caption"], self.seq_len)}
        return {"inputs": picture, "targets": np.asarray(record["same"], np.int32), "weights": np.ones((), np.float32), "valid": np.ones(self.seq_len, bool)}

    def picture(self, record: dict) -> np.ndarray:
        """The picture of a record, uint8 [SIDE, SIDE, 3], RGB."""
        return record["picture"]

    def text(self, ids: np.ndarray) -> str:
        """The words of target ids, up to END."""
        return " ".join(words(ids))

    def label(self, id: int, source: bool = False) -> str:
        return reserved_label(id) or WORDS[id - RESERVED]

    def slots(self, ids_T: np.ndarray) -> dict[str, str | int]:
        """What a caption says: 'shapes', how many there are, and 'size 1', 'colour 1', 'form 1', 'relation 1' (of shape 1 to shape 2), ...

        A caption that is no sentence, as a model may generate it, is read as far as it goes: a relation ends a shape, and what is said twice of a shape
        counts the first time.
        """
        said: dict[str, str | int] = {"shapes": 1}
        for word in words(ids_T):
            kind = KINDS.get(word)
            if kind:
                said.setdefault(f"{kind} {said['shapes']}", word)
            if kind == "relation":
                said["shapes"] += 1
        return said

    def slot_accuracy(self, predicted_BT: np.ndarray, targets_BT: np.ndarray) -> dict[str, float]:
        """The share of the targets' slots that predictions get right, by kind: shapes (their number), size, colour, form, and relation if there are any.

        A row whose target is empty, as in the rest of a last batch, counts nothing.
        """
        right, asked = collections.Counter(), collections.Counter()
        for predicted_T, targets_T in zip(predicted_BT, targets_BT):
            if not words(targets_T):
                continue
            said = self.slots(predicted_T)
            for slot, word in self.slots(targets_T).items():
                kind = slot.partition(" ")[0]
                asked[kind] += 1
                right[kind] += said.get(slot) == word
        return {kind: right[kind] / n for kind, n in asked.items()}

    def written_scores(self, written_BT: np.ndarray, targets_BT: np.ndarray) -> dict[str, float]:
        """Of captions that a model writes: `slot_accuracy` by kind, and as `eval_slots` its mean over the kinds."""
        accuracy = self.slot_accuracy(written_BT, targets_BT)
        return {"eval_slots": float(np.mean(list(accuracy.values())))} | {f"eval_slot_{kind}": value for kind, value in accuracy.items()}

    def floors(self) -> dict[str, dict[str, float]]:
        """Predictors that see no picture, counted on the training split and scored on validation.

        Of captions: the next word by its position, and by all that it depends on in the law of scenes (`blind_context`), with the share of captions right in
        every word, and the scores of the one caption that it would write. Of comparisons: the majority class, also by the number of shapes, and by that of
        colours unless this is the answer, as it is with two shapes.
        """
        return self._caption_floors() if self.options.objective == "captions" else self._comparison_floors()

    def _caption_floors(self):
        def compute():
            train, validation = self._captions("train"), self._captions("validation")
            targets = [end(caption) for caption in validation]

            def scores(context):
                loss, accuracy, exact = caption_score(train, validation, context)
                written = end(likeliest_caption(train, context, self.options.longest))
                return self.score(loss, accuracy) | {"eval_exact": exact} | self.written_scores([written] * len(targets), targets)

            return {"word by position": scores(len), "caption without picture": scores(blind_context)}

        return prepared.cached_json(self.builder, "floors_with_slots", compute)

    def _comparison_floors(self):
        contexts = {"majority class": lambda caption: 0, "number of shapes": lambda caption: sum(word in FORMS for word in caption)}
        if self.options.max_shapes > 2:
            contexts["number of colours"] = lambda caption: len(COLOURS.keys() & set(caption))

        def compute():
            records = {split: self.builder.as_data_source(split=split) for split in ("train", "validation")}
            said = {split: [(words(r["caption"]), r["same"]) for r in source.__getitems__(range(len(source)))] for split, source in records.items()}

            def counts(split, context):
                counts = np.zeros((1 + self.options.max_shapes, 2))
                np.add.at(counts, tuple(np.array([(context(caption), same) for caption, same in said[split]]).T), 1)
                return counts

            return {name: count_model_score(1 + counts("train", context), counts("validation", context)) for name, context in contexts.items()}

        return {name: self.score(*score) for name, score in prepared.cached_json(self.builder, "floors", compute).items()}

    def _captions(self, split: str) -> list[list[str]]:
        source = self.builder.as_data_source(split=split)
        return [words(record["caption"]) for record in source.__getitems__(range(len(source)))]


def words(ids: np.ndarray) -> list[str]:
    """The words of ids up to END; PAD and BEGIN are none."""
    ids = list(itertools.takewhile(lambda i: i != END, np.asarray(ids).tolist()))
    return [WORDS[i - RESERVED] for i in ids if i >= RESERVED]


def end(caption: list[str]) -> np.ndarray:
    """The target ids of a caption."""
    return np.array([*map(IDS.get, caption), END])


def blind_context(prefix: list[str]) -> tuple:
    """What the next word of a caption can be told by without the picture: the last word's kind, and what the law of scenes makes it depend on.

    The order of shapes makes a size and a colour, and whether another shape comes, depend on the shape before; a form depends on nothing; a second
    relation depends on the first, since two shapes above each other leave little room for a third.
    """
    sizes, colours, relations = ([word for word in prefix if KINDS.get(word) == kind] for kind in ("size", "colour", "relation"))
    before = len(sizes), sizes[-1:], colours[-1:]
    last = prefix[-1] if prefix else ""
    told_by = {"a": before, "size": (*before, sizes[-2:]), "form": before, "is": (sizes, relations), "relation": last}
    kind = KINDS.get(last, last)
    return kind, str(told_by.get(kind))


def caption_score(train: list[list[str]], scored: list[list[str]], context: Callable[[list[str]], object]) -> tuple[float, float, float]:
    """(cross-entropy in nats, accuracy, share of captions right throughout) of predicting each word, or the end, by its counts in `context` of those before.

    One count in all is spread over the vocabulary in every context.
    """
    outcomes = {word: i for i, word in enumerate((*WORDS, "END"))}
    steps = lambda caption: ((context(caption[:t]), outcomes[word]) for t, word in enumerate((*caption, "END")))
    contexts: dict[object, int] = collections.defaultdict(itertools.count().__next__)
    events = [[[(contexts[c], o) for c, o in steps(caption)] for caption in captions] for captions in (train, scored)]
    counts, seen = np.full((len(contexts), len(outcomes)), 1 / len(outcomes)), np.zeros((len(contexts), len(outcomes)))
    for table, captions in zip((counts, seen), events):
        np.add.at(table, tuple(np.array(list(itertools.chain(*captions))).T), 1)
    best = counts.argmax(axis=1)
    exact = np.mean([all(best[c] == o for c, o in caption) for caption in events[1]])
    return *count_model_score(counts, seen), float(exact)


def likeliest_caption(train: list[list[str]], context: Callable[[list[str]], object], longest: int) -> list[str]:
    """What the counts of `caption_score` write, each time the most frequent word."""
    counts: dict[object, collections.Counter] = collections.defaultdict(collections.Counter)
    for caption in train:
        for t, word in enumerate((*caption, "END")):
            counts[context(caption[:t])][word] += 1
    said: list[str] = []
    while len(said) < longest and (word := max(counts[context(said)], key=counts[context(said)].get, default="END")) != "END":
        said.append(word)
    return said


def relation(a: Shape, b: Shape) -> list[str]:
    """Where a is, seen from b."""
    if abs(a.x - b.x) > abs(a.y - b.y):
        return ["left" if a.x < b.x else "right", "of"]
    return ["above" if a.y < b.y else "below"]


def caption(shapes: list[Shape]) -> list[str]:
    """The words that describe a scene."""
    said = []
    for i, shape in enumerate(shapes):
        said += ["a", shape.size, shape.colour, shape.form]
        if i + 1 < len(shapes):
            said += (["that", "is"] if i else []) + relation(shape, shapes[i + 1])
    return said


def split_of(said: list[str]) -> str:
    """The split that a caption belongs to, a tenth of all to validation and a tenth to test."""
    return {0: "validation", 1: "test"}.get(zlib.crc32(" ".join(said).encode()) % 10, "train")


def generate(split: str, max_shapes: int, noise: float) -> Iterator[dict]:
    """Yields examples of a split without end; the first n are the same whatever n. RandomState, because NumPy has frozen its streams (NEP 19)."""
    rng = np.random.RandomState(prepared.SPLITS.index(split))
    while True:
        scene = draw_scene(rng, max_shapes)
        said = caption(scene)
        if split_of(said) == split:
            yield {"picture": draw(scene, noise, rng), "caption": np.array([IDS[word] for word in said], np.uint8)}


def generate_comparisons(split: str, max_shapes: int, noise: float) -> Iterator[dict]:
    """The same of comparisons; every number of shapes has as many that are the same as that differ, in turn."""
    rng = np.random.RandomState(prepared.SPLITS.index(split))
    for i in itertools.count():
        same, n = i % 2, 2 + i // 2 % (max_shapes - 1)
        scene = draw_comparison(rng, n, same)
        while split_of(caption(scene)) != split:
            scene = draw_comparison(rng, n, same)
        yield {"picture": draw(scene, noise, rng), "caption": np.array([IDS[word] for word in caption(scene)], np.uint8), "same": same}


class ShapesBuilder(prepared.Builder):
    """Pictures of shapes, and their captions as ids without BEGIN and END."""

    name = "shapes"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Anti-aliased by signed distances, scenes by rejection on RandomState."}

    def features(self):
        return {"picture": prepared.raw_array(np.uint8, SIDE, SIDE, 3), "caption": prepared.raw_array(np.uint8, None)}

    def generate(self, split):
        max_shapes, noise, sizes = self.builder_config.options
        return itertools.islice(generate(split, max_shapes, noise), sizes[split])


class SameBuilder(prepared.Builder):
    """Pictures of shapes, their captions as ids, in the order of colours, and whether two shapes have the same colour."""

    name = "shapes_same"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The pictures of `shapes`, of small shapes far apart."}

    def features(self):
        return {"picture": prepared.raw_array(np.uint8, SIDE, SIDE, 3), "caption": prepared.raw_array(np.uint8, None), "same": tfds.features.Scalar(np.int64)}

    def generate(self, split):
        max_shapes, noise, sizes = self.builder_config.options
        return itertools.islice(generate_comparisons(split, max_shapes, noise), sizes[split])
