"""What training relies on, of every task: shapes, determinism, resumption, evaluation, preparation once."""

import itertools
import re
import subprocess
import sys
import threading

import numpy as np
import orbax.checkpoint as ocp
import pytest

from attn_zoo.spec import UserError
from attn_zoo.tasks import TASKS, load_task, prepared
from attn_zoo.tasks.pairs import PairTask

SMALL = "train_examples=40, validation_examples=10, test_examples=5"
CASES = {
    "bytes-causal": ("bytes(eval_segment=128)", 64),
    "bytes-masked": ("bytes(objective='masked', eval_segment=128)", 50),
    "mqar-random": (f"mqar({SMALL})", 64),
    "mqar-clean": (f"mqar(filler='clean', pairs=4, vocab=10, {SMALL})", 33),
    "listops-short": (f"listops(form='short', {SMALL})", 130),
    "copy": (f"copy(vocab=9, max_length=6, {SMALL})", 13),
    "reverse-joined": (f"reverse(joined=True, longest=20, {SMALL})", 43),
    "sort": (f"sort({SMALL})", 40),
    "dates": (f"dates({SMALL})", 11),
    "dates-joined": (f"dates(dates=2, joined=True, locales=('en_GB', 'ja'), {SMALL})", 104),
    "cloze": ("cloze(document=32, query=24, vocab=80, unknowns=8)", 30),
    "shapes": (f"shapes({SMALL})", 20),
    "shapes-same": (f"shapes(objective='same', {SMALL})", 64),
    "translate": ("translate(dataset='tiny_translation/de-en', vocab=300)", 64),
    "translate-joined": ("translate(dataset='tiny_translation/de-en', vocab=300, joined=True)", 128),
}
CORPORA = ("bytes", "cloze")  # which have as many examples as they have text


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def task(request, make_task):
    return make_task(*request.param)


def assert_same(batches, others):
    batches, others = list(batches), list(others)
    assert len(batches) == len(others)
    for batch, other in zip(batches, others):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def check_batch(task, batch, B):
    T, S = task.seq_len, task.source_len
    target_shape = (B, T) if task.per_token else (B,)
    shapes = {"inputs": (B, T), "targets": target_shape, "weights": target_shape, "valid": (B, T)}
    dtypes = {"inputs": np.int32, "targets": np.int32, "weights": np.float32, "valid": np.bool_}
    assert (S > 0) == (task.source_vocab > 0)
    if task.image_shape:
        picture = "source" if task.inputs_vocab else "inputs"
        shapes, dtypes = shapes | {picture: (B, *task.image_shape)}, dtypes | {picture: np.float32}
        assert 0 <= batch[picture].min() and batch[picture].max() <= 1
    if S:
        shapes |= {"source": (B, S), "source_valid": (B, S)}
        dtypes |= {"source": np.int32, "source_valid": np.bool_}
        assert batch["source"].min() >= 0 and batch["source"].max() < task.source_vocab
    if task.name == "cloze":
        shapes["candidates"], dtypes["candidates"] = (B, S), np.bool_
    assert {name: array.shape for name, array in batch.items()} == shapes
    assert {name: array.dtype for name, array in batch.items()} == dtypes
    if task.inputs_vocab:
        assert batch["inputs"].min() >= 0 and batch["inputs"].max() < task.inputs_vocab
    assert batch["targets"].min() >= 0 and batch["targets"].max() < task.num_outputs
    assert set(np.unique(batch["weights"])) <= {0.0, 1.0}
    for name in ("valid", "source_valid"):
        assert name not in batch or (np.sort(batch[name], axis=1)[:, ::-1] == batch[name]).all(), "padding stands at the end"


PROBED = ("copy", "reverse", "sort", "dates")  # also evaluated on longer sequences than those trained on, or length by length


def seen(batch):
    """All that a model sees of each row, side by side."""
    return np.concatenate([batch[name].reshape(len(batch[name]), -1) for name in ("source", "inputs") if name in batch], axis=1)


@pytest.mark.parametrize("B", [1, 6])
def test_train_batches_keep_shapes_and_ranges(task, B):
    for batch in itertools.islice(task.train_iterator(B, seed=0), 10):
        check_batch(task, batch, B)
        assert batch["valid"].any(axis=1).all()
        assert batch["weights"].reshape(B, -1).any(axis=1).all(), "a row without anything to learn"


def test_every_registered_task_is_covered():
    assert {spec.partition("(")[0] for spec, _ in CASES.values()} == set(TASKS)
    assert all(task.name == name for name, task in TASKS.items())


def test_the_seed_alone_determines_the_training_batches(task):
    def draw(seed):
        return list(itertools.islice(task.train_iterator(4, seed), 12))

    assert_same(draw(3), draw(3))
    assert any(not np.array_equal(a["inputs"], b["inputs"]) for a, b in zip(draw(3), draw(4)))


@pytest.mark.parametrize("after", [0, 1, 7, 25])
def test_a_restored_iterator_goes_on_bitwise(task, after):
    iterator = task.train_iterator(4, seed=1)
    for _ in range(after):
        next(iterator)
    state = iterator.get_state()
    expected = list(itertools.islice(iterator, 15))  # 40 records: crosses epochs
    resumed = task.train_iterator(4, seed=1)
    resumed.set_state(state)
    assert_same(itertools.islice(resumed, 15), expected)


def test_an_iterator_restored_by_orbax_goes_on_bitwise(make_task, tmp_path):
    import grain

    task = make_task(*CASES["bytes-masked"])
    iterator = task.train_iterator(4, seed=1)
    for _ in range(5):
        next(iterator)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        expected = list(itertools.islice(iterator, 5))
        manager.wait_until_finished()
        resumed = task.train_iterator(4, seed=1)
        manager.restore(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed)))
    assert_same(itertools.islice(resumed, 5), expected)


@pytest.mark.parametrize("case", ["mqar-random", "listops-short"])
def test_an_epoch_has_each_record_once_and_the_next_another_order(make_task, case):
    task = make_task(*CASES[case])
    first, second = ([row.tobytes() for row in batch["inputs"]] for batch in itertools.islice(task.train_iterator(40, seed=0), 2))
    assert len(set(first)) == 40 and set(first) == set(second) and first != second


def test_evaluation_is_always_the_same_and_never_wraps(task):
    batches = task.eval_batches(4, tokens=10**9)
    assert_same(batches, task.eval_batches(4, tokens=10**9))
    for batch in batches:
        check_batch(task, batch, 4)
    rows = np.concatenate([seen(batch)[batch["valid"].any(axis=1)] for batch in batches])
    assert len(np.unique(rows, axis=0)) == len(rows)
    if task.name not in CORPORA:
        assert len(rows) == 10


def test_evaluation_pads_the_last_batch_with_nothing(task):
    (batch,) = task.eval_batches(9, tokens=3 * task.seq_len)
    check_batch(task, batch, 9)
    real = batch["valid"].any(axis=1)
    assert 1 <= real.sum() <= 3 and not real[real.sum() :].any()
    assert not batch["weights"][~real].any() and batch["weights"][real].reshape(real.sum(), -1).any(axis=1).all()


def test_evaluation_has_at_least_one_sequence(task):
    (batch,) = task.eval_batches(2, tokens=1)
    assert batch["valid"].any(axis=1).sum() == 1


def test_splits_have_different_examples(task):
    validation, test = (task.eval_batches(1, tokens=10**9, split=split) for split in ("validation", "test"))
    assert not {seen(b).tobytes() for b in validation} & {seen(b).tobytes() for b in test}


def test_training_has_none_of_the_evaluated_examples(task):
    if task.name == "bytes":
        pytest.skip("its windows stand anywhere in a split, with other bytes hidden each time: see test_task_bytes.py")
    evaluated = {seen(b).tobytes() for split in ("validation", *task.probes) for b in task.eval_batches(1, tokens=10**9, split=split)}
    trained = {row.tobytes() for batch in itertools.islice(task.train_iterator(8, seed=0), 20) for row in seen(batch)}
    assert not evaluated & trained


def test_probes_are_evaluated_as_validation_is(task):
    assert bool(task.probes) == (task.name in PROBED)
    for probe in task.probes:
        batches = task.eval_batches(3, tokens=10**9, split=probe)
        rows = np.concatenate([seen(batch)[batch["valid"].any(axis=1)] for batch in batches])
        assert 1 <= len(np.unique(rows, axis=0)) == len(rows)
        for batch in batches:
            check_batch(task, batch, 3)


def test_floors_are_scores_in_the_units_of_evaluation(task):
    assert task.floors()
    for score in task.floors().values():
        assert 0 <= score["eval_accuracy"] < 1 and 0 < score["eval_loss"] < 6
        generates = isinstance(task, PairTask) or task.begin_end is not None
        assert ("eval_exact" in score) == (generates and task.name != "translate")  # whose sentences no count model writes
        assert 0 <= score.get("eval_exact", 0) <= score["eval_accuracy"]
        assert ("eval_bits_per_byte" in score) == (task.loss_name == "bits_per_byte")
        if "eval_bits_per_byte" in score:
            assert score["eval_bits_per_byte"] == pytest.approx(score["eval_loss"] / np.log(2))


def test_provenance_names_dataset_version_and_sizes(task):
    provenance = task.provenance()
    assert re.fullmatch(r"\d+\.\d+\.\d+", provenance["version"]) and provenance["dataset"] and provenance["config"]
    assert set(provenance["num_examples"]) == {*prepared.SPLITS, *task.probes} and min(provenance["num_examples"].values()) > 0


PREPARE = "import sys; from attn_zoo.tasks import load_task; t = load_task({spec!r}, 64, sys.argv[1]); t.prepare(); print(t.builder.data_dir)"


def test_processes_that_start_together_prepare_once(tmp_path):
    command = [sys.executable, "-c", PREPARE.format(spec="mqar(train_examples=3000)"), str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert [out.count("\n") for out, _ in outputs] == [1, 1, 1], "preparation must not chatter"
    assert [err for _, err in outputs] == ["", "", ""]


def test_what_is_prepared_is_read_without_writing(make_task, monkeypatch):
    make_task(*CASES["listops-short"]).prepare()
    monkeypatch.setattr(prepared.tfds.core.GeneratorBasedBuilder, "download_and_prepare", None)
    monkeypatch.setattr(prepared, "_write", None)
    make_task(*CASES["listops-short"]).prepare()


def test_a_cached_array_is_never_seen_in_part(make_task):
    builder = make_task(*CASES["mqar-random"]).builder
    seen = []

    def read():
        seen.append(prepared.cached_array(builder, "ramp", lambda: np.arange(10**6)).sum())

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [np.arange(10**6).sum()] * 8
    assert not list(builder.data_path.glob(".ramp*")), "temporary files left behind"


@pytest.mark.parametrize(
    "spec, seq_len, words",
    [
        ("byte", 64, "there is no task 'byte'; did you mean 'bytes'?"),
        ("bytes(objectiv='masked')", 64, "no option 'objectiv'; did you mean 'objective'?"),
        ("bytes(objective='mask')", 64, "objective='mask': must be one of 'causal', 'masked'"),
        ("bytes(objective='masked', mask_rate=1.5)", 64, "mask_rate=1.5: must be a number of at least 0.01 and at most 0.9"),
        ("bytes(mask_rate=0.3)", 64, "mask_rate=0.3: needs objective='masked'"),
        ("mqar(pairs=32)", 64, "pairs=32: seq_len=64 holds at most 16, 2 tokens for a pair and 2 for its query; use pairs=16 or seq_len=128"),
        ("mqar(vocab=16)", 64, "vocab=16: must be a whole number of at least 18"),
        ("mqar(filler='zeros')", 64, "filler='zeros': must be one of 'random', 'clean'"),
        ("mqar(train_examples=0)", 64, "train_examples=0: must be a whole number of at least 1"),
        ("listops", 1024, "seq_len=1024: must be at least max_length=2000"),
        ("listops(form='long')", 2048, "form='long': must be one of 'lra', 'short'"),
        ("listops(min_length=100, max_length=120)", 256, "max_length=120: must be at least 1.5 * min_length = 150"),
        ("listops(min_length=3000, max_length=9000)", 9000, "min_length=3000: must be at most 2000"),
        ("copy", 32, "seq_len=32: must be at least 33, to hold a target of 32 and END"),
        ("sort(max_length=5, joined=True)", 20, "seq_len=20: must be at least 21, to hold a source of 10, BEGIN and a target of 10"),
        ("reverse(longest=15)", 64, "longest=15: must be a whole number of at least 16, or None"),
        ("reverse(vocab=8)", 64, "min_length=4: there are 4096 of that length with vocab=8, too few to set some apart; use at least 6"),
        ("copy(joined='yes')", 64, "joined='yes': must be one of False, True"),
        ("dates", 10, "seq_len=10: must be at least 11, to hold a target of 10 and END"),
        ("dates(dates=2, joined=True)", 64, "seq_len=64: must be at least 103, to hold a source of 81, BEGIN and a target of 21"),
        ("dates(locales=('fr', 'en_UK'))", 64, "locales='en_UK': must be one of 'cs', 'da'"),
        ("dates(locales='fr')", 64, "locales='fr': must be a tuple of names, as in ('cs', 'da')"),
        ("dates(forms=('long', 'long'))", 64, "forms=('long', 'long'): names one twice"),
        ("dates(years=(2000, 1999))", 64, "years=(2000, 1999): must be (first, last), both of four digits"),
        ("cloze(query=100)", 64, "seq_len=64: must be at least query=100"),
        ("cloze(vocab=64)", 64, "vocab=64: must be a whole number of at least 68"),
        ("mqar, bytes", 64, "expected one name(option=value)"),
    ],
)
def test_mistakes_are_named(spec, seq_len, words, tmp_path):
    with pytest.raises(UserError) as error:
        load_task(spec, seq_len, str(tmp_path))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir()), "a mistake is found before anything is prepared"
