"""MQAR: the law of its sequences, each checked by looking it up again, and of its distributions."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from attn_zoo.tasks import load_task
from attn_zoo.tasks.mqar import Layout, draw_distinct, fill, generate

PINNED = {"random": "1e8c2e650cec", "clean": "988691453269"}


@pytest.fixture(scope="module")
def rows(data_dir):
    """(inputs, targets, weights) of 500 training examples, and the task."""

    def of(filler, vocab=64, pairs=8, T=64):
        task = load_task(f"mqar(vocab={vocab}, pairs={pairs}, filler={filler!r}, train_examples=500, validation_examples=50)", T, data_dir)
        batch = next(task.train_iterator(500, seed=0))
        return task, list(zip(batch["inputs"], batch["targets"], batch["weights"]))

    return of


@pytest.mark.parametrize("filler", ["random", "clean"])
def test_examples_are_pinned(data_dir, checksum, filler):
    task = load_task(f"mqar(filler={filler!r}, train_examples=50, validation_examples=8, test_examples=8)", 64, data_dir)
    source = task.train_source()
    examples = [task.example(source[i]) for i in range(8)]
    assert checksum(*(array for e in examples for array in e.values())) == PINNED[filler]


def test_the_first_examples_do_not_depend_on_how_many_are_asked_for(data_dir):
    few, many = (load_task(f"mqar(train_examples={n}, validation_examples=8, test_examples=8)", 64, data_dir) for n in (70, 200))
    sources = few.train_source(), many.train_source()
    for i in range(70):
        a, b = (few.example(source[i]) for source in sources)
        np.testing.assert_array_equal(a["inputs"], b["inputs"])


@pytest.mark.parametrize("filler", ["random", "clean"])
@pytest.mark.parametrize("T, pairs", [(64, 8), (64, 16), (37, 9), (8, 2)])
def test_each_key_returns_once_and_its_value_is_the_answer(rows, filler, T, pairs):
    _, examples = rows(filler, pairs=pairs, T=T)
    for inputs, targets, weights in examples:
        inputs, targets = inputs.tolist(), targets.tolist()
        memory = dict(zip(inputs[0 : 2 * pairs : 2], inputs[1 : 2 * pairs : 2]))
        assert len(memory) == pairs, "keys are distinct"
        assert len(set(memory.values())) == pairs, "values are distinct"
        assert all(1 <= key < 32 <= value < 64 for key, value in memory.items()), "keys in the lower half, values in the upper"
        queries = np.flatnonzero(weights).tolist()
        assert min(queries) >= 2 * pairs
        assert sorted(inputs[q] for q in queries) == sorted(memory), "each key is asked for once"
        assert [targets[q] for q in queries] == [memory[inputs[q]] for q in queries]
        later = [i for i in range(2 * pairs, T) if inputs[i] in memory and i not in queries]
        if filler == "clean":
            assert not later, "a key by accident"


def test_random_filler_repeats_keys_by_accident(rows):
    _, examples = rows("random")
    accidents = sum(np.isin(inputs[16:], inputs[0:16:2]).sum() - 8 for inputs, _, _ in examples)
    expected = len(examples) * (64 - 16 - 8) * 8 / 64
    assert accidents == pytest.approx(expected, abs=4 * math.sqrt(expected))


@pytest.mark.parametrize("without", [[], [0], [3, 9, 1, 2], [9, 8, 7]], ids=str)
def test_filler_is_uniform_over_what_is_allowed(without):
    tokens = fill(np.random.RandomState(0), 10, 20_000, np.array(without, np.int32))
    counts = np.bincount(tokens, minlength=10)
    assert not counts[without].any()
    assert stats.chisquare(np.delete(counts, without)).pvalue > 1e-3


def test_draws_without_replacement_follow_the_sequential_law():
    p = np.array([0.6, 0.3, 0.1])
    draws = draw_distinct(np.random.RandomState(0), 7 * p, 30_000, 2)  # p need not sum to one
    counts = np.zeros((3, 3))
    np.add.at(counts, tuple(draws.T), 1)
    expected = np.array([[0 if i == j else p[i] * p[j] / (1 - p[i]) for j in range(3)] for i in range(3)]) * 30_000
    off = ~np.eye(3, dtype=bool)
    assert not counts[~off].any()
    assert stats.chisquare(counts[off], expected[off]).pvalue > 1e-3


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_gaps_follow_the_power_law(power):
    T, pairs, n = 48, 4, 8_000
    records = list(itertools.islice(generate(Layout(64, pairs, power, T), seed=0), n))
    first = np.array([record["queries"][0] for record in records])  # the first key's gap is drawn before any is taken
    assert set((first - 2 * pairs) % 2) == {0}
    gap = (first - 2 * pairs) // 2 + 1
    slots = (T - 2 * pairs) // 2
    law = np.arange(1.0, slots + 1) ** (power - 1)
    counts = np.bincount(gap, minlength=slots + 1)[1:]
    assert stats.chisquare(counts, n * law / law.sum()).pvalue > 1e-3


def test_floors_hold_on_the_evaluated_sequences(rows):
    """Uniform over values, and over the sequence's own: the share of guesses that hit, counted over every scored position."""
    task, _ = rows("random")
    own, all_values, scored = 0.0, 0.0, 0
    for batch in task.eval_batches(10, tokens=10**9):
        for inputs, targets, weights in zip(batch["inputs"], batch["targets"], batch["weights"]):
            values = set(inputs[1:16:2].tolist())
            for target in targets[weights == 1].tolist():
                own += (target in values) / len(values)
                all_values += target in range(32, 64)
                scored += 1
    floors = task.floors()
    assert scored == 50 * 8
    assert floors["own values"] == {"eval_loss": pytest.approx(-math.log(own / scored)), "eval_accuracy": pytest.approx(own / scored)}
    uniform = all_values / scored / 32
    assert floors["uniform over values"] == {"eval_loss": pytest.approx(-math.log(uniform)), "eval_accuracy": pytest.approx(uniform)}


def test_a_sequence_of_64k_is_prepared_without_storing_it(data_dir):
    task = load_task("mqar(train_examples=64, validation_examples=2, test_examples=2)", 65536, data_dir)
    batch = next(task.train_iterator(2, seed=0))
    assert batch["inputs"].shape == (2, 65536) and (batch["weights"].sum(axis=1) == 8).all()
    assert sum(path.stat().st_size for path in Path(task.builder.data_dir).iterdir()) < 1_000_000  # the tokens would be 18 MB
