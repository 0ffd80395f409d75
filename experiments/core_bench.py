"""Attention alone, against jax.nn.dot_product_attention in the same process: time and memory of forward, and forward + backward.

    python experiments/core_bench.py                                          # every variant, B=1, N=8, H=64, f32, T = 1k to 8k
    python experiments/core_bench.py --variants='local(window=256)' --seq_lens=4096
    python experiments/core_bench.py --report_only                            # the tables again, from the records alone

All candidates of one length are compiled first and then timed in interleaved rounds, so that a slow moment of the machine falls on all
of them; medians with 20th and 80th percentile. Variants that cannot be causal run bidirectionally, and their row says so. Memory is what
XLA allots beyond arguments and results. Exponents are least-squares slopes of log seconds (bytes) over log T. The last column gives the length from
which on a variant is faster than `full` in the same direction: between two lengths measured, or predicted by the fits beyond the last.
"""

import json
import math
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from tabulate import tabulate

from attn_zoo import VARIANTS, UserError, make_attention, provenance
from attn_zoo.attention import find, parse_variants, variant_text
from attn_zoo.measure import compile_timed, matmul_flops_per_s
from attn_zoo.summary import crossover, predicted_crossover

VARIANT_SPECS = flags.DEFINE_string("variants", None, "Specs; by default every variant of the zoo.")
SEQ_LENS = flags.DEFINE_list("seq_lens", ["1024", "2048", "4096", "8192"], "Sequence lengths.")
BATCH, HEADS, HEAD_DIM = (flags.DEFINE_integer(*f) for f in (("B", 1, "Batch."), ("N", 8, "Heads."), ("H", 64, "Head dim.")))
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Of queries, keys and values.")
CAUSAL = flags.DEFINE_bool("causal", True, "Causal where a variant can be.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed calls of each candidate, interleaved.")
OUT = flags.DEFINE_string("out", "results/core_bench", "Folder for records.json and table.md.")
REPORT_ONLY = flags.DEFINE_bool("report_only", False, "Write table.md again from records.json.")

PEER = "jax.nn (xla)"
MODES = ("forward", "forward_backward")


def candidates(T: int, specs: list[str]) -> dict[str, tuple]:
    """{name: (function of q, k, v, causal, forward FLOPs)}: the peer first; it and `full` in both directions if a variant needs it."""
    shape = dict(num_heads=HEADS.value, head_dim=HEAD_DIM.value, max_len=T, dtype=jnp.dtype(DTYPE.value))
    found, directions = {}, set()

    def add(name, spec, causal):
        attention = make_attention(spec, causal=causal, **shape)
        graph, state = nnx.split(attention)
        flops = attention.flops(BATCH.value, T, T)
        found[name] = (lambda q, k, v: nnx.merge(graph, state)(q, k, v), causal, flops)
        directions.add(causal)

    for spec in specs:
        add(spec, spec, CAUSAL.value and find(spec)[0].causal is True)
    if "full" in specs and directions == {True, False}:
        add(both_ways("full"), "full", False)
    peers = {}
    for causal in sorted(directions, reverse=True):
        flops = 4.0 * BATCH.value * HEADS.value * HEAD_DIM.value * (T * (T + 1) / 2 if causal else T * T)
        call = lambda q, k, v, causal=causal: jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="xla")
        peers[PEER if causal == CAUSAL.value else both_ways(PEER)] = (call, causal, flops)
    return peers | found


def both_ways(name: str) -> str:
    """The name of a candidate that could be causal, run bidirectionally for the sake of those that cannot."""
    return f"{name}, bidirectional"


def measure(T: int, specs: list[str]) -> list[dict]:
    """Records of all candidates and modes at one length."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, do = (jax.random.normal(key, (BATCH.value, T, HEADS.value, HEAD_DIM.value)).astype(DTYPE.value) for key in keys)
    records, calls = [], []
    for name, (function, causal, flops) in candidates(T, specs).items():

        def both(q, k, v, do, function=function):
            o, pull = jax.vjp(function, q, k, v)
            return o, pull(do)

        for mode, call, args in (("forward", function, (q, k, v)), ("forward_backward", both, (q, k, v, do))):
            record = {"name": name, "seq_len": T, "mode": mode, "causal": causal, "flops": flops * (1 if mode == "forward" else 3), "status": "ok"}
            records.append(record)
            try:
                compiled, record["compile"] = compile_timed(jax.jit(call), *args)
                jax.block_until_ready(compiled(*args))
            except Exception as e:  # a row with the reason, whatever it is
                record |= {"status": "failed", "message": f"{type(e).__name__}: {str(e).splitlines()[0]}"}
                continue
            record["temp_bytes"] = compiled.memory_analysis().temp_size_in_bytes
            calls.append((record, compiled, args, []))
    for _ in range(ROUNDS.value):
        for _, compiled, args, seconds in calls:
            start = time.perf_counter()
            jax.block_until_ready(compiled(*args))
            seconds.append(time.perf_counter() - start)
    for record, _, _, seconds in calls:
        p20, median, p80 = np.percentile(seconds, (20, 50, 80)).tolist()
        record["speed"] = {"median_s": median, "p20_s": p20, "p80_s": p80, "n": len(seconds)}
    return records


def table(content: dict) -> str:
    """Markdown: a table a mode (ms, times faster than the peer, memory), and exponents; from the records alone."""
    s, p = content["settings"], content["provenance"]
    lines = [f"Attention alone, B={s['B']}, N={s['N']}, H={s['H']}, {s['dtype']}, {'causal unless marked (b)' if s['causal'] else 'bidirectional'}."]
    for mode in MODES:
        records = [r for r in content["records"] if r["mode"] == mode]
        lengths = sorted({r["seq_len"] for r in records})
        by_name = defaultdict(dict)
        for r in records:
            by_name[r["name"]][r["seq_len"]] = r
        peer_of = {r["causal"]: name for name, rs in by_name.items() if name.startswith(PEER) for r in rs.values()}
        rows = []
        for name, at in by_name.items():
            causal = next(iter(at.values()))["causal"]
            mark = " (b)" if s["causal"] and not causal and not name.endswith(both_ways("")) else ""
            full = by_name.get("full" if causal == s["causal"] else both_ways("full"))
            cells = (_cell(at.get(T), by_name[peer_of[causal]].get(T)) for T in lengths)
            rows.append([f"`{name}`{mark}", *cells, *_slopes(at), "–" if full is None or at is full else _faster_from(at, full)])
        header = ["", *(f"T = {T}" for T in lengths), "time exponent", "memory exponent", "faster than `full` from T"]
        lines += ["", f"**{mode.replace('_', ' + ').capitalize()}**: ms (× faster than {PEER}), MiB of temporary memory", "", tabulate(rows, header, tablefmt="pipe", disable_numparse=True)]
    rate = [f"{r / 1e9:.0f}" for r in content["matmul_flops_per_s"]]
    lines += ["", f"{p['device_kind']} ({p['cpu']}), jax {p['jax']}, attn_zoo {str(p['git_commit'])[:10]}{' with local changes' if p['git_dirty'] else ''}, {p['date'][:10]}. Matrix product {' to '.join(rate)} GFLOP/s. Medians of {s['rounds']} interleaved rounds."]
    return "\n".join(lines) + "\n"


def _cell(record: dict | None, peer: dict | None) -> str:
    if record is None:
        return "–"
    if record["status"] != "ok":
        return record["message"]
    seconds = record["speed"]["median_s"]
    ratio = f" ({peer['speed']['median_s'] / seconds:.1f}×)" if peer and peer["status"] == "ok" else ""
    return f"{seconds * 1e3:.1f}{ratio}, {record['temp_bytes'] / 2**20:.0f}"


def _faster_from(at: dict[int, dict], full: dict[int, dict]) -> str:
    """From which T on a variant is faster than `full`: measured, interpolated, or where the two fits meet beyond the last length."""
    lengths = [T for T in sorted(at) if at[T]["status"] == "ok" and T in full and full[T]["status"] == "ok"]
    own, reference = ([curve[T]["speed"]["median_s"] for T in lengths] for curve in (at, full))
    if not lengths:
        return "–"
    T = crossover(lengths, reference, own)
    if T < math.inf:
        return f"{T:.0f}" if T else f"≤ {lengths[0]}"
    T = predicted_crossover(lengths, reference, own)
    return f"{T:.2g}, by the fit" if T < math.inf else "never, by the fit"


def _slopes(at: dict[int, dict]) -> list[str]:
    ok = {T: r for T, r in at.items() if r["status"] == "ok"}
    if len(ok) < 3:
        return ["–", "–"]
    curves = [r["speed"]["median_s"] for r in ok.values()], [max(r["temp_bytes"], 1) for r in ok.values()]
    return [f"{np.polyfit(np.log(list(ok)), np.log(curve), 1)[0]:.2f}" for curve in curves]


def main(_) -> None:
    try:
        run(Path(OUT.value))
    except UserError as e:
        print(f"core_bench.py: {e}", file=sys.stderr)
        sys.exit(2)


def run(out: Path) -> None:
    """Measures what is not measured yet, unless told to report only, and writes records.json and table.md into `out`."""
    path = out / "records.json"
    if not REPORT_ONLY.value:
        text = VARIANT_SPECS.value if VARIANT_SPECS.value is not None else ", ".join(VARIANTS)
        specs = [variant_text(entry) for entry in parse_variants(text)]
        settings = {f.name: f.value for f in (BATCH, HEADS, HEAD_DIM, DTYPE, CAUSAL, ROUNDS)} | {"specs": specs}
        content = {"settings": settings, "matmul_flops_per_s": [], "records": [], "provenance": provenance.collect()}
        if path.exists():
            before = json.loads(path.read_text())
            same = all(before["provenance"].get(key) == content["provenance"][key] for key in ("git_commit", "git_dirty", "cpu"))
            if before["settings"] == settings and same and not before["provenance"]["git_dirty"]:
                content = before
        for T in map(int, SEQ_LENS.value):
            if T not in {r["seq_len"] for r in content["records"]}:
                content["matmul_flops_per_s"].append(matmul_flops_per_s(DTYPE.value))
                content["records"] += measure(T, specs)
                _write(path, content)
            print(f"T = {T} done", file=sys.stderr, flush=True)
    if not path.exists():
        raise UserError(f"--report_only: there is no {path}")
    text = table(json.loads(path.read_text()))
    (out / "table.md").write_text(text)
    print(text)


def _write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    app.run(main)
