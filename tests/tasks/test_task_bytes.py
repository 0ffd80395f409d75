"""The bytes task, on a small corpus: which files, which split, which windows, which floors."""

import collections
import itertools
import math
import platform

import numpy as np
import pytest

from attn_zoo.spec import UserError
from attn_zoo.tasks import Bytes, load_task
from attn_zoo.tasks.bytes import MASK, read_corpus, split_of
from attn_zoo.tasks.prepared import SPLITS

PINNED_CORPUS = (122, 40392, "8d39356a304b")
PINNED_SPLITS = {"train": "909db31f7ccc", "validation": "483764f0ac99", "test": "59729ffe297a"}
PINNED_MASKED = "35073fedaad3"


@pytest.fixture(scope="module")
def split_text(corpus_root):
    """The bytes of a split, put together from the files by plain Python."""

    def text(split):
        files = sorted(p.relative_to(corpus_root).as_posix() for p in corpus_root.rglob("*.py") if p.name != "excluded.py")
        return b"\0".join((corpus_root / path).read_bytes() for path in files if split_of(path) == split)

    return text


def test_corpus_is_pinned(corpus_root):
    corpus = read_corpus(str(corpus_root))
    assert (len(corpus.paths), corpus.num_bytes, corpus.sha256[:12]) == PINNED_CORPUS
    assert list(corpus.paths) == sorted(corpus.paths) and not any("excluded" in path for path in corpus.paths)


def test_examples_are_pinned(make_task, checksum):
    causal = make_task("bytes(eval_segment=256)", 64)
    assert {split: checksum(causal.split(split)) for split in SPLITS} == PINNED_SPLITS
    masked = make_task("bytes(objective='masked', eval_segment=256)", 64).eval_batches(8, tokens=512)[0]
    assert checksum(masked["inputs"], masked["targets"], masked["weights"]) == PINNED_MASKED


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_is_its_files_with_a_zero_between(make_task, split_text, split):
    assert make_task("bytes", 16).split(split).tobytes() == split_text(split)


def test_the_corpus_hash_sees_every_change(corpus_root, tmp_path):
    def sha256(*files):
        for path, content in files:
            (tmp_path / path).write_text(content)
        return read_corpus(str(tmp_path)).sha256

    base = sha256(*((f"m{i}.py", "x = 1\n") for i in range(60)))
    assert sha256(("m3.py", "x = 2\n")) != base
    assert sha256(("m3.py", "x = 1\n")) == base
    assert sha256(("m60.py", "")) != base


def test_files_are_split_by_their_path_about_90_5_5():
    counts = collections.Counter(split_of(f"package/module_{i}.py") for i in range(20_000))
    for split, share in (("train", 0.90), ("validation", 0.05), ("test", 0.05)):
        assert counts[split] / 20_000 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 20_000))


def test_causal_targets_are_the_inputs_moved_by_one(make_task, split_text):
    train = split_text("train")
    for batch in itertools.islice(make_task("bytes", 48).train_iterator(8, seed=0), 10):
        np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
        assert batch["weights"].all() and batch["valid"].all()
        for inputs, targets in zip(batch["inputs"], batch["targets"]):
            assert bytes([inputs[0], *targets]) in train


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_training_reads_its_split_alone(make_task, split_text, objective):
    train, task = split_text("train"), make_task(f"bytes(objective={objective!r})", 48)
    assert task.train_bytes.tobytes() == train
    windows = [row.astype(np.uint8).tobytes() for batch in itertools.islice(task.train_iterator(8, seed=0), 10) for row in batch["targets"]]
    assert all(window in train for window in windows) and len(set(windows)) > 70


def test_training_windows_fall_anywhere_and_cover_the_split(make_task, split_text):
    train, T = split_text("train"), 128
    task = make_task("bytes", T)
    epoch = len(task.train_source())
    assert epoch == len(train) // T
    iterator = task.train_iterator(epoch, seed=0)
    first, second = next(iterator), next(iterator)
    assert not np.array_equal(np.unique(first["inputs"], axis=0), np.unique(second["inputs"], axis=0)), "offsets are drawn anew"
    for record in range(epoch):
        rng = np.random.default_rng(record)
        example = task.train_example(record, rng)
        offset = min(record * T + int(np.random.default_rng(record).integers(T)), len(train) - T - 1)
        assert bytes(example["inputs"].astype(np.uint8)) == train[offset : offset + T]


def test_masking_hides_the_rate_asked_for_and_scores_only_that(make_task):
    task = make_task("bytes(objective='masked', mask_rate=0.3)", 100)
    batches = list(itertools.islice(task.train_iterator(32, seed=0), 20))
    inputs, targets, weights = (np.concatenate([b[name] for b in batches]) for name in ("inputs", "targets", "weights"))
    np.testing.assert_array_equal(inputs == MASK, weights == 1)
    np.testing.assert_array_equal(inputs[weights == 0], targets[weights == 0])
    assert weights.mean() == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / weights.size))
    assert (task.inputs_vocab, task.num_outputs, task.causal) == (257, 256, False)


def test_masking_hides_at_least_one_byte(make_task):
    task = make_task("bytes(objective='masked', mask_rate=0.01)", 4)
    hidden = np.concatenate([b["weights"] for b in itertools.islice(task.train_iterator(64, seed=0), 10)]).sum(axis=1)
    assert hidden.min() == 1 and np.median(hidden) == 1
    assert min(b["weights"][b["valid"].any(axis=1)].sum(axis=1).min() for b in task.eval_batches(8, 400)) >= 1


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_all_lengths_are_scored_on_the_same_bytes(make_task, objective):
    def scored(T):
        batches = make_task(f"bytes(objective={objective!r}, eval_segment=256)", T).eval_batches(1, tokens=1024)
        return [np.concatenate([b[name].reshape(-1) for b in batches]) for name in ("targets", "weights")]

    expected = scored(256)
    assert len(expected[0]) == 1024
    for T in (64, 128):
        np.testing.assert_array_equal(scored(T), expected)


def test_evaluation_is_spread_over_the_split(make_task, split_text):
    validation = split_text("validation")
    batches = make_task("bytes(eval_segment=64)", 64).eval_batches(1, tokens=512)
    assert len(batches) == 8
    for i, batch in enumerate(batches):
        start = i * ((len(validation) - 1) // 8)
        assert bytes(batch["inputs"][0].astype(np.uint8)) == validation[start : start + 64]


def cross_entropy_and_accuracy(predict, pairs):
    scores = [(-math.log(p[target]), max(p, key=lambda b: (p[b], -b)) == target) for p, target in ((predict(c), t) for c, t in pairs)]
    return [sum(column) / len(scores) for column in zip(*scores)]


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_floors_by_brute_force(make_task, split_text, objective):
    """Floors, against counting in plain Python on the very bytes that evaluation scores: one window that is the whole split."""
    validation, train = split_text("validation"), split_text("train")
    task = make_task(f"bytes(objective={objective!r}, mask_rate=0.15)", len(validation) - 1)
    (batch,) = task.eval_batches(1, tokens=10**9)
    assert batch["targets"].shape == (1, len(validation) - 1)
    targets = batch["targets"][0].tolist()
    successors = collections.defaultdict(collections.Counter)
    for previous, byte in zip(train, train[1:]):
        successors[previous][byte] += 1
    total = sum(successors.values(), collections.Counter())

    def model(counts, plus):
        return {b: (counts[b] + plus) / (sum(counts.values()) + 256 * plus) for b in range(256)}

    # The unigram is the bigram's marginal, so every byte has 256 added in the place of one.
    unigram, bigrams = model(total, 256), {c: model(successors[c], 1) for c in set(validation)}
    pairs = list(zip([validation[0], *targets], targets))
    expected = {
        "uniform": [math.log(256), 1 / 256],
        "unigram": cross_entropy_and_accuracy(lambda _: unigram, pairs),
        "bigram": cross_entropy_and_accuracy(lambda c: bigrams[c], pairs),
    }
    floors = task.floors()
    assert floors.keys() == expected.keys()
    for name, (loss, accuracy) in expected.items():
        assert (floors[name]["eval_loss"], floors[name]["eval_accuracy"]) == (pytest.approx(loss), pytest.approx(accuracy)), name


def test_provenance_identifies_the_corpus(make_task, corpus_root):
    corpus = read_corpus(str(corpus_root))
    provenance = make_task("bytes", 16).provenance()
    assert provenance["corpus"] == {"sha256": corpus.sha256, "bytes": corpus.num_bytes, "files": len(corpus.paths)}
    assert provenance["python"] == platform.python_version()
    assert sum(provenance["num_examples"].values()) == len(corpus.paths)


def test_a_window_longer_than_the_split_is_refused(make_task, split_text):
    longest = len(split_text("validation")) - 1
    make_task("bytes", longest).eval_batches(1, tokens=1)
    with pytest.raises(UserError, match=f"seq_len={longest + 1}: the validation split has {longest + 1} bytes; use at most {longest}"):
        make_task("bytes", longest + 1).eval_batches(1, tokens=1)


def test_a_python_without_sources_is_refused(tmp_path, data_dir):
    with pytest.raises(UserError, match="has 0 .py files, none for train, validation, test"):
        Bytes(Bytes.Options(), 64, data_dir, root=str(tmp_path)).prepare()


def test_the_standard_library_is_the_default_and_beats_no_bigram(data_dir):
    """On the real corpus: megabytes of text, and the floors in the order that any language has."""
    task = load_task("bytes(objective='masked')", 2048, data_dir)
    bits = [task.floors()[name]["eval_bits_per_byte"] for name in ("uniform", "unigram", "bigram")]
    assert bits[0] == 8 and 4 < bits[1] < 5.5 and 3 < bits[2] < 4.2
    assert task.provenance()["corpus"]["bytes"] > 5e6
    assert sum(b["weights"].sum() for b in task.eval_batches(16, 65536)) == pytest.approx(0.15 * 65536, rel=0.05)
