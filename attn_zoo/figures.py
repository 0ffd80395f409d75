"""The figures of a sweep from its records: throughput, memory and loss against length, and loss against training time.

Drawn for one column of a paper, or for both when there are many variants. A variant keeps its colour, marker and line style in
all of them; neighbours differ in all three, so that grey print tells them apart. Functions return Figure objects and know no files.
"""

import math
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from attn_zoo import summary
from attn_zoo.summary import Row
from attn_zoo.tables import LOSS_TITLES, split_title

COLUMN = 3.5  # inches; a page has two
MANY = 12  # variants: more are drawn over both columns
FONT = 7  # points
LEFT, BOTTOM, TOP = 0.58, 0.38, 0.16  # inches around the axes. Fixed: a layout engine would draw every figure several times
# Okabe and Ito (2008), told apart by colour-blind readers, without their yellow, which print loses.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7")
REFED = f"{summary.REFERENCE}, re-fed"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*")
LEGEND = {"fontsize": FONT - 1, "frameon": False, "handlelength": 3, "columnspacing": 1, "borderaxespad": 0, "labelspacing": 0.4}
LINES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (2, 2)))


def figures(records: list[dict[str, Any]]) -> dict[str, Figure]:
    """The figures by name: 'throughput', 'memory', 'decode', 'state', 'loss', 'probes', 'loss_time'; those whose numbers no cell reached are left out, and
    curves against T of one length."""
    rows = summary.rows(records)
    styles = variant_styles(summary.variants_of(records))
    drawn = {
        "throughput": throughput(rows, styles),
        "memory": memory(rows, styles),
        "decode": decode(rows, styles),
        "state": state(rows, styles),
        "loss": loss(rows, styles, LOSS_TITLES[summary.headline(records)]),
        "probes": probes(records, styles),
        "loss_time": loss_time(records, styles),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def variant_styles(variants: list[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line style of each variant; no two share colour and marker up to 77 of them."""
    look = lambda i: {"color": COLOURS[i % 7], "marker": MARKERS[i % 11], "linestyle": LINES[i % 6]}
    return {variant: look(i) for i, variant in enumerate(variants)}


def throughput(rows: list[Row], styles: dict) -> Figure | None:
    """Tokens per second of the train step against T, log-log, with bars from the 20th to the 80th percentile of the steps."""
    points = [
        (r.variant, r.seq_len, r.tokens_per_step / r.step_s, r.tokens_per_step / r.step_s_p80, r.tokens_per_step / r.step_s_p20)
        for r in rows
        if r.step_s and r.tokens_per_step
    ]
    return against_length(points, styles, "tokens / s", log=True)


def memory(rows: list[Row], styles: dict) -> Figure | None:
    """Temporary memory of the train step against T, log-log; also of cells that did not fit."""
    points = [(r.variant, r.seq_len, *[r.temp_bytes / 2**20] * 3) for r in rows if r.temp_bytes]
    return against_length(points, styles, "temporary memory, MiB", log=True)


def decode(rows: list[Row], styles: dict) -> Figure | None:
    """Generated tokens per second at a context of T, log-log, with bars from the 20th to the 80th percentile of the steps; grey, of the reference re-fed.

    More than `MANY` variants stand in two panels, those whose state is of one size at every length apart from those whose state grows, the reference in both.
    """
    known = [r for r in rows if r.decode_step_s]
    rate = lambda r, seconds: r.decode_tokens_per_s * r.decode_step_s / seconds
    points = [(r.variant, r.seq_len, r.decode_tokens_per_s, rate(r, r.decode_step_s_p80), rate(r, r.decode_step_s_p20)) for r in known]
    refed = [(REFED, r.seq_len, *[r.refeed_tokens_per_s] * 3) for r in known if r.variant == summary.REFERENCE and r.refeed_tokens_per_s]
    many, styles = len(styles) > MANY, styles | ({REFED: {"color": "0.5", "marker": "", "linestyle": "--"}} if refed else {})
    state = {r.variant: {own.seq_len: own.state_bytes for own in known if own.variant == r.variant} for r in known}
    if not many or len({r.seq_len for r in known}) < 2:
        return against_length(points + refed, styles, "generated tokens / s", log=True)
    both = [point for point in points if point[0] == summary.REFERENCE] + refed
    titles = {variant: f"state {'that grows with T' if len(set(sizes.values())) > 1 else 'of one size'}" for variant, sizes in state.items() if len(sizes) > 1}
    groups: dict[str, list] = {}
    for title in ("state of one size", "state that grows with T", "at one length alone"):
        if own := [point for point in points if point not in both and titles.get(point[0], "at one length alone") == title]:
            groups[title] = both + own
    return panels(groups, "generated tokens / s", styles)


def state(rows: list[Row], styles: dict) -> Figure | None:
    """What generation keeps of a sequence against T, log-log."""
    points = [(r.variant, r.seq_len, *[r.state_bytes / 2**10] * 3) for r in rows if r.state_bytes]
    return against_length(points, styles, "state of a sequence, KiB", log=True)


def loss(rows: list[Row], styles: dict, title: str) -> Figure | None:
    """Headline loss against T with 95 % intervals over seeds, and the floors; one that differs by length has its own curve."""
    known = [r for r in rows if r.loss is not None and r.status != "floor"]
    half = lambda r: r.loss_interval or 0.0
    points = [(r.variant, r.seq_len, r.loss, r.loss - half(r), r.loss + half(r)) for r in known]
    floors: dict[str, list[tuple[int, float]]] = {}
    lengths = sorted({r.seq_len for r in known})
    for row in rows:
        if row.status == "floor" and row.loss is not None:
            floors.setdefault(row.variant, []).extend((T, row.loss) for T in (lengths if row.seq_len is None else [row.seq_len]))
    return against_length(points, styles, title, log=False, floors=floors)


def probes(records: list[dict[str, Any]], styles: dict) -> Figure | None:
    """Scores on the further splits of the task, in their order, a panel a length; with 95 % intervals over seeds."""
    found = summary.probes(records)
    if not found:
        return None
    splits, lengths = list(dict.fromkeys(p.split for p in found)), sorted({p.seq_len for p in found})
    across = min(2, len(lengths))
    figure, grid = _figure(styles, down=math.ceil(len(lengths) / across), across=across, below=0.3)
    for unused in grid[len(lengths) :]:
        unused.remove()
    titles = [split_title(split) for split in splits]
    by_length = all(title.startswith("length ") for title in titles)
    for i, (T, ax) in enumerate(zip(lengths, grid)):
        for j, (variant, style) in enumerate(styles.items()):
            own = {p.split: p for p in found if p.variant == variant and p.seq_len == T}
            points = [(n, own[split]) for n, split in enumerate(splits) if split in own]
            if points:  # side by side, so that bars can be told apart
                x = [n + 0.4 * ((j + 0.5) / len(styles) - 0.5) for n, _ in points]
                y, half = [100 * p.score for _, p in points], [100 * (p.interval or 0.0) for _, p in points]
                bars = [[min(h, s) for h, s in zip(half, y)], [min(h, 100 - s) for h, s in zip(half, y)]]  # no share is below 0 or above 100
                ax.errorbar(x, y, yerr=bars if any(half) else None, lw=1, ms=3.5, elinewidth=0.7, capsize=1.5, **style)
        ax.set(xticks=range(len(splits)), xticklabels=[], ylim=(-3, 103))
        if len(lengths) > 1:
            ax.set_title(f"T = {T:,}", fontsize=FONT, pad=2)
        if i + across >= len(lengths):
            labels = [title.removeprefix("length ") if by_length else title for title in titles]
            ax.set_xticks(range(len(splits)), labels, rotation=40, ha="right", rotation_mode="anchor")
            ax.set_xlabel("length of what is read" if by_length else "split")
        if i % across == 0:
            ax.set_ylabel("exact match, %" if summary.probe_metric(records) == "eval_exact" else "accuracy, %")
    return figure


def loss_time(records: list[dict[str, Any]], styles: dict) -> Figure | None:
    """Training loss (nats) against training seconds, a panel a length; mean over seeds, then a running mean of a tenth."""
    curves = {(T, v): curve for T in summary.lengths_of(records) for v in styles if (curve := mean_curve(records, v, T))}
    if not curves:
        return None
    lengths = list(dict.fromkeys(T for T, _ in curves))
    across = min(2, len(lengths))
    figure, grid = _figure(styles, down=math.ceil(len(lengths) / across), across=across)
    for unused in grid[len(lengths) :]:
        unused.remove()
    # The first steps fall from log V and would flatten what matters: the axes show what comes after a fifth of the steps.
    late = [y for _, losses in curves.values() for y in losses[len(losses) // 5 :]]
    margin = 0.05 * (max(late) - min(late)) or 0.05 * abs(max(late)) or 1.0
    low, high = min(late) - margin, max(late) + margin
    for i, (T, ax) in enumerate(zip(lengths, grid)):
        seen = []
        for j, (variant, style) in enumerate(styles.items()):
            seconds, losses = curves.get((T, variant), ((), ()))
            every = max(1, len(seconds) // 4)  # a few markers, out of step between the variants
            ax.plot(seconds, losses, lw=0.8, ms=2.5, markevery=(j % every, every), **style)
            seen += [s for s, y in zip(seconds, losses) if y <= high]
        ax.set(xscale="log", xlim=(min(seen) / 1.1, max(seen) * 1.1), ylim=(low, high))
        ax.set_title(f"T = {T:,}", fontsize=FONT, pad=2)
        _log_ticks(ax.xaxis)
        if i + across >= len(lengths):
            ax.set_xlabel("training time, s")
        if i % across == 0:
            ax.set_ylabel("training loss, nats")
    return figure


def mean_curve(records: list[dict[str, Any]], variant: str, T: int) -> tuple[list[float], list[float]] | None:
    """Seconds and smoothed training loss, mean over the seeds that ended ok at their common steps; None where none did."""
    cells = [r for r in records if r["status"] == "ok" and r["cell"]["variant"] == variant and r["cell"]["seq_len"] == T]
    curves = []
    for curve in (summary.reached(r, "curve") for r in cells):
        points = zip(*(curve.get(k) or [] for k in ("step", "seconds", "train_loss"))) if curve else []
        curves.append({step: (s, y) for step, s, y in points if s and y is not None})
    curves = [curve for curve in curves if curve]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    if not steps:
        return None
    mean = [[math.fsum(c[step][i] for c in curves) / len(curves) for step in steps] for i in (0, 1)]
    width = max(1, len(steps) // 10)
    smooth = [math.fsum(window) / len(window) for i in range(len(steps)) if (window := mean[1][max(0, i + 1 - width) : i + 1])]
    return mean[0], smooth


def against_length(points: list[tuple], styles: dict, title: str, log: bool, floors: dict | None = None) -> Figure | None:
    """Points (variant, T, value, low, high) as one curve a variant with bars, T on a binary logarithmic axis; None of fewer than two lengths."""
    if len({T for _, T, *_ in points}) < 2:
        return None  # the table tells it
    names = max((len(f"{name} 0.00 ↑") for name in floors or ()), default=0)
    figure, [ax] = _figure(styles, right=0.1 + names * 0.55 * (FONT - 1) / 72)
    _draw_lengths(ax, points, styles, title, log)
    if floors:
        _draw_floors(ax, floors)
    return figure


def panels(groups: dict[str, list[tuple]], title: str, styles: dict | None = None) -> Figure:
    """A panel a group of such points, two beside each other on the same axes, log-log, each with its legend at its right, and styles of its own if none are given."""
    longest = max(len(str(point[0])) for points in groups.values() for point in points)
    down, across, legend = math.ceil(len(groups) / 2), 2.4, (5 * FONT + 0.58 * (FONT - 1) * longest) / 72  # inches
    size = LEFT + 2 * (across + legend) + LEFT / 2, max(2.6, 1.9 * down)
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, 2, squeeze=False, sharex=True, sharey=True).flatten()
    lengths = sorted({T for points in groups.values() for _, T, *_ in points})
    figure.subplots_adjust(LEFT / size[0], BOTTOM / size[1], 1 - legend / size[0], 1 - 0.3 / size[1], wspace=(legend + LEFT / 2) / across, hspace=0.25)
    for ax, (name, points) in zip(axes, groups.items()):
        _look(ax)
        names = list(dict.fromkeys(point[0] for point in points))
        own = variant_styles(names) if styles is None else {name: styles[name] for name in names}
        _draw_lengths(ax, points, own, title, log=True, lengths=lengths)
        ax.set_title(name if len(name) < 60 else name.replace(", ", ",\n", 1), fontsize=FONT, pad=3)
        ax.legend(handles=_handles(own), loc="center left", bbox_to_anchor=(1.0, 0.5), **LEGEND)
        ax.label_outer()
    if len(groups) % 2:
        axes[-1].remove()
        if len(groups) > 1:  # the one above it is now the lowest of its column
            axes[-3].tick_params(labelbottom=True)
            axes[-3].set_xlabel("sequence length T")
    return figure


def _draw_lengths(ax, points: list[tuple], styles: dict, title: str, log: bool, lengths: list[int] | None = None) -> None:
    lengths = lengths or sorted({T for _, T, *_ in points})
    gap = min((math.log2(b / a) for a, b in zip(lengths, lengths[1:])), default=1.0)
    for i, (variant, style) in enumerate(styles.items()):
        own = sorted(point[1:] for point in points if point[0] == variant)
        if own:
            x, y, low, high = zip(*own)
            if not log:  # losses are close: side by side, their bars can be told apart
                x = [T * 2 ** (0.25 * gap * ((i + 0.5) / len(styles) - 0.5)) for T in x]
            bars = [[max(0.0, b - a) for a, b in zip(low, y)], [max(0.0, b - a) for a, b in zip(y, high)]]
            ax.errorbar(x, y, yerr=bars if any(map(any, bars)) else None, lw=1, ms=3.5, elinewidth=0.7, capsize=1.5, **style)
    ax.set_xscale("log", base=2)
    ax.xaxis.set(major_locator=FixedLocator(lengths), minor_locator=NullLocator(), major_formatter=FuncFormatter(lambda T, _: f"{T:g}"))
    if len(lengths) > 8:
        ax.tick_params(axis="x", rotation=45)
    ax.set(xlabel="sequence length T", ylabel=title)
    if log:
        ax.set_yscale("log")
        _log_ticks(ax.yaxis)
    else:
        ax.ticklabel_format(axis="y", scilimits=(-2, 4), useOffset=False)
        ax.yaxis.offsetText.set_size(FONT - 1)
        ax.set_ylim(_limits(*zip(*(point[2:] for point in points))))


def _limits(values: tuple, lows: tuple, highs: tuple) -> tuple[float, float]:
    """Room for the values and their bars; of bars far longer than the values differ (two seeds), only the start."""
    room = max(max(values) - min(values), 0.1 * max(map(abs, values))) or 1.0
    low, high = max(min(lows), min(values) - room), min(max(highs), max(values) + room)
    margin = 0.05 * max(high - low, room)
    return low - margin, high + margin


def _draw_floors(ax, floors: dict[str, list[tuple[int, float]]]) -> None:
    """Grey dashed lines, named in the right margin; a floor too far away to be drawn is named with an arrow at that end."""
    low, high = ax.get_ylim()
    reach = 0.75 * (high - low)  # a floor may widen the axis by this much
    ends = {name: sorted(line)[-1][1] for name, line in floors.items()}
    near = {name for name, y in ends.items() if low - reach <= y <= high + reach}
    shown = [y for name in near for _, y in floors[name]]
    margin = 0.04 * (high - low)
    low, high = min([low, *(y - margin for y in shown)]), max([high, *(y + margin for y in shown)])
    ax.set_ylim(low, high)
    for name in near:
        x, y = zip(*sorted(floors[name]))
        if len(set(y)) == 1:
            ax.axhline(y[0], color="0.5", lw=0.8, ls="--", zorder=1)
        else:
            ax.plot(x, y, color="0.5", lw=0.8, ls="--", zorder=1)
    text = lambda name: f"{name} {ends[name]:.2f}" + ("" if name in near else " ↑" if ends[name] > high else " ↓")
    heights = _spread([min(max(y, low), high) for y in ends.values()], low, high, gap=0.055 * (high - low))
    for name, height in zip(ends, heights):
        ax.annotate(text(name), (1.015, height), xycoords=("axes fraction", "data"), color="0.35", fontsize=FONT - 1, va="center")


def _spread(heights: list[float], low: float, high: float, gap: float) -> list[float]:
    """The heights moved as little as needed to stand at least a gap apart, between low and high."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = dict(enumerate(heights))
    for before, i in zip(order, order[1:]):
        moved[i] = max(moved[i], moved[before] + gap)
    ceiling = high
    for i in reversed(order):  # back down where the top ran over
        moved[i] = min(moved[i], ceiling)
        ceiling = moved[i] - gap
    return [moved[i] for i in range(len(heights))]


def _figure(styles: dict, right: float = 0.1, down: int = 1, across: int = 1, below: float = 0.0) -> tuple[Figure, list]:
    """A figure with its axes, and below them the legend of all variants; `right` is its margin on that side in inches, `below` more room for tick labels."""
    width = COLUMN * (1 if len(styles) <= MANY else 2)
    entry = 0.58 * (FONT - 1) * max(map(len, styles)) + 5 * FONT  # points that the longest name and its line take
    columns = max(1, min(len(styles), int(72 * width / entry)))
    legend = math.ceil(len(styles) / columns) * 1.45 * (FONT - 1) / 72 + 0.1 + below
    panel = 2.3 if down == 1 else 1.3
    height = down * (panel + TOP) + (down - 1) * 0.2 + BOTTOM + legend
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, across, squeeze=False, sharey=True).flatten()
    figure.subplots_adjust(LEFT / width, (BOTTOM + legend) / height, 1 - right / width, 1 - TOP / height, 0.08, (TOP + 0.2) / panel)
    for ax in axes:
        _look(ax)
    figure.legend(handles=_handles(styles), loc="lower center", bbox_to_anchor=(0.5, 0.03 / height), ncols=columns, **LEGEND)
    return figure, list(axes)


def _look(ax) -> None:
    ax.tick_params(labelsize=FONT - 1, width=0.6, length=2.5)
    ax.grid(color="0.9", lw=0.5)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.xaxis.label.set_size(FONT)
    ax.yaxis.label.set_size(FONT)


def _handles(styles: dict) -> list[Line2D]:
    return [Line2D([], [], lw=1, ms=3.5, label=variant, **style) for variant, style in styles.items()]


def _log_ticks(axis) -> None:
    """Ticks at plain numbers with a prefix, the more of them the fewer decades the axis spans."""
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    subs = (1, 1.5, 2, 3, 4, 5, 6, 8) if decades < 0.8 else (1, 2, 3, 5, 7) if decades < 1.3 else (1, 2, 5) if decades < 2.5 else (1,)
    axis.set(major_locator=LogLocator(subs=subs, numticks=12), major_formatter=FuncFormatter(_prefixed), minor_locator=NullLocator())


def _prefixed(x: float, _=None) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= factor:
            return f"{x / factor:g}{prefix}"
    return f"{x:g}"
