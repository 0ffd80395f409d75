"""From summary rows to text: the main and the scaling table, in Markdown, LaTeX (booktabs) and HTML.

Cells and notes are written once, with `backticks` around specs and *, †, ±, ×, – as themselves; each format translates them.
"""

import html as _html
import itertools
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from tabulate import LATEX_ESCAPE_RULES, SEPARATING_LINE, tabulate

from attn_zoo import summary
from attn_zoo.summary import REFERENCE, Row, Scaling

LOSS_TITLES = {"bits_per_byte": "bits per byte", "loss": "loss, nats"}
DIFFERS, DISTURBED = "*", "†"
_LATEX = {"±": r"$\pm$", "×": r"$\times$", "–": "--", "†": r"$^{\dagger}$", "*": "$^{*}$", "…": r"\ldots{}"}


class Table(NamedTuple):
    """A table as text, before any format. Rows whose first cell is the same belong together."""

    label: str
    caption: str
    headings: list[str]
    body: list[list[str]]
    left: set[str]  # headings of the columns that align left
    notes: list[str]


def main_table(rows: list[Row], records: list[dict[str, Any]]) -> Table:
    """Every variant at every length, seeds pooled, with the floors; failures in their rows."""
    loss, unit, scale = summary.headline(records), *_flops_unit(rows)
    columns = {
        "T": lambda r: "any" if r.seq_len is None else number(r.seq_len),
        "variant": lambda r: f"floor: {r.variant}" if r.status == "floor" else f"`{r.variant}`",
        "params": lambda r: number(r.params) + DIFFERS * r.params_differ,
        LOSS_TITLES[loss]: lambda r: with_interval(r.loss, r.loss_interval, summary.DECIMALS),
        "accuracy, %": lambda r: with_interval(_times(r.accuracy, 100), _times(r.accuracy_interval, 100), summary.DECIMALS - 2),
        "exact match, %": lambda r: with_interval(_times(r.exact, 100), _times(r.exact_interval, 100), summary.DECIMALS - 2),
        "slots, %": lambda r: with_interval(_times(r.slots, 100), _times(r.slots_interval, 100), summary.DECIMALS - 2),
        "BLEU": lambda r: with_interval(r.bleu, r.bleu_interval, 1),
        "tokens/s": lambda r: number(r.tokens_per_s),
        f"× {REFERENCE}": lambda r: with_interval(r.times_faster, None, 2),
        "step, ms (p20–p80)": lambda r: _step(r) + DISTURBED * r.disturbed,
        "compile, s": lambda r: number(r.compile_s),
        "memory, MiB": lambda r: number(_times(r.temp_bytes, 2**-20)),
        "decode, tokens/s": lambda r: number(r.decode_tokens_per_s) + DISTURBED * (r.disturbed and r.step_s is None),
        "re-fed, tokens/s": lambda r: number(r.refeed_tokens_per_s),
        "state, KiB": lambda r: number(_times(r.state_bytes, 2**-10)),
        unit: lambda r: number(_times(r.useful_flops_per_s, 1 / scale)),
        "of matmul, %": lambda r: number(_times(r.matmul_fraction, 100)),
        "backend": lambda r: r.backend or "–",
        "seeds": lambda r: "" if r.status == "floor" else _seeds(r),
    }
    # What no cell was asked for has no column.
    optional = {"accuracy, %": "accuracy", "exact match, %": "exact", "slots, %": "slots", "BLEU": "bleu"}
    optional |= {"decode, tokens/s": "decode_tokens_per_s", "re-fed, tokens/s": "refeed_tokens_per_s", "state, KiB": "state_bytes"}
    for column, field in optional.items():
        if all(getattr(row, field) is None for row in rows):
            del columns[column]
    timed = any(row.step_s or row.decode_step_s or row.forward_backward_s or row.status not in ("ok", "floor") for row in rows)
    of_steps = ("tokens/s", f"× {REFERENCE}", "step, ms (p20–p80)", unit, "of matmul, %")
    if not timed:  # compilations neither: where nothing was to be timed, cells may have run beside each other
        for column in (*of_steps, "compile, s"):
            del columns[column]
    elif any(row.decode_step_s for row in rows) and not any(row.step_s for row in rows):
        for column in of_steps:
            del columns[column]
    note = "Loss" + (" and accuracy" if "accuracy, %" in columns else "") + f" on held-out data: {_pooled(row.loss_interval for row in rows)}. "
    if not summary.trained(records):
        del columns[LOSS_TITLES[loss]]
        note = "Nothing was trained: costs alone. "
    if "exact match, %" in columns:
        note += "Exact match is the share of examples without a mistake in any target. "
    if "slots, %" in columns:
        note += "Slots is the share of what is to be said that is right in what the model writes by itself, mean over the kinds of slot. "
    if "BLEU" in columns:
        note += "BLEU is sacreBLEU's, of what the model writes by itself, greedily, against the translations of the set. "
    if "tokens/s" in columns:
        note += (
            f"Tokens/s, × {REFERENCE} (how many times faster at the same T) and step are of the train step: median of its steps, median over seeds, "
            "with the least 20th and the greatest 80th percentile. "
        )
    if "compile, s" in columns:
        note += "Compile is of the train step, tracing included. "
    note += "Memory is the temporary memory that XLA allots the train step."
    if "decode, tokens/s" in columns:
        note += (
            " Decode is generation at a context of T, one token a step for the whole batch; re-fed is what a forward pass over T for "
            "every token would give; state is what generation keeps, a sequence."
        )
    if unit in columns:
        note += f" {unit} counts useful pairs only; of matmul is its share of the matrix product rate measured in the same process."
    body = [[cell(row) for cell in columns.values()] for row in rows]
    caption = f"Attention variants by sequence length T on `{records[0]['cell']['task']}`."
    return Table("attn-zoo", caption, list(columns), body, {"variant", "backend", "seeds"}, [note, *_footnotes(rows, timed)])


def scaling_table(rows: list[Row]) -> Table:
    """How each variant grows with T, and where it overtakes the reference."""
    columns = {
        "variant": lambda s: f"`{s.variant}`",
        "lengths": lambda s: str(s.lengths),
        "train step": lambda s: _exponent(s.step_exponent, s.step_exponent_se),
        "forward + backward": lambda s: _exponent(s.forward_backward_exponent, s.forward_backward_exponent_se),
        "memory": lambda s: _exponent(s.memory_exponent, s.memory_exponent_se),
        f"faster than {REFERENCE} from T": _crossover,
    }
    notes = [
        "Exponents p of a cost per sequence that grows as T to the power p, by least squares on logarithms over the lengths measured, with standard error; of the "
        "whole model, so that short lengths show its parts that are linear in T. The crossover is the length from which on a "
        f"variant's train step is faster than that of `{REFERENCE}`, interpolated between measured lengths on log-log axes and never beyond "
        "them; in brackets, the same from the 80th and 20th percentiles of the step times in place of the medians, in its favour and "
        "against it."
    ]
    body = [[cell(s) for cell in columns.values()] for s in summary.scaling(rows)]
    return Table("attn-zoo-scaling", "Growth with T.", list(columns), body, {"variant"}, notes)


def probe_table(records: list[dict[str, Any]]) -> Table:
    """Every variant on every further split of the task, one column a split."""
    found = summary.probes(records)
    exact = summary.probe_metric(records) == "eval_exact"
    splits, lengths = list(dict.fromkeys(p.split for p in found)), sorted({p.seq_len for p in found})
    score = {(p.seq_len, p.variant, p.split): with_interval(100 * p.score, _times(p.interval, 100), summary.DECIMALS - 2) for p in found}
    ran = dict.fromkeys((p.seq_len, p.variant) for p in found)
    body = [[*([number(T)] if len(lengths) > 1 else []), f"`{variant}`", *(score.get((T, variant, split), "–") for split in splits)] for T, variant in ran]
    headings = [*(["T"] if len(lengths) > 1 else []), "variant", *map(split_title, splits)]
    what = "Exact match, the share of examples without a mistake in any target" if exact else "Accuracy"
    note = f"{what}, in % on each further split of the task: {_pooled(p.interval for p in found)}."
    return Table("attn-zoo-probes", "By split.", headings, body, {"variant"}, [note])


def _pooled(intervals: Iterable[float | None]) -> str:
    """What the scores of a table are, which have intervals over several seeds."""
    return "mean ± 95 % interval over seeds (Student's t)" if any(x is not None for x in intervals) else "of one seed, so without an interval"


def split_title(split: str) -> str:
    """The name of a split as a heading: 'length_8-11' is 'length 8–11'."""
    return re.sub(r"(?<=\d)-(?=\d)", "–", split).replace("_", " ")


def small_tables(rows: list[Row], records: list[dict[str, Any]]) -> list[str]:
    """For a README, in Markdown: loss, speed and memory, each with a row a variant and a column a length."""
    loss = summary.headline(records)
    ratio = lambda r: f" ({r.times_faster:.2f}×)" if r.times_faster and r.variant != REFERENCE else ""
    speed = lambda r: number(r.tokens_per_s) + ratio(r) + DISTURBED * r.disturbed
    memory = lambda r: number(_times(r.temp_bytes, 2**-20))
    value = lambda r: with_interval(r.loss, r.loss_interval, summary.DECIMALS)
    title = LOSS_TITLES[loss][0].upper() + LOSS_TITLES[loss][1:]
    ran = [r for r in rows if r.status != "floor"]
    over_seeds = ", ± 95 % interval over seeds" if any(row.loss_interval is not None for row in rows) else ""
    scored = [_by_length(f"{title} on held-out data{over_seeds}", rows, value)] if summary.trained(records) else []
    return [
        *scored,
        _by_length(f"Tokens per second of the train step (times faster than `{REFERENCE}`)", ran, speed),
        _by_length("Temporary memory of the train step, MiB", ran, memory),
        *(f"{_markdown(note)}\n" for note in _footnotes(rows)),
    ]


def markdown(table: Table) -> str:
    """The caption, the table and its notes."""
    align = ["left" if heading in table.left else "right" for heading in table.headings]
    body = [[_markdown(cell) for cell in row] for row in table.body]
    text = tabulate(body, table.headings, "pipe", disable_numparse=True, colalign=align if body else None)
    return "\n\n".join([f"**{table.caption}**", text, *map(_markdown, table.notes)]) + "\n"


def latex(table: Table, provenance: list[str]) -> str:
    """A table* for \\input; needs the packages booktabs and graphicx."""
    align = ["left" if heading in table.left else "right" for heading in table.headings]
    groups = [list(group) for _, group in itertools.groupby(table.body, key=lambda row: row[0])]
    if len(groups) < len(table.body):  # rules between the lengths; none where every row is its own group
        body = list(itertools.chain.from_iterable([*group, SEPARATING_LINE] for group in groups))[:-1]
    else:
        body = table.body
    tabular = tabulate(body, table.headings, "latex_booktabs", disable_numparse=True, colalign=align if body else None)
    notes = r"\par ".join(_latex(note) for note in [*table.notes, *provenance])
    fit = r"\ifdim\width>\textwidth\textwidth\else\width\fi"  # shrunk to the page where it is wider, never enlarged
    return (
        "% needs \\usepackage{booktabs,graphicx}\n\\begin{table*}\n\\centering\n"
        f"\\caption{{{_latex(table.caption)}}}\n\\label{{tab:{table.label}}}\n"
        f"\\resizebox{{{fit}}}{{!}}{{%\n{_translate(tabular)}}}\n"
        f"\\par\\smallskip\\raggedright\\footnotesize {notes}\n\\end{{table*}}\n"
    )


def html(table: Table | str) -> str:
    """A table with its caption and notes, or a text, for a page."""
    if isinstance(table, str):
        return _code(_html.escape(table, quote=False), "<code>", "</code>")
    align = ["left" if heading in table.left else "right" for heading in table.headings]
    text = tabulate(table.body, table.headings, "html", disable_numparse=True, colalign=align if table.body else None)
    notes = "".join(f'<p class="note">{html(note)}</p>' for note in table.notes)
    return f"<h2>{html(table.caption)}</h2>\n<div>{_code(text, '<code>', '</code>')}</div>\n{notes}"


def number(x: float | None, digits: int = 3) -> str:
    """At least `digits` significant digits, never rounding what stands before the point; '–' for None."""
    if x is None:
        return "–"
    if isinstance(x, int):
        return f"{x:,}"
    magnitude = int(f"{abs(x):e}".partition("e")[2]) if x else 0
    return f"{x:,.{max(0, digits - 1 - magnitude)}f}"


def with_interval(x: float | None, half: float | None, decimals: int) -> str:
    if x is None:
        return "–"
    return f"{x:.{decimals}f}" + ("" if half is None else f" ± {half:.{decimals}f}")


def readable(value: Any) -> str:
    """A value of a record as words: a dict as 'a=1, b=2' without what is null."""
    if isinstance(value, dict):
        return ", ".join(f"{k}={readable(v)}" for k, v in value.items() if v is not None)
    return f"{value:g}" if isinstance(value, float) else str(value)


def short(message: str, width: int = 50) -> str:
    """A message as part of a row: its start, on one line, without the marks of our formats."""
    message = message.replace("`", "'")
    return message if len(message) <= width else message[: width - 1].rstrip() + "…"


def _footnotes(rows: list[Row], timed: bool = True) -> list[str]:
    notes = []
    if any(row.params_differ for row in rows):
        notes.append(f"{DIFFERS} Parameters differ from those of `{REFERENCE}` at the same T by more than 1 %.")
    if timed and any(row.disturbed for row in rows):
        notes.append(f"{DISTURBED} Disturbed: the matrix product rates before and after a cell differ by more than 20 %, or one of them from the median of all.")
    return notes


def _by_length(title: str, rows: list[Row], cell) -> str:
    lengths = sorted({row.seq_len for row in rows if row.seq_len is not None})
    found = {(row.variant, row.status == "floor", T): row for row in rows for T in ([row.seq_len] if row.seq_len else lengths)}
    body = []
    for variant, floor in dict.fromkeys((row.variant, row.status == "floor") for row in rows):
        at = [found.get((variant, floor, T)) for T in lengths]
        cells = ["–" if row is None else row.status if row.seeds and not row.seeds_ok else cell(row) for row in at]
        differs = any(row is not None and row.params_differ for row in at)
        body.append([f"floor: {variant}" if floor else f"`{variant}`" + DIFFERS * differs, *cells])
    headings = ["variant", *(f"T = {T:,}" for T in lengths)]
    body = [[_markdown(cell) for cell in row] for row in body]
    text = tabulate(body, headings, "pipe", disable_numparse=True, colalign=["left"] + ["right"] * len(lengths))
    return f"{title}:\n\n{text}\n"


def _seeds(row: Row) -> str:
    counts = row.status if "," in row.status else f"{row.seeds} {row.status}"
    return f"{counts}: {short(row.message)}" if row.message else counts


def _step(row: Row) -> str:
    if row.step_s is None:
        return "–"
    decimals = len(number(1e3 * row.step_s).partition(".")[2])
    low, high = (f"{1e3 * s:,.{decimals}f}" for s in (row.step_s_p20, row.step_s_p80))
    return f"{number(1e3 * row.step_s)} ({low}–{high})"


def _exponent(slope: float | None, error: float | None) -> str:
    return "–" if slope is None else f"{slope:.2f} (s.e. {error:.2f})"


def _crossover(s: Scaling) -> str:
    if s.crossover is None:
        return "–"
    point = {0: "always", math.inf: f"none up to {s.longest:,}"}
    edge = {0: f"< {s.shortest:,}", math.inf: f"> {s.longest:,}"}
    text = lambda T, words: words.get(T) or f"{T:,.0f}"
    if s.crossover_low == s.crossover_high:
        return text(s.crossover, point)
    return f"{text(s.crossover, point)} [{text(s.crossover_low, edge)}, {text(s.crossover_high, edge)}]"


def _flops_unit(rows: list[Row]) -> tuple[str, float]:
    """One unit for the column, by its greatest value."""
    top = max((row.useful_flops_per_s or 0 for row in rows), default=0)
    return ("TFLOP/s", 1e12) if top >= 1e12 else ("GFLOP/s", 1e9) if top >= 1e9 else ("MFLOP/s", 1e6)


def _times(x: float | None, factor: float) -> float | None:
    return None if x is None else x * factor


def _code(text: str, begin: str, end: str) -> str:
    return re.sub("`([^`]*)`", lambda match: begin + match[1] + end, text)


def _markdown(text: str) -> str:
    return re.sub(r"([*<|])", r"\\\1", text)


def _latex(text: str) -> str:
    return _translate("".join(LATEX_ESCAPE_RULES.get(c, c) for c in text))


def _translate(escaped: str) -> str:
    return _code("".join(_LATEX.get(c, c) for c in escaped), r"\texttt{", "}")
