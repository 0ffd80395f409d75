"""What there is and what a sweep would do: the zoo as a table and as a page of the documentation, and the cells of an experiment.

    python -m attn_zoo.catalogue       # renews docs/zoo.md and the zoo's table in the README, from the registry and the variants' own texts
"""

import dataclasses
import inspect
import sys
from itertools import groupby
from pathlib import Path

from tabulate import tabulate

from attn_zoo import train
from attn_zoo.attention import VARIANTS
from attn_zoo.attention.base import Variant
from attn_zoo.config import Cell, Experiment
from attn_zoo.models import param_counts
from attn_zoo.spec import Spec, Unsupported
from attn_zoo.sweep import cells
from attn_zoo.tasks import load_task

ACCENTS = {r"\'e": "é", r"\'E": "É", r"\'a": "á", r"\cc": "ç", r"\"o": "ö", r"\"u": "ü", r"\L": "Ł", r"\vc": "č"}  # BibTeX's, less the braces


def zoo_table() -> str:
    """The registry for a terminal: name with options and defaults, cost, what each can do, paper; and the reasons for what it cannot."""
    rows = [(str(_defaults(v)), v.family, v.complexity, _able(v), f"{_authors(v)} {v.paper.year}: {_plain(v.paper.title)}") for v in VARIANTS.values()]
    reasons = [f"{name} {reason}" for name, v in VARIANTS.items() for reason in refusals(v)]
    table = tabulate(rows, headers=("variant", "family", "cost", "can do", "paper"), maxcolwidths=(44, 16, 22, 14, 48), tablefmt="simple")
    return f"{table}\n\n" + "\n".join(reasons)


def refusals(variant: Variant) -> list[str]:
    """What a variant says it cannot do, or cannot be held to, and why: 'cannot be causal: ...'."""
    found = []
    if variant.causal is not True:
        found.append(f"cannot be causal: {variant.causal}")
    if variant.cross is not True:
        found.append(f"cannot attend across sequences: {variant.cross}")
    if variant.bound is not None:
        found.append(f"is never exactly full attention: {variant.bound.why}")
    if variant.causal is True and variant.decode is not True:
        found.append(f"generates by feeding the sequence again: {variant.decode}")
    if variant.foresight:
        found.append(f"may generate otherwise than it was trained: {variant.foresight}")
    return found


def state_growth(variant: Variant) -> str:
    """How a decoder's state grows with T, in words."""
    if variant.causal is not True:
        return "–"
    if variant.decode is not True:
        return "re-fed"
    return {0.0: "constant", 1.0: "T"}.get(variant.state_order, f"T^{variant.state_order:g}")


def readme_zoo() -> str:
    """The zoo's table for the README."""
    rows = []
    for name, v in VARIANTS.items():
        able = ["✓" if getattr(v, claim) is True else "–" for claim in ("causal", "cross")]
        rows.append((f"[`{name}`](docs/zoo.md#{name})", v.family, f"`{v.complexity}`".replace("|", "\\|"), *able, state_growth(v), f"{_authors(v)} {v.paper.year}"))
    return tabulate(rows, headers=("variant", "family", "cost", "causal", "cross", "state of generation", "paper"), tablefmt="github") + "\n"


def zoo_page() -> str:
    """docs/zoo.md: every variant's idea, equation, options, cost, abilities and departures, in the words of its file."""
    lines = [
        "# The zoo",
        "",
        "Every variant in the words of its own file, in the order of the tables. Letters: T queries, S keys, N heads, H head dim; i is the query's position, j the key's.",
        "Scores are scaled by H^-1/2 unless said otherwise, and `causal` adds j <= i. Made from the registry by `python -m attn_zoo.catalogue`.",
        "",
        "![what sees what in every sparse variant](patterns.png)",
        "",
        "Drawn by `python launch.py --plot_attention=patterns`.",
    ]
    for family, members in groupby(VARIANTS.values(), key=lambda v: v.family):
        lines += ["", f"## {family[0].upper()}{family[1:]}"]
        for v in members:
            lines += ["", f"### {v.name}"]
            for paragraph in inspect.getmodule(v.options).__doc__.split("\n\n"):
                for indented, part in groupby(paragraph.splitlines(), key=lambda line: line.startswith("    ")):
                    lines += ["", *part] if indented else ["", _prose("\n".join(part))]
            lines += ["", f"- Spec: `{_defaults(v)}`. {_prose(v.options.__doc__) if dataclasses.fields(v.options) else 'It has no options.'}"]
            lines += [f"- Cost: `{v.complexity}`; time grows as T^{v.time_order:g} and memory as T^{v.memory_order:g} at the defaults."]
            lines += [f"- Can do: {_able(v) or 'self-attention without a causal mask'}, padding." + "".join(f" It {_prose(r)}." for r in refusals(v))]
            if v.decode is True and v.causal is True:
                lines += [f"- Generation keeps a state that grows as T^{v.state_order:g} at the defaults." if v.state_order else "- Generation keeps a state of one size, whatever the length."]
            limit = v.exact_when(64)
            lines += [f"- Equals `full` at T = 64 as `{Spec(v.name, tuple(limit.items()))}`."] if limit is not None else []
            lines += [f"- {_plain(v.paper.authors).replace(' and ', '; ')}: *{_plain(v.paper.title)}*. {_plain(v.paper.venue)}, {v.paper.year}. `{v.paper.key}`"]
    return "\n".join(lines) + "\n"


def renew(root: Path) -> None:
    """Writes docs/zoo.md and the README's zoo table under `root`."""
    from attn_zoo.report import renew_section

    (root / "docs" / "zoo.md").write_text(zoo_page(), encoding="utf-8", newline="\n")
    readme = (root / "README.md").read_text(encoding="utf-8")
    (root / "README.md").write_text(renew_section(readme, "zoo", readme_zoo()), encoding="utf-8", newline="\n")


def _defaults(v: Variant) -> Spec:
    return Spec(v.name, tuple((f.name, f.default) for f in dataclasses.fields(v.options)))


def _able(v: Variant) -> str:
    return ", ".join(claim for claim in ("causal", "cross", "decode") if getattr(v, claim) is True)


def _authors(v: Variant) -> str:
    names = [_plain(author.split(",")[0]) for author in v.paper.authors.split(" and ")]
    return names[0] if len(names) == 1 else " and ".join(names) if len(names) == 2 else f"{names[0]} et al."


def _plain(text: str) -> str:
    """BibTeX as plain text."""
    text = text.replace("{", "").replace("}", "")
    for code, letter in ACCENTS.items():
        text = text.replace(code, letter)
    return text


def _prose(text: str) -> str:
    """A paragraph of a docstring as Markdown: on one line, and outside `code` nothing that would be taken for markup."""
    pieces = " ".join(text.split()).split("`")
    pieces[::2] = [piece.replace("*", "\\*").replace("<", "&lt;").replace("~", "\\~") for piece in pieces[::2]]
    return "`".join(pieces)


def cell_table(experiment: Experiment, data_dir: str) -> str:
    """The cells of an experiment with parameters, useful FLOPs and an estimate of memory; nothing is run or compiled."""
    rows, total = [], 0.0
    estimates: dict[Cell, tuple] = {}
    for cell in cells(experiment, data_dir):
        same = dataclasses.replace(cell, seed=0)
        if same not in estimates:
            estimates[same] = _estimate(same, data_dir)
        rows.append((cell.id, cell.variant, cell.seq_len, cell.seed, *estimates[same][1:]))
        total += estimates[same][0]
    headers = ("cell", "variant", "T", "seed", "parameters", "GFLOP/step", "memory MiB (estimate)", "note")
    table = tabulate(rows, headers=headers, tablefmt="simple", floatfmt=("", "", "", "", "", ".2f", ".0f", ""), intfmt=("", "", "", "", ",", "", "", ""))
    return f"{table}\n\n{len(rows)} cells, {total / 1e12:,.2f} TFLOP of training in all, useful work only"


def _estimate(cell: Cell, data_dir: str) -> tuple:
    """(FLOPs of the training, parameters, GFLOP a step, MiB, note)."""
    task = load_task(cell.task, cell.seq_len, data_dir)
    try:
        model = train.Model(cell, task).abstract
    except Unsupported as e:
        return 0.0, None, None, None, f"unsupported: {e}"
    B = train.batch_size(cell)
    flops, params = model.flops_per_step(B, cell.seq_len)["model"], param_counts(model)["total"]
    # Parameters, gradients and Adam's two moments, all float32, and what the backward pass needs of the forward.
    memory = 16 * params + model.activation_bytes(B, cell.seq_len)
    return flops * cell.train.steps, params, flops / 1e9, memory / 2**20, ""


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(f"{' '.join(sys.argv[1:])!r}: it takes no arguments, and renews docs/zoo.md and the README's table of the zoo")
    renew(Path(__file__).parents[1])
