"""The report of a sweep from its records alone: tables in four formats, figures, one self-contained page, and what to cite.

    python -m attn_zoo.report WORKDIR [--readme README.md]

writes it into WORKDIR, and renews the section of the README between `<!-- table:NAME -->` and `<!-- /table -->`, NAME being
the workdir's last part.
"""

import argparse
import base64
import csv
import dataclasses
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

from attn_zoo import results, summary
from attn_zoo.config import SETTINGS
from attn_zoo.spec import UserError
from attn_zoo.tables import Table, html, latex, main_table, markdown, probe_table, readable, scaling_table, small_tables

FIGURES = {
    "throughput": "Tokens per second of the train step against length; bars are the 20th to 80th percentile of the steps.",
    "memory": "Temporary memory of the compiled train step against length.",
    "decode": "Generated tokens per second at a context of T; bars are the 20th to 80th percentile of the steps; re-fed: the whole sequence for every token.",
    "state": "What generation keeps of a sequence of T tokens.",
    "loss": "Loss on held-out data against length; bars, of several seeds, are the 95 % interval, dashed lines the task's floors.",
    "probes": "Scores on the further splits of the task; bars, of several seeds, are the 95 % interval.",
    "loss_time": "Training loss against training time, compilation excluded; running mean over a tenth of the steps of the seeds' mean.",
}


def write_report(workdir: str | os.PathLike) -> str:
    """Writes tables, cite.bib, figures/ (PNG and PDF) and index.html into the workdir; returns the Markdown tables, to print.

    Raises UserError when there is nothing to report, or a record is damaged.
    """
    from attn_zoo import figures  # Matplotlib is slow to import, and a text table needs none

    workdir = Path(workdir)
    records = results.load_with_missing(workdir)
    texts = tables(records)
    (workdir / "figures").mkdir(exist_ok=True)
    pngs = {}
    for name, figure in figures.figures(records).items():
        pngs[name] = io.BytesIO()
        figure.savefig(pngs[name], format="png", dpi=200)
        (workdir / "figures" / f"{name}.png").write_bytes(pngs[name].getvalue())
        figure.savefig(workdir / "figures" / f"{name}.pdf", metadata={"CreationDate": None})
    for name in set(FIGURES) - set(pngs):  # drawn once from records that are no longer these
        for kind in ("png", "pdf"):
            (workdir / "figures" / f"{name}.{kind}").unlink(missing_ok=True)
    texts["index.html"] = _page(records, {name: png.getvalue() for name, png in pngs.items()})
    for name, text in texts.items():
        (workdir / name).write_text(text, encoding="utf-8", newline="\n")
    return texts["table.md"]


def tables(records: list[dict[str, Any]]) -> dict[str, str]:
    """The content of table.md, table.tex, table.csv, scaling.csv and cite.bib, and of probes.csv where a task has further splits: the same bytes for the same records.

    `records` as results.load_with_missing gives them. Raises UserError when they are not of one experiment.
    """
    rows, probes = summary.rows(records), summary.probes(records)
    every = _tables(rows, records)
    provenance = provenance_notes(records)
    return {
        "table.md": "\n".join([markdown(table) for table in every] + [f"{note}  " for note in provenance]) + "\n",
        "table.tex": "\n".join(latex(table, provenance) for table in every),
        "table.csv": _csv(summary.Row, rows),
        "scaling.csv": _csv(summary.Scaling, summary.scaling(rows)),
        **({"probes.csv": _csv(summary.Probe, probes)} if probes else {}),
        "cite.bib": cite(records),
    }


def _tables(rows: list[summary.Row], records: list[dict[str, Any]]) -> list[Table]:
    """The main table, that of further splits where the task has any, and that of growth where steps were timed at several lengths."""
    found = [main_table(rows, records)]
    if summary.probes(records):
        found.append(probe_table(records))
    return [*found, scaling_table(rows)] if any(s.lengths > 1 for s in summary.scaling(rows)) else found


def readme_table(records: list[dict[str, Any]]) -> str:
    """The main table for a README: loss, speed and memory apart, a row a variant and a column a length."""
    return "\n".join([*small_tables(summary.rows(records), records), *(f"{note}  " for note in provenance_notes(records))]) + "\n"


def renew_section(readme: str, name: str, table: str) -> str:
    """The README's text with the table between its markers `<!-- table:name -->` and `<!-- /table -->`. Raises UserError without them."""
    begin, end = f"<!-- table:{name} -->\n", "<!-- /table -->"
    before, found, rest = readme.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise UserError(f"the README has no section {begin.strip()} ... {end} to put the table in")
    return f"{before}{begin}{table}{end}{after}"


def provenance_notes(records: list[dict[str, Any]]) -> list[str]:
    """What was run, where and with what, in two lines; and a line for each way in which the records are not of one origin."""
    done = [r for r in records if r["status"] != "missing"] or records
    cell = done[0]["cell"]
    shown = dict(cell) | {"model": _in_use(cell.get("model") or {}, summary.variants_of(records))}
    settings = [f"{group} {readable(shown[group])}" for group in ("model", "attention", "train") if shown.get(group)]
    origin = [r["provenance"] for r in done if "device_kind" in (r.get("provenance") or {})]  # a cell that was killed could not say
    if not origin:
        return [f"Task `{cell['task']}`; {'; '.join(settings)}."]
    each = lambda key: list(dict.fromkeys(readable(p[key]) for p in origin if p.get(key) is not None))
    machine = lambda p: f"{readable(p.get('device_kind', 'unknown device'))} × {p.get('device_count', 1)} ({readable(p.get('cpu', 'unknown CPU'))})"
    machines = list(dict.fromkeys(machine(p) for p in origin))
    commits = list(dict.fromkeys((p.get("git_commit") or "unknown")[:10] for p in origin))
    dates = sorted(day[:10] for day in each("date"))
    versions = [f"{name} {' and '.join(each(name))}" for name in ("python", "jax", "jaxlib", "flax", "optax", "attn_zoo") if each(name)]
    when = " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "at an unknown date"
    kept = sum(bool(p.get("memory_kept")) for p in origin)
    memory = " Freed memory was kept for the next call." if kept == len(origin) else ""
    notes = [
        f"Task `{cell['task']}`; {'; '.join(settings)}.",
        f"Measured {when} on {' and '.join(machines)}; {', '.join(versions)}; commit {' and '.join(commits)}.{memory}",
    ]
    several = [f"{len(found)} {what}" for what, found in (("machines", machines), ("commits", commits)) if len(found) > 1]
    several += [f"{len(each(name))} versions of {name}" for name in ("python", "jax", "flax") if len(each(name)) > 1]
    if several:
        notes.append(f"Mind: the records come from {', '.join(several)}.")
    if 0 < kept < len(origin):
        notes.append(f"Mind: in {kept} of {len(origin)} records freed memory was kept for the next call.")
    dirty = sum(bool(p.get("git_dirty")) for p in origin)
    if dirty:
        notes.append(f"Mind: {dirty} of {len(origin)} records were made with uncommitted changes in the tree.")
    return notes


def _in_use(model: dict[str, Any], variants: list[str]) -> dict[str, Any]:
    """The settings that have a meaning in the sweep's model, or in a row's own."""
    bodies = {model.get("body", "transformer"), *(body for body in SETTINGS if any(variant.startswith(f"{body}(") for variant in variants))}
    return {name: value for name, value in model.items() if name == "body" or any(name in SETTINGS[body] for body in bodies)}


def cite(records: list[dict[str, Any]]) -> str:
    """BibTeX: an entry per paper of the variants used, by key, and one for this software."""
    papers = {paper["key"]: paper for r in records for paper in r.get("paper") or []}
    origin = [r["provenance"] for r in records if "attn_zoo" in (r.get("provenance") or {})]
    entries = []
    for key, paper in sorted(papers.items()):
        journal = re.search(r"\b(arxiv|journal|transactions|letters|neural computation)\b", paper["venue"], re.IGNORECASE)
        kind, venue = ("article", "journal") if journal else ("inproceedings", "booktitle")
        fields = {"title": f"{{{_bibtex(paper['title'])}}}", "author": _bibtex(paper["authors"])}  # double braces keep the capitals
        entries.append((kind, key, {**fields, venue: _bibtex(paper["venue"]), "year": paper["year"]}))
    software = {"title": r"{attn\_zoo: attention variants in JAX, swept over sequence length}", "author": r"{The attn\_zoo authors}"}
    if origin:
        latest = max(origin, key=lambda provenance: provenance["date"])
        software |= {"version": latest["attn_zoo"], "year": latest["date"][:4]}
    entries.append(("software", "attn_zoo", software))
    body = lambda fields: ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return "\n".join(f"@{kind}{{{key},\n{body(fields)}\n}}\n" for kind, key, fields in entries)


def _bibtex(text: str) -> str:
    return re.sub(r"(?<!\\)([&%#_])", r"\\\1", text)


def _csv(kind: type, rows: list) -> str:
    """The fields of a kind of row as columns, in SI units; six digits, so that the last bits of a platform do not show."""
    cell = lambda v: "" if v is None else f"{v:.6g}" if isinstance(v, float) else v
    fields = [field.name for field in dataclasses.fields(kind)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(fields)
    writer.writerows([cell(getattr(row, field)) for field in fields] for row in rows)
    return out.getvalue()


def _page(records: list[dict[str, Any]], pngs: dict[str, bytes]) -> str:
    """One page that needs no other file."""
    rows = summary.rows(records)
    drawn = []
    for name, png in pngs.items():
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        width = int.from_bytes(png[16:20]) // 2  # of the PNG header; half, for sharp print on dense screens
        text = html(FIGURES[name])
        drawn.append(f'<figure><img src="{source}" width="{width}" alt="{text}"><figcaption>{text}</figcaption></figure>')
    style = (
        "body{font:15px/1.45 sans-serif;margin:2em auto;max-width:110em;padding:0 1em}"
        "table{border-collapse:collapse;font-size:13px}th,td{padding:.2em .6em;border-bottom:1px solid #ddd;white-space:nowrap}"
        "div{overflow-x:auto}figure{display:inline-block;vertical-align:top;max-width:100%;margin:1em}img{max-width:100%}"
        "figcaption,.note{color:#444;font-size:13px;max-width:75em}figcaption{max-width:27em}"
    )
    body = [*(html(table) for table in _tables(rows, records)), *drawn]
    body += [f'<p class="note">{html(note)}</p>' for note in provenance_notes(records)]
    head = f'<meta charset="utf-8"><title>attn_zoo: {html(records[0]["cell"]["task"])}</title><style>{style}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m attn_zoo.report", description="Write the report of a sweep from its records.")
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--readme", type=Path, help="also renew its section <!-- table:WORKDIR'S NAME -->")
    arguments = parser.parse_args(argv)
    try:
        print(write_report(arguments.workdir))
        if arguments.readme:
            table = readme_table(results.load_with_missing(arguments.workdir))
            text = arguments.readme.read_text(encoding="utf-8")
            arguments.readme.write_text(renew_section(text, arguments.workdir.resolve().name, table), encoding="utf-8")
    except (UserError, FileNotFoundError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
