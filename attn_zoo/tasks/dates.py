"""`dates`: dates as people write them in twenty languages, to ISO 8601, a character at a time: 'samedi 21 novembre 2026' to '2026-11-21'.

The words and patterns are those of the Unicode CLDR, by Babel, lower-cased. A day is training's, validation's or test's by its hash.
Years have four digits everywhere, also where the CLDR writes two, and dates in digits are day first or year first in all these
locales: so a text means one day, and none that is evaluated is ever trained on.
"""

import datetime
import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import babel
import numpy as np
import tensorflow_datasets as tfds
from babel.dates import format_date, get_date_format

from attn_zoo.spec import check, check_choice, check_int
from attn_zoo.tasks import prepared
from attn_zoo.tasks.pairs import RESERVED, PairTask, content, previous

# Not en_US, nor any other that puts the month first in digits; not hr, whose listopad is October and that of pl and cs November.
LOCALES = ("cs", "da", "de", "el", "en_GB", "es", "fi", "fr", "hu", "id", "it", "ja", "ko", "nl", "pl", "pt", "ru", "sv", "tr", "vi")

FORMS = {  # the locale's own, and patterns (Unicode TR 35) that every locale fills with its words
    "short": None,
    "medium": None,
    "long": None,
    "full": None,
    "slashes": "d/M/y",
    "day_first": "d MMMM y",
    "month_first": "MMMM d, y",
    "year_first": "y MMM d",
    "weekday": "EEE d MMM y",
    "weekday_first": "EEEE, MMMM d, y",
}

SOURCE_SEPARATOR, TARGET_SEPARATOR = " ; ", " "
TARGET_ALPHABET = "0123456789-" + TARGET_SEPARATOR
SHORTEST, LONGEST = 8, 39  # characters of one date
BIN = 4  # lengths that share a probe, for every date that a source may have


@dataclass(frozen=True)
class Options:
    """`dates` stand in one source, ' ; ' between two, or as many as it says from a first to a last number; of years[0] to years[1]. `joined` makes one
    sequence, for a decoder alone.

    Evaluation has no source twice, and where the options leave fewer than asked for, has those.
    """

    locales: tuple[str, ...] = LOCALES
    forms: tuple[str, ...] = tuple(FORMS)
    years: tuple[int, int] = (1900, 2099)
    dates: int | tuple[int, int] = 1
    joined: bool = False
    train_examples: int = 20_000
    validation_examples: int = 1_000
    test_examples: int = 1_000

    def __post_init__(self):
        for name in ("train_examples", "validation_examples", "test_examples"):
            check_int(name, getattr(self, name), 1)
        if isinstance(self.dates, tuple):
            whole = len(self.dates) == 2 and all(isinstance(n, int) and not isinstance(n, bool) for n in self.dates)
            check(whole and 1 <= self.dates[0] <= self.dates[1], "dates", self.dates, "must be a number, or (fewest, most), 1 at least")
        else:
            check_int("dates", self.dates, 1)
        for name, known in (("locales", LOCALES), ("forms", FORMS)):
            values = getattr(self, name)
            check(isinstance(values, tuple) and values != (), name, values, f"must be a tuple of names, as in {tuple(known)[:2]}")
            for value in values:
                check_choice(name, value, known)
            check(len(set(values)) == len(values), name, values, "names one twice")
        years = self.years if isinstance(self.years, tuple) and len(self.years) == 2 else (0, 0)
        whole = all(isinstance(year, int) and 1000 <= year <= 9999 for year in years)
        check(whole and years[0] <= years[1], "years", self.years, "must be (first, last), both of four digits")
        check_choice("joined", self.joined, (False, True))

    @property
    def counts(self) -> tuple[int, int]:
        """The fewest and the most dates of a source."""
        return self.dates if isinstance(self.dates, tuple) else (self.dates, self.dates)


class Dates(PairTask):
    """Written dates to ISO dates; a decoder's task, with an encoder or alone.

    The probes length_M-N are of validation's days, each of sources of one range of lengths, four characters for every date that a source may have.
    """

    name = "dates"
    Options = Options

    def __init__(self, options: Options, seq_len: int, data_dir: str):
        super().__init__(options, seq_len, data_dir)
        _, most = options.counts
        self.lay_out(
            source_vocab=RESERVED + len(alphabet()),
            target_vocab=RESERVED + len(TARGET_ALPHABET) - (most == 1),  # without the separator
            source_len=total_length(most, LONGEST, SOURCE_SEPARATOR),
            target_len=total_length(most, len("2026-11-21"), TARGET_SEPARATOR),
            joined=options.joined,
        )

    @functools.cached_property
    def builder(self) -> prepared.Builder:
        o = self.options
        locales = "all" if set(o.locales) == set(LOCALES) else "-".join(sorted(o.locales))
        forms = "all" if set(o.forms) == set(FORMS) else "-".join(sorted(o.forms))
        sizes = {split: getattr(o, f"{split}_examples") for split in prepared.SPLITS}
        counts = "to".join(map(str, dict.fromkeys(o.counts)))
        name = "-".join(map(str, (f"babel{babel.__version__}", locales, forms, *o.years, f"dates{counts}", *sizes.values())))
        layout = Layout(tuple(sorted(o.locales)), tuple(sorted(o.forms)), o.years, o.counts)
        return prepared.prepare(DatesBuilder, prepared.Config(name=name, options=(layout, sizes)), self.data_dir)

    @property
    def probes(self) -> tuple[str, ...]:
        """Which lengths there are depends on the locale data."""
        return tuple(name for name in self.builder.info.splits if name not in prepared.SPLITS)

    def pair(self, record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        return encode(record["source"].decode()), encode(record["target"].decode())

    def text(self, ids: np.ndarray, source: bool = False) -> str:
        return "".join(alphabet()[i - RESERVED] for i in content(ids))

    def contexts(self, source: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
        """Also the character before."""
        return {**super().contexts(source, target), "bigram": previous(target)}

    def provenance(self) -> dict[str, Any]:
        return {**super().provenance(), "babel": babel.__version__}


@functools.cache
def alphabet() -> str:
    """All characters, those of targets first, then those of the words and patterns of all locales in order."""
    first = datetime.date(2001, 1, 1)
    days = [first + datetime.timedelta(29 * i) for i in range(13)]  # all months, and all weekdays
    seen = {c for day in days for locale in LOCALES for form in FORMS for c in write(day, locale, form)}
    return TARGET_ALPHABET + "".join(sorted((seen | set(SOURCE_SEPARATOR)) - set(TARGET_ALPHABET)))


@functools.cache
def _ids() -> dict[str, int]:
    return {c: RESERVED + i for i, c in enumerate(alphabet())}


def encode(text: str) -> np.ndarray:
    """The ids of a text, int32; those of TARGET_ALPHABET come first. Raises UserError for a character that no date is written with here."""
    ids = _ids()
    unknown = "".join(sorted(set(text) - ids.keys()))
    check(not unknown, "date", text, f"has characters that no date of these languages is written with, {unknown!r}; nearest: {text.lower()!r}")
    return np.array([ids[c] for c in text], np.int32)


def total_length(n: int, length: int, separator: str) -> int:
    """Characters of n dates of this length, with separators."""
    return n * length + (n - 1) * len(separator)


def write(day: datetime.date, locale: str, form: str) -> str:
    """A day as the locale writes it, lower-cased, with plain single spaces."""
    return " ".join(format_date(day, pattern(locale, form), locale).lower().split())


@functools.cache
def pattern(locale: str, form: str) -> str:
    """The pattern of a form, its year always in full."""
    return FORMS[form] or re.sub(r"(?<!y)yy(?!y)", "y", get_date_format(form, locale).pattern)


@dataclass(frozen=True)
class Layout:
    """What a source is drawn from."""

    locales: tuple[str, ...]
    forms: tuple[str, ...]
    years: tuple[int, int]
    dates: tuple[int, int]

    def days(self, split: str) -> list[datetime.date]:
        """The days of a split."""
        first, last = datetime.date(self.years[0], 1, 1), datetime.date(self.years[1], 12, 31)
        days = map(datetime.date.fromordinal, range(first.toordinal(), last.toordinal() + 1))
        return [day for day in days if prepared.split_of(day.isoformat()) == split]


Written = tuple[str, str]  # dates as their locales write them, and in ISO 8601


def draw(layout: Layout, days: Sequence[datetime.date], rng: np.random.RandomState):
    """Yields dates without end: day, locale and form are uniform. RandomState, because NumPy has frozen its streams (NEP 19)."""
    while True:
        day, locale, form = (choices[rng.randint(len(choices))] for choices in (days, layout.locales, layout.forms))
        text = write(day, locale, form)
        if SHORTEST <= len(text) <= LONGEST:
            yield text, day.isoformat()


def distinct(rows, n: int):
    """The first n rows whose source is new, out of at most 20 n."""
    seen = set()
    for source, target in itertools.islice(rows, 20 * n):
        if source not in seen:
            seen.add(source)
            yield source, target
        if len(seen) == n:
            return


def sources(layout: Layout, days: Sequence[datetime.date], rng: np.random.RandomState):
    """Yields (source, target) without end; how many dates a source has is uniform too."""
    dates, (fewest, most) = draw(layout, days, rng), layout.dates
    while True:
        row = list(itertools.islice(dates, rng.randint(fewest, most + 1) if fewest < most else most))
        yield SOURCE_SEPARATOR.join(text for text, _ in row), TARGET_SEPARATOR.join(iso for _, iso in row)


class DatesBuilder(prepared.Builder):
    """Dates as people write them, and in ISO 8601."""

    name = "dates"
    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES = {"1.1.0": "Uniform numbers of dates, days, locales and forms on RandomState; days are split 90 / 5 / 5 by the SHA-256 of their ISO date."}

    def features(self):
        return {"source": tfds.features.Text(), "target": tfds.features.Text()}

    @functools.cached_property
    def probed(self) -> dict[str, list[Written]]:
        """Sources of validation's days by the range that their length is in, shortest first; of ranges that hold a tenth of what is asked for, or more."""
        layout, sizes = self.builder_config.options
        n, width = sizes["validation"], BIN * layout.dates[1]
        shortest = total_length(layout.dates[0], SHORTEST, SOURCE_SEPARATOR)
        ranges = defaultdict(dict)  # of sources, each once, and their targets
        rows = sources(layout, layout.days("validation"), np.random.RandomState(len(prepared.SPLITS)))
        for source, target in itertools.islice(rows, 50 * n):
            found = ranges[(len(source) - shortest) // width]
            if len(found) < n:
                found[source] = target
        name = lambda i: f"length_{shortest + width * i}-{shortest + width * (i + 1) - 1}"
        return {name(i): list(ranges[i].items()) for i in sorted(ranges) if 10 * len(ranges[i]) >= n}

    def probes(self):
        return tuple(self.probed)

    def generate(self, split):
        layout, sizes = self.builder_config.options
        if split in self.probed:
            rows = self.probed[split]
        else:
            rows = sources(layout, layout.days(split), np.random.RandomState(prepared.SPLITS.index(split)))
            rows = itertools.islice(rows, sizes[split]) if split == "train" else distinct(rows, sizes[split])
        for source, target in rows:
            yield {"source": source, "target": target}
