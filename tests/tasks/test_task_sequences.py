"""copy, reverse and sort: the law of each target, and which lengths and sequences each split has."""

from collections import Counter

import numpy as np
import pytest
from scipy import stats

from attn_zoo.tasks import load_task
from attn_zoo.tasks.pairs import BEGIN, END, RESERVED
from attn_zoo.tasks.prepared import SPLITS

LAWS = {"copy": list, "reverse": lambda symbols: list(reversed(symbols)), "sort": sorted}
SIZES = "train_examples=600, validation_examples=60, test_examples=40"
PINNED = "0a92c8385129"


def sequences(task, split):
    """The sources of a split, as tuples of symbols."""
    source = task.builder.as_data_source(split=split)
    return [tuple(source[i]["symbols"].tolist()) for i in range(len(source))]


@pytest.mark.parametrize("name", LAWS)
def test_the_target_is_the_law_of_the_source(data_dir, name):
    task = load_task(f"{name}({SIZES})", 33, data_dir)
    for batch in (next(task.train_iterator(100, seed=0)), *task.eval_batches(30, 10**6, split="length_24")):
        for source, targets, valid in zip(batch["source"], batch["targets"], batch["valid"]):
            symbols = [int(word) for word in task.text(source, source=True).split()]
            assert [int(word) for word in task.text(targets).split()] == LAWS[name](symbols)
            assert valid.sum() == len(symbols) + 1 and targets[len(symbols)] == END
            assert all(0 <= symbol < 26 for symbol in symbols)


@pytest.mark.parametrize("name", LAWS)
def test_joined_it_is_the_same_pair_in_one_sequence(data_dir, name):
    apart, joined = (load_task(f"{name}(joined={joined}, {SIZES})", 80, data_dir).eval_batches(60, 10**6)[0] for joined in (False, True))
    for source, length, targets, inputs, weights, outputs in zip(
        apart["source"], apart["source_valid"].sum(axis=1), apart["targets"], joined["inputs"], joined["weights"], joined["targets"]
    ):
        pair = [*source[:length], BEGIN, *targets[: length + 1]]
        assert inputs[: 2 * length + 1].tolist() == pair[:-1] and not inputs[2 * length + 1 :].any()
        assert outputs[weights == 1].tolist() == targets[: length + 1].tolist()


def test_the_three_share_one_dataset(data_dir):
    assert len({load_task(f"{name}({SIZES})", 33, data_dir).builder.data_dir for name in LAWS}) == 1


def test_sequences_are_pinned(data_dir, checksum):
    task = load_task(f"copy({SIZES})", 33, data_dir)
    assert checksum(*(np.array(symbols) for split in (*SPLITS, "length_24") for symbols in sequences(task, split)[:5])) == PINNED


def test_lengths_and_symbols_are_uniform(data_dir):
    train = sequences(load_task(f"copy({SIZES})", 33, data_dir), "train")
    lengths, symbols = Counter(map(len, train)), Counter(symbol for sequence in train for symbol in sequence)
    assert set(lengths) == set(range(4, 17)) and stats.chisquare(list(lengths.values())).pvalue > 1e-3
    assert set(symbols) == set(range(26)) and stats.chisquare(list(symbols.values())).pvalue > 1e-3


@pytest.mark.parametrize("vocab, lengths", [(26, "min_length=4, max_length=16"), (2, "min_length=12, max_length=12, longest=14")])
def test_nothing_that_is_evaluated_may_be_trained_on(data_dir, vocab, lengths):
    task = load_task(f"copy(vocab={vocab}, {lengths}, {SIZES})", 33, data_dir)
    split = {name: sequences(task, name) for name in (*SPLITS, *task.probes)}
    assert all(len(set(rows)) == len(rows) for name, rows in split.items() if name != "train")
    assert not set(split["train"]) & set().union(*(split[name] for name in split if name != "train"))
    assert not set(split["validation"]) & set(split["test"])


@pytest.mark.parametrize(
    "options, lengths",
    [("", [4, 10, 16, 20, 24, 28, 32]), ("min_length=6, max_length=8, longest=64,", [6, 7, 8, 22, 36, 50, 64]), ("longest=16,", [4, 10, 16])],
)
def test_probes_have_one_length_each(data_dir, options, lengths):
    task = load_task(f"sort({options} {SIZES})", 65, data_dir)
    assert task.probes == tuple(f"length_{n}" for n in lengths)
    assert task.source_len == lengths[-1]
    for n, probe in zip(lengths, task.probes):
        assert [len(symbols) for symbols in sequences(task, probe)] == [n] * 60
        (batch,) = task.eval_batches(60, 10**6, split=probe)
        assert (batch["weights"].sum(axis=1) == n + 1).all() and (batch["source_valid"].sum(axis=1) == n).all()


def test_sorting_is_partly_known_without_the_source(data_dir):
    """The position and what came before tell something of a sorted target, nothing of a copied or reversed one."""
    sort, copy = (load_task(f"{name}({SIZES})", 33, data_dir).floors() for name in ("sort", "copy"))
    assert sort["position"]["eval_loss"] < sort["unigram"]["eval_loss"] - 0.3
    assert sort["bigram"]["eval_loss"] < copy["bigram"]["eval_loss"] - 0.5
    assert copy["uniform"]["eval_loss"] == sort["uniform"]["eval_loss"] == pytest.approx(np.log(27))
    assert copy["unigram"]["eval_loss"] == pytest.approx(sort["unigram"]["eval_loss"]), "the same symbols"


def test_ids_leave_room_for_the_reserved_ones(data_dir):
    task = load_task(f"copy(vocab=5, min_length=6, {SIZES})", 33, data_dir)
    assert (task.inputs_vocab, task.num_outputs, task.source_vocab) == (8, 8, 8)
    (batch,) = task.eval_batches(60, 10**6)
    assert set(np.unique(batch["source"][batch["source_valid"]])) == set(range(RESERVED, 8))
