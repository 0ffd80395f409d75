"""Shapes: captions read off the pictures again, splits, slots, and the floors by loops."""

import collections
import itertools
import math

import numpy as np
import pytest
import scipy.ndimage

from attn_zoo.spec import UserError
from attn_zoo.tasks import load_task, prepared
from attn_zoo.tasks.pairs import BEGIN, END, PAD
from attn_zoo.tasks.scenes import BACKGROUND, COLOURS, FAR, FORMS
from attn_zoo.tasks.shapes import IDS, WORDS, end, generate, generate_comparisons, likeliest_caption, split_of, words

PINNED = "9df7e775b9fd"
PINNED_COMPARISONS = "c67e816099d1"
SMALL = "train_examples=800, validation_examples=100, test_examples=10"


@pytest.fixture(scope="module")
def task(data_dir):
    return load_task(f"shapes({SMALL})", 24, data_dir)


@pytest.fixture(scope="module")
def comparisons(data_dir):
    return load_task(f"shapes(objective='same', {SMALL})", 256, data_dir)


def ids(caption):
    return np.array([IDS[word] for word in caption.split()])


def inside(form, x, y):
    """Whether points are in a form of area 1 with its centre at the origin, y downwards."""
    if form == "circle":
        return x * x + y * y < 1 / math.pi
    if form == "square":
        return (abs(x) < 0.5) & (abs(y) < 0.5)
    if form == "cross":  # bars of 2.3 by 0.9
        x, y = abs(x) * math.sqrt(3.33), abs(y) * math.sqrt(3.33)
        return ((x < 1.15) & (y < 0.45)) | ((x < 0.45) & (y < 1.15))
    side = math.sqrt(4 / math.sqrt(3))
    return (y < side / math.sqrt(12)) & (abs(x) < (y + side / math.sqrt(3)) / math.sqrt(3))


def read_shape(picture, background, mask):
    """(size, colour, form, y, x) of the one shape that stands in the mask, from how much of each pixel it covers."""
    contrast = np.where(mask, abs(picture - background).sum(axis=-1), 0)
    core = picture[contrast > 0.8 * contrast.max()].mean(axis=0)
    colour = min(COLOURS, key=lambda name: np.linalg.norm(core - COLOURS[name]))
    covered = np.clip((picture - background) @ (core - background) / np.square(core - background).sum(), 0, 1)
    covered *= scipy.ndimage.binary_dilation(mask) & (covered > 0.15)  # the rest is noise
    area, (y, x) = covered.sum(), scipy.ndimage.center_of_mass(covered)
    fine = np.arange(0, 32, 1 / 8) + 1 / 16 - 0.5  # 8 x 8 points in every pixel, whose own centres are whole numbers here
    points = (fine[None, :] - x) / math.sqrt(area), (fine[:, None] - y) / math.sqrt(area)
    expected = {form: inside(form, *points).reshape(32, 8, 32, 8).mean(axis=(1, 3)) for form in FORMS}
    form = min(FORMS, key=lambda name: np.square(expected[name] - covered).sum())
    return "large" if math.sqrt(area / math.pi) > 3.4 else "small", colour, form, y, x


def read_caption(picture):
    """The caption of a picture, from its pixels alone."""
    picture = picture / 255
    background = np.median(picture, axis=(0, 1))
    labels, n = scipy.ndimage.label(abs(picture - background).max(axis=-1) > 0.25)
    masks = [mask for mask in (labels == i + 1 for i in range(n)) if mask.sum() > 4]  # without single pixels of noise at edges
    shapes = sorted(read_shape(picture, background, mask) for mask in masks)  # by size, then colour
    said = ""
    for i, (size, colour, form, y, x) in enumerate(shapes):
        said += f"a {size} {colour} {form}"
        if i + 1 < len(shapes):
            down, right = shapes[i + 1][3] - y, shapes[i + 1][4] - x
            side = ("above" if down > 0 else "below") if abs(down) > abs(right) else ("left of" if right > 0 else "right of")
            said += f" that is {side} " if i else f" {side} "
    return said


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_caption_is_a_function_of_its_picture(noise):
    for record in itertools.islice(generate("train", 3, noise), 150):
        assert read_caption(record["picture"]) == " ".join(words(record["caption"]))


def test_pictures_and_captions_are_pinned(checksum):
    records = list(itertools.islice(generate("train", 3, 0.05), 8))
    assert checksum(*(record[name] for record in records for name in ("picture", "caption"))) == PINNED


def test_the_first_examples_do_not_depend_on_how_many_are_asked_for(data_dir):
    few, many = (load_task(f"shapes(train_examples={n}, validation_examples=3, test_examples=3)", 24, data_dir).train_source() for n in (5, 9))
    for i in range(5):
        np.testing.assert_array_equal(few[i]["picture"], many[i]["picture"])
        np.testing.assert_array_equal(few[i]["caption"], many[i]["caption"])


def test_without_noise_a_picture_is_flat_but_for_its_edges():
    record = next(record for record in generate("train", 1, 0.0) if "square" in words(record["caption"]))
    colours = collections.Counter(map(tuple, record["picture"].reshape(-1, 3).tolist()))
    named = next(word for word in words(record["caption"]) if word in COLOURS)
    (background, _), (inside, _) = colours.most_common(2)
    assert background == tuple(round(255 * x) for x in BACKGROUND)
    assert inside == tuple(round(255 * x) for x in COLOURS[named])


def test_noise_is_bounded_and_differs_by_shape_and_pixel():
    noise = 0.1
    deviations = []
    for record in itertools.islice(generate("train", 1, noise), 50):
        corners = record["picture"][[0, 0, -1, -1], [0, -1, 0, -1]] / 255 - np.array(BACKGROUND)
        assert abs(corners).max() <= 2 * noise + 1 / 255
        deviations.append(corners)
    pixel = np.std([d - d.mean(axis=0) for d in deviations])
    whole = np.std([d.mean(axis=0) for d in deviations])
    assert 0.03 < pixel < 0.06 and 0.05 < whole < 0.08  # 0.1 / sqrt(3), the pixels' about their mean of four


def test_shapes_are_as_many_and_as_varied_as_the_options_say():
    captions = [words(record["caption"]) for record in itertools.islice(generate("train", 3, 0.0), 400)]
    numbers = collections.Counter(sum(word in FORMS for word in caption) for caption in captions)
    assert set(numbers) == {1, 2, 3} and all(100 < n < 170 for n in numbers.values())
    used = collections.Counter(itertools.chain(*captions))
    assert set(used) == set(WORDS)
    for form in FORMS:
        assert 0.2 < used[form] / sum(used[f] for f in FORMS) < 0.3
    assert all(0.2 < used[r] / sum(used[r] for r in ("above", "below", "left", "right")) < 0.3 for r in ("above", "below", "left", "right"))


@pytest.mark.parametrize("max_shapes", [1, 3])
def test_splits_share_no_caption(max_shapes):
    said = lambda split: (" ".join(words(record["caption"])) for record in generate(split, max_shapes, 0.0))
    captions = {split: set(itertools.islice(said(split), 450 // max_shapes)) for split in prepared.SPLITS}
    for one, other in itertools.combinations(captions.values(), 2):
        assert not one & other
    if max_shapes == 1:  # all 48, a few of which are left for evaluation
        assert sum(map(len, captions.values())) == 48 and min(map(len, captions.values())) >= 3
    assert all(split_of(c.split()) == split for split, said in captions.items() for c in said)


def test_examples_are_pictures_and_shifted_captions(task):
    batch = next(task.train_iterator(8, seed=0))
    for source, inputs, targets, weights, valid in zip(*(batch[name] for name in ("source", "inputs", "targets", "weights", "valid"))):
        n = int(weights.sum())
        assert read_caption(np.rint(source * 255)) == task.text(targets)
        assert inputs[0] == BEGIN and targets[n - 1] == END and (targets[n:] == PAD).all() and (inputs[n:] == PAD).all()
        np.testing.assert_array_equal(inputs[1:n], targets[: n - 1])
        np.testing.assert_array_equal(weights, np.arange(24) < n)
        np.testing.assert_array_equal(valid, np.arange(24) < n)


def test_picture_and_text_of_a_record(task):
    record = task.train_source()[3]
    picture = task.picture(record)
    assert picture.dtype == np.uint8 and picture.shape == task.image_shape
    assert task.text(np.append(record["caption"], [END, *ids("a large")])) == read_caption(picture)


def test_slots_of_a_sentence(task):
    said = task.slots(np.append(ids("a large red circle above a small blue square that is left of a small red cross"), END))
    assert said == {
        "shapes": 3,
        **{"size 1": "large", "colour 1": "red", "form 1": "circle", "relation 1": "above"},
        **{"size 2": "small", "colour 2": "blue", "form 2": "square", "relation 2": "left"},
        **{"size 3": "small", "colour 3": "red", "form 3": "cross"},
    }


def test_slots_of_what_is_no_sentence(task):
    assert task.slots(ids("red of of large blue")) == {"shapes": 1, "colour 1": "red", "size 1": "large"}
    assert task.slots(np.array([PAD, BEGIN, END, *ids("a large red circle")])) == {"shapes": 1}


def test_slot_accuracy_counts_by_kind(task):
    def rows(*captions):
        return np.stack([np.pad(np.append(ids(c), END) if c else [], (0, 24 - len(c.split()) - bool(c))) for c in captions]).astype(np.int32)

    targets = rows("a large red circle above a small blue square", "a small cyan cross", "")
    assert task.slot_accuracy(targets, targets) == dict.fromkeys(("shapes", "size", "colour", "form", "relation"), 1.0)
    predicted = rows("a large blue circle left of a small blue triangle", "a small cyan cross below a small red cross", "a large red circle")
    assert task.slot_accuracy(predicted, targets) == {"shapes": 1 / 2, "size": 1.0, "colour": 2 / 3, "form": 2 / 3, "relation": 0.0}


def loop_floor(train, scored, context):
    """(loss, accuracy, exact) of counting, with dictionaries."""
    V = len(WORDS) + 1
    counts = collections.defaultdict(collections.Counter)
    for caption in train:
        for t, word in enumerate([*caption, "END"]):
            counts[context(caption[:t])][word] += 1
    losses, hits, exact = [], [], []
    for caption in scored:
        right = []
        for t, word in enumerate([*caption, "END"]):
            seen = counts[context(caption[:t])]
            losses.append(-math.log((seen[word] + 1 / V) / (sum(seen.values()) + 1)))
            right.append(max([*WORDS, "END"], key=lambda w: seen[w]) == word)
        hits += right
        exact.append(all(right))
    return np.mean(losses), np.mean(hits), np.mean(exact)


def evaluated(task):
    rows = [(t, w) for batch in task.eval_batches(50, tokens=10**9) for t, w in zip(batch["targets"], batch["weights"]) if w.any()]
    return [words(t) for t, _ in rows]


def test_the_floor_by_position_is_a_loop(task):
    source = task.train_source()
    train = [words(source[i]["caption"]) for i in range(len(source))]
    loss, accuracy, exact = loop_floor(train, evaluated(task), len)
    floor = {name: score for name, score in task.floors()["word by position"].items() if "slot" not in name}
    assert floor == {"eval_loss": pytest.approx(loss), "eval_accuracy": pytest.approx(accuracy), "eval_exact": exact}


def test_no_shorter_look_back_beats_the_blind_caption(task):
    source = task.train_source()
    train, scored = [words(source[i]["caption"]) for i in range(len(source))], evaluated(task)
    blind = task.floors()["caption without picture"]
    for n in (1, 2, 3):
        loss, accuracy, _ = loop_floor(train, scored, lambda prefix: tuple(prefix[-n:]))
        assert blind["eval_loss"] < loss and blind["eval_accuracy"] >= accuracy - 0.01
    assert 0 <= blind["eval_exact"] < 0.05


def test_the_blind_floor_comes_near_the_law_of_captions(data_dir):
    """One caption of two shapes or one has, by the law that draws them, the probability 1/2 1/12 1/4, or 1/2 1/66 1/16 1/4."""
    task = load_task("shapes(max_shapes=2, train_examples=1000, validation_examples=100, test_examples=1)", 11, data_dir)
    captions = evaluated(task)
    p = {4: 1 / 2 / 12 / 4, 9: 1 / 2 / 66 / 16 / 4, 10: 1 / 2 / 66 / 16 / 4}
    law = np.mean([-math.log(p[len(caption)]) for caption in captions]) * len(captions) / sum(len(caption) + 1 for caption in captions)
    assert task.floors()["caption without picture"]["eval_loss"] == pytest.approx(law, rel=0.06)


@pytest.mark.parametrize(
    "spec, seq_len, said",
    [
        ("shapes(max_shapes=4)", 64, "max_shapes=4: must be at most 3"),
        ("shapes(max_shapes=0)", 64, "max_shapes=0: must be a whole number of at least 1"),
        ("shapes(noise=0.5)", 64, "noise=0.5: must be a number of at least 0 and at most 0.1"),
        ("shapes(objective='captioned')", 64, "objective='captioned': must be one of 'captions', 'same'; did you mean 'captions'?"),
        ("shapes(objective='same', max_shapes=1)", 64, "max_shapes=1: must be at least 2 with objective='same'"),
        ("shapes(objective='same')", 100, "seq_len=100: must be the cells of a grid of features, 32 x 32 halved any number of times: 1024, 256, 64, 16, 4"),
        ("shapes", 18, "seq_len=18: must be at least 19, the longest caption of max_shapes=3 and its end"),
        ("shapes(max_shapes=2)", 10, "seq_len=10: must be at least 11"),
        ("shapes(noize=0)", 64, "no option 'noize'; did you mean 'noise'?"),
    ],
)
def test_mistakes_are_named(spec, seq_len, said, tmp_path):
    with pytest.raises(UserError) as error:
        load_task(spec, seq_len, str(tmp_path))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_shortest_length_holds_the_longest_caption(data_dir):
    task = load_task("shapes(train_examples=150, validation_examples=3, test_examples=3)", 19, data_dir)
    source = task.train_source()
    assert max(task.example(source[i])["weights"].sum() for i in range(150)) == 19


def test_the_slots_of_a_floor_are_those_of_the_one_caption_that_it_writes(task):
    """'a' is followed by the most frequent size there, and so on, until END is as likely as anything; slots are then counted by hand."""
    source = task.train_source()
    train = [words(source[i]["caption"]) for i in range(len(source))]
    written = likeliest_caption(train, len, 18)
    by_place = [collections.Counter(place) for place in itertools.zip_longest(*([*c, "END"] for c in train), fillvalue=None)]
    for t, word in enumerate([*written, "END"]):
        assert by_place[t][word] == max(n for w, n in by_place[t].items() if w)
    said, right, asked = task.slots(end(written)), collections.Counter(), collections.Counter()
    for caption in evaluated(task):
        for slot, word in task.slots(end(caption)).items():
            asked[slot.split()[0]] += 1
            right[slot.split()[0]] += said.get(slot) == word
    floor, shares = task.floors()["word by position"], {kind: right[kind] / n for kind, n in asked.items()}
    assert {name: score for name, score in floor.items() if name.startswith("eval_slot_")} == {f"eval_slot_{kind}": share for kind, share in shares.items()}
    assert floor["eval_slots"] == pytest.approx(np.mean(list(shares.values())))


def read_colours(picture):
    """The colours of the shapes of a picture, from its pixels alone."""
    picture = picture / 255
    background = np.median(picture, axis=(0, 1))
    labels, n = scipy.ndimage.label(abs(picture - background).max(axis=-1) > 0.25)
    masks = [mask for mask in (labels == i + 1 for i in range(n)) if mask.sum() > 4]
    return sorted(read_shape(picture, background, mask)[1] for mask in masks)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_class_is_whether_a_picture_shows_one_colour_twice(noise):
    for record in itertools.islice(generate_comparisons("train", 3, noise), 150):
        colours = read_colours(record["picture"])
        assert colours == [word for word in words(record["caption"]) if word in COLOURS]
        assert record["same"] == (len(set(colours)) < len(colours))


def test_what_is_compared_is_far_apart():
    """Centres of mass, of a picture without noise."""
    for record in itertools.islice(generate_comparisons("train", 3, 0.0), 60):
        ink = abs(record["picture"] / 255 - np.array(BACKGROUND)).sum(axis=-1)
        labels, n = scipy.ndimage.label(ink > 0.02)
        centres = scipy.ndimage.center_of_mass(ink, labels, range(1, n + 1))
        assert all(math.dist(a, b) > FAR - 1.5 for a, b in itertools.combinations(centres, 2))  # a triangle's mass is below its centre


@pytest.mark.parametrize("max_shapes", [2, 3])
def test_both_classes_are_as_many_with_every_number_of_shapes(max_shapes):
    numbers = collections.Counter()
    for record in itertools.islice(generate_comparisons("validation", max_shapes, 0.0), 48):
        numbers[sum(word in FORMS for word in words(record["caption"])), record["same"]] += 1
    assert numbers == {(n, same): 24 // (max_shapes - 1) for n in range(2, max_shapes + 1) for same in (0, 1)}


def test_splits_share_nothing_that_is_compared():
    said = {split: {" ".join(words(r["caption"])) for r in itertools.islice(generate_comparisons(split, 2, 0.0), 150)} for split in prepared.SPLITS}
    for one, other in itertools.combinations(said.values(), 2):
        assert not one & other
    assert all(split_of(c.split()) == split for split, captions in said.items() for c in captions)


def test_comparisons_are_pinned(checksum):
    records = list(itertools.islice(generate_comparisons("train", 3, 0.05), 8))
    assert checksum(*(record[name] for record in records for name in ("picture", "caption", "same"))) == PINNED_COMPARISONS


def test_a_comparison_is_given_a_picture_alone(comparisons):
    batch = next(comparisons.train_iterator(8, seed=0))
    assert batch["inputs"].shape == (8, 32, 32, 3) and "source" not in batch and comparisons.inputs_vocab == 0
    for picture, same in zip(batch["inputs"], batch["targets"]):
        colours = read_colours(picture * 255)
        assert same == (len(set(colours)) < len(colours))


def test_floors_of_comparisons_are_chance_but_for_who_counts_colours(comparisons):
    """With two shapes or three: one colour is the same, three are different, two are either."""
    floors = comparisons.floors()
    for name in ("majority class", "number of shapes"):
        assert floors[name] == {"eval_loss": pytest.approx(math.log(2), abs=1e-3), "eval_accuracy": 0.5}
    assert floors["number of colours"] == {"eval_loss": pytest.approx(math.log(2) / 2, abs=0.02), "eval_accuracy": 0.75}


def test_with_two_shapes_the_number_of_colours_is_the_answer_and_no_floor(data_dir):
    task = load_task("shapes(objective='same', max_shapes=2, train_examples=20, validation_examples=10, test_examples=1)", 64, data_dir)
    assert set(task.floors()) == {"majority class", "number of shapes"}
