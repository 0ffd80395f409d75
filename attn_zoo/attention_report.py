"""What the trained models of a sweep look at, drawn from the parameters that it kept, and a picture of the zoo's patterns."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from attn_zoo import attention_figures, pattern_figures
from attn_zoo.attention_figures import Panel
from attn_zoo.models.generation import write
from attn_zoo.models.looking import look
from attn_zoo.spec import UserError
from attn_zoo.tasks import Example, Task
from attn_zoo.trained import kept, load_trained

EXAMPLES = 3  # of validation
CANDIDATES = 64  # among which those are looked for whose characters a figure can draw
POSITIONS = 64  # of self-attention
WORDS = {"cross": "attention to the source", "decoder": "self-attention of the decoder", "encoder": "self-attention of the encoder"}


def write_patterns(folder: str | os.PathLike) -> list[Path]:
    """Draws the patterns of all sparse variants into folder/patterns.png and .pdf."""
    return _save(pattern_figures.patterns(), Path(folder), "patterns")


def write_attention(workdir: str | os.PathLike, data_dir: str) -> list[str]:
    """Draws the attention of each variant and length, of its first seed that kept parameters, into workdir/attention/; a line for each figure.

    Raises UserError where there are no records, no parameters, or no attention.
    """
    try:
        records = kept(workdir)
    except UserError as e:
        raise UserError(f"--plot_attention={e}") from None
    lines, learned = [], {}
    for record in {(r["cell"]["variant"], r["cell"]["seq_len"]): r for r in reversed(records)}.values():
        title = f"{record['cell']['variant']}, T = {record['cell']['seq_len']:,}, seed {record['cell']['seed']}"
        for name, what, figure in cell_figures(workdir, record, data_dir, title):
            (png, _) = _save(figure, Path(workdir, "attention"), f"{record['id']}_{name}")
            lines.append(f"{png}: {title}: {what}")
        if by_layer := learned_spans(record):
            learned[title] = by_layer
    tails = {title.partition(", T = ")[2] for title in learned}
    if len(tails) == 1:  # of one length and seed: what differs is the variant
        learned = {title.removesuffix(f", T = {next(iter(tails))}"): by_layer for title, by_layer in learned.items()}
    if learned:
        (png, _) = _save(attention_figures.spans(dict(reversed(learned.items()))), Path(workdir, "attention"), "spans")
        lines.append(f"{png}: learned spans of all heads")
    if not lines:
        raise UserError(f"--plot_attention={workdir}: none of its models has attention to draw")
    return sorted(lines)


def cell_figures(workdir: str | os.PathLike, record: dict[str, Any], data_dir: str, title: str) -> Iterator[tuple[str, str, Figure]]:
    """(name, what it shows, figure) of a cell: of some examples what the source is read for, and of the first the self-attention.

    Where there is a source, what is said of it is what the model itself writes, greedily.
    """
    model, task = load_trained(workdir, record["id"], data_dir=data_dir)
    if not task.inputs_vocab:
        return  # pictures alone, classified: what attends there is a layer of a convolutional network, and has no positions to name
    chosen = as_written(model, task, examples(task, EXAMPLES))
    grid = model.encoder.net.grid if task.image_shape is not None else None
    found = look_at(model, task, chosen)
    for place, layers in found.items():
        heads = layers[0].shape[1]
        for n, example in enumerate(chosen if place == "cross" else chosen[:1]):
            each = list(itertools.product(range(len(layers)), range(heads)))
            name = lambda layer, head: f"layer {layer + 1}, head {head + 1}" if len(each) > 1 else ""
            panels = [Panel(name(layer, head), np.asarray(layers[layer][n, head], np.float32)) for layer, head in each]
            what = f"example {n + 1}, {WORDS[place]}"
            yield f"{place}_{n + 1}", what, draw(task, example, place, panels, f"{title}; {what}", across=heads, grid=grid)


def draw(task: Task, example: Example, place: str, panels: list[Panel], title: str, across: int, grid: tuple[int, int] | None) -> Figure:
    """The figure of one example, of its valid positions alone; `grid` is that of the cells of a picture, where the source is one."""
    inputs = example["inputs"][example["valid"]]
    said = [task.label(int(i)) for i in (example["targets"][example["valid"]] if place == "cross" and task.per_token else inputs)]
    if place == "cross" and grid is not None:
        return attention_figures.maps(example["source"], said, panels, grid, title=title)
    of_source = place == "cross" or (place == "encoder" and task.source_len > 0)
    read = [task.label(int(i), source=True) for i in example["source"][example["source_valid"]]] if of_source else said
    rows, columns = (said if place == "cross" else read), read
    if place != "cross":
        rows, columns = rows[:POSITIONS], columns[:POSITIONS]
    cut = [Panel(panel.title, panel.weights_TS[: len(rows), : len(columns)]) for panel in panels]
    sides = "what is said" if place == "cross" else "queries", "what is read" if place == "cross" else "keys"
    return attention_figures.matrices(cut, rows, columns, title=f"{title}; down, {sides[0]}; across, {sides[1]}", across=across)


def as_written(model: Any, task: Task, chosen: list[Example]) -> list[Example]:
    """The examples with what the model writes of their sources in the place of their targets; as they are, where the task has no sources."""
    if task.begin_end is None:
        return chosen
    begin, end = task.begin_end
    graph, arrays = nnx.split(model)
    sources = {name: jnp.stack([example[name] for example in chosen]) for name in ("source", "source_valid") if name in chosen[0]}
    written = np.asarray(jax.jit(lambda arrays: write(nnx.merge(graph, arrays), begin, end, task.seq_len, **sources))(arrays))
    said = lambda row: {"inputs": np.append(begin, row[:-1]), "targets": row, "valid": np.arange(len(row)) <= np.argmax(np.append(row, end) == end)}
    return [example | said(row) for example, row in zip(chosen, written)]


def look_at(model: Any, task: Task, chosen: list[Example]) -> dict[str, list[jax.Array]]:
    """The model's weights on these examples, as `look` gives them."""
    batch = {name: jnp.stack([example[name] for example in chosen]) for name in chosen[0]}
    source = {name: batch[name] for name in ("source", "source_valid") if name in batch}
    # Of a source all that is said is drawn, of self-attention the first positions.
    rows = None if "source" in batch else POSITIONS
    return look(model, batch["inputs"], valid_BT=batch["valid"] if task.padded else None, rows=rows, **source)


def examples(task: Task, count: int) -> list[Example]:
    """The first examples of validation whose characters, of the source where there is one, all have a picture in the font; then, if there are too few, the first others."""
    candidates = list(itertools.islice(task.eval_examples(CANDIDATES * task.seq_len, "validation"), CANDIDATES))

    def illegible(example: Example) -> bool:
        if "source_valid" in example:
            labels = [task.label(int(i), source=True) for i in example["source"][example["source_valid"]]]
        else:
            labels = [task.label(int(i)) for i in example["inputs"][example["valid"]]]
        return not all(map(attention_figures.legible, labels))

    return sorted(candidates, key=illegible)[:count]


def learned_spans(record: dict[str, Any]) -> list[np.ndarray]:
    """What the layers of a cell recorded of their heads' spans, [N] a layer, in the order of the model; [] where they learn none."""
    spans = {tuple(int(x) if x.isdigit() else x for x in name.split(".")): z for name, z in (record.get("statistics") or {}).items() if name.endswith(".spans")}
    return [np.atleast_1d(np.asarray(spans[path], float)) for path in sorted(spans)]


def _save(figure: Figure, folder: Path, name: str) -> list[Path]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{folder}: the folder cannot be made ({e.strerror})") from None
    paths = [folder / f"{name}.{form}" for form in ("png", "pdf")]
    figure.savefig(paths[0], dpi=200)
    figure.savefig(paths[1], metadata={"CreationDate": None})
    return paths
