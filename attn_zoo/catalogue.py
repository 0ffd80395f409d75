"""What there is and what a sweep would do, as tables for the terminal: the zoo, and the cells of an experiment."""

import dataclasses

from tabulate import tabulate

from attn_zoo import train
from attn_zoo.attention import VARIANTS
from attn_zoo.config import Cell, Experiment
from attn_zoo.models import activation_bytes, flops_per_step, param_counts
from attn_zoo.spec import Spec, Unsupported
from attn_zoo.sweep import cells
from attn_zoo.tasks import load_task

UNBRACED = str.maketrans("", "", "{}")  # BibTeX's braces keep capitals; a terminal does not need them


def zoo_table() -> str:
    """The registry: name with options and defaults, cost, what each can do, paper; and the reasons for what it cannot."""
    rows, reasons = [], []
    for name, v in VARIANTS.items():
        spec = Spec(name, tuple((f.name, f.default) for f in dataclasses.fields(v.options)))
        claims = {claim: getattr(v, claim) for claim in ("causal", "cross", "decode")}
        able = ", ".join(claim for claim, value in claims.items() if value is True)
        reasons += [f"{name} is not {claim}: {reason}" for claim, reason in claims.items() if reason is not True and claim != "decode"]
        first = v.paper.authors.split(",")[0]
        rows.append((str(spec), v.family, v.complexity, able, f"{first} et al. {v.paper.year}: {v.paper.title.translate(UNBRACED)}"))
    table = tabulate(rows, headers=("variant", "family", "cost", "can do", "paper"), maxcolwidths=(44, 16, 22, 14, 48), tablefmt="simple")
    return f"{table}\n\n" + "\n".join(reasons)


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
    flops, params = flops_per_step(model, B, cell.seq_len)["model"], param_counts(model)["total"]
    # Parameters, gradients and Adam's two moments, all float32, and what the backward pass needs of the forward.
    memory = 16 * params + activation_bytes(model, B, cell.seq_len)
    return flops * cell.train.steps, params, flops / 1e9, memory / 2**20, ""
