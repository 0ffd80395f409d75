"""Tables and figures of core_bench.py, from its records alone."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from attn_zoo import figures, summary
from attn_zoo.attention import find
from attn_zoo.tables import number

MODES = {"forward": "Forward", "forward_backward": "Forward + backward"}
Record = dict[str, Any]


def write(records: list[Record], out: Path, reference: str) -> None:
    """Writes table.md and, of several lengths, figures/<mode>.png and .pdf into `out`."""
    (out / "table.md").write_text(table(records, reference))
    drawn = draw(records) if len(lengths_of(records)) > 1 else {}
    if drawn:
        (out / "figures").mkdir(exist_ok=True)
    for name, figure in drawn.items():
        figure.savefig(out / "figures" / f"{name}.png", dpi=200)
        figure.savefig(out / "figures" / f"{name}.pdf", metadata={"CreationDate": None})


def table(records: list[Record], reference: str) -> str:
    """Markdown: times and memory of the variants by mode, what rates they reach, the peers beside the variants that see the same pairs, and spreads and compilation of all."""
    s = records[0]["settings"]
    batch = f"{s['tokens']:,} tokens" if s["tokens"] else f"B={s['B']}"
    title = f"Attention alone, {batch}, N={s['N']}, H={s['H']}, {s['dtype']}, {'causal unless marked (b)' if s['causal'] else 'bidirectional'}."
    sections = [title, *(times(records, mode, reference) for mode in MODES), rates(records)]
    sections += [section(records, mode) for section in (side_by_side, on_backends) for mode in MODES] + [spreads(records), origin(records)]
    return "\n\n".join(section for section in sections if section) + "\n"


def times(records: list[Record], mode: str, reference: str) -> str:
    """A row a variant: milliseconds, times faster than the reference in its direction, memory; exponents, and from where on it is faster than `full`."""
    own, lengths = by_name(r for r in records if r["cell"]["mode"] == mode and not r["cell"]["layer"]), lengths_of(records)
    references = {causal: at for name, at in own.items() for causal in (True, False) if name.startswith(reference) and cell(at)["causal"] == causal}
    fulls = {(cell(at)["causal"], asked_backend(name)): at for name, at in own.items() if cell(at)["spec"] == "full" and not cell(at)["peer"]}
    asked = settings(records)["causal"]
    rows = []
    for name, at in sorted(own.items(), key=lambda item: not item[0].startswith(reference)):
        if cell(at)["peer"] and not name.startswith(reference):
            continue
        causal = cell(at)["causal"]
        mark = " (b)" if asked and not causal and "bidirectional" not in name else ""
        cells = [_time(at.get(T), references.get(causal, {}).get(T)) for T in lengths]
        full = fulls.get((causal, asked_backend(name)))
        rows.append([f"`{name}`{mark}", *cells, *slopes(at), "–" if full is None or at is full else faster_from(at, full)])
    header = ["", *(f"T = {T}" for T in lengths), "time exponent", "memory exponent", "faster than `full` from T"]
    ratio = f" (× faster than {reference})" if references else ""
    return f"**{MODES[mode]}**: ms{ratio}, MiB of temporary memory\n\n" + pipe(rows, header)


def rates(records: list[Record]) -> str:
    """What the variants reach at the longest length: useful FLOPs and bytes a second, as fractions of the matrix product's and of a copy's; and who ran, on which density."""
    T = max(lengths_of(records))
    rows, counted = [], any((r.get("plan") or {}).get("computed_pairs") for r in records)
    for name, at in by_name(r for r in records if r["cell"]["seq_len"] == T and not r["cell"]["layer"]).items():
        of = {r["cell"]["mode"]: r for r in records if r["cell"]["seq_len"] == T and r["cell"]["variant"] == name}
        if len(of) < len(MODES) or any(r["status"] != "ok" for r in of.values()):
            continue
        plan = at[T].get("plan") or {}
        row = [f"`{name}`", plan.get("without_key", plan.get("backend", "–")), _percent(plan.get("density")), _percent(plan.get("computed_density"))]
        for r in (of[mode] for mode in MODES):
            row += [_rate(r, "flops", "matmul_flops_per_s"), _rate(r, "bytes", "copy_bytes_per_s"), *([_pair(r, plan.get("computed_pairs"))] if counted else [])]
        rows.append(row)
    units = "GFLOP/s (of the matrix product)", "GB/s (of a copy)", *(["ps a computed pair"] if counted else [])
    header = ["", "backend", "pairs seen", "pairs computed", *(f"{title}: {unit}" for title in MODES.values() for unit in units)]
    what = "of useful pairs, and of every argument and result moved once" + "; picoseconds of a computed pair, seen or not, in one head" * counted
    return f"**Rates at T = {T}**, {what}\n\n" + pipe(rows, header) if rows else ""


def spreads(records: list[Record]) -> str:
    """A row a variant and a peer, at the longest length: milliseconds with their 20th and 80th percentile, and how long it took to trace and compile it, or of PyTorch to build and first call it."""
    T = max(lengths_of(records))
    rows = []
    for name in by_name(r for r in records if r["cell"]["seq_len"] == T):
        of = {r["cell"]["mode"]: r for r in records if r["cell"]["seq_len"] == T and r["cell"]["variant"] == name}
        if any(r["status"] == "ok" for r in of.values()):
            rows.append([f"`{name}`", *(text for mode in MODES for text in (_spread(of.get(mode)), _compilation(of.get(mode))))])
    header = ["", *(f"{title}: {unit}" for title in MODES.values() for unit in ("ms (p20 to p80)", "compile, s"))]
    together = " Compiled side by side, so not as fast as alone." if settings(records)["jobs"] > 1 else ""
    return f"**Spread and compilation at T = {T}**, over the rounds; of PyTorch, compilation is the first call.{together}\n\n" + pipe(rows, header) if rows else ""


def side_by_side(records: list[Record], mode: str) -> str:
    """A row a peer: the variant that sees the same pairs, and at every length the milliseconds of both and how many times faster the variant is."""
    own, lengths = by_name(r for r in records if r["cell"]["mode"] == mode), lengths_of(records)
    rows = []
    for name, at in own.items():
        c = cell(at)
        if c["peer"]:
            same = [(other, times) for other, times in own.items() if not cell(times)["peer"] and all(cell(times)[key] == c[key] for key in ("spec", "causal", "layer"))]
            rows += [[name, f"`{other}`", *_once([_beside(at.get(T), times.get(T)) for T in lengths])] for other, times in same]
    header = ["peer", "beside", *(f"T = {T}" for T in lengths)]
    return f"**{MODES[mode]}, side by side**: ms of the peer / ms of the variant (× faster than the peer)\n\n" + pipe(rows, header) if rows else ""


def on_backends(records: list[Record], mode: str) -> str:
    """A row a variant and further backend, where it was run on several: at every length the milliseconds of both."""
    own, lengths = by_name(r for r in records if r["cell"]["mode"] == mode and not r["cell"]["peer"]), lengths_of(records)
    first: dict[tuple, tuple[str, dict]] = {}
    rows = []
    for name, at in own.items():
        of, times = first.setdefault(tuple(cell(at)[key] for key in ("spec", "causal", "layer")), (name, at))
        if of != name:
            rows.append([f"`{name}`", f"`{of}`", *_once([_beside(at.get(T), times.get(T)) for T in lengths])])
    header = ["", "beside", *(f"T = {T}" for T in lengths)]
    return f"**{MODES[mode]}, backends side by side**: ms on the first / ms on the second (× faster on the second)\n\n" + pipe(rows, header) if rows else ""


def draw(records: list[Record]) -> dict[str, Any]:
    """Milliseconds against T, log-log: of the variants, a figure a mode with a panel a family; of the peers, with a panel for each variant that one stands beside."""
    drawn = {}
    for mode in MODES:
        known = [r for r in records if r["cell"]["mode"] == mode and r["status"] == "ok"]
        families = by_family([r for r in known if not r["cell"]["peer"] and not r["cell"]["layer"]])
        if families:
            drawn[mode] = figures.panels({name: points_of(own) for name, own in families.items()}, "milliseconds")
        sides: dict[tuple, list[Record]] = {}
        for r in sorted(known, key=lambda r: r["cell"]["peer"]):  # of each side the variant first
            sides.setdefault(tuple(r["cell"][key] for key in ("spec", "causal", "layer")), []).append(r)
        ours = lambda own: [(name if peer else "attn_zoo", *rest) for (name, *rest), peer in zip(points_of(own), (r["cell"]["peer"] for r in own))]
        compared = {own[0]["cell"]["variant"]: ours(own) for own in sides.values() if not own[0]["cell"]["peer"] and own[-1]["cell"]["peer"]}
        if compared:
            drawn[f"{mode}_peers"] = figures.panels(compared, "milliseconds")
    return drawn


def points_of(records: list[Record]) -> list[tuple]:
    """(row, length, median, 20th and 80th percentile in milliseconds)."""
    return [(r["cell"]["variant"], r["cell"]["seq_len"], *(1e3 * r["speed"][key] for key in ("median_s", "p20_s", "p80_s"))) for r in records]


def by_family(records: list[Record]) -> dict[str, list[Record]]:
    """The variants of each family, and in each of them first `full`; families of one or two together."""
    families: dict[str, list[Record]] = {}
    for r in records:
        families.setdefault(find(r["cell"]["spec"])[0].family, []).append(r)
    rows = lambda own: {r["cell"]["variant"] for r in own}
    small = [family for family, own in families.items() if len(rows(own)) <= 2]
    if len(small) > 1:
        families[", ".join(small)] = [r for family in small for r in families.pop(family)]
    full = [r for r in records if r["cell"]["variant"] == "full"]
    return {family: own if full and "full" in rows(own) else full + own for family, own in families.items()}


def origin(records: list[Record]) -> str:
    """Machine, versions, date, and the rates that the fractions are of."""
    lines = []
    for key in dict.fromkeys(str((r["provenance"]["git_commit"], r["provenance"]["date"][:10])) for r in records):
        own = [r for r in records if str((r["provenance"]["git_commit"], r["provenance"]["date"][:10])) == key]
        p = own[0]["provenance"]
        changes = " with local changes" if p["git_dirty"] else ""
        torch = f"torch {p['torch']['torch']} on {p['torch']['device']}, " if p.get("torch") else ""
        line = f"{p['device_kind']} ({p['cpu']}), jax {p['jax']}, {torch}attn_zoo {str(p['git_commit'])[:10]}{changes}, {p['date'][:10]}."
        measured = [f"{what} {_range(own, key)} {unit}" for what, key, unit in (("matrix product", "matmul_flops_per_s", "GFLOP/s"), ("copy", "copy_bytes_per_s", "GB/s")) if own[0][key]]
        kept = " Freed memory was kept for the next call." if own[0]["settings"].get("memory_kept") else ""
        lines.append(f"{line} Rates: {', '.join(measured)}. Medians of {own[0]['settings']['rounds']} interleaved rounds, of variants without a random key, as in evaluation.{kept}")
    return "\n".join(lines)


def _range(records: list[Record], key: str) -> str:
    least, most = (f"{x(r[key] for r in records) / 1e9:.3g}" for x in (min, max))
    return least if least == most else f"{least} to {most}"


def by_name(records: Iterable[Record]) -> dict[str, dict[int, Record]]:
    """{row: {length: record}}, in the order of the zoo's table, peers first."""
    found: dict[str, dict[int, Record]] = {}
    for r in records:
        found.setdefault(r["cell"]["variant"], {})[r["cell"]["seq_len"]] = r
    return found


def cell(at: dict[int, Record]) -> dict:
    """What all records of a row have in common."""
    return next(iter(at.values()))["cell"]


def asked_backend(name: str) -> str:
    """That a row's name ends with, as in 'full [xla]'; '' for the one that is chosen by itself."""
    return name[name.rindex(" [") + 2 : -1] if name.endswith("]") else ""


def settings(records: list[Record]) -> dict:
    return records[0]["settings"]


def lengths_of(records: list[Record]) -> list[int]:
    return sorted({r["cell"]["seq_len"] for r in records})


def faster_from(at: dict[int, Record], full: dict[int, Record]) -> str:
    """From which T on a variant is faster than `full`: measured, interpolated, or where the two fits of three lengths or more meet beyond the last one."""
    lengths = [T for T in sorted(at) if at[T]["status"] == "ok" and T in full and full[T]["status"] == "ok"]
    own, reference = ([curve[T]["speed"]["median_s"] for T in lengths] for curve in (at, full))
    if not lengths:
        return "–"
    T = summary.crossover(lengths, reference, own)
    if T < math.inf:
        return f"{T:.0f}" if T else f"≤ {lengths[0]}"
    if len(lengths) < 3:
        return f"> {lengths[-1]}"
    T = summary.predicted_crossover(lengths, reference, own)
    foreseen = f"{T:.2g}" if T < math.inf else f"> {summary.FORESEEN * lengths[-1]}"
    return f"{foreseen}, by the fit"


def slopes(at: dict[int, Record]) -> list[str]:
    """Exponents of time and memory in T, by least squares on logarithms."""
    ok = {T: r for T, r in sorted(at.items()) if r["status"] == "ok"}
    found = []
    for curve in ([r["speed"]["median_s"] for r in ok.values()], [max(r.get("temp_bytes", 0), 1) for r in ok.values()]):
        slope, _ = summary.fit_exponent(list(ok), curve)
        found.append("–" if slope is None else f"{slope:.2f}")
    return found


def pipe(rows: list[list[str]], header: list[str]) -> str:
    return tabulate(rows, header, tablefmt="pipe", disable_numparse=True)


def _time(record: Record | None, reference: Record | None) -> str:
    if record is None:
        return "–"
    if record["status"] != "ok":
        return record["message"]
    seconds = record["speed"]["median_s"]
    ratio = f" ({reference['speed']['median_s'] / seconds:.1f}×)" if reference and reference["status"] == "ok" else ""
    return f"{seconds * 1e3:.1f}{ratio}, {record['temp_bytes'] / 2**20:.0f}"


def _beside(peer: Record | None, own: Record | None) -> str:
    if peer is None or own is None:
        return "–"
    failed = next((r["message"] for r in (peer, own) if r["status"] != "ok"), None)
    if failed is not None:
        return failed
    theirs, ours = peer["speed"]["median_s"], own["speed"]["median_s"]
    return f"{theirs * 1e3:.1f} / {ours * 1e3:.1f} ({theirs / ours:.2f}×)"


def _once(cells: list[str]) -> list[str]:
    """A reason that is the same at every length is said at the first."""
    alike = len(set(cells)) == 1 and not cells[0].endswith("×)")
    return [cells[0], *["–"] * (len(cells) - 1)] if alike else cells


def _rate(record: Record, what: str, most: str) -> str:
    """Billions a second, and as a share of the rate measured beside it, if one was; of what was not counted, a dash."""
    if record[what] is None:
        return "–"
    rate = record[what] / record["speed"]["median_s"]
    return f"{rate / 1e9:.3g}" + (f" ({100 * rate / record[most]:.0f} %)" if record[most] else "")


def _spread(record: Record | None) -> str:
    """Median, and 20th to 80th percentile."""
    if record is None or record["status"] != "ok":
        return "–"
    median, p20, p80 = (f"{1e3 * record['speed'][key]:.1f}" for key in ("median_s", "p20_s", "p80_s"))
    return f"{median} ({p20} to {p80})"


def _compilation(record: Record | None) -> str:
    """Seconds of tracing, lowering and compiling."""
    return f"{sum(record['compile'].values()):.2f}" if record and record["status"] == "ok" else "–"


def _pair(record: Record, computed_pairs: int | None) -> str:
    """Picoseconds of a computed pair, of what lists the blocks that it computes: alike for all patterns where time follows these."""
    heads = record["cell"]["B"] * record["cell"]["N"]
    return number(1e12 * record["speed"]["median_s"] / (heads * computed_pairs)) if computed_pairs else "–"


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f} %"
