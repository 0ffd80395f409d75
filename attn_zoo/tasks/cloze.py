"""`cloze`: which identifier was taken out of a sentence? It stands in the text around it. Documents are docstrings of the standard library.

In the manner of Hermann et al. 2015, "Teaching Machines to Read and Comprehend", and Hill et al. 2016, "The Goldilocks Principle" (CBT).
The docstrings of a file, in the order of the file, are one text. A query is a sentence of it, with every occurrence of one identifier, a name
that the file's code uses, replaced by a blank; its document is the text around that sentence, without it. The identifier stands there too.
"""

import ast
import dataclasses
import functools
import inspect
import keyword
import math
import platform
import re
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from attn_zoo.spec import UserError, check, check_int
from attn_zoo.tasks import prepared
from attn_zoo.tasks.base import Example, RecordTask
from attn_zoo.tasks.bytes import Corpus, read_corpus

PAD, BLANK, UNKNOWN = 0, 1, 2  # the first ids; then those that unknown words get anew in every example, then the words
RESERVED = 3
BLANK_WORD = "[BLANK]"  # brackets are words of their own, so the text has none like it

WORD = re.compile(r"[^\W\d]\w*|\d+|([^\w\s])\1*")  # a run of one sign is one word
MIN_QUERY = 5  # words, with the full stop
DOCSTRINGS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclasses.dataclass(frozen=True)
class Options:
    """`document` and `query` are how many words they may have, `vocab` the number of ids.

    Of the words that are not among the vocab - 3 - unknowns most frequent ones of training, an example's first `unknowns` get ids of their own, in an order drawn
    anew for every example, as of the entities in Hermann et al.; further ones share one id. Candidates come first, and all of them must get one: that a
    word had none would tell that it is not the answer.
    """

    document: int = 256
    query: int = 48
    vocab: int = 4096
    unknowns: int = 64

    def __post_init__(self):
        check_int("document", self.document, 16)
        check_int("query", self.query, MIN_QUERY)
        check_int("unknowns", self.unknowns, 1)
        check_int("vocab", self.vocab, RESERVED + self.unknowns + 1)


class Cloze(RecordTask):
    """The word that fills the blank, one of the vocabulary; an encoder's task, with an encoder of the document.

    Batches also have candidates, bool [B, S]: where the document has an identifier. `root` is the directory of .py files, by default the standard library.
    """

    name = "cloze"
    Options = Options
    causal = False
    per_token = False
    padded = True

    def __init__(self, options: Options, seq_len: int, data_dir: str, root: str | None = None):
        super().__init__(options, seq_len, data_dir)
        if seq_len < options.query:
            raise UserError(f"seq_len={seq_len}: must be at least query={options.query}, the words that a query may have")
        self.root = root or sysconfig.get_paths()["stdlib"]
        self.inputs_vocab = self.num_outputs = self.source_vocab = options.vocab
        self.source_len = options.document

    @functools.cached_property
    def corpus(self) -> Corpus:
        return read_corpus(self.root)

    @functools.cached_property
    def builder(self) -> prepared.Builder:
        o = self.options
        name = f"py{platform.python_version()}-{self.corpus.sha256[:12]}-document{o.document}-query{o.query}"
        config = prepared.Config(name=name, options=(self.corpus, o.document, o.query))
        return prepared.prepare(ClozeBuilder, config, self.data_dir)

    @functools.cached_property
    def vocabulary(self) -> dict[str, int]:
        """The ids of the words that have one."""

        def by_frequency():
            counts = Counter(word for record in self._records("train") for name in ("document", "query") for word in _words(record[name]))
            del counts[BLANK_WORD]
            return sorted(counts, key=lambda word: (-counts[word], word))

        first = RESERVED + self.options.unknowns
        words = prepared.cached_json(self.builder, "words", by_frequency)[: self.options.vocab - first]
        return {BLANK_WORD: BLANK, **{word: first + i for i, word in enumerate(words)}}

    @functools.cached_property
    def most_unknown_candidates(self) -> int:
        """The greatest number of candidates without an id in the vocabulary that one example has."""

        def count():
            unknown = lambda record: {word for word, is_candidate in zip(_words(record["document"]), record["candidates"]) if is_candidate} - self.vocabulary.keys()
            return max(len(unknown(record)) for split in prepared.SPLITS for record in self._records(split))

        return prepared.cached_json(self.builder, f"most_unknown_candidates_{len(self.vocabulary)}", count)

    def prepare(self) -> None:
        super().prepare()
        unknowns, most = self.options.unknowns, self.most_unknown_candidates
        check(most <= unknowns, "unknowns", unknowns, f"must be at least {most}, the most candidates outside the vocabulary that one example has")

    def train_example(self, record: dict[str, Any], rng: np.random.Generator) -> Example:
        return self._example(record, rng.permutation(self.options.unknowns))

    def example(self, record: dict[str, Any]) -> Example:
        """The unknown words' order is a function of the query."""
        rng = np.random.RandomState(zlib.crc32(record["query"]))
        return self._example(record, rng.permutation(self.options.unknowns))

    def _example(self, record: dict[str, Any], order: np.ndarray) -> Example:
        document, query, answer = (_words(record[name]) for name in ("document", "query", "answer"))
        ids = self.vocabulary
        offered = (word for word, is_candidate in zip(document, record["candidates"]) if is_candidate)  # first, so that they are among those that get an id
        unknown = dict.fromkeys(word for word in (*offered, *document, *query) if word not in ids)
        own = {word: RESERVED + int(i) for word, i in zip(unknown, order)}
        number = lambda words, n: _padded([ids.get(word) or own.get(word, UNKNOWN) for word in words], np.int32, n)
        return {
            "source": number(document, self.source_len),
            "source_valid": np.arange(self.source_len) < len(document),
            "candidates": _padded(record["candidates"], bool, self.source_len),
            "inputs": number(query, self.seq_len),
            "valid": np.arange(self.seq_len) < len(query),
            "targets": number(answer, 1)[0],
            "weights": np.ones((), np.float32),
        }

    def floors(self) -> dict[str, dict[str, float]]:
        """Guesses among the document's identifiers, on validation.

        Uniform; by how often each is there; the same without those of the query; by how often each was an answer in training, plus one.
        The second and third are the maximum and the exclusive frequency of Hermann et al. 2015, sec. 4.
        """

        def compute():
            answers = Counter(record["answer"] for record in self._records("train"))
            scores = {name: [] for name in ("uniform over candidates", "candidate counts", "candidate counts, not in the query", "answer counts")}
            for record in self._records("validation"):
                document, query = record["document"].split(), set(record["query"].split())
                counts = Counter(word for word, is_candidate in zip(document, record["candidates"]) if is_candidate)
                predictors = (
                    dict.fromkeys(counts, 1),
                    counts,
                    {word: count for word, count in counts.items() if word not in query},
                    {word: 1 + answers[word] for word in counts},
                )
                for name, weights in zip(scores, predictors):
                    best = [word for word in weights if weights[word] == max(weights.values())]
                    hit = (record["answer"] in best) / len(best)  # where several are as good, any of them
                    scores[name].append((-math.log(weights[record["answer"]] / sum(weights.values())), hit))
            return {name: np.mean(values, axis=0).tolist() for name, values in scores.items()}

        return {name: self.score(*score) for name, score in prepared.cached_json(self.builder, "floors", compute).items()}

    def text(self, ids: Sequence[int]) -> str:
        """The words of ids, unknown ones as ?0, ?1 ... by their id in the example."""
        words = {i: word for word, i in self.vocabulary.items()}
        return " ".join(words.get(i, "?" if i == UNKNOWN else f"?{i - RESERVED}") for i in map(int, ids) if i != PAD)

    def label(self, id: int, source: bool = False) -> str:
        return self.text([id]) or "PAD"

    def provenance(self) -> dict[str, Any]:
        corpus = {"sha256": self.corpus.sha256, "bytes": self.corpus.num_bytes, "files": len(self.corpus.paths)}
        return {**prepared.describe(self.builder), "corpus": corpus, "python": platform.python_version()}

    def _records(self, split: str) -> Sequence[dict[str, Any]]:
        source = self.builder.as_data_source(split=split)
        return source.__getitems__(range(len(source)))


def _words(text: bytes) -> list[str]:
    return text.decode().split(" ")


def _padded(values: Sequence, dtype: Any, n: int) -> np.ndarray:
    return np.pad(np.asarray(values, dtype), (0, n - len(values)))


@dataclasses.dataclass(frozen=True)
class Text:
    """The docstrings of a file: their words, where its sentences begin and end, and the names that its code uses."""

    words: tuple[str, ...]
    sentences: tuple[tuple[int, int], ...]
    identifiers: frozenset[str]


def read_text(content: bytes) -> Text:
    """Reads a .py file; one that this Python cannot parse has no docstrings. Names shorter than three letters are words of English first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in the library's own strings
        try:
            tree = ast.parse(content)
        except (SyntaxError, ValueError):
            return Text((), (), frozenset())
    names, docstrings = set(), []
    for node in ast.walk(tree):
        names.update(name for field in ("id", "arg", "attr", "name") if isinstance(name := getattr(node, field, None), str))
        if isinstance(node, DOCSTRINGS) and (docstring := ast.get_docstring(node, clean=False)) is not None:
            docstrings.append((node.body[0].lineno, inspect.cleandoc(docstring)))
    words, sentences = [], []
    for _, docstring in sorted(docstrings):
        for sentence in split_sentences(docstring):
            sentences.append((len(words), len(words) + len(sentence)))
            words += sentence
    return Text(tuple(words), tuple(sentences), frozenset(name for name in names if len(name) >= 3 and not keyword.iskeyword(name)))


def split_sentences(docstring: str) -> list[list[str]]:
    """The words of each sentence; a paragraph ends one, too."""
    paragraphs = re.split(r"\n\s*\n", docstring)
    sentences = [sentence for paragraph in paragraphs for sentence in re.split(r"(?<=[.!?])\s+", paragraph)]
    return [[match.group() for match in WORD.finditer(sentence)] for sentence in sentences if sentence.strip()]


def clozes(text: Text, document: int, query: int) -> Iterator[dict[str, Any]]:
    """An example of each sentence and identifier in it that the document has too, if it has another candidate and not the sentence itself."""
    for start, stop in text.sentences:
        sentence = text.words[start:stop]
        if not (MIN_QUERY <= len(sentence) <= query and sentence[-1] in ".!?" and sentence[0] != ">>>"):  # which begins code
            continue
        right = len(text.words) - stop
        before = min(start, max(document // 2, document - right))
        around = text.words[start - before : start] + text.words[stop : stop + document - before]
        candidates = np.array([word in text.identifiers for word in around], bool)
        if f" {' '.join(sentence)} " in f" {' '.join(around)} ":
            continue
        found = {word for word, is_candidate in zip(around, candidates) if is_candidate}
        for answer in dict.fromkeys(word for word in sentence if word in found):
            if len(found) > 1:
                blanked = (BLANK_WORD if word == answer else word for word in sentence)
                yield {"document": " ".join(around), "query": " ".join(blanked), "answer": answer, "candidates": candidates}


class ClozeBuilder(prepared.Builder):
    """Sentences from docstrings with an identifier taken out, and the text around them."""

    name = "cloze"
    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES = {
        "1.0.0": "Split 90 / 5 / 5 by the SHA-256 of the file's relative path; of questions that recur, the first stays.",
        "1.1.0": "No sentence is asked about that stands in a file of an earlier split, whichever word was blanked there, or none.",
    }

    def features(self):
        texts = {name: tfds.features.Text() for name in ("document", "query", "answer")}
        return {**texts, "candidates": prepared.raw_array(np.bool_, None)}

    @functools.cached_property
    def examples(self) -> dict[str, list[dict[str, Any]]]:
        """By split, training first: what has been read there is not evaluated."""
        corpus, document, query = self.builder_config.options
        read, examples = set(), {}
        for split in prepared.SPLITS:
            texts = [read_text(Path(corpus.root, path).read_bytes()) for path in corpus.paths if prepared.split_of(path) == split]
            questions = {}
            for row in (row for text in texts for row in clozes(text, document, query)):
                if row["query"].replace(BLANK_WORD, row["answer"]) not in read:
                    questions.setdefault((row["query"], row["answer"]), row)
            read.update(" ".join(text.words[start:stop]) for text in texts for start, stop in text.sentences)
            rows = list(questions.values())
            # Evaluation takes the first ones, which should not be of a few files.
            examples[split] = [rows[i] for i in np.random.RandomState(0).permutation(len(rows))]
        missing = [split for split in prepared.SPLITS if not examples[split]]
        check(not missing, "document", document, f"the docstrings under {corpus.root} have no example for {', '.join(missing)}; use a longer one")
        return examples

    def generate(self, split):
        yield from self.examples[split]
