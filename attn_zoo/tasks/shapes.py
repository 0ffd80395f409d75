"""`shapes`: captions of drawn pictures, each of up to three shapes: "a large red circle above a small blue square".

A caption is a function of its picture. Larger shapes are named first, and of one size the colours go by the alphabet; no two shapes share both. Each is
said to be above, below, left of or right of the one named next, by the axis on which their centres are farther apart, by MARGIN pixels more at least:
"a large red circle left of a small blue square that is below a small red triangle". Shapes never touch.

Splits share no caption: its checksum says where it belongs, so what is evaluated are combinations never seen in training.
"""

import collections
import dataclasses
import functools
import itertools
import math
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow_datasets as tfds

from attn_zoo.spec import UserError, check, check_int, check_number
from attn_zoo.tasks import prepared
from attn_zoo.tasks.base import Example, RecordTask
from attn_zoo.tasks.counts import count_model_score
from attn_zoo.tasks.pairs import BEGIN, END, RESERVED, shifted

SIDE = 32  # pixels
MARGIN, GAP = 3.0, 1.0  # pixels, by which a relation is clear, and between shapes
COLOURS = {  # by the alphabet; RGB
    "blue": (0.20, 0.35, 0.95),
    "cyan": (0.20, 0.85, 0.90),
    "green": (0.15, 0.65, 0.20),
    "magenta": (0.90, 0.25, 0.85),
    "red": (0.90, 0.15, 0.15),
    "yellow": (0.95, 0.90, 0.20),
}
BACKGROUND = (0.15, 0.15, 0.15)
RADII = {"large": (4.6, 5.2), "small": (2.6, 3.0)}  # pixels, the range of each size
REACH = 1.3  # no form goes further from its centre, in radii

# Signed distance in pixels from the edge of a form at the origin, negative inside; y grows downwards. Areas are about equal.
FORMS: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "circle": lambda x, y, r: np.sqrt(x * x + y * y) - r,
    "cross": lambda x, y, r: np.minimum(_box(x, y, 1.15 * r, 0.45 * r), _box(x, y, 0.45 * r, 1.15 * r)),
    "square": lambda x, y, r: _box(x, y, 0.89 * r, 0.89 * r),
    "triangle": lambda x, y, r: np.maximum(y - 0.65 * r, (math.sqrt(3) * abs(x) - y) / 2 - 0.65 * r),
}
RELATIONS = ("above", "below", "left", "right")  # the last two are followed by 'of'
WORDS = ("a", "that", "is", "of", *RELATIONS, *RADII, *COLOURS, *FORMS)
IDS = {word: RESERVED + i for i, word in enumerate(WORDS)}
KINDS = {word: kind for kind, words in (("size", RADII), ("colour", COLOURS), ("form", FORMS), ("relation", RELATIONS)) for word in words}


@dataclasses.dataclass(frozen=True)
class Options:
    """max_shapes: a picture has 1 to so many, all equally often. noise: the largest deviation of a colour channel, of 1, once by shape and once by pixel."""

    max_shapes: int = 3
    noise: float = 0.05
    train_examples: int = 20_000
    validation_examples: int = 1_000
    test_examples: int = 1_000

    def __post_init__(self):
        check_int("max_shapes", self.max_shapes, 1)
        check(self.max_shapes <= 3, "max_shapes", self.max_shapes, f"must be at most 3: more large shapes do not fit into {SIDE} pixels")
        check_number("noise", self.noise, 0, 0.1)
        for name in ("train_examples", "validation_examples", "test_examples"):
            check_int(name, getattr(self, name), 1)

    @property
    def longest(self) -> int:
        """Words of the longest caption: four a shape, 'left of' before all but the first, and 'that is' before that from the third on."""
        return 4 * self.max_shapes + 2 * (self.max_shapes - 1) + 2 * max(0, self.max_shapes - 2)


class Shapes(RecordTask):
    """Captions of drawn pictures, word by word."""

    name = "shapes"
    Options = Options
    causal = True
    per_token = True
    padded = True
    inputs_vocab = num_outputs = RESERVED + len(WORDS)
    image_shape = (SIDE, SIDE, 3)

    def __init__(self, options: Options, seq_len: int, data_dir: str):
        super().__init__(options, seq_len, data_dir)
        if seq_len <= options.longest:
            raise UserError(f"seq_len={seq_len}: must be at least {options.longest + 1}, the longest caption of max_shapes={options.max_shapes} and its end")

    @functools.cached_property
    def builder(self) -> prepared.Builder:
        o = self.options
        sizes = {split: getattr(o, f"{split}_examples") for split in prepared.SPLITS}
        name = "-".join(map(str, (f"max{o.max_shapes}", f"noise{float(o.noise)}", *sizes.values())))
        return prepared.prepare(ShapesBuilder, prepared.Config(name=name, options=(o.max_shapes, float(o.noise), sizes)), self.data_dir)

    def example(self, record: dict) -> Example:
        return {"source": self.picture(record).astype(np.float32) / 255, **shifted(record["caption"], self.seq_len)}

    def picture(self, record: dict) -> np.ndarray:
        """The picture of a record, uint8 [SIDE, SIDE, 3], RGB."""
        return record["picture"]

    def text(self, ids: np.ndarray) -> str:
        """The words of target ids, up to END."""
        return " ".join(words(ids))

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

    def floors(self) -> dict[str, dict[str, float]]:
        """Predictors that see no picture, counted on the training captions and scored on validation, with the share of captions right in every word.

        The next word by its position, and by all that it depends on in the law of scenes: `blind_context`.
        """

        def compute():
            train, validation = self._captions("train"), self._captions("validation")
            return {"word by position": caption_score(train, validation, len), "caption without picture": caption_score(train, validation, blind_context)}

        floors = prepared.cached_json(self.builder, "floors", compute)
        return {name: self.score(loss, accuracy) | {"eval_exact": exact} for name, (loss, accuracy, exact) in floors.items()}

    def _captions(self, split: str) -> list[list[str]]:
        source = self.builder.as_data_source(split=split)
        return [words(record["caption"]) for record in source.__getitems__(range(len(source)))]


def words(ids: np.ndarray) -> list[str]:
    """The words of ids up to END; PAD and BEGIN are none."""
    ids = list(itertools.takewhile(lambda i: i != END, np.asarray(ids).tolist()))
    return [WORDS[i - RESERVED] for i in ids if i >= RESERVED]


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


@dataclasses.dataclass(frozen=True)
class Shape:
    """One shape; x to the right and y down, of its centre, in pixels."""

    size: str
    colour: str
    form: str
    x: float
    y: float
    radius: float


def draw_scene(rng: np.random.RandomState, max_shapes: int) -> list[Shape]:
    """1 to max_shapes shapes in the order in which they are named; what they are is uniform, and where, among the places that a caption is clear for."""
    n = 1 + rng.randint(max_shapes)
    # Numbers of size and colour in one, so that sorting them is the order of names.
    sizes, colours = np.divmod(np.sort(rng.permutation(len(RADII) * len(COLOURS))[:n]), len(COLOURS))
    forms = rng.randint(len(FORMS), size=n)
    least, most = np.array(list(RADII.values()))[sizes].T
    radii = rng.uniform(least, most)
    reach_n1 = REACH * radii[:, None]
    i, j = np.triu_indices(n, 1)
    place_n2 = None
    while place_n2 is None:
        tries_Rn2 = rng.uniform(reach_n1, SIDE - reach_n1, size=(16, n, 2))
        apart = (np.square(tries_Rn2[:, i] - tries_Rn2[:, j]).sum(axis=-1) > (reach_n1[i] + reach_n1[j] + GAP).T ** 2).all(axis=1)
        across, down = np.moveaxis(abs(np.diff(tries_Rn2, axis=1)), -1, 0)
        clear = (abs(across - down) >= MARGIN).all(axis=1)
        place_n2 = next(iter(tries_Rn2[apart & clear]), None)
    names = zip(*([list(table)[i] for i in index] for table, index in ((RADII, sizes), (COLOURS, colours), (FORMS, forms))))
    return [Shape(*name, float(x), float(y), float(radius)) for name, (x, y), radius in zip(names, place_n2, radii)]


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


def draw(shapes: list[Shape], noise: float, rng: np.random.RandomState) -> np.ndarray:
    """The picture of a scene, uint8 [SIDE, SIDE, 3]; a pixel that an edge crosses is mixed by how far inside its centre is."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    deviate = lambda *shape: rng.uniform(-noise, noise, size=shape)
    picture = np.broadcast_to(BACKGROUND + deviate(3), (SIDE, SIDE, 3))
    for s in shapes:
        inside = np.clip(0.5 - FORMS[s.form](x - s.x, y - s.y, s.radius), 0, 1)[..., None]
        picture = picture + inside * (COLOURS[s.colour] + deviate(3) - picture)
    return np.rint(255 * np.clip(picture + deviate(SIDE, SIDE, 3), 0, 1)).astype(np.uint8)


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


def _box(x, y, half_width, half_height):
    return np.maximum(abs(x) - half_width, abs(y) - half_height)


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
