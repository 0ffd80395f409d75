"""Cloze: which words, sentences and identifiers a file has, which documents and queries they make, and how words become ids."""

import json.decoder
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from attn_zoo.spec import UserError
from attn_zoo.tasks import Cloze, load_task
from attn_zoo.tasks.cloze import BLANK, MIN_QUERY, RESERVED, UNKNOWN, Text, clozes, read_text, split_sentences
from attn_zoo.tasks.prepared import SPLITS, split_of

SOURCE = b'''"""Counts words. The counter keeps `total`, ok?

>>> count("a")
1
"""
import os

class Counter:
    """Wraps a total."""

    def add(self, amount, if_new=False):
        "Adds an amount -- the \\d total grows."
        self.total += amount

def late():
    """Comes last."""
    "is no docstring"
'''


def test_a_file_is_read_in_its_order():
    text = read_text(SOURCE)
    sentences = [" ".join(text.words[start:stop]) for start, stop in text.sentences]
    assert sentences == [
        "Counts words .",
        "The counter keeps ` total ` , ok ?",
        '>>> count ( " a " ) 1',
        "Wraps a total .",
        "Adds an amount -- the \\ d total grows .",
        "Comes last .",
    ]
    assert text.identifiers == {"Counter", "add", "self", "amount", "if_new", "total", "late"}, "no keyword, and nothing as short as os"
    assert text.sentences[0][0] == 0 and all(stop == start for (_, stop), (start, _) in zip(text.sentences, text.sentences[1:]))


@pytest.mark.parametrize("content", [b"x = = 1", b'"""\xff"""', b"x = '\0'"], ids=["syntax", "encoding", "null"])
def test_a_file_that_is_no_python_is_empty(content):
    assert read_text(content) == Text((), (), frozenset())


def test_sentences_end_with_their_signs_and_with_paragraphs():
    sentences = split_sentences("One e.g. this. Two!\nThree\n\n  \nfour... Is it five?")
    assert [" ".join(words) for words in sentences] == ["One e . g .", "this .", "Two !", "Three", "four ...", "Is it five ?"]


def text_of(*sentences, identifiers):
    words, spans = [], []
    for sentence in sentences:
        spans.append((len(words), len(words) + len(sentence.split())))
        words += sentence.split()
    return Text(tuple(words), tuple(spans), frozenset(identifiers))


def test_a_query_has_each_occurrence_blanked_and_is_not_in_its_document():
    text = text_of("Open the file .", "A file or a path or that file is open .", "See the path .", identifiers=("file", "path"))
    examples = [{**row, "candidates": row["candidates"].nonzero()[0].tolist()} for row in clozes(text, document=16, query=16)]
    document = "Open the file . See the path ."
    assert examples == [
        {"document": document, "query": "A [BLANK] or a path or that [BLANK] is open .", "answer": "file", "candidates": [2, 6]},
        {"document": document, "query": "A file or a [BLANK] or that file is open .", "answer": "path", "candidates": [2, 6]},
    ]


@pytest.mark.parametrize(
    "sentence, rest",
    [
        pytest.param("The file is open", "Its file has a path", id="no end"),
        pytest.param("A file opens .", "Its file has a path", id="too short"),
        pytest.param("The file is open , is it not ?", "Its file has a path", id="too long"),
        pytest.param(">>> file = open ( it ) .", "Its file has a path", id="code"),
        pytest.param("The file is open .", "Its name has a path", id="not in the document"),
        pytest.param("The file is open .", "Its file has a name", id="no other candidate"),
        pytest.param("The file is open .", "Its path : The file is open . The end", id="repeated in the document"),
    ],
)
def test_what_is_no_query(sentence, rest):
    control = text_of("The file is open .", "Its file has a path", identifiers=("file", "path"))
    assert [row["answer"] for row in clozes(control, 32, 8)] == ["file"]
    assert not list(clozes(text_of(sentence, rest, identifiers=("file", "path")), 32, 8))


@pytest.mark.parametrize("place", [0, 2, 10, 38, 39])
def test_the_document_is_as_many_words_as_asked_for_from_around(place):
    """Forty sentences of six words, each with a word of its own; the document of one is the nearest words on both sides, where they are."""
    sentences = [f"The file w{i} has path ." for i in range(40)]
    text = text_of(*sentences, identifiers=("file", "path"))
    rows = [row for row in clozes(text, document=50, query=8) if f"w{place} " in row["query"]]
    assert [row["answer"] for row in rows] == ["file", "path"]
    words = " ".join(sentences).split()
    left, right = words[: 6 * place], words[6 * place + 6 :]
    before = min(len(left), 50 - min(25, len(right)))
    assert rows[0]["document"].split() == left[len(left) - before :] + right[: 50 - before]
    assert len(rows[0]["document"].split()) == len(rows[0]["candidates"]) == 50


@pytest.fixture(scope="module")
def task(make_task):
    return make_task("cloze(document=40, query=24, vocab=120, unknowns=12)", 28)


def records(task, split):
    source = task.builder.as_data_source(split=split)
    return [{**record, **{k: record[k].decode() for k in ("document", "query", "answer")}} for record in source.__getitems__(range(len(source)))]


def test_splits_are_of_files_and_share_no_question(task, docs_root):
    by_split = {split: records(task, split) for split in SPLITS}
    questions = {split: {(row["query"], row["answer"]) for row in rows} for split, rows in by_split.items()}
    assert all(len(questions[split]) == len(by_split[split]) > 0 for split in SPLITS)
    assert not questions["train"] & (questions["validation"] | questions["test"]) and not questions["validation"] & questions["test"]
    modules = {path.stem.removeprefix("module_"): split_of(path.relative_to(docs_root).as_posix()) for path in docs_root.rglob("module_*.py")}
    for split, rows in by_split.items():
        for row in rows:
            owners = set(re.findall(r"(?:row|[Tt]able)_(\d+)", " ".join((row["document"], row["query"], row["answer"]))))
            assert {modules[owner] for owner in owners} == {split}


def test_an_example_asks_for_an_identifier_of_its_document(task):
    for row, batch in zip(records(task, "validation"), task.eval_batches(1, 10**6)):
        document, query = row["document"].split(), row["query"].split()
        assert MIN_QUERY <= len(query) <= 24 and "[BLANK]" in query and row["answer"] not in query
        source, inputs, candidates, target = (batch[name][0] for name in ("source", "inputs", "candidates", "targets"))
        assert batch["source_valid"][0].sum() == len(document) and batch["valid"][0].sum() == len(query)
        np.testing.assert_array_equal(inputs[: len(query)] == BLANK, [word == "[BLANK]" for word in query])
        places = [i for i, word in enumerate(document) if word == row["answer"]]
        assert places and (source[places] == target).all() and candidates[places].all() and target != UNKNOWN
        assert target not in inputs and not candidates[len(document) :].any()


def test_known_words_have_an_id_and_unknown_ones_one_of_the_example(task):
    counts = Counter(word for row in records(task, "train") for name in ("document", "query") for word in row[name].split() if word != "[BLANK]")
    words = sorted(counts, key=lambda word: (-counts[word], word))[: 120 - RESERVED - 12]
    assert task.vocabulary == {"[BLANK]": BLANK, **{word: 15 + i for i, word in enumerate(words)}}
    for row, batch in zip(records(task, "validation"), task.eval_batches(1, 10**6)):
        document = row["document"].split()
        own = {}
        for word, i in zip(document, batch["source"][0].tolist()):
            assert (i == task.vocabulary[word]) if word in task.vocabulary else (RESERVED <= i < 15 and own.setdefault(word, i) == i)
        assert len(set(own.values())) == len(own), "two words, two ids"
        shown = task.text(batch["source"][0]).split()
        assert [a for a, b in zip(shown, document) if b in words] == [word for word in document if word in words]


def test_training_draws_the_ids_of_unknown_words_anew(make_task):
    """Uniform over all there are, whatever the example; the order of words is not told."""
    task = make_task("cloze(document=40, query=24, vocab=20, unknowns=12)", 28)
    record = next(row for row in task._records("train") if row["answer"].decode() not in task.vocabulary)
    examples = [task.train_example(record, np.random.default_rng(i)) for i in range(600)]
    drawn = Counter(int(example["targets"]) for example in examples)
    assert set(drawn) == set(range(RESERVED, 15)) and stats.chisquare(list(drawn.values())).pvalue > 1e-3
    first, other = examples[0]["source"], next(e["source"] for e in examples if e["targets"] != examples[0]["targets"])
    renamed = dict(zip(first.tolist(), other.tolist()))
    assert [renamed[i] for i in first.tolist()] == other.tolist() and len(set(renamed.values())) == len(renamed)


def test_more_unknown_words_than_ids_share_one_but_no_candidate_does(make_task):
    with pytest.raises(UserError, match="unknowns=1: must be at least ([0-9]+), the most candidates") as error:
        make_task("cloze(document=40, query=24, vocab=5, unknowns=1)", 28).prepare()
    least = int(re.search("at least ([0-9]+)", str(error.value))[1])
    task = make_task(f"cloze(document=40, query=24, vocab={4 + least}, unknowns={least})", 28)
    batches = list(task.eval_batches(1, 10**6))
    for batch in batches:
        assert RESERVED <= batch["targets"][0] < RESERVED + least + 1 and not (batch["candidates"] & (batch["source"] == UNKNOWN)).any()
        assert (batch["source"][0] == batch["targets"][0]).any()
    assert any((batch["source"] == UNKNOWN).any() for batch in batches)


def test_floors_by_brute_force(task):
    answers = [row["answer"] for row in records(task, "train")]
    expected = {"uniform over candidates": [], "candidate counts": [], "candidate counts, not in the query": [], "answer counts": []}
    for row in records(task, "validation"):
        places = [word for word, candidate in zip(row["document"].split(), row["candidates"]) if candidate]
        choices = sorted(set(places))
        outside = [word for word in choices if word not in row["query"].split()]
        for name, words, weight in (
            ("uniform over candidates", choices, lambda word: 1),
            ("candidate counts", choices, places.count),
            ("candidate counts, not in the query", outside, places.count),
            ("answer counts", choices, lambda word: 1 + answers.count(word)),
        ):
            weights = [weight(word) for word in words]
            best = [word for word, w in zip(words, weights) if w == max(weights)]
            p = weight(row["answer"]) / sum(weights)
            expected[name].append((-math.log(p), best.count(row["answer"]) / len(best)))
    floors = task.floors()
    assert set(floors) == set(expected)
    for name, scores in expected.items():
        loss, accuracy = np.mean(scores, axis=0)
        assert floors[name] == {"eval_loss": pytest.approx(loss), "eval_accuracy": pytest.approx(accuracy)}


def test_the_standard_library_asks_questions():
    rows = list(clozes(read_text(Path(json.decoder.__file__).read_bytes()), 256, 48))
    assert len(rows) >= 5 and {"object_hook", "dict"} & {row["answer"] for row in rows}


def test_what_a_file_of_an_earlier_split_says_is_not_asked(tmp_path, data_dir):
    """Every file has the same two sentences; of the first other files could ask for another identifier than those of training, of the second these ask nothing."""
    for i in range(120):
        path = tmp_path / f"module_{i}.py"
        offered = "alpha" if split_of(path.name) == "train" else "beta gamma"
        sentences = "The alpha and the beta are one .", "A gamma is not here .", f"{offered} , own_{i}", f"Now own_{i} is {offered} here ."
        path.write_text('"""' + "\n\n".join(sentences) + f'"""\nalpha = beta = gamma = own_{i} = 0')
    task = Cloze(Cloze.Options(unknowns=4, vocab=64), 48, data_dir, root=str(tmp_path))
    asked = {split: {row["query"].split()[0] for row in records(task, split)} for split in SPLITS}
    assert asked == {"train": {"The", "Now"}, "validation": {"Now"}, "test": {"Now"}}


def test_a_corpus_without_a_question_is_refused(tmp_path, data_dir):
    for i in range(120):
        (tmp_path / f"module_{i}.py").write_text(f'"""Module {i} says no more."""')
    with pytest.raises(UserError, match="have no example for train, validation, test"):
        Cloze(Cloze.Options(), 48, data_dir, root=str(tmp_path)).prepare()


def test_provenance_identifies_the_corpus(task, docs_root):
    assert task.provenance()["corpus"]["files"] == 121
    assert load_task("cloze", 48, "").root != str(docs_root)
