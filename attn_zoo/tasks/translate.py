"""`translate`: from one language to another, on any translation set of TFDS, in pieces of words that both languages share.

The pieces are learned by SentencePiece (Kudo and Richardson 2018) from both sides of the training split, by default by byte pair encoding
(Sennrich et al. 2016), with bytes for what no piece covers, so that every sentence comes back as it was. A set is downloaded only where that is
allowed, encoded once for all lengths, and a length takes the pairs that fit; how many did not is in the provenance.
"""

import dataclasses
import functools
import hashlib
import importlib
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import scipy.sparse
import tensorflow_datasets as tfds

from attn_zoo.spec import UserError, check, check_choice, check_int, nearest
from attn_zoo.tasks import prepared
from attn_zoo.tasks.base import Example
from attn_zoo.tasks.pairs import BEGIN, END, PAD, RESERVED, PairTask

LEARN_FROM = 1_000_000  # training pairs, evenly spread, that pieces are learned from
CHUNK = 10_000  # records read at a time
PRIOR = 100.0  # counts that a word's followers are worth beforehand, in the bigram floor


@dataclasses.dataclass(frozen=True)
class Options:
    """Languages are fields of the set; `vocab` counts pieces with PAD, BEGIN, END and the unknown. source_len is the longest source, None: as the target.

    train, validation and test are splits of the set, or slices: train='train[5000:]'. Joined, source and target are one sequence for a decoder alone.
    """

    dataset: str = "wmt14_translate/de-en"
    source: str = "en"
    target: str = "de"
    vocab: int = 16_000
    pieces: str = "bpe"
    source_len: int | None = None
    joined: bool = False
    train: str = "train"
    validation: str = "validation"
    test: str = "test"

    def __post_init__(self):
        texts = {"dataset": (r"\w+(/[\w.-]+)?", "wmt14_translate/de-en"), "source": (r"[\w-]+", "en"), "target": (r"[\w-]+", "de")}
        texts |= dict.fromkeys(prepared.SPLITS, (r"\w+(\[[\d:%-]+\])?", "train[:90%]"))
        for name, (form, example) in texts.items():
            value = getattr(self, name)
            check(isinstance(value, str) and re.fullmatch(form, value) is not None, name, value, f"must be text such as {example!r}")
        check(self.source != self.target, "target", self.target, "must be another language than the source")
        check_int("vocab", self.vocab, 280)  # 256 of them are the bytes
        check(self.vocab <= 2**16, "vocab", self.vocab, "must be at most 65536")
        check_choice("pieces", self.pieces, ("bpe", "unigram"))
        check_int("source_len", self.source_len, 1, optional=True)
        check(isinstance(self.joined, bool), "joined", self.joined, "must be True or False")
        check(not (self.joined and self.source_len), "source_len", self.source_len, "has no meaning with joined=True; leave it None")


class Translate(PairTask):
    """Sentences of one language, to be said in another."""

    name = "translate"
    Options = Options

    def __init__(self, options: Options, seq_len: int, data_dir: str):
        super().__init__(options, seq_len, data_dir)
        self.joined = options.joined
        self.inputs_vocab = self.num_outputs = options.vocab
        if not self.joined:
            self.source_vocab, self.source_len = options.vocab, options.source_len or seq_len
            self.begin_end, self.judges_writing = (BEGIN, END), True

    @functools.cached_property
    def sentences(self) -> tfds.core.DatasetBuilder:
        """The set as TFDS has it, on disk."""
        o = self.options
        return prepared.fetch(lambda: published(o.dataset, (o.source, o.target), self.data_dir), self.data_dir, self.allow_download)

    @functools.cached_property
    def builder(self) -> prepared.Builder:
        o = self.options
        made_of = (self.sentences.info.full_name, o.source, o.target, o.vocab, o.pieces, *(getattr(o, split) for split in prepared.SPLITS))
        digest = hashlib.sha256("\n".join(map(str, made_of)).encode()).hexdigest()[:8]
        name = f"{o.dataset.replace('/', '-')}-{o.source}-{o.target}-{o.pieces}{o.vocab}-{digest}"
        return prepared.prepare(TranslateBuilder, prepared.Config(name=name, options=(self.sentences, o)), self.data_dir)

    @functools.cached_property
    def pieces(self) -> Any:
        """The SentencePieceProcessor of both languages."""
        return load_pieces(self.sentences, self.options)

    def pair(self, record):
        return record["source"], record["target"]

    def text(self, ids: np.ndarray, source: bool = False) -> str:
        ids = np.asarray(ids)
        end = np.flatnonzero(ids == END)
        ids = ids[: end[0]] if len(end) else ids
        return self.pieces.decode([i for i in ids.tolist() if i not in (PAD, BEGIN)])

    def train_source(self) -> Sequence:
        return Selection(self.builder.as_data_source(split="train"), self.kept("train"))

    def eval_examples(self, tokens: int, split: str) -> Iterable[Example]:
        source = self.builder.as_data_source(split=split)
        return (self.example(source[i]) for i in self.evaluated(tokens, split))

    def references(self, tokens: int, split: str = "validation") -> list[str]:
        """The translations that the set itself has for `eval_examples`, in their order: what BLEU compares with."""
        source = self.sentences.as_data_source(split=getattr(self.options, split))
        return [source[i][self.options.target].decode() for i in self.evaluated(tokens, split)]

    def bleu(self, hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float | str]:
        """{'bleu', 'signature'} of translations, as `bleu` has it for the target language."""
        return bleu(hypotheses, references, self.options.target)

    def written_scores(self, written_BT, targets_BT):
        """BLEU of what a model wrote for the sources of `eval_examples`, in their order, against the translations of the set."""
        rows = np.flatnonzero((targets_BT != PAD).any(axis=1))  # the last batch may have others
        hypotheses = [self.text(written_BT[row]) for row in rows]
        return {"eval_bleu": self.bleu(hypotheses, self.references(len(rows) * self.seq_len))["bleu"]}

    def evaluated(self, tokens: int, split: str) -> list[int]:
        """The records that make up an evaluation."""
        return self.kept(split)[: max(1, tokens // self.seq_len)].tolist()

    def kept(self, split: str) -> np.ndarray:
        """The records of a split of which both sides have any pieces and fit."""
        source, target = self.lengths(split).T
        fits = source + target + 1 <= self.seq_len if self.joined else (source <= self.source_len) & (target + 1 <= self.seq_len)
        kept = np.flatnonzero(fits & (source > 0) & (target > 0))
        if not len(kept):
            raise UserError(f"seq_len={self.seq_len}: no pair of {self.options.dataset}, split {split}, is that short; use a longer one")
        return kept

    def lengths(self, split: str) -> np.ndarray:
        """Pieces of source and target of each record, int32 [records, 2]."""

        def compute():
            records = read(self.builder.as_data_source(split=split))
            return np.fromiter((len(record[side]) for record in records for side in ("source", "target")), np.int32).reshape(-1, 2)

        return prepared.cached_array(self.builder, f"lengths-{split}", compute)

    def floors(self) -> dict[str, dict[str, float]]:
        """Predictions that see no source: the next piece by the counts of training targets, alone or mixed with those after the piece before."""

        def compute():
            counts = pair_counts(self._targets("train"), self.num_outputs)
            seen = pair_counts(self._targets("validation"), self.num_outputs)
            return {"unigram": blind_score(counts, seen, bigram=False), "bigram": blind_score(counts, seen, bigram=True)}

        lengths = f"joined{self.seq_len}" if self.joined else f"{self.source_len}-{self.seq_len}"
        return {name: self.score(*score) for name, score in prepared.cached_json(self.builder, f"floors-{lengths}", compute).items()}

    def _targets(self, split: str) -> Iterator[np.ndarray]:
        source = self.builder.as_data_source(split=split)
        return (record["target"] for record in read(Selection(source, self.kept(split))))

    def provenance(self) -> dict[str, Any]:
        described = prepared.describe(self.builder)
        left_out = {split: n - len(self.kept(split)) for split, n in described["num_examples"].items()}
        return described | {"sentences": self.sentences.info.full_name, "sentencepiece": optional("sentencepiece").__version__, "left_out": left_out}


def optional(package: str) -> Any:
    """A package that translation alone needs. Raises UserError naming the extra that has it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"the translate task needs the package {package}; install it with: pip install 'attn_zoo[translate]'") from None


def bleu(hypotheses: Sequence[str], references: Sequence[str], language: str = "") -> dict[str, float | str]:
    """Corpus BLEU, 0 to 100 (Papineni et al. 2002), of texts against one reference each, with the signature without which it means little (Post 2018).

    The language chooses the tokenizer where it matters (zh, ja, ko).
    """
    if len(hypotheses) != len(references):
        raise UserError(f"{len(hypotheses)} hypotheses for {len(references)} references; BLEU compares them one for one")
    metric = optional("sacrebleu").BLEU(trg_lang=language)
    return {"bleu": metric.corpus_score(list(hypotheses), [list(references)]).score, "signature": str(metric.get_signature())}


def published(dataset: str, languages: Iterable[str], data_dir: str) -> tfds.core.DatasetBuilder:
    """The builder of 'name' or 'name/configuration' in TFDS, which has these languages. Raises UserError with the nearest that there is."""
    importlib.import_module("tensorflow_datasets.translate")  # what TFDS itself does, until the first set of its own that needs TensorFlow stops it
    name, _, config = dataset.partition("/")
    try:
        builder = tfds.builder_cls(name)
    except tfds.core.DatasetNotFoundError:
        valid = [n for n in tfds.list_builders(with_community_datasets=False) if "_translat" in n]
        raise UserError(f"dataset={dataset!r}: TFDS has no {name!r}; {nearest(name, valid)}") from None
    if config not in builder.builder_configs and (config or builder.builder_configs):
        rule = nearest(config, builder.builder_configs) if builder.builder_configs else "it takes none"
        raise UserError(f"dataset={dataset!r}: {name} has no configuration {config!r}; {rule}")
    found = builder(config=config or None, data_dir=data_dir, file_format="array_record")
    fields = dict(found.info.features)
    for language in languages:
        check(language in fields, "dataset", dataset, f"has no language {language!r}; {nearest(language, fields)}")
    return found


def load_pieces(sentences: tfds.core.DatasetBuilder, options: Options) -> Any:
    """The SentencePieceProcessor of a set, learned on first use and kept beside it. Raises UserError for a vocabulary that does not suit the text."""
    sentencepiece = optional("sentencepiece")

    def learn() -> bytes:
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_texts(sentences, options),
                model_writer=model,
                model_type=options.pieces,
                vocab_size=options.vocab,
                pad_id=PAD,
                bos_id=BEGIN,
                eos_id=END,
                unk_id=RESERVED,
                byte_fallback=True,
                normalization_rule_name="identity",  # a text must come back as it was
                remove_extra_whitespaces=False,
                minloglevel=2,
            )
        except RuntimeError as e:  # what is for people stands behind a place in its source
            raise UserError(f"vocab={options.vocab}: SentencePiece says: {' '.join(str(e).rpartition('] ')[2].split())}") from None
        return model.getvalue()

    split = hashlib.sha256(options.train.encode()).hexdigest()[:8]
    name = f"pieces-{'-'.join(sorted((options.source, options.target)))}-{options.pieces}{options.vocab}-{split}.model"
    return sentencepiece.SentencePieceProcessor(model_proto=prepared.cached_bytes(sentences, name, learn))


def _texts(sentences: tfds.core.DatasetBuilder, options: Options) -> Iterator[str]:
    source = sentences.as_data_source(split=options.train)
    few = np.unique(np.linspace(0, len(source) - 1, LEARN_FROM).astype(np.int64)) if len(source) > LEARN_FROM else np.arange(len(source))
    for record in read(Selection(source, few)):
        for language in sorted((options.source, options.target)):  # one vocabulary for both directions
            yield record[language].decode()


class Selection(Sequence):
    """Some records of a source, by index."""

    def __init__(self, source: Sequence, index: np.ndarray):
        self.source = source
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Any:
        return self.source[int(self.index[i])]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        return self.source.__getitems__(self.index[list(indices)].tolist())


def read(source: Any) -> Iterator[dict]:
    """All records in order, many at a time."""
    for start in range(0, len(source), CHUNK):
        yield from source.__getitems__(range(start, min(start + CHUNK, len(source))))


def pair_counts(targets: Iterable[np.ndarray], V: int) -> scipy.sparse.csr_array:
    """How often each piece, or END, follows each piece, or BEGIN, [V, V]."""
    counts = scipy.sparse.csr_array((V, V))
    while chunk := list(itertools.islice(targets, CHUNK)):
        before = np.concatenate([np.append(BEGIN, target) for target in chunk])
        after = np.concatenate([np.append(target, END) for target in chunk])
        counts += scipy.sparse.csr_array((np.ones(len(after)), (before, after)), shape=(V, V))  # sums what comes twice
    return counts


def blind_score(counts: scipy.sparse.csr_array, seen: scipy.sparse.csr_array, bigram: bool) -> tuple[float, float]:
    """(cross-entropy in nats, accuracy) on pairs `seen` of predicting a piece by `counts`, [V, V] as of pair_counts.

    A piece has the probability p of its count plus one, whatever is before it, or after a piece a of which n were counted, as a bigram,
    (its count after a + PRIOR p) / (n + PRIOR).
    """
    alone_V = np.asarray(counts.sum(axis=0)) + 1.0
    p_V = alone_V / alone_V.sum()
    entropy, correct = 0.0, 0.0
    for a in np.flatnonzero(np.diff(seen.indptr)):
        after_V = counts[[a]].toarray()[0] if bigram else np.zeros_like(p_V)
        given_V = (after_V + PRIOR * p_V) / (after_V.sum() + PRIOR)
        row = slice(seen.indptr[a], seen.indptr[a + 1])
        entropy -= (seen.data[row] * np.log(given_V[seen.indices[row]])).sum()
        correct += seen.data[row][seen.indices[row] == given_V.argmax()].sum()
    total = seen.sum()
    return float(entropy / total), float(correct / total)


class TranslateBuilder(prepared.Builder):
    """Pairs of sentences as ids of shared pieces, without BEGIN and END, as many and in the order of the set that they come from."""

    name = "translate"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Pieces by SentencePiece, with bytes for what no piece covers."}

    def features(self):
        return {side: prepared.raw_array(np.uint16, None) for side in ("source", "target")}

    def generate(self, split):
        sentences, options = self.builder_config.options
        pieces = load_pieces(sentences, options)
        encode = lambda text: np.array(pieces.encode(text.decode()), np.uint16)
        for record in read(sentences.as_data_source(split=getattr(options, split))):
            yield {"source": encode(record[options.source]), "target": encode(record[options.target])}
