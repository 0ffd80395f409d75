"""The tiles of the Pallas kernels, measured on this GPU: the fastest of all that compile, for ops/tuning.json.

    python experiments/tune.py                                                # every dtype, head dim and kernel; into results/tune
    python experiments/tune.py --minutes=9                                    # as far as that goes; the next call goes on from there
    python experiments/tune.py --kernels=states,output,dv,dqk                 # those of the scans of linearized attention alone
    python experiments/tune.py --report_only                                  # table and choice again, from the records alone
    python experiments/tune.py --report_only --write                          # and the choice into the package's tuning.json

Each kernel is timed alone on one or two problems: those of attention on causal attention and a causal window, those of scans on sums without and with decay
("corrected" and "wy" on a delta rule), those of features on what performer, rfa and delta make of queries and keys. Candidates are compiled side by side, those nearest to the present tile first, held to what XLA computes, and timed in
interleaved rounds; a timing is of as many calls as take some milliseconds. The choice is the least product of the problems' medians; of chunks, at which scans
have their tiles, that of all kernels together. What does not compile, or computes something else, is left out and counted.
"""

import concurrent.futures
import copy
import dataclasses
import json
import math
import os
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from bench.attention_tiles import AttentionTiles
from bench.feature_tiles import FeatureTiles
from bench.scan_tiles import ScanTiles
from tabulate import tabulate

from attn_zoo import UserError, provenance
from attn_zoo.measure import copy_bytes_per_s, matmul_flops_per_s
from attn_zoo.ops import delta, pallas_attention, pallas_kernels, tuning
from attn_zoo.ops.tuning import LEAST, MOST_HEAD_DIM, power_of_two
from attn_zoo.spec import check, check_choice

ENGINES = (AttentionTiles, ScanTiles, FeatureTiles)
KERNELS = flags.DEFINE_list("kernels", [kernel for engine in ENGINES for kernel in engine.kernels], "Of attention, then of scans and of features, the most important first.")
DTYPES = flags.DEFINE_list("dtypes", ["bfloat16", "float32"], "Of queries, keys and values, the most important first; float16 has the tiles of bfloat16, in scans and features of float32.")
HEAD_DIMS = flags.DEFINE_list("head_dims", ["64", "128", "256"], "The most important first; features have kernels up to 128.")
BLOCKS = flags.DEFINE_list("blocks", ["16", "32", "64", "128", "256"], "Queries, and keys, of a tile, or features, and values, or positions, and directions: powers of two.")
CHUNKS = flags.DEFINE_list("chunks", ["64", "128"], "Positions of a chunk of a scan: powers of two, at least the 64 of a delta rule, which has the same tiles.")
WARPS = flags.DEFINE_list("warps", ["4", "8"], "Warps of a program: powers of two.")
STAGES = flags.DEFINE_list("stages", ["1", "2", "3", "4"], "Stages of its load pipeline.")
INTEGERS = [
    flags.DEFINE_integer(*f, lower_bound=1)
    for f in (
        ("B", 4, "Batch."),
        ("N", 8, "Heads."),
        ("T", 8192, "Sequence length."),
        ("window", 512, "Keys that a query of the second problem sees."),
        ("rounds", 7, "Timings of each candidate, interleaved."),
    )
]
B, N, T, WINDOW, ROUNDS = INTEGERS
MINUTES = flags.DEFINE_float("minutes", None, "Compile nothing new after so many.", lower_bound=0)
OUT = flags.DEFINE_string("out", "results/tune", "Folder for records.json, table.md and tuning.json, which is the package's with this device's entry.")
WRITE = flags.DEFINE_bool("write", False, "Write the choice into the package's tuning.json too.")
INTERPRET = flags.DEFINE_bool("interpret", False, "Run the kernels without a GPU, slowly: to try this script on small sizes.")
REPORT_ONLY = flags.DEFINE_bool("report_only", False, "Write table.md and tuning.json again from records.json.")

TIMED_S = 5e-3  # the least that one timing takes: a kernel of some microseconds would measure its launch
TOLERANCE = 2e-2  # of the largest value: bfloat16 weights, and products in TF32 in the engine compared with, stay below


def engine_of(kernel: str, settings: dict):
    """The part of tuning.json that has this kernel's tiles."""
    return next(engine(settings) for engine in ENGINES if kernel in engine.kernels)


def candidates(engine, kernel: str, dtype: str, H: int) -> list:
    """The present tile, and all that the flags name, the nearest to it first."""
    present = engine.present(kernel, dtype, H)
    steps = lambda tile: sum(abs(math.log2(a / b)) for a, b in zip(dataclasses.astuple(tile), dataclasses.astuple(present)))
    return [present, *sorted((tile for tile in engine.candidates(kernel, H) if tile != present), key=steps)]


def measure(engine, kernel: str, dtype: str, H: int, deadline: float) -> tuple[list[dict], bool]:
    """(records of all candidates on all problems, whether none was left out for want of time)."""
    tiles, records, complete = candidates(engine, kernel, dtype, H), [], True
    for problem in engine.problems(kernel):
        solved = {x: engine.solve(problem, dtype, H, x)[kernel] for x in {engine.arguments_of(tile): None for tile in tiles}}

        def compiled(tile):
            """A compiled call, the reason why there is none, or None after the deadline."""
            if time.monotonic() > deadline:
                return None
            args, _ = solved[engine.arguments_of(tile)]
            try:
                return jax.jit(engine.call(kernel, problem, tile, args)).lower(*args).compile()
            except Exception as e:  # whatever it is, this tile is none to choose, and the reason is counted
                return reason(e)

        timed = []
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for tile, call in zip(tiles, pool.map(compiled, tiles)):
                if call is None:
                    complete = False
                    continue
                record = {"dtype": dtype, "H": H, "kernel": kernel, "problem": problem, "tile": dataclasses.astuple(tile), "present": tile == tiles[0]}
                records.append(record | {"status": "failed", "message": call} if isinstance(call, str) else record)
                args, expected = solved[engine.arguments_of(tile)]
                if not isinstance(call, str) and agrees(record, call, args, expected):
                    timed.append((record, call, args))
        time_calls(timed)
    return records, complete


def agrees(record: dict, call, args: tuple, expected: tuple) -> bool:
    """Whether the kernel runs and computes what XLA does; else the record says why not."""
    try:
        results = jax.block_until_ready(call(*args))
    except Exception as e:
        record |= {"status": "failed", "message": reason(e)}
        return False
    pairs = zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True)
    # Of nothing but zeros, as is the state before a lone chunk, any other number differs.
    differences = [abs(a.astype(jnp.float32) - e.astype(jnp.float32)).max() / jnp.maximum(abs(e).max(), 1e-30) for a, e in pairs]
    error = float(np.max(differences))  # NaN if any is
    if not error <= TOLERANCE:
        record |= {"status": "wrong", "message": f"differs from XLA by {error:.2g} of the largest value"}
        return False
    record |= {"status": "ok", "bytes": sum(x.nbytes for x in jax.tree.leaves((args, results)))}
    return True


def time_calls(calls: list[tuple]) -> None:
    """Adds to each record the seconds of a call, of (record, call, arguments)."""

    def seconds(call, args, repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            results = call(*args)
        jax.block_until_ready(results)
        return (time.perf_counter() - start) / repeats

    repeats = [math.ceil(TIMED_S / seconds(*call, 1)) for _, *call in calls]
    timings = [[seconds(*call, n) for (_, *call), n in zip(calls, repeats)] for _ in range(ROUNDS.value)]
    for (record, *_), *timed in zip(calls, *timings):
        p20, median, p80 = np.percentile(timed, (20, 50, 80)).tolist()
        record["speed"] = {"median_s": median, "p20_s": p20, "p80_s": p80, "n": len(timed)}


def reason(e: Exception) -> str:
    """In one line."""
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"[:200]


def medians(content: dict) -> dict[tuple, dict[str, dict[object, dict[str, float]]]]:
    """{(engine, dtype, H): {kernel: {tile: {problem: median seconds}}}}, of the tiles that every problem was solved with."""
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for r in content["records"]:
        if r["status"] == "ok":
            engine = engine_of(r["kernel"], content["settings"])
            found[engine.engine, r["dtype"], r["H"]][r["kernel"]][engine.tile(*r["tile"])][r["problem"]] = r["speed"]["median_s"]
    whole = {}
    for (name, dtype, H), kernels in found.items():
        for kernel, tiles in kernels.items():
            problems = engine_of(kernel, content["settings"]).problems(kernel)
            everywhere = {tile: at for tile, at in tiles.items() if len(at) == len(problems)}
            if everywhere:
                whole.setdefault((name, dtype, H), {})[kernel] = everywhere
    return whole


def choices(content: dict) -> Iterator[tuple]:
    """(engine, dtype, H, {kernel: the tile to take}) of all that was measured."""
    for (_, dtype, H), costs in medians(content).items():
        engine = engine_of(next(iter(costs)), content["settings"])
        yield engine, dtype, H, engine.choose(costs, dtype, H)


def tuned(content: dict) -> dict:
    """The package's table of tiles with those chosen for this device."""
    entries = copy.deepcopy(tuning.table())
    for engine, dtype, H, chosen in choices(content):
        rows = entries[engine.engine].setdefault(content["provenance"]["device_kind"], {}).setdefault(dtype, {})
        rows.setdefault(str(H), {}).update(engine.entries(chosen))
    return entries


def text_of(entries: dict, depth: int = 4, margin: str = "") -> str:
    """JSON as tuning.json has it: a line a head dim."""
    if depth == 0:
        return json.dumps(entries)
    inner = margin + "  "
    return "{\n" + ",\n".join(f"{inner}{json.dumps(key)}: {text_of(value, depth - 1, inner)}" for key, value in entries.items()) + f"\n{margin}}}"


def table(content: dict) -> str:
    """Markdown: what was chosen, how fast it is, and what was left out; from the records alone."""
    s, p, length = content["settings"], content["provenance"], content["settings"]["T"]
    lines = [f"Tiles of the Pallas kernels, B={s['B']}, N={s['N']}, T={length}, a window of {s['window']}{', interpreted' * s['interpret']}."]
    lines += ["Of attention they are queries × keys, and the rate is of useful FLOPs; of scans features × values, of features positions × directions, and the rate is of arguments and results."]
    lines += ["", tabulate(_rows(content), "keys", tablefmt="pipe", disable_numparse=True)]
    left_out = Counter(re.sub(r"\b\d[\d.]*(e[+-]?\d+)?\b", "#", r["message"]) for r in content["records"] if r["status"] != "ok")
    lines += ["", "Left out:", *(f"- {count} × {message}" for message, count in left_out.most_common())] if left_out else []
    missing = [f"{dtype} H={H} {kernel}" for dtype, H, kernel in wanted(s) if [dtype, H, kernel] not in content["done"]]
    lines += ["", f"Not all candidates measured: {', '.join(missing)}."] if missing else []
    rates, copies = [r / 1e12 for r in content["matmul_flops_per_s"]], [r / 1e9 for r in content["copy_bytes_per_s"]]
    code = f"jax {p['jax']}, attn_zoo {str(p['git_commit'])[:10]}{' with local changes' if p['git_dirty'] else ''}, {p['date'][:10]}"
    measured = f"Matrix product {min(rates):.2f} to {max(rates):.2f} TFLOP/s, copy {min(copies):.0f} to {max(copies):.0f} GB/s. Medians of {s['rounds']} interleaved rounds."
    lines += ["", f"{p['device_kind']} ({p['cpu']}), {code}. {measured}"]
    return "\n".join(lines) + "\n"


def _rows(content: dict) -> Iterator[dict]:
    for engine, dtype, H, chosen in choices(content):
        for kernel, tile in chosen.items():
            for problem in engine.problems(kernel):
                here = [r for r in content["records"] if (r["dtype"], r["H"], r["kernel"], r["problem"]) == (dtype, H, kernel, problem)]
                measured = {tuple(r["tile"]): r for r in here if r["status"] == "ok"}
                record, present = measured[dataclasses.astuple(tile)], next((r for r in measured.values() if r["present"]), None)
                seconds, columns = record["speed"]["median_s"], engine.columns(record, tile)
                yield {
                    **{"dtype": dtype, "H": H, "kernel": kernel, "problem": problem, "tile": columns["tile"], "chunk": columns.get("chunk", "–")},
                    **{"warps": tile.num_warps, "stages": tile.num_stages, "ms": f"{seconds * 1e3:.3f}"},
                    "× the present tile": f"{present['speed']['median_s'] / seconds:.2f}×" if present else "–",
                    **{name: columns.get(name, "–") for name in ("rate", "density", "density of its blocks")},
                    "candidates": f"{len(measured)} of {len(here)}",
                }


def wanted(settings: dict) -> list[tuple[str, int, str]]:
    """What is measured, in this order."""
    takes = lambda kernel, dtype, H: dtype in engine_of(kernel, settings).dtypes and H <= engine_of(kernel, settings).widest
    return [(dtype, H, kernel) for dtype in settings["dtypes"] for H in settings["head_dims"] for kernel in settings["kernels"] if takes(kernel, dtype, H)]


def settings() -> dict:
    """What was asked for. Raises UserError for what no kernel takes."""
    for dtype in DTYPES.value:
        check_choice("--dtypes", dtype, [jnp.dtype(x).name for x in pallas_attention.DTYPES])
    for kernel in KERNELS.value:
        check_choice("--kernels", kernel, [kernel for engine in ENGINES for kernel in engine.kernels])
    for H in numbers(HEAD_DIMS):
        check(H <= MOST_HEAD_DIM, "--head_dims", H, f"must be at most {MOST_HEAD_DIM}")
    for flag, least in ((BLOCKS, LEAST), (CHUNKS, delta.CHUNK), (WARPS, 1)):
        for n in numbers(flag):
            rule = f"must be a power of two of at least {least}; nearest: {max(power_of_two(n), least)}"
            check(n >= least and n == power_of_two(n), f"--{flag.name}", n, rule)
    lists = {flag.name: numbers(flag) for flag in (HEAD_DIMS, BLOCKS, CHUNKS, WARPS, STAGES)}
    return {f.name: f.value for f in (*INTEGERS, INTERPRET, KERNELS, DTYPES)} | lists


def numbers(flag) -> list[int]:
    for text in flag.value:
        check(text.isdecimal() and int(text) > 0, f"--{flag.name}", text, "must be a whole number of at least 1")
    return [int(text) for text in flag.value]


def main(_) -> None:
    try:
        run(Path(OUT.value))
    except UserError as e:
        print(f"tune.py: {e}", file=sys.stderr)
        sys.exit(2)


def run(out: Path) -> None:
    """Measures what is not measured yet, unless told to report only, and writes records.json, table.md and tuning.json into `out`."""
    path = out / "records.json"
    if not REPORT_ONLY.value:
        device = jax.default_backend()
        rule = f"these are kernels for NVIDIA GPUs, and this runs on {device}; with --interpret, small sizes can be tried anywhere"
        check(INTERPRET.value or device == "gpu", "--interpret", False, rule)
        pallas_kernels.INTERPRET = INTERPRET.value
        measure_all(path, time.monotonic() + 60 * (math.inf if MINUTES.value is None else MINUTES.value))
    if not path.exists():
        raise UserError(f"there is no {path}, and nothing was measured")
    content = json.loads(path.read_text())
    check(not (WRITE.value and content["settings"]["interpret"]), "--write", True, "interpreted kernels say nothing about a device")
    for name, text in (("table.md", table(content)), ("tuning.json", text_of(tuned(content)) + "\n")):
        (out / name).write_text(text)
    if WRITE.value:
        tuning.PATH.write_text(text_of(tuned(content)) + "\n")
    print(table(content))


def measure_all(path: Path, deadline: float) -> None:
    """Adds to the records at `path` what they lack, if they are of the same settings, code and device; else begins anew."""
    content = {"settings": settings(), "provenance": provenance.collect(), "matmul_flops_per_s": [], "copy_bytes_per_s": [], "done": [], "records": []}
    if path.exists():
        before = json.loads(path.read_text())
        same = all(before["provenance"].get(key) == content["provenance"][key] for key in ("git_commit", "git_dirty", "cpu", "device_kind"))
        if before["settings"] == content["settings"] and same and not before["provenance"]["git_dirty"]:
            content = before
    for dtype, H, kernel in wanted(content["settings"]):
        if [dtype, H, kernel] in content["done"] or time.monotonic() > deadline:
            continue
        content["matmul_flops_per_s"].append(matmul_flops_per_s(dtype))
        content["copy_bytes_per_s"].append(copy_bytes_per_s())
        records, complete = measure(engine_of(kernel, content["settings"]), kernel, dtype, H, deadline)
        content["records"] = [r for r in content["records"] if (r["dtype"], r["H"], r["kernel"]) != (dtype, H, kernel)] + records
        content["done"] += [[dtype, H, kernel]] if complete else []
        _write(path, content)
        print(f"{dtype}, H = {H}, {kernel}: {'done' if complete else 'out of time'}", file=sys.stderr, flush=True)


def _write(path: Path, content: dict) -> None:
    """A line a record."""
    records = ",\n".join(json.dumps(r) for r in content["records"])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content | {"records": []}, indent=1).replace('"records": []', f'"records": [\n{records}\n]') + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    app.run(main)
