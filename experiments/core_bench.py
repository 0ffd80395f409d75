"""Attention alone, side by side: every variant, JAX's own attention, PyTorch's and the packages of others, in one run; time and memory of forward, and forward + backward.

    python experiments/core_bench.py                                          # every variant, B=1, N=8, H=64, f32, T = 1k to 8k, against jax.nn
    make bench                                                                # with every peer that can be imported, in an environment of its own (--peers=all)
    make bench-gpu ACCELERATOR=cuda13                                         # in bfloat16 to T = 32k, on an NVIDIA GPU
    python experiments/core_bench.py --variants='local(window=256)' --seq_lens=4096
    python experiments/core_bench.py --report_only                            # tables and figures again, from the records alone

All candidates of one length are compiled first and then timed in interleaved rounds, so that a slow moment of the machine falls on all
of them; medians with 20th and 80th percentile. PyTorch runs in processes of its own, one or more, which wait while JAX is timed, as JAX does while PyTorch is. Variants that cannot be
causal run bidirectionally, and their row says so. A peer is set beside the variant that sees the same pairs, and those that come with their projections beside that
variant with its own. What cannot run is a row with the reason. One record a candidate, length and mode; a length that has all its records, none of them of a
row that was lost or left out, is not measured again.
"""

import hashlib
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from absl import app, flags
from bench import candidates, report
from bench.candidates import Problem, TorchProcess
from bench.jax_peers import jax_peers
from bench.rounds import MODES, done, measure
from bench.single_pattern import single_pattern

from attn_zoo import VARIANTS, UserError, provenance
from attn_zoo.attention import find, parse_variants, variant_text
from attn_zoo.measure import copy_bytes_per_s, matmul_flops_per_s
from attn_zoo.memory import keep_freed_memory
from attn_zoo.results import load_records, write_record
from attn_zoo.spec import check, check_int

VARIANT_SPECS = flags.DEFINE_string("variants", None, "Specs; by default every variant of the zoo.")
SEQ_LENS = flags.DEFINE_list("seq_lens", ["1024", "2048", "4096", "8192"], "Sequence lengths.")
BATCH = flags.DEFINE_integer("B", 1, "Batch.", lower_bound=1)
HEADS = flags.DEFINE_integer("N", 8, "Heads.", lower_bound=1)
HEAD_DIM = flags.DEFINE_integer("H", 64, "Head dim.", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Of queries, keys and values.")
CAUSAL = flags.DEFINE_bool("causal", True, "Causal where a variant can be.")
TOKENS = flags.DEFINE_integer("tokens", None, "Tokens of a batch, in place of --B: a batch of tokens / T.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed samples of each candidate, interleaved.", lower_bound=1)
JOBS = flags.DEFINE_integer("jobs", 1, "Candidates compiled side by side; with more than one, compile times are not those of one alone.", lower_bound=1)
MINUTES = flags.DEFINE_float("minutes", None, "Compile nothing further after so many, of which each length gets half of what is left, and the last all: a row says so. The same command goes on with the lengths that are not complete.", lower_bound=0)
PEERS = flags.DEFINE_enum("peers", "jax", ["none", "jax", "all"], "Whose attention to set beside it: JAX's (also in its own Pallas kernels, and tokamax, where installed), or that and PyTorch's and its packages.")
PEER_PROCESSES = flags.DEFINE_integer("peer_processes", 1, "Processes of PyTorch among which its rows are divided: with --jobs they compile side by side; one at a time is timed.", lower_bound=1)
PEERS_PYTHON = flags.DEFINE_string("peers_python", sys.executable, "The Python that has PyTorch, the packages and attn_zoo.")
BACKENDS = flags.DEFINE_list("backends", ["auto"], "attention.backend of the variants, a row each: auto, xla, pallas, cudnn, ...")
KEEP_MEMORY = flags.DEFINE_bool("keep_memory", True, "On a CPU, keep the memory that a call frees for the next one, on either side; else as the C library does by default.")
OUT = flags.DEFINE_string("out", "results/core_bench", "Folder for records, table.md and figures.")
REPORT_ONLY = flags.DEFINE_bool("report_only", False, "Write tables and figures again from the records.")

# Of the packages of others and of the variants beside them: their defaults, or what their papers use.
SIZES = {"window": 256, "block": 64, "features": 256, "rank": 256, "landmarks": 64}
REFERENCE = "jax.nn (xla)"
COUNTED = 4096  # positions at most, among which pairs are counted to find out whether a variant is a single pattern


def rows_of(problem: Problem, specs: list[str], torch: list[TorchProcess]) -> list:
    """All candidates of one length; where two of the same name were asked for, one."""
    qkv = candidates.heads(problem)
    found = {}
    for backend in BACKENDS.value:
        for spec, causal in directed(specs):
            mark = "" if backend == "auto" else f" [{backend}]"
            both = ", bidirectional" if causal != CAUSAL.value and spec == "full" else ""
            name = spec + both + mark
            if name not in found:
                found[name] = candidates.variant(problem, name, spec, causal, qkv, backend)
    peers = jax_peers(problem, SIZES["window"], qkv) if PEERS.value != "none" else []
    theirs = [process.candidates(problem) for process in torch]
    peers += [rows[n % len(torch)] for n, rows in enumerate(zip(*theirs))]  # dealt out: every process knows all
    return [*peers, *found.values(), *candidates.counterparts(peers, list(found.values()), problem, qkv)]


def directed(specs: list[str]) -> list[tuple[str, bool]]:
    """(spec, causal) of each; `full` in both directions if a variant needs it."""
    found = [(spec, CAUSAL.value and find(spec)[0].causal is True) for spec in specs]
    return found + [("full", False)] if "full" in specs and len({causal for _, causal in found}) == 2 else found


def patterns(specs: list[str], problem: Problem) -> list[tuple[str, bool]]:
    """Those that are a single pattern, which flex_attention can be given."""
    found = directed([*dict.fromkeys([*specs, candidates.plain(f"local(window={SIZES['window']})")])])
    return [(spec, causal) for spec, causal in found if single_pattern(problem.attention(spec, causal), problem.T) is not None]


def cell_of(row, problem: Problem, mode: str) -> dict:
    """What a record is of; `variant` is the name of its row."""
    sizes = {"B": problem.B, "N": problem.N, "H": problem.H, "dtype": problem.dtype}
    return {"variant": row.name, "seq_len": problem.T, "seed": 0, "mode": mode, "spec": row.spec, "causal": row.causal, "layer": row.layer, "peer": row.peer} | sizes


def main(_) -> None:
    try:
        run(Path(OUT.value))
    except UserError as e:
        print(f"core_bench.py: {e}", file=sys.stderr)
        sys.exit(2)


def run(out: Path) -> None:
    """Measures what is not measured yet, unless told to report only, and writes records, tables and figures into `out`."""
    if not REPORT_ONLY.value:
        kept = KEEP_MEMORY.value and keep_freed_memory()  # before JAX has threads
        text = VARIANT_SPECS.value if VARIANT_SPECS.value is not None else ", ".join(VARIANTS)
        specs = [variant_text(entry) for entry in parse_variants(text)]
        lengths = [int(T) if T.isdigit() else T for T in SEQ_LENS.value]
        for T in lengths:
            check_int("--seq_lens", T, 2)
        platform = platform_of_jax()
        batch = lambda T: max(1, TOKENS.value // T) if TOKENS.value else BATCH.value
        checked = lambda T: platform != "cpu" and T == lengths[0]  # the tests run kernels on a CPU alone
        problem = lambda T: Problem(batch(T), T, HEADS.value, HEAD_DIM.value, DTYPE.value, checked(T))
        settings = {f.name: f.value for f in (BATCH, HEADS, HEAD_DIM, DTYPE, CAUSAL, ROUNDS, TOKENS, JOBS, PEER_PROCESSES)} | {"memory_kept": kept}
        torch = []
        if PEERS.value == "all":
            asked = settings | SIZES | {"patterns": patterns(specs, problem(min(max(lengths), COUNTED))), "platform": platform}
            threads = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, (os.cpu_count() or 1) // PEER_PROCESSES.value))} if PEER_PROCESSES.value > 1 else {}
            with ThreadPoolExecutor(PEER_PROCESSES.value) as pool:  # they take seconds to import what they need
                torch = list(pool.map(lambda _: TorchProcess(PEERS_PYTHON.value, asked, threads), range(PEER_PROCESSES.value)))
        origin = provenance.collect() | ({"torch": torch[0].about} if torch else {})
        until = time.monotonic() + 60 * (math.inf if MINUTES.value is None else MINUTES.value)
        for left, T in zip(range(len(lengths), 0, -1), lengths):
            now = time.monotonic()
            if now > until:
                print(f"T = {T} and more not begun: --minutes={MINUTES.value:g} are over; the same command goes on", file=sys.stderr)
                break
            measure_length(out, problem(T), specs, torch, now + (until - now) / min(left, 2), {"settings": settings, "provenance": origin})
            print(f"T = {T} done", file=sys.stderr, flush=True)
        for process in torch:
            process.close()
    records = sorted(load_records(out), key=lambda r: (r["order"], r["cell"]["seq_len"]))
    check(bool(records), "--out", str(out), "has no records yet; run without --report_only")
    report.write(records, out, REFERENCE)
    print((out / "table.md").read_text())


def platform_of_jax() -> str:
    """cpu, gpu or tpu. Raises UserError where JAX has no device of the kind that JAX_PLATFORMS asks for."""
    try:
        return jax.default_backend()
    except (RuntimeError, AssertionError) as e:  # the latter without a plugin
        reason = (str(e).splitlines() or ["is the extra for it installed?"])[0]
        raise UserError(f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: JAX has no such device; {reason}") from None


def measure_length(out: Path, problem: Problem, specs: list[str], torch: list[TorchProcess], until: float, common: dict) -> None:
    """Records of all candidates and modes at one length, unless they are there from the same commit and machine. Raises UserError if JAX runs nothing any more."""
    rows = rows_of(problem, specs, torch)
    ids = {(row.name, mode): hashlib.sha256(json.dumps(cell_of(row, problem, mode), sort_keys=True).encode()).hexdigest()[:12] for row in rows for mode in MODES}
    if done(out, set(ids.values()), common):
        return
    rates = {"matmul_flops_per_s": matmul_flops_per_s(problem.dtype), "copy_bytes_per_s": copy_bytes_per_s()}
    lost = {}
    for order, (row, mode, outcome) in enumerate(measure(rows, ROUNDS.value, JOBS.value, until)):
        at = outcome.pop("lost_at", math.inf)
        if row.framework == "jax" and at < math.inf:
            lost[at] = f"T = {problem.T}, {row.name}, {mode}: {outcome['message']}; if it is this row's fault, the same command without it goes on"
        attention = problem.attention(row.spec, row.causal)
        counted = mode == "forward" or attention.gradients_without_key
        flops = attention.flops(problem.B, problem.T, problem.T) * (1 if mode == "forward" else 3) if counted else None
        work = {"order": order, "framework": row.framework, "flops": flops, "bytes": problem.bytes(mode), "plan": row.plan, "lost": at < math.inf}
        write_record(out, {"id": ids[row.name, mode], "status": outcome.pop("status"), "message": outcome.pop("message", ""), "cell": cell_of(row, problem, mode)} | work | outcome | rates | common)
    if lost:
        raise UserError(lost[min(lost)])


if __name__ == "__main__":
    app.run(main)
