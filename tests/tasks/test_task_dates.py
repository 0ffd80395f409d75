"""Dates: what locales write, that it means one day, and which days and lengths each split has."""

import datetime
from collections import defaultdict

import babel
import pytest

from attn_zoo.spec import UserError
from attn_zoo.tasks import load_task
from attn_zoo.tasks.dates import FORMS, LOCALES, alphabet, encode, pattern, write
from attn_zoo.tasks.prepared import SPLITS

SIZES = "train_examples=300, validation_examples=60, test_examples=40"
DAY = datetime.date(2026, 11, 1)


def rows(task, split):
    """(source, target) texts of a split."""
    source = task.builder.as_data_source(split=split)
    return [(record["source"].decode(), record["target"].decode()) for record in source.__getitems__(range(len(source)))]


@pytest.mark.parametrize(
    "locale, form, text",
    [
        ("fr", "full", "dimanche 1 novembre 2026"),
        ("de", "long", "1. november 2026"),
        ("de", "short", "01.11.2026"),
        ("es", "short", "1/11/2026"),
        ("pl", "weekday_first", "niedziela, listopada 1, 2026"),
        ("ja", "full", "2026年11月1日日曜日"),
        ("el", "day_first", "1 νοεμβρίου 2026"),
        ("ru", "long", "1 ноября 2026 г."),
        ("en_GB", "month_first", "november 1, 2026"),
    ],
)
def test_dates_are_written_as_in_the_locale(locale, form, text):
    assert write(DAY, locale, form) == text


@pytest.fixture(scope="module")
def written():
    """All that is written of a leap year: {text: its days}."""
    days = [datetime.date(2024, 1, 1) + datetime.timedelta(i) for i in range(366)]
    meanings = defaultdict(set)
    for locale in LOCALES:
        for form in FORMS:
            for day in days:
                meanings[write(day, locale, form)].add(day)
    return meanings


def test_a_text_means_one_day(written):
    """The year is written in full, so all days that could share a text are of one year."""
    assert all("2024" in text for text in written)
    assert {text: days for text, days in written.items() if len(days) > 1} == {}
    assert all("yyyy" in p or "yy" not in p for p in (pattern(locale, form) for locale in LOCALES for form in FORMS))


def test_alphabet_and_lengths_hold_all_that_is_written(written):
    assert set().union(*written) | set(" ;") <= set(alphabet())
    assert len(set(alphabet())) == len(alphabet()) and alphabet().startswith("0123456789-")
    assert {len(text) for text in written} <= set(range(8, 40))
    assert not any("  " in text or text != text.strip() or text != text.lower() for text in written)


@pytest.mark.parametrize("dates", [1, 3, (1, 3)])
def test_the_target_is_the_days_of_the_source(data_dir, dates):
    least, most = dates if isinstance(dates, tuple) else (dates, dates)
    task = load_task(f"dates(dates={dates}, {SIZES})", 33, data_dir)
    for split in SPLITS:
        for source, target in rows(task, split)[:15]:
            texts, days = source.split(" ; "), target.split(" ")
            assert least <= len(texts) == len(days) <= most
            for text, day in zip(texts, map(datetime.date.fromisoformat, days)):
                assert text in {write(day, locale, form) for locale in LOCALES for form in FORMS}
    assert {source.count(";") + 1 for source, _ in rows(task, "train")} == set(range(least, most + 1))


@pytest.mark.parametrize("dates", [1, (2, 3)])
def test_no_day_is_in_two_splits(data_dir, dates):
    task = load_task(f"dates(dates={dates}, {SIZES})", 33, data_dir)
    texts = {split: {text for source, _ in rows(task, split) for text in source.split(" ; ")} for split in (*SPLITS, *task.probes)}
    days = {split: {day for _, target in rows(task, split) for day in target.split(" ")} for split in (*SPLITS, *task.probes)}
    for sets in (texts, days):
        assert not sets["train"] & set().union(*(sets[split] for split in sets if split != "train"))
        assert not sets["validation"] & sets["test"]
    assert len({source for source, _ in rows(task, "validation")}) == 60


@pytest.mark.parametrize("dates", [1, 2, (1, 3)])
def test_probes_are_ranges_of_source_lengths(data_dir, dates):
    task = load_task(f"dates(dates={dates}, {SIZES})", 44, data_dir)
    ranges = [tuple(map(int, probe.removeprefix("length_").split("-"))) for probe in task.probes]
    fewest, most = dates if isinstance(dates, tuple) else (dates, dates)
    assert ranges == sorted(ranges) and ranges[0][0] >= 8 * fewest + 3 * (fewest - 1) and ranges[-1][0] <= 39 * most + 3 * (most - 1) == task.source_len
    assert {high - low + 1 for low, high in ranges} == {4 * most} and all(high < low for (_, high), (low, _) in zip(ranges, ranges[1:]))
    for probe, (low, high) in zip(task.probes, ranges):
        sources = [source for source, _ in rows(task, probe)]
        assert 6 <= len(set(sources)) == len(sources) <= 60
        assert all(low <= len(source) <= high for source in sources)
    assert len(ranges) >= 4


@pytest.mark.parametrize("dates", [(2, 1), (0, 1), (1, 2, 3), 0, (True, 2)])
def test_a_bad_number_of_dates_is_refused_in_one_line(data_dir, dates):
    with pytest.raises(UserError, match=r" dates=.* must be [^\n]*$"):
        load_task(f"dates(dates={dates})", 33, data_dir)


def test_batches_spell_the_texts(data_dir):
    apart, joined = (load_task(f"dates(dates=2, joined={joined}, {SIZES})", 120, data_dir) for joined in (False, True))
    expected = rows(apart, "validation")
    (batch,), (one,) = (task.eval_batches(60, 10**6) for task in (apart, joined))
    for i, (source, target) in enumerate(expected):
        assert apart.text(batch["source"][i], source=True) == source and apart.text(batch["targets"][i]) == target
        length = len(source)
        assert one["inputs"][i][:length].tolist() == encode(source).tolist() and apart.text(one["inputs"][i][length + 1 :]) == target
        assert apart.text(one["targets"][i][length:]) == target and one["weights"][i].sum() == len(target) + 1
    assert (apart.inputs_vocab, apart.num_outputs) == (15, 15) and apart.source_vocab == joined.inputs_vocab == 3 + len(alphabet())
    assert load_task(f"dates({SIZES})", 11, data_dir).num_outputs == 14, "one date has no separator"


def test_locales_forms_and_years_can_be_chosen(data_dir):
    task = load_task(f"dates(locales=('fr', 'it'), forms=('long',), years=(1789, 1815), {SIZES})", 11, data_dir)
    for source, target in rows(task, "train") + rows(task, "test"):
        day = datetime.date.fromisoformat(target)
        assert 1789 <= day.year <= 1815 and source in {write(day, "fr", "long"), write(day, "it", "long")}


def test_the_order_of_locales_and_forms_does_not_matter(data_dir):
    one, other = (load_task(f"dates({options}, {SIZES})", 11, data_dir) for options in ("locales=('fr', 'it')", "locales=('it', 'fr')"))
    assert one.builder.data_dir == other.builder.data_dir


def test_evaluation_has_what_there_is_where_it_is_less_than_asked_for(data_dir):
    task = load_task(f"dates(locales=('de',), forms=('slashes',), years=(2000, 2000), {SIZES})", 11, data_dir)
    validation = [source for source, _ in rows(task, "validation")]
    assert 5 < len(validation) == len(set(validation)) < 60, "one in twenty of a year's days"
    assert len(rows(task, "train")) == 300


def test_provenance_names_the_locale_data(data_dir):
    provenance = load_task(f"dates({SIZES})", 11, data_dir).provenance()
    assert provenance["babel"] == babel.__version__ and babel.__version__ in provenance["config"]


def test_floors_know_the_form_of_a_date_and_no_date(data_dir):
    floors = load_task(f"dates({SIZES})", 11, data_dir).floors()
    assert set(floors) == {"uniform", "unigram", "bigram", "position"}
    assert floors["position"]["eval_accuracy"] > 3 / 11, "both hyphens and END"
    assert floors["position"]["eval_loss"] < floors["unigram"]["eval_loss"] < floors["uniform"]["eval_loss"]
    assert all(score["eval_exact"] < 1e-9 for score in floors.values())
