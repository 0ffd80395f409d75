"""Translation on a tiny set of TFDS' form: nothing here may reach a network."""

import collections
import gzip
import json
import math
import socket
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import tiny_translation

from attn_zoo.spec import UserError
from attn_zoo.tasks import load_task, prepared
from attn_zoo.tasks.pairs import BEGIN, END, PAD
from attn_zoo.tasks.translate import bleu

TINY = "dataset='tiny_translation/de-en', vocab=300"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def connect(*args):
        raise AssertionError(f"a connection to {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)


@pytest.fixture(scope="module")
def make(data_dir):
    return lambda options="", seq_len=64: load_task(f"translate({TINY}{options})", seq_len, data_dir, allow_download=True)


def sentences(task, split):
    """The pairs of a split as the set has them, in order."""
    source = task.sentences.as_data_source(split=split)
    return [{language: text.decode() for language, text in source[i].items()} for i in range(len(source))]


def test_without_leave_nothing_is_downloaded_and_the_size_is_said(tmp_path):
    task = load_task("translate", 64, str(tmp_path / "data"))
    with pytest.raises(UserError) as error:
        task.prepare()
    assert str(error.value).startswith("wmt14_translate/de-en/1.0.0 is not in data_dir=")
    assert "at most 1.59 GiB" in str(error.value) and "--allow_download" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "data").exists()


def test_with_leave_it_is_prepared_and_then_needs_none(tmp_path):
    spec, data_dir = f"translate({TINY})", str(tmp_path)
    with pytest.raises(UserError, match="of unknown size"):
        load_task(spec, 64, data_dir).prepare()
    load_task(spec, 64, data_dir, allow_download=True).prepare()
    load_task(spec, 64, data_dir).prepare()


class ArchivedTranslation(tiny_translation.TinyTranslation):
    """The tiny set out of archives, as those of others come."""

    folder = None  # where they are

    def _split_generators(self, dl_manager):
        unpacked = dl_manager.extract({"tar": f"{self.folder}/text.tgz", "gz": f"{self.folder}/names.gz"})
        assert Path(unpacked["gz"]).read_text() == "de en"
        texts = {split: (Path(unpacked["tar"]) / "inside" / f"{split}.json").read_text() for split in tiny_translation.SIZES}
        return {split: self._generate_examples(json.loads(text)) for split, text in texts.items()}


def test_archives_are_unpacked_without_tensorflow(tmp_path, monkeypatch):
    pairs = tiny_translation.sentences_of(12)
    (tmp_path / "inside").mkdir()
    for i, split in enumerate(tiny_translation.SIZES):
        (tmp_path / "inside" / f"{split}.json").write_text(json.dumps(pairs[4 * i : 4 * i + 4]))
    with tarfile.open(tmp_path / "text.tgz", "w:gz") as tar:
        tar.add(tmp_path / "inside", "inside")
    (tmp_path / "names.gz").write_bytes(gzip.compress(b"de en"))
    monkeypatch.setattr(ArchivedTranslation, "folder", str(tmp_path))
    task = load_task("translate(dataset='archived_translation/de-en', vocab=285)", 64, str(tmp_path / "data"), allow_download=True)
    assert sorted(pair["en"] for pair in sentences(task, "validation")) == sorted(pair["en"] for pair in pairs[4:8])
    assert "tensorflow" not in sys.modules


def test_batches_say_what_the_set_says(make):
    task = make(", source='de', target='en'")
    (batch,) = task.eval_batches(10, tokens=10**9)
    rows = zip(*(batch[name] for name in ("source", "source_valid", "targets", "inputs")), sentences(task, "validation"))
    for source, source_valid, targets, inputs, pair in rows:
        assert (task.text(source, source=True), task.text(targets)) == (pair["de"], pair["en"])
        n = np.flatnonzero(targets == END)[0]
        assert inputs[0] == BEGIN and (targets[n + 1 :] == PAD).all() and (source[~source_valid] == PAD).all() and (source[source_valid] > END).all()
        np.testing.assert_array_equal(inputs[1 : n + 1], targets[:n])
    assert task.references(10**9) == [task.text(t) for t in batch["targets"]]
    assert task.references(3 * 64) == task.references(10**9)[:3]


@pytest.mark.parametrize("pieces", ["bpe", "unigram"])
def test_every_text_comes_back_from_its_pieces(data_dir, pieces):
    task = load_task(f"translate({TINY.replace('300', '285')}, pieces={pieces!r})", 64, data_dir, allow_download=True)
    for text in ("one two three", "fünf  sieben", "Ωδή 漢字 \u00a0 ﬁ", " before and behind "):
        ids = task.pieces.encode(text)
        assert min(ids) > END and max(ids) < 285
        assert task.text(np.array([*ids, END, *task.pieces.encode("not this")])) == text


def test_both_directions_share_their_pieces(make):
    there, back = make(), make(", source='de', target='en'")
    assert there.pieces.serialized_model_proto() == back.pieces.serialized_model_proto()
    np.testing.assert_array_equal(there.train_source()[5]["source"], back.train_source()[5]["target"])


@pytest.mark.parametrize("options, T", [("", 12), (", source_len=9", 20), (", joined=True", 25)])
def test_what_does_not_fit_is_left_out_and_counted(make, options, T):
    task = make(options, T)
    S = task.source_len

    def fits(pair):
        s, t = len(task.pieces.encode(pair["en"])), len(task.pieces.encode(pair["de"]))
        return s + 1 + t <= T if task.joined else s <= S and t + 1 <= T

    kept = {split: [fits(pair) for pair in sentences(task, split)] for split in prepared.SPLITS}
    assert 0 < sum(kept["train"]) < 60
    source = task.train_source()
    assert [task.text(source[i]["target"]) for i in range(len(source))] == [p["de"] for p, fit in zip(sentences(task, "train"), kept["train"]) if fit]
    assert task.provenance()["left_out"] == {split: len(fit) - sum(fit) for split, fit in kept.items()}
    for batch in task.eval_batches(4, tokens=10**9):
        assert all((row == END).sum() == 1 for row in batch["targets"][batch["weights"].any(axis=1)])


def test_splits_may_be_slices(make):
    task = make(", train='train[10:40]', validation='train[40:]', test='train[:10]'")
    train = sentences(task, "train")
    assert [task.text(task.train_source()[i]["target"]) for i in range(30)] == [pair["de"] for pair in train[10:40]]
    assert task.references(10**9) == [pair["de"] for pair in train[40:]]
    assert task.provenance()["num_examples"] == {"train": 30, "validation": 20, "test": 10}


def test_floors_are_counts_of_targets(make):
    """A hundred counts of the unigram stand behind every bigram's; both by loops."""
    task = make()
    source, alone, after = task.train_source(), collections.Counter(range(300)), collections.defaultdict(collections.Counter)
    for i in range(len(source)):
        ids = [BEGIN, *source[i]["target"].tolist(), END]
        alone.update(ids[1:])
        for a, b in zip(ids, ids[1:]):
            after[a][b] += 1
    p = {b: n / sum(alone.values()) for b, n in alone.items()}
    models = {
        "unigram": lambda a, b: p[b],
        "bigram": lambda a, b: (after[a][b] + 100 * p[b]) / (sum(after[a].values()) + 100),
    }
    (batch,) = task.eval_batches(10, tokens=10**9)
    scored = list(zip(*(batch[name][batch["weights"] == 1].tolist() for name in ("inputs", "targets"))))
    for name, model in models.items():
        loss = np.mean([-math.log(model(a, b)) for a, b in scored])
        accuracy = np.mean([max(range(300), key=lambda c: model(a, c)) == b for a, b in scored])
        assert task.floors()[name] == {"eval_loss": pytest.approx(loss), "eval_accuracy": pytest.approx(accuracy)}
    assert task.floors()["bigram"]["eval_loss"] < task.floors()["unigram"]["eval_loss"]


def plain_bleu(hypothesis, reference):
    """Papineni et al. 2002, eq. 1-3, of one sentence of words."""
    h, r = hypothesis.split(), reference.split()
    logs = []
    for n in (1, 2, 3, 4):
        grams = [collections.Counter(tuple(x[i : i + n]) for i in range(len(x) - n + 1)) for x in (h, r)]
        logs.append(math.log((grams[0] & grams[1]).total() / grams[0].total()))
    return 100 * min(1, math.exp(1 - len(r) / len(h))) * math.exp(sum(logs) / 4)


def test_bleu_and_its_signature():
    hypothesis, reference = "the cat sat on the old mat today", "today the cat sat on the very old mat"
    score = bleu([hypothesis], [reference], "en")
    assert score["bleu"] == pytest.approx(plain_bleu(hypothesis, reference))
    assert "nrefs:1" in score["signature"] and "tok:13a" in score["signature"] and sacrebleu.__version__ in score["signature"]
    assert bleu([reference], [reference])["bleu"] == pytest.approx(100)
    with pytest.raises(UserError, match="2 hypotheses for 1 references"):
        bleu(["a", "b"], ["a"])


def test_bleu_is_of_the_whole_text_not_a_mean_of_sentences(make):
    task = make()
    references = task.references(10**9)
    hypotheses = [*references[:-1], "something else altogether and much longer than that"]
    assert task.bleu(references, references)["bleu"] == pytest.approx(100)
    assert task.bleu(hypotheses, references)["bleu"] == sacrebleu.corpus_bleu(hypotheses, [references]).score < 100


def test_what_a_model_writes_is_scored_against_the_set(make):
    """The true targets as if a model had written them, in batches whose last has rows without a sentence; and what one that stops at once writes."""
    task = make()
    targets = np.concatenate([batch["targets"] for batch in task.eval_batches(3, 4 * task.seq_len)])
    assert len(targets) == 6 and task.judges_writing and task.begin_end is not None and make(", joined=True").begin_end is None
    expected = task.bleu([task.text(row) for row in targets[:4]], task.references(4 * task.seq_len))["bleu"]
    assert task.written_scores(targets, targets) == {"eval_bleu": expected} and expected > 90
    assert task.written_scores(np.full_like(targets, task.begin_end[1]), targets)["eval_bleu"] == 0


@pytest.mark.parametrize("package", ["sentencepiece", "sacrebleu"])
def test_a_missing_package_names_its_extra(make, package, monkeypatch):
    task = make()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as error:
        task.pieces if package == "sentencepiece" else bleu(["a"], ["a"])
    assert str(error.value) == f"the translate task needs the package {package}; install it with: pip install 'attn_zoo[translate]'"


@pytest.mark.parametrize(
    "options, words",
    [
        ("source='de'", "target='de': must be another language than the source"),
        ("vocab=100", "vocab=100: must be a whole number of at least 280"),
        ("vocab=100000", "vocab=100000: must be at most 65536"),
        ("pieces='word'", "pieces='word': must be one of 'bpe', 'unigram'"),
        ("dataset='huggingface:wmt14'", "dataset='huggingface:wmt14': must be text such as 'wmt14_translate/de-en'"),
        ("train='train[:10'", "train='train[:10': must be text such as 'train[:90%]'"),
        ("joined=True, source_len=8", "source_len=8: has no meaning with joined=True"),
    ],
)
def test_mistakes_in_options_are_named(options, words, tmp_path):
    with pytest.raises(UserError) as error:
        load_task(f"translate({options})", 64, str(tmp_path))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, seq_len, words",
    [
        ("dataset='wmt14_translation/de-en'", 64, "TFDS has no 'wmt14_translation'; did you mean 'wmt14_translate'?"),
        ("dataset='tiny_translation/de_en'", 64, "tiny_translation has no configuration 'de_en'; did you mean 'de-en'?"),
        ("dataset='tiny_translation/de-en', source='eng'", 64, "has no language 'eng'; did you mean 'en'?"),
        (f"{TINY.replace('300', '3000')}", 64, "vocab=3000: SentencePiece says: Vocabulary size"),
        (TINY, 2, "seq_len=2: no pair of tiny_translation/de-en, split train, is that short"),
    ],
)
def test_mistakes_in_the_set_are_named(options, seq_len, words, data_dir):
    task = load_task(f"translate({options})", seq_len, data_dir, allow_download="tiny" in options)
    with pytest.raises(UserError) as error:
        task.prepare()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_tiny_set_has_each_sentence_once():
    assert len({pair["en"] for pair in tiny_translation.sentences_of(75)}) == 75
