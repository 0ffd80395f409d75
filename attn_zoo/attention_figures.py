"""Figures of what trained models look at: weights of query against key with tokens beside them, maps over pictures, learned spans.

Functions take arrays and names, return Figure objects, and know no files and no models. Sizes are in inches, and a cell of a labelled matrix has
room for its character.
"""

import dataclasses
import functools
import math
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from attn_zoo.figures import COLOURS, COLUMN, FONT, MARKERS

SMALL = FONT - 1.5  # points, of tokens
CELL = SMALL / 72 + 0.012  # inches, of a labelled row or column
LETTER = 0.62 * SMALL / 72  # inches, the width of a letter on average, and a little more
PAGE = 2 * COLUMN  # inches
LABELLED = 40  # labelled columns of a panel; more only if it is the figure's one panel
LABELLED_ALONE = 128
PANEL = 1.5  # inches, the side of a panel without labels
NAMED = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍", "\0": "␀", "": "∅"}


@dataclasses.dataclass(frozen=True)
class Panel:
    """One matrix, weights of query (down) and key (across), and what stands above it."""

    title: str
    weights_TS: np.ndarray


@functools.cache
def drawable() -> frozenset[str]:
    """The characters of Matplotlib's own font, DejaVu Sans: Latin, Greek, Cyrillic and many symbols, but no Chinese, Japanese or Korean."""
    return frozenset(map(chr, font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()))


def legible(label: str) -> bool:
    """Whether a label can be drawn as it is, or by a symbol that stands for white space."""
    return all(c in NAMED or (c in drawable() and c.isprintable()) for c in label)


def visible(label: str) -> str:
    """A token as it is drawn: white space by a symbol, and what the font has no picture of by its code point."""
    if label in NAMED:
        return NAMED[label]
    return "".join(NAMED.get(c, c) if legible(c) else f"U+{ord(c):04X}" for c in label)


def matrices(panels: Sequence[Panel], rows: Sequence[str], columns: Sequence[str], *, title: str, across: int) -> Figure:
    """Panels of one size, `across` of them side by side where they fit, else a divisor of it; tokens as labels, or, of long ones, positions and a list."""
    T, S = panels[0].weights_TS.shape
    labelled = max(T, S) <= (LABELLED_ALONE if len(panels) == 1 else LABELLED)
    rows, columns = ([visible(token) for token in tokens] for tokens in (rows, columns))
    left = LETTER * max(map(len, rows)) + 0.12 if labelled else 0.3
    # One panel of a few tokens takes the column; several stand close.
    cell = CELL if len(panels) > 1 else min(max(CELL, (COLUMN - left - 0.12) / S), 2 * CELL)
    width, height = (cell * S, cell * T) if labelled else (PANEL, PANEL * T / S if T < S else PANEL)
    upright = labelled and max(map(len, columns)) > 1
    bottom = (LETTER * max(map(len, columns)) if upright else CELL) + 0.1 if labelled else 0.25
    gap, above = 0.12, 0.17 if any(panel.title for panel in panels) else 0.0
    across = max(n for n in range(1, across + 1) if across % n == 0 and (n == 1 or left + n * (width + gap) <= PAGE + 0.2))
    down = math.ceil(len(panels) / across)
    total = max(COLUMN, left + across * (width + gap))
    low, high = min(p.weights_TS.min() for p in panels), max(p.weights_TS.max() for p in panels)
    # Of what is linear in its values no weight is below zero, but for rounding.
    signed = low < -0.01 * high
    reach = max(abs(low), abs(high)) or 1.0
    shades = f"red {-reach:.2g}, white 0, blue {reach:.2g}" if signed else f"white 0, black {reach:.2g}"
    heading = wrapped(f"{title}; {shades}", total)
    notes = [] if labelled else listing(rows, total)
    top, below = len(heading) * 1.35 * FONT / 72 + 0.1, bottom + len(notes) * 1.35 * SMALL / 72 + (0.1 if notes else 0.0)
    figure = canvas(total, top + down * (above + height) + below)
    for n, panel in enumerate(panels):
        r, c = divmod(n, across)
        ax = axes_at(figure, left + c * (width + gap), top + r * (above + height) + above, width, height)
        colours = {"cmap": "RdBu", "vmin": -reach, "vmax": reach} if signed else {"cmap": "Greys", "vmin": 0, "vmax": reach}
        ax.imshow(panel.weights_TS, aspect="auto", interpolation="nearest", **colours)
        ax.set_title(panel.title, fontsize=FONT - 1, pad=2)
        ax.tick_params(length=1.2, width=0.4, pad=1, labelsize=SMALL, labelleft=c == 0, labelbottom=r == down - 1)
        if labelled:
            ax.set_yticks(range(T), rows, parse_math=False)
            ax.set_xticks(range(S), columns, rotation=90 if upright else 0, parse_math=False)
        else:
            ax.set_yticks(range(0, T, 16))
            ax.set_xticks(range(0, S, 16))
    write(figure, 0.05, 0.04, heading, FONT)
    write(figure, 0.05, figure.get_figheight() - len(notes) * 1.35 * SMALL / 72 - 0.02, notes, SMALL, family="DejaVu Sans Mono")
    return figure


def maps(picture_hwc: np.ndarray, words: Sequence[str], panels: Sequence[Panel], grid: tuple[int, int], *, title: str) -> Figure:
    """The picture, and for every word the picture whitened by the weights [words, cells] of each panel's head on the grid of cells laid over it.

    As in Xu et al. 2015, fig. 2 to 5, but with the cells as they are, not smoothed. A word is as white as can be where its weight is largest.
    One head is laid out as they do, several with a row each.
    """
    words = [visible(word) for word in words]
    alone = len(panels) == 1
    across = min(7, 1 + len(words)) if alone else 1 + len(words)
    side = (PAGE - 0.1) / 7 - 0.05 if alone else max(0.42, LETTER * max(map(len, words)) + 0.02)
    left = 0.05 if alone else LETTER * max(len(p.title) for p in panels) + 0.12
    down = math.ceil((1 + len(words)) / across) if alone else len(panels)
    above = 0.16  # of words: above every row where there is one head, else above the first
    step = side + (above if alone else 0.04)
    total = max(COLUMN, left + across * (side + 0.05))
    heading = wrapped(f"{title}; white: where it looks, each word by its own largest weight", total)
    top = len(heading) * 1.35 * FONT / 72 + 0.06 + (0.0 if alone else above)
    figure = canvas(total, top + down * step + 0.05)

    def show(r, c, picture, word=""):
        ax = axes_at(figure, left + c * (side + 0.05), top + r * step + (above if alone else 0.0), side, side)
        ax.imshow(picture, interpolation="nearest")
        ax.set_axis_off()
        if word and (alone or r == 0):
            ax.set_title(word, fontsize=FONT - 1 if alone else SMALL, pad=2, parse_math=False)

    for r, panel in enumerate(panels):
        show(r, 0, picture_hwc)
        for n, word in enumerate(words):
            place = divmod(n + 1, across) if alone else (r, n + 1)
            show(*place, whitened(picture_hwc, panel.weights_TS[n].reshape(grid)), word)
        if not alone:
            y = 1 - (top + r * step + side / 2) / figure.get_figheight()
            figure.text((left - 0.06) / total, y, panel.title, fontsize=SMALL, ha="right", va="center")
    write(figure, 0.05, 0.04, heading, FONT)
    return figure


def whitened(picture_hwc: np.ndarray, weights_hw: np.ndarray) -> np.ndarray:
    """The picture mixed with white by the weight of the cell that each pixel lies in, up to 85 % where it is largest."""
    H, W = picture_hwc.shape[:2]
    y, x = (np.arange(pixels) * cells // pixels for pixels, cells in zip((H, W), weights_hw.shape))
    share = np.clip(weights_hw[y][:, x] / max(weights_hw.max(), 1e-9), 0, 1)[..., None] * 0.85
    return picture_hwc * (1 - share) + share


def spans(learned: dict[str, list[np.ndarray]]) -> Figure:
    """What each head of each layer learned to look back, in positions: `learned` holds for each name [N] a layer. Sukhbaatar et al. 2019, fig. 3."""
    layers = max(map(len, learned.values()))
    learned = {"\n".join(wrapped(name, COLUMN - 0.4)): by_layer for name, by_layer in learned.items()}
    legend = sum(1 + name.count("\n") for name in learned) * 1.5 * FONT / 72 + 0.05
    figure = canvas(COLUMN, 2.1 + legend)
    ax = axes_at(figure, 0.5, 0.08, COLUMN - 0.6, 1.65)
    width = 0.7 / len(learned)
    for i, (name, by_layer) in enumerate(learned.items()):
        for layer, span_N in enumerate(by_layer):
            offsets = (np.arange(len(span_N)) + 0.5) / len(span_N) - 0.5
            x = layer + 1 + width * (i + 0.5) - 0.35 + 0.8 * width * offsets
            look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            ax.plot(x, span_N, ls="", ms=3, label=name if layer == 0 else None, **look)
    ax.set_xlim(0.5, layers + 0.5)
    ax.set_ylim(bottom=0)
    ax.set_xticks(range(1, layers + 1))
    ax.set_xlabel("layer, a mark for each head", fontsize=FONT)
    ax.set_ylabel("learned span, positions", fontsize=FONT)
    ax.tick_params(labelsize=FONT - 1, width=0.6, length=2.5)
    ax.grid(axis="y", color="0.9", lw=0.5)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    handles, names = ax.get_legend_handles_labels()
    figure.legend(handles, names, loc="lower left", bbox_to_anchor=(0.02, 0), fontsize=FONT - 1, frameon=False, borderaxespad=0.3, labelspacing=0.3)
    return figure


def listing(tokens: Sequence[str], width: float) -> list[str]:
    """The tokens in lines of sixteen or fewer, each with the position of its first."""
    separator = "" if max(map(len, tokens)) == 1 else " "
    count = next((n for n in (16, 8, 4, 2) if LETTER * (5 + max(len(separator.join(tokens[i : i + n])) for i in range(0, len(tokens), n))) <= width - 0.1), 1)
    return [f"{i:3d}  {separator.join(tokens[i : i + count])}" for i in range(0, len(tokens), count)]


def wrapped(text: str, width: float) -> list[str]:
    return textwrap.wrap(text, max(20, int((width - 0.1) * 72 / (0.53 * FONT))))


def write(figure: Figure, x: float, y: float, lines: list[str], size: float, **font) -> None:
    """Lines of text from (x, y) inches, counted from the upper left corner."""
    for n, line in enumerate(lines):
        down = 1 - (y + n * 1.35 * size / 72) / figure.get_figheight()
        figure.text(x / figure.get_figwidth(), down, line, fontsize=size, va="top", parse_math=False, **font)


def canvas(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def axes_at(figure: Figure, left: float, top: float, width: float, height: float):
    """Axes with their upper left corner at (left, top) inches, counted from that of the figure."""
    W, H = figure.get_size_inches()
    ax = figure.add_axes((left / W, 1 - (top + height) / H, width / W, height / H))
    for spine in ax.spines.values():
        spine.set_linewidth(0.5)
    return ax
