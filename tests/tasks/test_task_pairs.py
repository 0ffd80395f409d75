"""What pairs of a source and a target become, and the floors of predictors that count."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from attn_zoo.tasks import load_task
from attn_zoo.tasks.pairs import BEGIN, END, PAD, RESERVED, content, join, pair

SOURCE, TARGET = np.array([7, 8, 9], np.int32), np.array([4, 5], np.int32)


def test_a_pair_is_a_source_and_a_target_moved_by_one():
    example = pair(SOURCE, TARGET, S=5, T=4)
    assert {name: array.tolist() for name, array in example.items()} == {
        "source": [7, 8, 9, PAD, PAD],
        "source_valid": [True, True, True, False, False],
        "inputs": [BEGIN, 4, 5, PAD],
        "targets": [4, 5, END, PAD],
        "weights": [1, 1, 1, 0],
        "valid": [True, True, True, False],
    }


def test_joined_they_are_one_sequence_scored_behind_begin():
    example = join(SOURCE, TARGET, T=8)
    assert {name: array.tolist() for name, array in example.items()} == {
        "inputs": [7, 8, 9, BEGIN, 4, 5, PAD, PAD],
        "targets": [PAD, PAD, PAD, 4, 5, END, PAD, PAD],
        "weights": [0, 0, 0, 1, 1, 1, 0, 0],
        "valid": [True] * 6 + [False] * 2,
    }


def test_both_hold_an_empty_target_and_the_longest_that_fits():
    nothing = TARGET[:0]
    assert pair(SOURCE, nothing, S=3, T=1)["targets"].tolist() == join(SOURCE, nothing, T=4)["targets"][3:].tolist() == [END]
    assert pair(SOURCE, TARGET, S=3, T=3)["valid"].all() and join(SOURCE, TARGET, T=6)["valid"].all()


@pytest.mark.parametrize("ids, expected", [([4, 5, END, 6], [4, 5]), ([4, PAD, 5], [4]), ([END], []), ([3], [3])], ids=str)
def test_content_ends_with_end_or_padding(ids, expected):
    assert content(np.array(ids)) == expected


KNOWN = {  # what each predictor is told: the length of the source, and the target so far
    "unigram": lambda length, before: None,
    "position": lambda length, before: len(before),
    "bigram": lambda length, before: before[-1:],
    "position and length": lambda length, before: (len(before), length),
}


@pytest.mark.parametrize("spec", ["sort(vocab=2, min_length=9, max_length=10", "copy(vocab=9, min_length=3, max_length=5"])
def test_floors_by_brute_force(data_dir, spec):
    """Counting in plain Python; exact match by decoding greedily, each token from the ones decoded."""
    task = load_task(f"{spec}, train_examples=200, validation_examples=12, test_examples=2)", 33, data_dir)

    def targets(split):
        source = task.builder.as_data_source(split=split)
        examples = [task.example(source[i]) for i in range(len(source))]
        return [(e["source_valid"].sum(), e["targets"][e["valid"]].tolist()) for e in examples]

    outcomes = [END, *range(RESERVED, task.num_outputs)]
    floors = task.floors()
    assert set(floors) == {"uniform", *KNOWN}
    for name, known in KNOWN.items():
        counts = defaultdict(Counter)
        for length, target in targets("train"):
            for t, token in enumerate(target):
                counts[known(length, tuple(target[:t]))][token] += 1
        best = lambda context: max(outcomes, key=lambda token: (counts[context][token], -token))
        losses, hits, exact = [], [], []
        for length, target in targets("validation"):
            decoded = []
            while END not in decoded and len(decoded) < 20:
                decoded.append(best(known(length, tuple(decoded))))
            exact.append(decoded == target)
            for t, token in enumerate(target):
                context = known(length, tuple(target[:t]))
                losses.append(-math.log((1 + counts[context][token]) / (len(outcomes) + counts[context].total())))
                hits.append(best(context) == token)
        expected = {"eval_loss": np.mean(losses), "eval_accuracy": np.mean(hits), "eval_exact": np.mean(exact)}
        assert floors[name] == pytest.approx(expected), name
    p = 1 / len(outcomes)
    uniform = {"eval_loss": -math.log(p), "eval_accuracy": p, "eval_exact": np.mean([p ** len(target) for _, target in targets("validation")])}
    assert floors["uniform"] == pytest.approx(uniform)
    if spec.startswith("sort"):
        assert floors["position and length"]["eval_exact"] > 0, "half zeros, half ones is a likely target"
