"""Table 1 of "Attention Is All You Need", measured: time, sequential operations and path length of one layer of each type.

    python experiments/layer_types.py                                         # B=1, D=256, T = 256 to 4k; T=1024, D = 64 to 512; some minutes on a CPU
    python experiments/layer_types.py --seq_lens=512,1024,2048 --window=128 --kernel=5
    python experiments/layer_types.py --report_only                           # the table again, from the records alone

The layers are those of this package, causal, each from [B, T, D] to [B, T, D]: multi-head self-attention (`full`), the same restricted to a window (`local`), a
gated recurrent unit, and gated convolutions, contiguous or with dilations that double from layer to layer. Vaswani et al. 2017 leave the projections of
attention, 4 T D^2, out of its complexity, so here it stands a second time without them.

Time: forward, and forward + backward to input and parameters; all layers of one size are compiled first and then timed in interleaved rounds. Exponents are
least-squares slopes of log seconds over log T at a fixed D, and over log D at a fixed T, with standard error.
Sequential operations: the longest chain of loop trips that wait for each other (attn_zoo.dependence), a layer without loops being one operation. Attention
is counted as defined, by its reference, and as timed, in blocks of queries and keys that it visits one after the other to save memory
(but where a kernel of attention runs, as `auto` has it on most machines: then they are inside of one call, and not counted).
Maximum path length: from the first input to the last output. It is the number of layers that a stack needs until the one depends on the other, found by
following the zeros of each layer's gradient, times the sequential operations of a layer that passes on a state.
"""

import dataclasses
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from bench.candidates import Jax
from bench.rounds import MODES, measure
from flax import nnx
from tabulate import tabulate

from attn_zoo import UserError, make_attention, provenance
from attn_zoo.dependence import longest_chain, positions_reached
from attn_zoo.measure import matmul_flops_per_s
from attn_zoo.memory import keep_freed_memory
from attn_zoo.models.convolutional_stack import DilatedLayer
from attn_zoo.models.multi_head import MultiHeadAttention
from attn_zoo.models.recurrent import Cell
from attn_zoo.spec import check, check_int
from attn_zoo.summary import fit_exponent

SEQ_LENS = flags.DEFINE_list("seq_lens", ["256", "512", "1024", "2048", "4096"], "Lengths T to time at D, and to count sequential operations at.")
WIDTHS = flags.DEFINE_list("widths", ["64", "128", "256", "512"], "Widths D to time at T.")
PATH_LENS = flags.DEFINE_list("path_lens", ["64", "128", "256"], "Lengths T to measure paths at; the gradients of a recurrence vanish on long ones.")
INTEGERS = [
    flags.DEFINE_integer(*f, lower_bound=1)
    for f in (
        ("B", 1, "Batch."),
        ("D", 256, "The fixed width."),
        ("T", 1024, "The fixed length."),
        ("H", 64, "Head dim, which divides every width."),
        ("window", 64, "Of restricted self-attention: keys before the query's own."),
        ("kernel", 3, "Taps of a convolution."),
        ("rounds", 7, "Timed samples of each layer, interleaved."),
    )
]
B, FIXED_D, FIXED_T, H, WINDOW, KERNEL, ROUNDS = INTEGERS
OUT = flags.DEFINE_string("out", "results/layer_types", "Folder for records.json and table.md.")
REPORT_ONLY = flags.DEFINE_bool("report_only", False, "Write table.md again from records.json.")


class AttentionAlone(nnx.Module):
    """Attention from each head's channels to themselves, between no projections."""

    def __init__(self, attention):
        self.attention = attention

    def __call__(self, x_BTD):
        x_BTNH = x_BTD.reshape(*x_BTD.shape[:2], -1, self.attention.dims.head_dim)
        return self.attention(x_BTNH, x_BTNH, x_BTNH).reshape(x_BTD.shape)


class AsDefined(nnx.Module):
    """Attention by its reference: the equation, without the blocks of the fast form."""

    def __init__(self, attention):
        self.attention, self.dims = attention, attention.dims

    def __call__(self, *args, **kwargs):
        return self.attention.reference(*args, **kwargs)


class Recurrence(nnx.Module):
    """A gated recurrent unit over positions."""

    def __init__(self, D: int):
        self.cell = Cell("gru", D, D, "float32", nnx.Rngs(0))

    def __call__(self, x_BTD):
        return self.cell.read(x_BTD, None, False)[0]


def attention(spec: str, D: int, T: int):
    return make_attention(spec, num_heads=D // H.value, head_dim=H.value, max_len=T, causal=True)


def convolution(D: int, dilation: int) -> DilatedLayer:
    return DilatedLayer(D, KERNEL.value, dilation, True, "layernorm", 1.0, "float32", nnx.Rngs(0))


def local() -> str:
    return f"local(window={WINDOW.value})"


@dataclasses.dataclass(frozen=True)
class Layer:
    """A row: how a layer is built, and what Table 1 says of it, with n for T, d for D, k for the taps and r for the neighbourhood."""

    name: str
    build: Callable[[int, int, int], nnx.Module]  # (D, T, dilation)
    complexity: str
    sequential: str
    path: str
    passes_state: bool = False
    dilates: bool = False


LAYERS = (
    Layer("self-attention", lambda D, T, _: MultiHeadAttention(attention("full", D, T), D=D, rngs=nnx.Rngs(0)), "n² d", "1", "1"),
    Layer("self-attention, without projections", lambda D, T, _: AttentionAlone(attention("full", D, T)), "n² d", "1", "1"),
    Layer("recurrent (GRU)", lambda D, T, _: Recurrence(D), "n d²", "n", "n", passes_state=True),
    Layer("convolutional, contiguous", lambda D, T, _: convolution(D, 1), "k n d²", "1", "n / k"),
    Layer("convolutional, dilated", lambda D, T, dilation: convolution(D, dilation), "k n d²", "1", "log_k n", dilates=True),
    Layer("self-attention, restricted", lambda D, T, _: MultiHeadAttention(attention(local(), D, T), D=D, rngs=nnx.Rngs(0)), "r n d", "1", "n / r"),
    Layer("self-attention, restricted, without projections", lambda D, T, _: AttentionAlone(attention(local(), D, T)), "r n d", "1", "n / r"),
)


def time_layers(T: int, D: int) -> list[dict]:
    """Records of the times of all layers in both modes at one size; gradients go to input and parameters."""
    x = jax.random.normal(jax.random.key(0), (B.value, T, D))
    # As far apart as the taps of a dilated layer come at this length.
    widest = max(d for d in (2**n for n in range(T.bit_length())) if d == 1 or d * (KERNEL.value - 1) < T)
    rows = []
    for layer in LAYERS:
        graph, state = nnx.split(layer.build(D, T, widest if layer.dilates else 1))
        call = functools.partial(lambda graph, state, x: nnx.merge(graph, state)(x), graph)
        rows.append(Jax(layer.name, call, (state, x), spec=layer.name, causal=True))
    return [{"kind": "time", "name": row.name, "mode": mode, "T": T, "D": D} | outcome for row, mode, outcome in measure(rows, ROUNDS.value, jobs=1)]


def count_operations(layer: Layer, T: int) -> tuple[int, int]:
    """Sequential operations of a layer (as defined, as timed). They do not depend on B and D, which are small here."""
    x = jax.random.normal(jax.random.key(0), (1, T, H.value))
    module = layer.build(H.value, T, 1)
    as_timed = longest_chain(module, x)
    if hasattr(module, "attention"):
        module.attention = AsDefined(module.attention)
    return max(1, longest_chain(module, x)), max(1, as_timed)


def layers_between_ends(layer: Layer, T: int) -> int:
    """How many layers a stack needs until its last output depends on its first input. Raises UserError if ever more add nothing."""

    @functools.cache
    def reached(dilation):
        return positions_reached(layer.build(H.value, T, dilation), T, H.value)

    seen_T = np.eye(T, dtype=bool)[0]  # positions that depend on the first input
    for count in itertools.count(1):
        before, seen_T = seen_T, (reached(2 ** (count - 1) if layer.dilates else 1) & seen_T).any(axis=1)
        if seen_T[-1]:
            return count
        if (seen_T == before).all():
            raise UserError(f"--path_lens={T}: {layer.name}: no number of layers brings the first input to position {T - 1} in float32; use a smaller length")


def structure() -> list[dict]:
    """Records of what no clock tells: sequential operations and paths."""
    records = []
    for layer in LAYERS:
        for T in lengths(SEQ_LENS):
            defined, timed = count_operations(layer, T)
            records.append({"kind": "operations", "name": layer.name, "T": T, "as_defined": defined, "as_timed": timed})
        for T in lengths(PATH_LENS):
            depth = layers_between_ends(layer, T)
            steps = count_operations(layer, T)[0] if layer.passes_state else 1
            records.append({"kind": "path", "name": layer.name, "T": T, "layers": depth, "length": depth * steps})
    return records


def lengths(flag: flags.FlagHolder) -> list[int]:
    """The sizes of a list flag, ascending. Raises UserError for what is no whole number above 1."""
    check(bool(flag.value) and all(text.strip().isdigit() for text in flag.value), f"--{flag.name}", ",".join(flag.value), "must list whole numbers, as in 256,512")
    for T in map(int, flag.value):
        check_int(f"--{flag.name}", T, 2)
    return sorted(set(map(int, flag.value)))


def table(content: dict) -> str:
    """Markdown: Table 1 with what was measured beside what it says, then the times; from the records alone."""
    s, p, records = content["settings"], content["provenance"], content["records"]
    of = lambda kind, name: [r for r in records if r["kind"] == kind and r["name"] == name]
    numbers = lambda rows, key: ", ".join(f"{r[key]:,}" for r in rows)
    rows, names = [], [layer.name for layer in LAYERS if of("time", layer.name)]
    for layer in (layer for layer in LAYERS if layer.name in names):
        times, operations = of("time", layer.name), of("operations", layer.name)
        exponents = [_exponent(times, mode, axis, s) for axis in "TD" for mode in MODES]
        measured = numbers(operations, "as_defined"), numbers(operations, "as_timed"), numbers(of("path", layer.name), "length")
        rows.append([layer.name, layer.complexity, *exponents, layer.sequential, *measured[:2], layer.path, measured[2]])
    each = lambda kind: ", ".join(f"{T:,}" for T in sorted({r["T"] for r in records if r["kind"] == kind}))
    header = ["layer", "complexity: Table 1", *(f"time ~ {size}: {mode}" for size in ("T^", "D^") for mode in ("forward", "+ backward"))]
    header += ["sequential operations: Table 1", "as defined", "as timed", "maximum path: Table 1", "measured"]
    lines = [
        f"Layer types, causal, B={s['B']}, H={s['H']}, float32; exponents in T at D={s['D']}, in D at T={s['T']}; k={s['kernel']} taps, a window of r={s['window']} "
        f"keys and the query's own. Sequential operations at T = {each('operations')}; paths at T = {each('path')}.",
        "",
        tabulate(rows, header, tablefmt="pipe", disable_numparse=True),
    ]
    for mode in MODES:
        sizes = sorted({(r["T"], r["D"]) for r in records if r["kind"] == "time"})
        at = {(r["name"], r["T"], r["D"]): r for r in records if r["kind"] == "time" and r["mode"] == mode}
        rows = [[name, *(_milliseconds(at.get((name, *size))) for size in sizes)] for name in names]
        header = ["", *(f"T = {T:,}, D = {D}" for T, D in sizes)]
        lines += ["", f"**{mode.replace('_', ' + ').capitalize()}**, ms", "", tabulate(rows, header, tablefmt="pipe", disable_numparse=True)]
    rate = " to ".join(f"{r / 1e9:.0f}" for r in content["matmul_flops_per_s"])
    changes = " with local changes" if p["git_dirty"] else ""
    lines += ["", f"{p['device_kind']} ({p['cpu']}), jax {p['jax']}, attn_zoo {str(p['git_commit'])[:10]}{changes}, {p['date'][:10]}."]
    lines[-1] += f" Matrix product {rate} GFLOP/s. Medians of {s['rounds']} interleaved rounds."
    lines[-1] += " Freed memory was kept for the next call." if p.get("memory_kept") else ""
    return "\n".join(lines) + "\n"


def _exponent(times: list[dict], mode: str, axis: str, settings: dict) -> str:
    """The exponent of time in T or in D, the other fixed, with its standard error."""
    fixed = "D" if axis == "T" else "T"
    rows = sorted((r[axis], r["speed"]["median_s"]) for r in times if r["mode"] == mode and r[fixed] == settings[fixed] and r["status"] == "ok")
    slope, error = fit_exponent(*map(list, zip(*rows))) if rows else (None, None)
    return "–" if slope is None else f"{slope:.2f} ± {error:.2f}"


def _milliseconds(record: dict | None) -> str:
    if record is None:
        return "–"
    return f"{record['speed']['median_s'] * 1e3:.2f}" if record["status"] == "ok" else record["message"]


def main(_) -> None:
    try:
        run(Path(OUT.value))
    except UserError as e:
        print(f"layer_types.py: {e}", file=sys.stderr)
        sys.exit(2)


def run(out: Path) -> None:
    """Measures unless told to report only, and writes records.json and table.md into `out`."""
    if not REPORT_ONLY.value:
        check(KERNEL.value > 1, "--kernel", KERNEL.value, "must be at least 2, or nothing passes between positions")
        sizes = {(T, FIXED_D.value) for T in lengths(SEQ_LENS)} | {(FIXED_T.value, D) for D in lengths(WIDTHS)}
        for D in sorted({D for _, D in sizes}):
            check(D % H.value == 0, "D", D, f"must be a multiple of the head dim --H={H.value}")
        lengths(PATH_LENS)
        keep_freed_memory()  # before JAX has threads
        rates, records = [matmul_flops_per_s("float32")], []
        for T, D in sorted(sizes):
            records += time_layers(T, D)
            print(f"T = {T}, D = {D} timed", file=sys.stderr, flush=True)
        rates.append(matmul_flops_per_s("float32"))
        records += structure()
        content = {"settings": {f.name: f.value for f in INTEGERS}, "matmul_flops_per_s": rates, "records": records, "provenance": provenance.collect()}
        out.mkdir(parents=True, exist_ok=True)
        temporary = out / f".records.json.{os.getpid()}"
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, out / "records.json")
    if not (out / "records.json").exists():
        raise UserError(f"--report_only: there is no {out / 'records.json'}")
    text = table(json.loads((out / "records.json").read_text()))
    (out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    app.run(main)
