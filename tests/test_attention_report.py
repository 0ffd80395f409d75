"""Figures of what is looked at: every label stands where it belongs and inside the figure, patterns are those of the variants, and a real run is drawn from its parameters."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib.figure import Figure

from attn_zoo import VARIANTS, attention_report, pattern_figures, train
from attn_zoo.attention_figures import Panel, legible, maps, matrices, spans, visible, whitened
from attn_zoo.parameters import parameters_path, write_parameters
from attn_zoo.results import load_records, write_record
from attn_zoo.spec import UserError
from attn_zoo.tasks import load_task
from attn_zoo.tasks.pairs import BEGIN, END, RESERVED, reserved_label
from tiny import make_cell

REVERSE = "reverse(vocab=26, min_length=4, max_length=6, longest=6, train_examples=32, validation_examples=4, test_examples=1)"
SHAPES = "shapes(max_shapes=1, train_examples=16, validation_examples=4, test_examples=1)"


def softmax(*shape) -> np.ndarray:
    weights = np.random.RandomState(0).exponential(size=shape)
    return weights / weights.sum(axis=-1, keepdims=True)


def labels_of(ax) -> tuple[list[str], list[str]]:
    """(rows, columns) that stand beside a panel."""
    return tuple([t.get_text() for t in axis.get_ticklabels() if t.get_visible()] for axis in (ax.yaxis, ax.xaxis))


def assert_nothing_is_cut_off(figure):
    """All that is drawn lies on the page; in inches."""
    figure.canvas.draw()  # numbers beside an axis have no text before
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= -0.01 and box.y0 >= -0.01 and box.x1 <= width + 0.01 and box.y1 <= height + 0.01, (box, (width, height))


def test_a_matrix_has_its_tokens_beside_it():
    rows, columns = list("2026-11-21") + ["END"], list("samedi 21 novembre 2026")
    panels = [Panel(f"layer {layer}, head {head}", softmax(len(rows), len(columns))) for layer in (1, 2) for head in range(1, 5)]
    figure = matrices(panels, rows, columns, title="full, T = 12", across=4)
    assert [ax.get_title() for ax in figure.axes] == [p.title for p in panels]
    assert all(np.array_equal(ax.images[0].get_array(), p.weights_TS) for ax, p in zip(figure.axes, panels))
    left, bottom = figure.axes[0], figure.axes[-1]
    assert labels_of(left)[0] == rows
    assert [t.get_text() for t in bottom.get_xticklabels()] == [visible(c) for c in columns] and "␣" in visible(" ")
    assert_nothing_is_cut_off(figure)


@pytest.mark.parametrize("T, S", [(3, 3), (64, 64), (20, 90), (30, 120)])
@pytest.mark.parametrize("count", [1, 4])
def test_matrices_of_any_size_fit_their_figure(T, S, count):
    words = ["BEGIN", "a", "large", "magenta", "triangle", "$x_1$", "\n", "日"]
    tokens = lambda n: (words * n)[:n]
    assert_nothing_is_cut_off(matrices([Panel("layer 1, head 1", softmax(T, S))] * count, tokens(T), tokens(S), title="a long title " * 12, across=count))


def test_weights_below_zero_have_a_colour_of_their_own():
    weights = softmax(3, 3) - 0.2
    image = matrices([Panel("", weights)], "abc", "abc", title="", across=1).axes[0].images[0]
    assert image.get_cmap().name == "RdBu" and image.norm.vmin == -image.norm.vmax == -np.abs(weights).max()


@pytest.mark.parametrize("label, drawn, is_legible", [("a", "a", True), ("ж", "ж", True), (" ", "␣", True), ("\n", "↵", True), ("日", "U+65E5", False), ("\x07", "U+0007", False)])
def test_no_label_is_a_box(label, drawn, is_legible):
    assert (visible(label), legible(label)) == (drawn, is_legible)
    assert all(legible(c) for c in visible(label))


def test_a_picture_is_whitened_where_its_cells_weigh():
    picture = np.full((4, 6, 3), 0.2)
    weights = np.array([[0.0, 0.5, 0.25], [0.0, 0.0, 0.0]])
    shown = whitened(picture, weights)
    for y, x in np.ndindex(4, 6):
        share = 0.85 * weights[y // 2, x // 2] / 0.5
        np.testing.assert_allclose(shown[y, x], 0.2 + share * 0.8)


@pytest.mark.parametrize("heads", [1, 4])
def test_every_word_has_its_map(heads):
    words = ["a", "large", "magenta", "triangle", "above", "a", "small", "blue", "square", "END"]
    panels = [Panel(f"layer 1, head {n}", softmax(len(words), 16)) for n in range(heads)]
    figure = maps(np.random.RandomState(0).rand(32, 32, 3), words, panels, (4, 4), title="additive, T = 24")
    assert [ax.get_title() for ax in figure.axes if ax.get_title()] == words
    assert len(figure.axes) == heads * (1 + len(words))
    assert_nothing_is_cut_off(figure)


def test_every_head_has_a_mark_for_its_span():
    learned = {"adaptive_span, T = 64": [np.array([3.0, 40.0]), np.array([0.0, 7.5])], "mix": [np.array([1.0])]}
    figure = spans(learned)
    assert sorted(y for line in figure.axes[0].lines for y in line.get_ydata()) == [0.0, 1.0, 3.0, 7.5, 40.0]
    assert figure.axes[0].get_ylim()[0] == 0
    assert_nothing_is_cut_off(figure)


def test_spans_stand_in_the_order_of_the_layers():
    statistics = {f"blocks.{n}.mixer.attention.spans": [float(n)] for n in (10, 2, 0)} | {"blocks.0.mixer.attention.balance": [1.0]}
    assert [z.tolist() for z in attention_report.learned_spans({"statistics": statistics})] == [[0.0], [2.0], [10.0]]


@pytest.mark.parametrize("name", ["local", "global_window", "strided", "random"])
def test_a_picture_of_a_pattern_is_the_pattern(name):
    """Shares of single positions are the softmax of equal scores over what is seen; those of blocks are the sums of these."""
    spec = pattern_figures.small(name)
    weights = pattern_figures.shares(spec, 64, 1)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    i, j = np.indices((64, 64))
    seen = {
        "local": abs(i - j) <= 4,
        "global_window": (abs(i - j) <= 4) | (i < 2) | (j < 2),
        "strided": (abs(i - j) < 8) | ((i - j) % 8 == 0),
        "random": weights > 0,
    }[name]
    np.testing.assert_allclose(weights, seen / seen.sum(axis=1, keepdims=True), rtol=1e-5)
    assert name != "random" or (seen.sum(axis=1) == 6).all()
    np.testing.assert_allclose(pattern_figures.shares(spec, 64, 16), weights.reshape(4, 16, 4, 16).sum(axis=3).mean(axis=1), atol=1e-6)


def test_every_sparse_variant_is_in_the_picture(monkeypatch):
    """All of them compiled take a minute: here they are drawn with other weights."""
    monkeypatch.setattr(pattern_figures, "shares", lambda spec, T, block: softmax(T // block, T // block))
    monkeypatch.setattr(pattern_figures, "drawn_weights", lambda spec, T: softmax(T, T))
    figure = pattern_figures.patterns()
    drawn = {text.get_text().partition("(")[0] for text in figure.texts}
    sparse = {name for name, v in VARIANTS.items() if "sparse" in v.family}
    assert len(sparse) > 10 and sparse <= drawn
    assert_nothing_is_cut_off(figure)


def test_what_is_useful_and_computed_is_that_of_the_plan():
    """A window of 256 on each side, of 2,048 positions, in blocks of 64."""
    pairs = sum(min(i + 256, 2047) - max(i - 256, 0) + 1 for i in range(2048)) / 2048**2
    assert pattern_figures.densities("local", 2048).startswith(f"pairs {100 * pairs:.2g} %, computed ")
    assert pattern_figures.densities("random", 2048) == "pairs 1.6 %"


@pytest.mark.parametrize(
    "spec, T, labels",
    [
        ("bytes(objective='masked')", 8, {97: "a", 10: "\n", 256: "MASK"}),
        ("listops(form='short')", 128, {0: "[PAD]", 1: "[CLS]", 2: "0"}),
        ("dates", 12, {0: "PAD", 1: "BEGIN", 2: "END", 3: "0"}),
        (REVERSE, 7, {1: "BEGIN", 3: "0", 28: "25"}),
        (SHAPES, 5, {2: "END", 3: "a"}),
        ("mqar", 32, {7: "7"}),
    ],
    ids=lambda x: x.partition("(")[0] if isinstance(x, str) else "",
)
def test_tasks_name_their_tokens(spec, T, labels):
    assert {id: load_task(spec, T, "").label(id) for id in labels} == labels


def keep(workdir, a_cell, scale=1.0, **record):
    """Leaves what a cell that ended well leaves: its record, and its parameters, here its first ones times `scale`."""
    model = train.Model(a_cell, load_task(a_cell.task, a_cell.seq_len, ""))
    write_record(workdir, {"id": a_cell.id, "status": "ok", "message": "", "cell": dataclasses.asdict(a_cell)} | record)
    params, rest = model.init()
    write_parameters(workdir, a_cell.id, jax.tree.map(lambda x: scale * x, params), rest)
    return workdir


def recurrent(**changes):
    return make_cell("additive", T=7, task=REVERSE, model={"body": "recurrent"}, **changes)


@pytest.mark.parametrize(
    "a_cell, names",
    [
        (make_cell(T=7, task=REVERSE), ["cross_1", "cross_2", "cross_3", "decoder_1", "encoder_1"]),
        (make_cell("additive", T=5, task=SHAPES, model={"body": "recurrent"}), ["cross_1", "cross_2", "cross_3"]),
        (make_cell("adaptive_span(max_span=16, init=4, ramp=4)", model={"remat": True}), ["decoder_1"]),
    ],
    ids=["encoder and decoder", "picture", "decoder"],
)
def test_a_run_is_drawn_from_its_parameters(a_cell, names, tmp_path):
    statistics = {"blocks.0.mixer.attention.spans": [4.0, 4.0]} if "span" in a_cell.variant else {}
    lines = attention_report.write_attention(keep(tmp_path, a_cell, statistics=statistics), str(tmp_path / "data"))
    expected = [f"{a_cell.id}_{name}" for name in names] + (["spans"] if statistics else [])
    assert sorted(path.name for path in (tmp_path / "attention").iterdir()) == sorted(f"{name}.{form}" for name in expected for form in ("pdf", "png"))
    assert [re.match(r".*/attention/(\w+)\.png: ", line)[1] for line in lines] == sorted(expected)
    assert all(path.stat().st_size > 1000 for path in (tmp_path / "attention").iterdir())


def test_what_is_drawn_are_the_weights_of_the_kept_parameters(tmp_path):
    """Of what the model writes of each example, up to its end; and not those of the parameters that training started from."""
    a_cell, data = recurrent(), str(tmp_path / "data")
    (record,) = load_records(keep(tmp_path, a_cell, scale=3.0))
    figures = [figure for _, _, figure in attention_report.cell_figures(tmp_path, record, data, "")]
    task = load_task(REVERSE, 7, data)
    model = train.Model(a_cell, task)
    params, rest = model.init()
    scaled = lambda scale: model.bind(jax.tree.map(lambda x: scale * x, params), rest)
    read = jax.jit(lambda scale, inputs, **source: (scaled(scale)(inputs, **source)[0].argmax(axis=-1), scaled(scale).alignments(inputs, **source)[0]))

    def written(scale, example):
        """(what the model says, its alignment while it says so), a word at a time."""
        source = {name: jnp.asarray(example[name][None]) for name in ("source", "source_valid")}
        inputs, said = np.full((1, 7), BEGIN), []
        while len(said) < 7 and END not in said:
            said.append(int(read(scale, jnp.asarray(inputs), **source)[0][len(said)]))
            inputs[0, 1 : len(said) + 1] = said[:6]
        return said, np.asarray(read(scale, jnp.asarray(inputs), **source)[1])[: len(said), example["source_valid"]]

    for figure, example in zip(figures, attention_report.examples(task, 3), strict=True):
        shown = np.asarray(figure.axes[0].images[0].get_array())
        said, weights = written(3.0, example)
        np.testing.assert_allclose(shown, weights, atol=1e-5)
        other = written(1.0, example)[1]
        assert shown.shape != other.shape or not np.allclose(shown, other, atol=1e-3)
        symbols = lambda ids: [reserved_label(i) or str(i - RESERVED) for i in ids]
        assert labels_of(figure.axes[0]) == (symbols(said), symbols(example["source"][example["source_valid"]]))


def test_what_a_model_writes_ends_where_it_says_so(tmp_path):
    task, model = load_task(REVERSE, 7, str(tmp_path)), nnx.Module()
    script = jnp.array([[5, 6, END, 0, 0, 0, 0], [7, 7, 7, 7, 7, 7, 7]])
    model.start = lambda B, max_len, source, source_valid: {"t": jnp.zeros((), jnp.int32)}
    model.step = lambda tokens_B, cache: (jax.nn.one_hot(script[:, cache["t"]], 32), {"t": cache["t"] + 1})
    first, second = attention_report.as_written(model, task, attention_report.examples(task, 2))
    assert first["inputs"].tolist() == [BEGIN, 5, 6, END, 0, 0, 0] and first["targets"].tolist() == script[0].tolist()
    assert first["valid"].sum() == 3 and second["valid"].all() and second["targets"].tolist() == [7] * 7


def test_of_several_seeds_the_first_that_kept_its_parameters_is_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(attention_report, "cell_figures", lambda workdir, record, data_dir, title: drawn.append(record["cell"]["seed"]) or [("cross_1", "", Figure((1, 1)))])
    for seed in (0, 1, 2):
        a_cell = recurrent(seed=seed)
        write_record(tmp_path, {"id": a_cell.id, "status": "ok", "message": "", "cell": dataclasses.asdict(a_cell)})
        if seed:
            write_parameters(tmp_path, a_cell.id, {}, {})
    (line,) = attention_report.write_attention(tmp_path, "")
    assert drawn == [1] and recurrent(seed=1).id in line and "seed 1" in line


def test_what_cannot_be_drawn_is_refused_in_a_line(tmp_path):
    with pytest.raises(UserError, match="there are no records; give the workdir of a sweep"):
        attention_report.write_attention(tmp_path / "nothing", "")
    parameters_path(keep(tmp_path, make_cell()), make_cell().id).unlink()
    with pytest.raises(UserError, match="no cell kept its parameters; run the sweep again with --set keep_parameters=True"):
        attention_report.write_attention(tmp_path, "")
    assert not (tmp_path / "attention").exists()


def test_a_model_without_attention_is_refused(tmp_path):
    keep(tmp_path, make_cell("dilated", model={"body": "convolutional"}))
    with pytest.raises(UserError, match="none of its models has attention to draw"):
        attention_report.write_attention(tmp_path, str(tmp_path / "data"))
