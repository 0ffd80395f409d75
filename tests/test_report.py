"""The report: its numbers against laws known beforehand, its formats against their own parsers, and committed tables against their records."""

import base64
import copy
import csv
import html.parser
import io
import json
import math
import re
from pathlib import Path

import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from attn_zoo import figures, report, results, summary
from attn_zoo.spec import UserError
from attn_zoo.tables import number

ROOT = Path(__file__).parents[1]
LN2 = math.log(2)
TOKENS = 8192
LENGTHS = (256, 512, 1024, 2048)
# Seconds of one sequence by T, and where it crosses the quadratic `full`.
SEQUENCE_S = {
    "full": lambda T: 1e-8 * T**2,
    "local(window=128)": lambda T: 7e-6 * T,  # as full at T = 700
    "strided(stride=64)": lambda T: 1e-6 * T**1.5,  # as full at T = 10,000, beyond all lengths
    "linear": lambda T: 1e-6 * T,  # as full at T = 100, below all lengths
}


def make(variant="full", T=256, seed=0, **changes):
    """A record with exact numbers: times by SEQUENCE_S, memory linear in T, loss 4 - seed / 10 bits."""
    step_s = SEQUENCE_S[variant](T) * TOKENS / T
    loss = (4 - seed / 10) * LN2
    speed = {"median_s": step_s, "p20_s": 0.9 * step_s, "p80_s": 1.2 * step_s, "n": 20}
    floor = lambda bits, accuracy: {"eval_loss": bits * LN2, "eval_accuracy": accuracy, "eval_bits_per_byte": bits}
    record = {
        "id": f"{list(SEQUENCE_S).index(variant):02x}{T:08x}{seed:02x}",
        "status": "ok",
        "message": "",
        "cell": {
            "variant": variant,
            "seq_len": T,
            "seed": seed,
            "task": "bytes(objective='masked')",
            "model": {"D": 64, "layers": 2, "K": None, "dropout": 0.0},
            "attention": {"backend": "auto"},
            "train": {"steps": 40, "lr": 1e-3},
            "measure": {"modes": ["train_step"]},
        },
        "params": {"total": 100_000, "attention": 30_000},
        "metrics": {"train_loss": loss, "eval_loss": loss, "eval_accuracy": 0.2 + seed / 100, "eval_bits_per_byte": loss / LN2},
        "loss_name": "bits_per_byte",
        "floors": {"uniform": floor(8.0, 1 / 256), "unigram": floor(4.5, 0.15)},
        "curve": {
            "step": list(range(1, 41)),
            "seconds": [step_s * i for i in range(1, 41)],
            "train_loss": [loss + math.exp(-i / 4) for i in range(1, 41)],
            "eval_step": [40],
            "eval_loss": [loss],
        },
        "compile": {"train_step": {"lower_s": 0.5, "compile_s": 1.25}},
        "speed": {"forward": speed, "forward_backward": {**speed, "median_s": 0.8 * step_s}, "train_step": speed},
        "tokens_per_step": TOKENS,
        "tokens_per_s": TOKENS / step_s,
        "memory": {"peak_bytes": 2**25, "temp_bytes": 3 * 2**20, "argument_bytes": 2**20, "output_bytes": 2**20, "device_peak_bytes": None},
        "flops": {"attention_per_step": 1e9, "model_per_step": 3e9, "useful_per_step": 4e9},
        "attention": {"backend": "xla", "layers": [{"backend": "xla"}] * 2},
        "statistics": {},
        "calibration": {"matmul_flops_per_s": {"before": 2.0e11, "after": 2.2e11}},
        "paper": [{"key": f"{variant[:5]}2020", "title": "Q & A_b: 100 %", "authors": "Doe, Jane", "year": 2020, "venue": "NeurIPS"}],
        "provenance": {
            "date": "2026-11-21T10:00:00+00:00",
            "git_commit": "0123456789abcdef",
            "git_dirty": False,
            **{name: "1.2.3" for name in ("attn_zoo", "jax", "jaxlib", "flax", "optax", "python")},
            "platform": "cpu",
            "device_kind": "cpu",
            "device_count": 1,
            "cpu": "some CPU, 2 cores",
        },
    }
    for path, value in changes.items():  # metrics__eval_loss=1.0
        *keys, last = path.split("__")
        inner = record
        for key in keys:
            inner = inner[key]
        inner[last] = value
    return record


def failed(status, message, variant="linear", T=256, seed=0):
    whole = make(variant, T, seed)
    return {"id": whole["id"], "status": status, "message": message, "cell": whole["cell"]}


def sweep(variants=tuple(SEQUENCE_S), lengths=LENGTHS, seeds=(0, 1, 2)):
    return [make(v, T, s) for T in lengths for v in variants for s in seeds]


def row_of(records, variant, T):
    [row] = [r for r in summary.rows(records) if (r.variant, r.seq_len) == (variant, T)]
    return row


def scaling_of(records, variant):
    [found] = [s for s in summary.scaling(summary.rows(records)) if s.variant == variant]
    return found


def cells(line):
    """The cells of a Markdown table's line."""
    return [cell.strip().replace("\\", "") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def markdown_rows(records):
    """The main table as dicts by heading."""
    table = [line for line in report.tables(records)["table.md"].split("**Growth")[0].splitlines() if line.startswith("|")]
    headings = cells(table[0])
    assert all(len(cells(line)) == len(headings) for line in table)
    return [dict(zip(headings, cells(line))) for line in table[2:]]


# Numbers


def test_power_laws_give_their_exponents_and_crossovers():
    records = sweep()
    for variant, exponent in (("full", 2), ("local(window=128)", 1), ("strided(stride=64)", 1.5), ("linear", 1)):
        found = scaling_of(records, variant)
        assert found.step_exponent == pytest.approx(exponent, abs=1e-9) and found.step_exponent_se == pytest.approx(0, abs=1e-6)
        assert found.forward_backward_exponent == pytest.approx(exponent, abs=1e-9)
        assert found.memory_exponent == pytest.approx(1, abs=1e-9)  # 3 MiB a step at every T, so linear a sequence
    local = scaling_of(records, "local(window=128)")
    assert local.crossover == pytest.approx(700)
    # full and variant are 1.2 / 0.9 apart in the step times of the interval's ends
    assert (local.crossover_low, local.crossover_high) == (pytest.approx(700 * 0.9 / 1.2), pytest.approx(700 * 1.2 / 0.9))
    assert scaling_of(records, "strided(stride=64)").crossover == math.inf
    assert scaling_of(records, "linear").crossover == 0
    assert scaling_of(records, "full").crossover is None


def test_crossovers_read_as_words():
    text = report.tables(sweep())["table.md"].split("**Growth")[1]
    last = {cells(line)[0].strip("`"): cells(line)[-1] for line in text.splitlines() if line.startswith("| `")}
    assert last == {
        "full": "–",
        "local(window=128)": "700 [525, 933]",
        "strided(stride=64)": "none up to 2,048",
        "linear": "always",
    }
    [edge] = [s for s in summary.scaling(summary.rows(sweep(lengths=(512, 1024, 2048)))) if s.variant.startswith("local")]
    assert (edge.crossover_low, round(edge.crossover)) == (pytest.approx(525), 700)
    text = report.tables(sweep(lengths=(600, 800)))["table.md"]
    assert "700 [< 600, > 800]" in text.replace("\\", "")


def test_a_variant_that_is_faster_only_at_first_has_no_crossover():
    assert summary.crossover([1, 2, 4], [2.0, 2.0, 1.0], [1.0, 1.0, 1.5]) == math.inf
    assert summary.crossover([1, 2, 4, 8], [2.0, 1.0, 2.0, 4.0], [1.0, 2.0, 1.0, 1.0]) == pytest.approx(2**1.5)  # the last crossing counts


def test_beyond_the_lengths_measured_the_fits_predict_the_crossover():
    lengths = [1024, 2048, 4096]
    assert summary.predicted_crossover(lengths, [1e-3 * T**2 for T in lengths], [20.0 * T for T in lengths]) == pytest.approx(20_000)
    assert summary.predicted_crossover(lengths, [1.0 * T for T in lengths], [2.0 * T for T in lengths]) == math.inf
    assert summary.predicted_crossover(lengths, [1.0 * T**1.0001 for T in lengths], [2.0 * T for T in lengths]) == math.inf  # lines all but parallel
    assert summary.predicted_crossover(lengths, [1e-3 * T**2 for T in lengths], [60.0 * T for T in lengths]) == pytest.approx(60_000)
    assert summary.predicted_crossover(lengths, [1e-3 * T**2 for T in lengths], [70.0 * T for T in lengths]) == math.inf  # beyond 16 times the longest
    assert summary.predicted_crossover(lengths[:2], [1.0, 4.0], [8.0, 9.0]) == math.inf  # two points make no fit
    assert summary.predicted_crossover(lengths, [1.0, 4.0, 16.0], [0.5, 1.0, 17.0]) == math.inf  # steeper than the reference, by the line


@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(1, 2), st.floats(1, 2)), min_size=1, max_size=6))
def test_the_interval_of_a_crossover_holds_it(points):
    lengths = [2**i for i in range(len(points))]
    reference, variant = [a for a, *_ in points], [b for _, b, *_ in points]
    low = summary.crossover(lengths, [a * s for a, _, s, _ in points], [b / t for _, b, _, t in points])
    high = summary.crossover(lengths, [a / s for a, _, s, _ in points], [b * t for _, b, _, t in points])
    middle = summary.crossover(lengths, reference, variant)
    assert low <= middle * (1 + 1e-9) and middle <= high * (1 + 1e-9)


@given(st.lists(st.integers(1, 1000), min_size=3, max_size=8).filter(lambda values: len(set(values)) > 1))
def test_exponents_are_those_of_scipys_regression(values):
    lengths = [2 ** (i + 8) for i in range(len(values))]
    expected = scipy.stats.linregress([math.log(T) for T in lengths], [math.log(v) for v in values])
    slope, error = summary.fit_exponent(lengths, values)
    assert slope == pytest.approx(expected.slope, abs=1e-9) and error == pytest.approx(expected.stderr, abs=1e-7)


def test_no_exponent_below_three_lengths():
    assert summary.fit_exponent([256, 512], [1.0, 2.0]) == (None, None)
    assert scaling_of(sweep(lengths=(256, 512)), "local(window=128)").step_exponent is None


@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=10).filter(lambda values: len(set(values)) > 1))
def test_intervals_are_students(values):
    mean, half = summary.mean_interval(values)
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, loc=sum(values) / len(values), scale=scipy.stats.sem(values))
    assert (mean - half, mean + half) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))


def test_one_seed_has_no_interval():
    assert summary.mean_interval([2.0]) == (2.0, None) and summary.mean_interval([]) == (None, None)
    assert markdown_rows([make()])[0]["bits per byte"] == "4.000"


def test_a_row_pools_its_seeds():
    records = sweep(seeds=(0, 1, 2))
    row = row_of(records, "local(window=128)", 1024)
    step_s = 7e-6 * TOKENS
    assert row.loss == pytest.approx(3.9) and row.loss_interval == pytest.approx(0.1 * scipy.stats.t.ppf(0.975, 2) / math.sqrt(3))
    assert row.accuracy == pytest.approx(0.21)
    assert (row.step_s, row.step_s_p20, row.step_s_p80) == pytest.approx((step_s, 0.9 * step_s, 1.2 * step_s))
    assert row.tokens_per_s == pytest.approx(TOKENS / step_s)
    assert row.times_faster == pytest.approx(1024 / 700)
    assert row.compile_s == 1.75 and row.temp_bytes == 3 * 2**20
    assert row.useful_flops_per_s == pytest.approx(4e9 / step_s) and row.matmul_fraction == pytest.approx(4e9 / step_s / 2.1e11)
    shown = next(r for r in markdown_rows(records) if r["T"] == "1,024" and "local" in r["variant"])
    assert shown["bits per byte"] == "3.900 ± 0.248" and shown["accuracy, %"] == "21.0 ± 2.5"
    assert shown["step, ms (p20–p80)"] == "57.3 (51.6–68.8)" and shown["× full"] == "1.46" and shown["seeds"] == "3 ok"
    assert shown["GFLOP/s"] == "69.8" and shown["of matmul, %"] == "33.2" and shown["memory, MiB"] == "3.00"


def test_the_spread_of_a_row_covers_all_its_seeds():
    slow = make(seed=1)
    slow["speed"]["train_step"] = {"median_s": 1.0, "p20_s": 0.5, "p80_s": 2.0, "n": 10}
    row = row_of([make(seed=0), slow], "full", 256)
    assert row.step_s_p20 == make()["speed"]["train_step"]["p20_s"] and row.step_s_p80 == 2.0


@pytest.mark.parametrize(("total", "marked"), [(101_000, False), (101_001, True), (98_999, True), (99_000, False)])
def test_parameters_that_differ_by_more_than_1_percent_are_marked(total, marked):
    records = [make("full"), make("linear", params__total=total)]
    assert markdown_rows(records)[1]["params"] == f"{total:,}" + "*" * marked
    assert ("more than 1 %" in report.tables(records)["table.md"]) == marked
    assert ("`linear`\\*" in report.readme_table(records)) == marked


def calibrated(seed, before, after, **changes):
    return make(seed=seed, calibration={"matmul_flops_per_s": {"before": before, "after": after}}, **changes)


@pytest.mark.parametrize(("after", "marked"), [(1.2e11, False), (1.21e11, True), (0.84e11, False), (0.83e11, True)])
def test_a_disturbed_cell_is_marked(after, marked):
    records = [calibrated(0, 1e11, 1e11), calibrated(1, 1e11, after)]
    assert markdown_rows(records)[0]["step, ms (p20–p80)"].endswith("†") == marked
    assert ("more than 20 %" in report.tables(records)["table.md"]) == marked


def test_a_cell_that_was_slow_from_first_to_last_is_disturbed_too():
    """Beside what the same machine did for the others; another machine is as fast as it is."""
    records = [*(calibrated(i, 1.5e11, 1.5e11) for i in range(3)), calibrated(3, 1.2e11, 1.2e11), calibrated(4, 1.26e11, 1.5e11), calibrated(5, 9e11, 9e11, provenance__cpu="another")]
    assert summary.disturbed(records) == {records[3]["id"]}


def test_rows_stand_by_length_then_in_the_order_of_the_sweep():
    records = sweep(variants=("strided(stride=64)", "full", "linear"), lengths=(256, 1024))
    records = sorted(records, key=lambda r: r["cell"]["seq_len"], reverse=True)
    shown = [(r["T"], r["variant"].strip("`")) for r in markdown_rows(records) if r["T"] != "any"]
    assert shown == [(T, v) for T in ("256", "1,024") for v in ("strided(stride=64)", "full", "linear")]


def test_without_the_reference_nothing_is_compared():
    records = sweep(variants=("linear", "local(window=128)"))
    assert all(row["× full"] == "–" for row in markdown_rows(records))
    assert scaling_of(records, "linear").crossover is None


def test_records_of_two_experiments_are_refused():
    with pytest.raises(UserError, match="differ in train"):
        report.tables([make(seed=0), make(seed=1, cell__train={"steps": 41})])
    with pytest.raises(UserError, match="no records"):
        report.tables([])


# Cells that did not end ok


@pytest.mark.parametrize("status", ["oom", "unsupported", "nan", "timeout", "error", "missing"])
def test_every_status_is_a_row_with_its_message(status):
    records = [make("full"), failed(status, "It | broke_down\n at <line> 1 `x` " + "and so on " * 20)]
    row = markdown_rows(records)[1]
    assert row["variant"] == "`linear`" and row["seeds"].startswith(f"1 {status}: It | broke_down at <line> 1 'x' and") and row["seeds"].endswith("…")
    assert row["tokens/s"] == row["bits per byte"] == "–"
    assert f"1 {status}: It | broke\\_down at \\ensuremath{{<}}line" in report.tables(records)["table.tex"]
    [line] = [r for r in csv.DictReader(io.StringIO(report.tables(records)["table.csv"])) if r["variant"] == "linear"]
    assert line["status"] == status and line["message"].endswith("and so on") and line["loss"] == ""
    assert f"| {status} |" in re.sub(" +", " ", report.readme_table(records))


def test_one_failed_seed_leaves_the_others_their_row():
    records = [make("linear", seed=0), make("linear", seed=1), failed("nan", "loss is NaN at step 7", seed=2)]
    row = markdown_rows(records)[0]
    assert row["seeds"] == "2 ok, 1 nan: loss is NaN at step 7"
    assert row["bits per byte"].startswith("3.950 ±")


def test_a_cell_that_ran_out_of_memory_shows_what_it_asked_for():
    oom = make("full", 2048, status="oom", message="out of memory", metrics=None, speed=None, tokens_per_s=None, curve=None)
    row = row_of([oom], "full", 2048)
    assert row.temp_bytes == 3 * 2**20 and row.compile_s == 1.75 and row.loss is None and row.step_s is None


def test_a_nan_cell_gives_no_loss_and_no_speed():
    row = row_of([make(seed=0), make(seed=1, status="nan", metrics__eval_bits_per_byte=99.0, speed__train_step={"median_s": 99.0})], "full", 256)
    assert row.loss == pytest.approx(4.0) and row.step_s < 1


def test_a_sweep_of_which_nothing_ran_is_still_a_table(tmp_path):
    records = [failed("missing", "not run yet", variant=v) for v in SEQUENCE_S]
    assert len(markdown_rows(records)) == 4 and figures.figures(records) == {}
    for name, text in report.tables(records).items():
        assert text, name


# Floors


def test_floors_that_are_the_same_at_every_length_are_one_row_each():
    shown = [row for row in markdown_rows(sweep()) if row["variant"].startswith("floor")]
    assert [(r["T"], r["variant"], r["bits per byte"], r["accuracy, %"]) for r in shown] == [
        ("any", "floor: uniform", "8.000", "0.4"),
        ("any", "floor: unigram", "4.500", "15.0"),
    ]


def test_floors_that_differ_by_length_close_its_rows():
    records = [make(v, T, floors__unigram__eval_bits_per_byte=4.5 + T / 1e5) for T in (256, 512) for v in ("full", "linear")]
    shown = [(r["T"], r["variant"], r["bits per byte"]) for r in markdown_rows(records) if r["variant"].startswith("floor")]
    assert shown == [
        ("256", "floor: uniform", "8.000"),
        ("256", "floor: unigram", "4.503"),
        ("512", "floor: uniform", "8.000"),
        ("512", "floor: unigram", "4.505"),
    ]
    assert [r["T"] for r in markdown_rows(records)] == ["256"] * 4 + ["512"] * 4


def test_a_task_without_accuracy_has_no_such_column():
    floors = {"uniform": {"eval_loss": 5.5, "eval_accuracy": None, "eval_bits_per_byte": None}}
    records = [make(metrics={"eval_loss": 2.5}, loss_name="loss", floors=floors)]
    [row, floor] = markdown_rows(records)
    assert "accuracy, %" not in row and row["loss, nats"] == "2.500" and floor["loss, nats"] == "5.500"


# Formats


def test_the_same_records_give_the_same_bytes():
    records = sweep()
    again = json.loads(json.dumps(copy.deepcopy(records)))
    assert report.tables(records) == report.tables(again)
    assert report.readme_table(records) == report.readme_table(again)


@pytest.mark.parametrize(
    ("x", "text"), [(None, "–"), (0.0, "0.00"), (123456, "123,456"), (1234.56, "1,235"), (12.345, "12.3"), (9.999, "10.00"), (0.0012345, "0.00123")]
)
def test_numbers_keep_three_digits_and_all_before_the_point(x, text):
    assert number(x) == text


@pytest.mark.parametrize(("flops", "unit"), [(4e6, "MFLOP/s"), (4e9, "GFLOP/s"), (4e12, "TFLOP/s")])
def test_one_unit_for_the_rates_by_the_greatest(flops, unit):
    records = [make("full", flops__useful_per_step=flops), make("linear", flops__useful_per_step=1.0)]
    assert all(unit in row for row in markdown_rows(records))


def test_latex_is_escaped_and_every_line_has_all_columns():
    records = [make(v, T) for T in LENGTHS for v in SEQUENCE_S] + [failed("oom", r"100 % of a_b & {c} \d #1 $2 ^3 ~4 <5>", T=256)]
    text = report.tables([make("linear", 256, params__total=200_000), *records])["table.tex"]
    tabular = text.split(r"\begin{tabular}{")[1].split(r"\end{tabular}")[0]
    columns, body = tabular.split("}\n", 1)
    lines = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert len(lines) == 1 + len(LENGTHS) * len(SEQUENCE_S) + 2
    assert all(len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1 for line in lines)
    assert [line for line in body.splitlines() if not line.endswith(r"\\")] == [r"\toprule", *[r"\midrule"] * 5, r"\bottomrule"]
    assert r"\texttt{local(window=128)}" in text and r"100 \% of a\_b \& \{c\} \textbackslash{}d \#1 \$2 \^{}3" in text
    assert "`" not in text and text.isascii()
    assert not re.search(r"(?<!\\)[_#]", re.sub(r"\\(begin|end|label)\{[^}]*\}", "", text))
    for begin, end in ("{}", "[]"):
        plain = re.sub(r"\\[{}]", "", text)
        assert plain.count(begin) == plain.count(end)


def test_csv_reads_back_as_the_numbers():
    records = sweep()
    lines = list(csv.DictReader(io.StringIO(report.tables(records)["table.csv"])))
    rows = summary.rows(records)
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows):
        for field, value in vars(row).items():
            if isinstance(value, float):
                assert float(line[field]) == pytest.approx(value, rel=1e-5), field
            else:
                assert line[field] == ("" if value is None else str(value)), field
    scaling = list(csv.DictReader(io.StringIO(report.tables(records)["scaling.csv"])))
    assert [float(line["crossover"] or "nan") for line in scaling[1:]] == [pytest.approx(700, rel=1e-5), math.inf, 0]


def bib_entries(text):
    return re.findall(r"^@(\w+)\{([^,]+),\n(.*?)^\}$", text, re.MULTILINE | re.DOTALL)


def test_bibtex_has_one_entry_a_paper_and_one_for_the_software():
    journal = {"key": "child2019", "title": "Sparse", "authors": "Child, Rewon", "year": 2019, "venue": "arXiv:1904.10509"}
    meeting = {**journal, "key": "acl2019", "venue": "Association for Computational Linguistics"}
    text = report.tables([*sweep(), make("linear", 4096, paper=[journal, meeting])])["cite.bib"]
    entries = {key: (kind, body) for kind, key, body in bib_entries(text)}
    assert set(entries) == {"full2020", "local2020", "strid2020", "linea2020", "child2019", "acl2019", "attn_zoo"}
    assert entries["acl2019"][0] == "inproceedings"
    assert len(entries) == text.count("@")
    assert entries["full2020"][0] == "inproceedings" and r"title = {{Q \& A\_b: 100 \%}}" in entries["full2020"][1]
    assert entries["child2019"][0] == "article" and "journal = {arXiv:1904.10509}" in entries["child2019"][1]
    assert entries["attn_zoo"][0] == "software" and "year = {2026}" in entries["attn_zoo"][1] and "version = {1.2.3}" in entries["attn_zoo"][1]
    assert text.count("{") == text.count("}")


def test_records_of_several_origins_are_flagged():
    changes = [{}, {"provenance__device_kind": "H200"}, {"provenance__git_commit": "fedcba9876543210", "provenance__git_dirty": True}]
    text = report.tables([make(seed=i, **change) for i, change in enumerate(changes)])["table.md"]
    assert "Mind: the records come from 2 machines, 2 commits." in text
    assert "Mind: 1 of 3 records were made with uncommitted changes" in text
    assert "Mind" not in report.tables(sweep())["table.md"]
    kept = [make(seed=i, provenance__memory_kept=kept) for i, kept in enumerate((True, True, False))]
    assert "Mind: in 2 of 3 records freed memory was kept" in report.tables(kept)["table.md"]
    assert "commit 0123456789. Freed memory was kept for the next call." in report.tables(kept[:2])["table.md"]
    assert "commit 0123456789." in report.tables(sweep())["table.md"] and "some CPU, 2 cores" in report.tables(sweep())["table.md"]


def test_settings_that_no_model_of_the_table_reads_are_not_told():
    settings = {"D": 64, "N": 4, "norm": "layernorm", "body": "recurrent", "cell": "gru"}
    told = lambda variants, **model: report.provenance_notes([make(cell__model=settings | model, cell__variant=v) for v in variants])[0].split("; ")[1].removeprefix("model ")
    assert told(["dot"]) == "D=64, body=recurrent, cell=gru"
    assert told(["full"], body="transformer") == "D=64, N=4, norm=layernorm, body=transformer"
    assert told(["full", "recurrent(dot)"], body="transformer") == "D=64, N=4, norm=layernorm, body=transformer, cell=gru"
    assert told(["dot", "convolutional(dilated)"]) == "D=64, norm=layernorm, body=recurrent, cell=gru"


class Page(html.parser.HTMLParser):
    """Collects the links of a page and checks that its tags close."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def write_workdir(workdir, records):
    for record in records:
        results.write_record(workdir, record)


def decoded(record):
    """The same record, where generation was measured too."""
    step = {"median_s": 2e-3, "p20_s": 1.8e-3, "p80_s": 2.5e-3, "n": 10}
    return record | {"decode": {"step": step, "steps": 64, "batch": 4, "tokens_per_s": 2000.0, "refeed_tokens_per_s": 20.0, "state_bytes": 4096.0}}


def probed(record, splits=("length_8-11", "length_12-15", "length_16-19")):
    """The same record, with scores on further splits; exact match falls by a tenth a split, and by a hundredth a seed."""
    score = lambda n: {"eval_loss": 1.0, "eval_accuracy": 0.99, "eval_exact": 0.9 - 0.1 * n - record["cell"]["seed"] / 100}
    floors = {name: floor | {"eval_exact": 0.0} for name, floor in record["floors"].items()}
    return record | {"floors": floors, "probes": {split: score(n) for n, split in enumerate(splits)}}


def test_generation_has_columns_where_it_was_measured():
    assert not {"decode, tokens/s", "re-fed, tokens/s", "state, KiB"} & set(markdown_rows(sweep())[0])
    rows = [row for row in markdown_rows([*map(decoded, sweep())]) if not row["variant"].startswith("floor")]
    assert {(row["decode, tokens/s"], row["re-fed, tokens/s"], row["state, KiB"]) for row in rows} == {("2,000", "20.0", "4.00")}


def test_of_one_length_there_is_no_curve():
    records = [*map(decoded, sweep(lengths=LENGTHS[:1]))]
    assert set(figures.figures(records)) == {"loss_time"}


def test_what_was_not_trained_has_costs_alone():
    records = [*map(probed, map(decoded, sweep()))]
    for record in records:
        record["cell"] = record["cell"] | {"train": record["cell"]["train"] | {"steps": 0}}
        record["speed"] = {}
    rows = markdown_rows(records)
    assert not {"bits per byte", "accuracy, %", "tokens/s", "of matmul, %"} & set(rows[0]) and rows[0]["decode, tokens/s"] == "2,000"
    assert not [row for row in rows if row["variant"].startswith("floor")] and not {"loss", "probes"} & set(figures.figures(records))
    assert "probes.csv" not in report.tables(records) and "held-out" not in " ".join(report.small_tables(summary.rows(records), records))


@pytest.mark.parametrize("count", [2, 12, 14])
def test_generation_is_drawn_beside_the_reference_re_fed(count):
    """Of more than twelve variants in two panels, by whether their state grows; the reference stands in both."""
    records = []
    for n in range(count):
        for T in LENGTHS:
            record = decoded(make("full" if n == 0 else "linear", T))
            record["cell"]["variant"] = "full" if n == 0 else f"variant{n}"
            record["decode"]["state_bytes"] = 8.0 if n % 2 else 8.0 * T
            records.append(record | {"id": f"{n}-{T}"})
    drawn = figures.figures(records)["decode"]
    names = [[t.get_text() for t in (ax.get_legend() or drawn.legends[0]).get_texts()] for ax in drawn.axes]
    every, odd, even = [[f"variant{n}" for n in range(1, count) if n % 2 in parities] for parities in ((0, 1), (1,), (0,))]
    two = count > 12
    assert [ax.get_title() for ax in drawn.axes] == (["state of one size", "state that grows with T"] if two else [""])
    assert names == ([["full", "full, re-fed", *odd], ["full", "full, re-fed", *even]] if two else [["full", *every, "full, re-fed"]])
    for ax in drawn.axes:
        lines = {tuple(line.get_ydata()) for line in ax.lines}
        assert {(2000.0,) * len(LENGTHS), (20.0,) * len(LENGTHS)} <= lines


def test_exact_match_has_a_column_where_a_task_has_floors_of_it():
    def with_exact(record):
        floors = {name: floor | {"eval_exact": 0.01} for name, floor in record["floors"].items()}
        return record | {"floors": floors, "metrics": record["metrics"] | {"eval_exact": 0.75}}

    assert "exact match, %" not in markdown_rows(sweep())[0]
    rows = markdown_rows([*map(with_exact, sweep())])
    assert {row["exact match, %"] for row in rows} == {"75.0 ± 0.0", "1.0"}


def test_bleu_has_a_column_where_the_model_translated_by_itself():
    assert "BLEU" not in markdown_rows(sweep())[0]
    translated = [record | {"written": {"eval_bleu": 27.3}} for record in sweep()]
    assert "27.3 ± 0.0" in {row["BLEU"] for row in markdown_rows(translated)}


def test_slots_have_a_column_where_the_model_wrote_by_itself():
    said = [record | {"written": {"eval_slots": 0.8, "eval_slot_colour": 0.9}} for record in sweep()]
    floors = {"blind": {"eval_loss": 1.0, "eval_accuracy": 0.1, "eval_bits_per_byte": 1.4, "eval_slots": 0.3}}
    assert "slots, %" not in markdown_rows(sweep())[0]
    assert {row["slots, %"] for row in markdown_rows([record | {"floors": floors} for record in said])} == {"80.0 ± 0.0", "30.0"}


def test_further_splits_have_a_table_a_file_and_a_figure():
    assert "By split" not in report.tables(sweep())["table.md"] and "probes.csv" not in report.tables(sweep())
    records = [*map(probed, sweep(variants=("full", "linear"), lengths=(256,))), failed("error", "no", T=256, seed=3)]
    texts = report.tables(records)
    table = [cells(line) for line in texts["table.md"].split("**By split.**")[1].split("**Growth")[0].splitlines() if line.startswith("|")]
    assert table[0] == ["variant", "length 8–11", "length 12–15", "length 16–19"]
    assert table[2:] == [[f"`{variant}`", "89.0 ± 2.5", "79.0 ± 2.5", "69.0 ± 2.5"] for variant in ("full", "linear")]
    found = list(csv.DictReader(io.StringIO(texts["probes.csv"])))
    assert [(r["variant"], r["split"], float(r["score"]), r["seeds_ok"]) for r in found[:2]] == [("full", "length_8-11", 0.89, "3"), ("full", "length_12-15", 0.79, "3")]
    [ax] = figures.figures(records)["probes"].axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["8–11", "12–15", "16–19"] and ax.get_ylabel() == "exact match, %"
    without = [record | {"floors": {}} for record in records]
    assert "99.0 ± 0.0" in report.tables(without)["table.md"], "accuracy, where nothing is generated"


def test_the_report_writes_every_file_and_the_page_needs_no_other(tmp_path):
    records = [*map(probed, map(decoded, sweep(seeds=(0, 1)))), failed("error", "a <b> & c", T=4096)]
    write_workdir(tmp_path, records)
    printed = report.write_report(tmp_path)
    assert printed == (tmp_path / "table.md").read_text()
    texts = report.tables(results.load_with_missing(tmp_path))
    assert {name: (tmp_path / name).read_text() for name in texts} == texts
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {f"{name}.{kind}" for name in report.FIGURES for kind in ("png", "pdf")}
    page = Page((tmp_path / "index.html").read_text())
    assert page.open == [] and len(page.links) == len(report.FIGURES)
    for link in page.links:
        assert link.startswith("data:image/png;base64,")
        assert base64.b64decode(link.partition(",")[2], validate=True).startswith(b"\x89PNG\r\n")
    assert "local(window=128)" in page.text and "a <b> & c" in page.text and "any" in page.text
    again = tmp_path / "again"
    write_workdir(again, [probed(record) for record in sweep(lengths=LENGTHS[:1], seeds=(0,))])
    (again / "figures").mkdir()
    for kind in ("png", "pdf"):
        (again / "figures" / f"throughput.{kind}").write_text("of two lengths")
    report.write_report(again)
    assert {path.stem for path in (again / "figures").iterdir()} == {"probes", "loss_time"}


def test_a_thousand_records_are_reported(tmp_path):
    names = [f"local(window={w})" for w in range(42)]
    template = make("linear")
    for i in range(1000):
        cell = {**template["cell"], "variant": names[i % 42], "seq_len": LENGTHS[i // 42 % 4], "seed": i // 168}
        results.write_record(tmp_path, {**template, "id": f"{i:012x}", "cell": cell})
    rows = markdown_rows(results.load_with_missing(tmp_path))
    assert len(rows) == 168 + 2 and sum(int(r["seeds"].split()[0]) for r in rows if r["seeds"]) == 1000
    assert set(report.write_report(tmp_path).splitlines()) >= {"**Growth with T.**"}


# Figures


def drawn_lines(figure, style):
    """The data of the curves with a variant's colour and marker, per axes."""
    return [
        [line for line in ax.lines if line.get_color() == style["color"] and line.get_marker() == style["marker"] and len(line.get_xdata())]
        for ax in figure.axes
    ]


def test_figures_show_the_numbers():
    records = sweep()
    drawn, styles = figures.figures(records), figures.variant_styles(summary.variants_of(records))
    for variant, style in styles.items():
        [[line]] = drawn_lines(drawn["throughput"], style)
        assert list(line.get_xdata()) == list(LENGTHS)
        assert list(line.get_ydata()) == pytest.approx([T / SEQUENCE_S[variant](T) for T in LENGTHS])
        [[line]] = drawn_lines(drawn["memory"], style)
        assert list(line.get_ydata()) == [3.0] * 4
        [[line]] = drawn_lines(drawn["loss"], style)
        assert list(line.get_ydata()) == pytest.approx([3.9] * 4)
        assert list(line.get_xdata()) == pytest.approx(LENGTHS, rel=0.1)
        panels = drawn_lines(drawn["loss_time"], style)
        assert [len(lines) for lines in panels] == [1] * 4
        assert panels[1][0].get_xdata()[-1] == pytest.approx(40 * SEQUENCE_S[variant](512) * TOKENS / 512)
    assert [ax.get_title() for ax in drawn["loss_time"].axes] == ["T = 256", "T = 512", "T = 1,024", "T = 2,048"]
    assert drawn["throughput"].axes[0].get_xscale() == drawn["throughput"].axes[0].get_yscale() == "log"
    assert drawn["loss"].axes[0].get_yscale() == "linear"


def test_loss_bars_are_the_intervals():
    drawn = figures.figures(sweep(variants=("full",)))["loss"]
    [bars] = drawn.axes[0].collections
    (low, high) = sorted(y for _, y in bars.get_segments()[0])
    assert (low, high) == (pytest.approx(3.9 - 0.2484, abs=1e-4), pytest.approx(3.9 + 0.2484, abs=1e-4))


def test_floors_are_dashed_lines_and_far_ones_are_named_with_an_arrow():
    figure = figures.figures(sweep())["loss"]
    [ax] = figure.axes
    floors = [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--" and line.get_color() == "0.5"]
    assert floors == [4.5]
    assert [text.get_text() for text in ax.texts] == ["uniform 8.00 ↑", "unigram 4.50"]


@given(st.lists(st.floats(0, 10), min_size=1, max_size=8))
def test_labels_stand_apart(heights):
    moved = figures._spread(heights, 0.0, 10.0, gap=1.0)
    assert all(b - a >= 1 - 1e-9 for a, b in zip(sorted(moved), sorted(moved)[1:]))
    assert 0 <= min(moved) and max(moved) <= 10
    assert [moved[i] for i in sorted(range(len(heights)), key=heights.__getitem__)] == sorted(moved)


@pytest.mark.parametrize("count", [1, 7, 40], ids=lambda n: f"{n}-variants")
def test_nothing_is_cut_off_and_the_legend_covers_no_curve(count):
    variants = ["full"] + [f"local(window={2**i % 997 + i}, another_option={i})" for i in range(1, count)]
    step = lambda v, T: {"median_s": 1e-5 * T * (1 + len(v) % 5), "p20_s": 1e-5 * T, "p80_s": 1e-4 * T, "n": 9}
    records = [make(T=T, cell={**make(T=T)["cell"], "variant": v}, speed={"train_step": step(v, T)}) for T in LENGTHS for v in variants]
    records = [probed(record, [f"length_{n}-{n + 9}" for n in range(100, 200, 10)]) for record in records]
    for name, figure in figures.figures(records).items():
        figure.canvas.draw()
        page = figure.bbox
        [legend] = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == variants
        box = legend.get_window_extent()
        for ax in figure.axes:
            tight = ax.get_tightbbox()
            assert tight.x0 >= 0 and tight.y0 >= box.y1 and tight.x1 <= page.x1 and tight.y1 <= page.y1, name
        assert box.x0 >= 0 and box.x1 <= page.x1 and box.y0 >= 0, name


def test_forty_variants_look_different_and_neighbours_in_all_ways():
    styles = list(figures.variant_styles([str(i) for i in range(40)]).values())
    assert len({(style["color"], style["marker"]) for style in styles}) == 40
    for a, b in zip(styles, styles[1:]):
        assert all(a[key] != b[key] for key in a)


def test_curves_are_the_mean_of_the_seeds_over_their_common_steps():
    records = [make(seed=0, curve={"step": [10, 20, 30], "seconds": [1.0, 2.0, 3.0], "train_loss": [3.0, 2.0, None]})]
    records.append(make(seed=1, curve={"step": [10, 20], "seconds": [3.0, 4.0], "train_loss": [5.0, 4.0]}))
    records.append(make(seed=2, status="nan", curve={"step": [10], "seconds": [1.0], "train_loss": [99.0]}))
    assert figures.mean_curve(records, "full", 256) == ([2.0, 3.0], [4.0, 3.0])
    assert figures.mean_curve([failed("oom", "")], "linear", 256) is None


# README, command, documents, committed results


def test_the_section_of_a_readme_is_renewed_and_nothing_else():
    readme = "# A\n<!-- table:x -->\nold\n<!-- /table -->\nB\n<!-- table:y -->\nother\n<!-- /table -->\n"
    new = report.renew_section(readme, "x", "new\n")
    assert new == readme.replace("old", "new") and report.renew_section(new, "x", "new\n") == new
    with pytest.raises(UserError, match="no section <!-- table:z -->"):
        report.renew_section(readme, "z", "new\n")


def test_the_command_writes_the_report_and_the_readme(tmp_path, capsys):
    workdir, readme = tmp_path / "seq_len", tmp_path / "README.md"
    write_workdir(workdir, [make()])
    readme.write_text("<!-- table:seq_len -->\n<!-- /table -->\n")
    assert report.main([str(workdir), "--readme", str(readme)]) == 0
    assert capsys.readouterr().out.startswith("**Attention variants")
    assert report.readme_table([make()]) in readme.read_text()
    assert report.main([str(tmp_path / "nothing")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_the_documented_record_is_one():
    text = (ROOT / "docs" / "records.md").read_text()
    example = json.loads(text.split("```json")[1].split("```")[0])
    assert example["metrics"]["eval_bits_per_byte"] == pytest.approx(example["metrics"]["eval_loss"] / LN2, rel=1e-4)
    [row] = [r for r in markdown_rows([example]) if r["variant"] == "`linear`"]
    assert "–" not in [v for k, v in row.items() if k != "× full"]
    documented = re.findall(r"`([^`]+)`", text.split("## Keys")[1].split("## sweep.json")[0])
    words = {word for name in documented for word in name.split(".")}
    inner = {word for key, value in example.items() if isinstance(value, dict) and key != "floors" for word in value}
    assert example.keys() | inner <= words, (example.keys() | inner) - words


COMMITTED = sorted(path.parent for path in (ROOT / "experiments" / "results").glob("*/sweep.json"))


@pytest.mark.parametrize("workdir", COMMITTED, ids=lambda path: path.name)
def test_committed_tables(workdir):
    records = results.load_with_missing(workdir)
    for name, text in report.tables(records).items():
        assert (workdir / name).read_bytes() == text.encode(), f"{name} is not that of its records: python -m attn_zoo.report {workdir}"
    drawn = {path.stem for path in (workdir / "figures").glob("*.p*")}
    assert drawn == set(figures.figures(records))
    readme = (ROOT / "README.md").read_text()
    if workdir.name == "seq_len" or f"<!-- table:{workdir.name} -->" in readme:
        assert report.renew_section(readme, workdir.name, report.readme_table(records)) == readme
