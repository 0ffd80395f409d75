"""What came before the Transformer: cells against their equations, alignments against the zoo's variants, steps against teacher forcing."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_zoo import config, make_attention
from attn_zoo.attention.base import Loss, ScoreFunction
from attn_zoo.models import ALIGNMENTS, BODIES, recurrent
from attn_zoo.models.recurrent import Aligner, Cell, look
from attn_zoo.spec import UserError, parse_one

B, T, S, V, U, D = 3, 6, 9, 11, 7, 8
SPECS = ["none", "additive", "dot", "general", "concat", "local_m(window=2)", "local_p(window=2)", "hard"]
STRAIGHT_THROUGH = "hard(estimator='straight_through', temperature=0.7)"
PICTURE = (8, 12, 3)
VALID = np.arange(S) < np.array([[S], [4], [7]])


def make(spec, image_shape=None, **fields):
    model = config.Model(**({"D": D, "layers": 1, "body": "recurrent"} | fields))
    sizes = dict(inputs_vocab=V, num_outputs=V, max_len=T, causal=True, per_token=True, source_vocab=U, source_len=S, image_shape=image_shape)
    made = BODIES["recurrent"].build(model, variant=[parse_one(spec)], attention=config.Attention(), rngs=nnx.Rngs(0), **sizes)
    graph, params, rest = nnx.split(made, nnx.Param, ...)  # no parameter where it starts, biases least of all
    leaves, tree = jax.tree.flatten(params)
    return nnx.merge(graph, tree.unflatten([x + 0.2 * jax.random.normal(jax.random.key(n), x.shape) for n, x in enumerate(leaves)]), rest)


def batch():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(V, size=(B, T))), {"source": jnp.asarray(rng.integers(U, size=(B, S))), "source_valid": jnp.asarray(VALID)}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_a_cell_reads_as_its_equations_say(kind):
    cell = Cell(kind, 5, D, jnp.float32, nnx.Rngs(0))
    cell.bias[...] = jax.random.normal(jax.random.key(1), cell.bias.shape)
    W, R, b = (np.asarray(p[...], np.float64) for p in (cell.input_kernel, cell.state_kernel, cell.bias))
    x = np.random.default_rng(0).normal(size=(B, S, 5)).astype(np.float32)
    for reverse in (False, True):
        outputs, last = cell.read(jnp.asarray(x), jnp.asarray(VALID), reverse)
        for row in range(B):
            h, c = np.zeros(D), np.zeros(D)
            for j in reversed(range(S)) if reverse else range(S):
                if not VALID[row, j]:
                    assert (np.asarray(outputs[row, j]) == 0).all()
                    continue
                gates = np.split(x[row, j] @ W + b, len(b) // D)
                states = lambda n: R[:, n * D : (n + 1) * D]
                if kind == "gru":
                    z, r = (sigmoid(gates[n] + h @ states(n)) for n in (0, 1))
                    h = z * h + (1 - z) * np.tanh(gates[2] + (r * h) @ states(2))
                else:
                    i, f, o = (sigmoid(gates[n] + h @ states(n)) for n in (0, 1, 3))
                    c = f * c + i * np.tanh(gates[2] + h @ states(2))
                    h = o * np.tanh(c)
                np.testing.assert_allclose(outputs[row, j], h, atol=1e-5)
            np.testing.assert_allclose(last[row], h, atol=1e-5)


@pytest.mark.parametrize("spec, fields", [(spec, {}) for spec in SPECS] + [("additive", {"cell": "lstm", "layers": 2}), ("general", {"cell": "lstm", "layers": 2})])
def test_steps_equal_teacher_forcing(spec, fields):
    model, (tokens, source) = make(spec, **fields), batch()
    expected = model(tokens, **source)
    step = lambda cache, token: model.step(token, cache)[::-1]
    cache, logits = jax.lax.scan(step, model.start(B, T, **source), tokens.T)
    np.testing.assert_allclose(logits.swapaxes(0, 1), expected, rtol=0, atol=1e-5)
    assert all(x.ndim == 0 or len(x) == B for x in jax.tree.leaves(cache)), "beam search reorders rows"


@pytest.mark.parametrize("spec", SPECS)
def test_padding_of_the_source_changes_nothing_and_later_tokens_are_not_seen(spec):
    model, (tokens, source) = make(spec), batch()
    run = jax.jit(lambda tokens, ids: model(tokens, source=ids, source_valid=source["source_valid"]))
    expected = np.asarray(run(tokens, source["source"]))
    np.testing.assert_array_equal(run(tokens, jnp.where(VALID, source["source"], (source["source"] + 3) % U)), expected)
    later = np.asarray(run(tokens.at[:, 3:].add(1) % V, source["source"]))
    np.testing.assert_array_equal(later[:, :3], expected[:, :3])
    assert (later[:, 3:] != expected[:, 3:]).any()


def attended(aligner, query_BTD, memory):
    """The contexts of queries one after the other, [B, T, D]."""
    keys = aligner.keys(memory)
    weights = [aligner.weights(query_BTD[:, t], keys, jnp.asarray(VALID), jnp.asarray(t))[0] for t in range(query_BTD.shape[1])]
    return jnp.einsum("BTS,BSD->BTD", jnp.stack(weights, axis=1), memory)


ZOO = {  # the same in the zoo, and what of the aligner becomes its parameters
    "dot": ("full", {}),
    "concat": ("additive", {"query": "query", "key": "key", "weight": "weight"}),
    "additive": ("additive", {"query": "query", "key": "key", "weight": "weight"}),
    "local_m(window=2)": ("luong_local(window=2, align='monotonic', score='dot')", {}),
    "local_p(window=2)": ("luong_local(window=2, score='dot')", {"place_hidden": "place_hidden", "place_weight": "place_weight"}),
}


@pytest.mark.parametrize("spec", ZOO)
def test_an_alignment_is_the_zoos_variant_with_one_head(spec):
    name, copied = ZOO[spec]
    parsed = parse_one(spec)
    entry = ALIGNMENTS[parsed.name]
    aligner = Aligner(entry, parsed.resolve("alignment", entry.options), D, nnx.Rngs(0))
    attention = make_attention(name, num_heads=1, head_dim=D, max_len=S)
    for theirs, ours in copied.items():
        getattr(attention, theirs)[...] = getattr(aligner, ours)[...][None]
    q, memory = (jax.random.normal(jax.random.key(n), (B, length, D)) for n, length in ((0, T), (1, S)))
    memory = jnp.where(VALID[:, :, None], memory, 0)
    keys = memory @ aligner.general[...] if entry.score == "general" else memory
    scale = D**0.5 if name == "full" else 1.0  # the zoo divides by sqrt(H)
    expected = attention(scale * q[:, :, None], keys[:, :, None], memory[:, :, None], valid_BS=jnp.asarray(VALID))[:, :, 0]
    np.testing.assert_allclose(attended(aligner, q, memory), expected, rtol=0, atol=1e-5)


def test_bahdanaus_context_is_found_by_the_state_before_and_enters_the_cell():
    model, (tokens, source) = make("additive"), batch()
    cache = model.start(B, T, **source)
    h, memory, a = np.asarray(cache["layers"]["0"][0]), np.asarray(cache["memory"]), model.aligner
    logits, after = model.step(tokens[:, 0], cache)
    for row in range(B):
        scores = np.array([np.tanh(h[row] @ a.query[...] + memory[row, j] @ a.key[...]) @ a.weight[...] for j in range(S) if VALID[row, j]])
        weights = np.exp(scores) / np.exp(scores).sum()
        context = sum(w * m for w, m in zip(weights, memory[row]))
        x = np.asarray(model.tokens[...])[tokens[row, 0]] * D**0.5
        state = model.cells[0].advance(model.cells[0].project(jnp.concatenate([x, context])), (jnp.asarray(h[row]),))[0]
        np.testing.assert_allclose(after["layers"]["0"][0][row], state, atol=1e-5)
        features = np.tanh(np.concatenate([state, context, x]) @ model.combine[...])
        np.testing.assert_allclose(logits[row], model.readout[...] @ features, atol=1e-5)


def test_luongs_readout_is_fed_to_the_next_step():
    model, (tokens, source) = make("general"), batch()
    cache = model.start(B, T, **source)
    assert (np.asarray(cache["fed"]) == 0).all()
    logits, cache = model.step(tokens[:, 0], cache)
    np.testing.assert_allclose(logits, cache["fed"] @ model.readout[...].T, atol=1e-5)
    fed, _ = model.step(tokens[:, 1], cache)
    without, _ = model.step(tokens[:, 1], cache | {"fed": jnp.zeros_like(cache["fed"])})
    assert (np.asarray(fed) != np.asarray(without)).any()


def test_without_alignment_the_length_of_the_state_is_fixed():
    model, (_, source) = make("none"), batch()
    sizes = lambda model: sum(x.size for x in jax.tree.leaves(model.start(B, T, **source)))
    assert sizes(model) == 1 + 2 * B * D
    assert (np.asarray(model.alignments(batch()[0], **source)) == 0).all()


def leave(model, tokens, source, key, valid=None):
    """(logits, log p [B], bonus) of a call with a random key."""
    inner = nnx.merge(*nnx.split(model))
    logits = inner(tokens, **source, key=key, valid_BT=valid)
    states = nnx.state(inner, ScoreFunction), nnx.state(inner, Loss)
    return logits, *(jax.tree.leaves(state)[0] for state in states)


def test_a_hard_alignment_draws_in_training_and_takes_the_likeliest_in_evaluation():
    model, (tokens, source) = make("hard(expected=0.0)"), batch()
    weights = np.asarray(model.alignments(tokens, **source))
    assert set(np.unique(weights)) == {0.0, 1.0} and (weights.sum(axis=-1) == 1).all() and (weights[~np.broadcast_to(VALID[:, None], weights.shape)] == 0).all()
    (a, log_p, bonus), (b, *_) = (leave(model, tokens, source, jax.random.key(n)) for n in (0, 1))
    assert (np.asarray(a) != np.asarray(b)).any() and log_p.shape == (B,) and (np.asarray(log_p) < 0).all() and float(bonus) < 0
    fewer = jnp.arange(T) < jnp.array([[T], [2], [0]])
    _, cut, _ = leave(model, tokens, source, jax.random.key(0), fewer)
    assert float(cut[0]) == pytest.approx(float(log_p[0]), rel=1e-5) and float(cut[1]) > float(log_p[1]) and float(cut[2]) == 0


def test_a_hard_alignment_that_always_takes_the_average_is_soft():
    hard, (tokens, source) = make("hard(expected=1.0)"), batch()
    soft = make("additive")
    for path in ("tokens", "combine", "readout", "aligner", "encoder", "cells", "first"):
        setattr(soft, path, getattr(hard, path))
    soft.aligner.alignment = ALIGNMENTS["additive"]
    logits, log_p, _ = leave(hard, tokens, source, jax.random.key(0))
    np.testing.assert_allclose(logits, soft(tokens, **source), rtol=0, atol=1e-5)
    assert (np.asarray(log_p) == 0).all()


def test_the_log_probability_left_is_that_of_what_was_drawn():
    """By enumeration: over all draws of one step, the left log p is log of the softmax weight, whose mean gradient vanishes."""
    model, (tokens, source) = make("hard(expected=0.0)"), batch()
    one = tokens[:, :1]
    keys = jax.random.split(jax.random.key(0), 3000)
    log_p = np.asarray(jax.jit(jax.vmap(lambda key: leave(model, one, source, key)[1]))(keys))
    for row in range(B):
        values, counts = np.unique(np.round(log_p[:, row], 5), return_counts=True)
        assert len(values) == VALID[row].sum() and np.exp(values).sum() == pytest.approx(1, abs=1e-3)
        np.testing.assert_allclose(counts / len(keys), np.exp(values), atol=4 * 0.5 / np.sqrt(len(keys)))


def test_the_estimator_has_the_gradient_of_the_expected_loss(monkeypatch):
    """Over all draws of two steps, of which the first moves the second's odds: the mean of dL + (L - baseline) d log p is the gradient of the mean loss,
    the decoder being led by hand through every pair of places."""
    model, tokens, source = make("hard(expected=0.0, entropy_weight=0.0)"), jnp.array([[1, 4]]), {"source": jnp.array([[2, 5, 3]])}
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    loss_of = lambda logits: jnp.square(logits).sum() + jnp.sin(logits[0] @ logits[1])

    def surrogate(params, key):
        logits, log_p, _ = leave(nnx.merge(graph, params, rest), tokens, source, key)
        loss = loss_of(logits[0])
        return loss + jax.lax.stop_gradient(loss - 0.3) * log_p[0], log_p[0]

    keys = jax.random.split(jax.random.key(0), 300)
    estimates, log_p = jax.jit(jax.vmap(jax.grad(surrogate, has_aux=True), (None, 0)))(params, keys)
    _, first = np.unique(np.round(log_p, 4), return_index=True)
    p = np.exp(log_p[first])
    assert len(p) == 9 and p.sum() == pytest.approx(1, abs=1e-4), "each pair of places once"

    def led(params, places):
        """(loss, log p) of a decoder that looks where it is told."""
        place, log_p, logits = iter(places), [], []

        def look(options, log_p_BS, key, average_B):
            s = next(place)
            log_p.append(log_p_BS[0, s])
            return jax.nn.one_hot(s, 3)[None], (jnp.zeros(1), jnp.zeros(1))

        monkeypatch.setattr(recurrent, "look", look)
        inner = nnx.merge(graph, params, rest)
        cache = inner.start(1, 2, **source)
        for t in range(2):
            step, cache = inner.step(tokens[:, t], cache)
            logits.append(step[0])
        return loss_of(jnp.stack(logits)), sum(log_p)

    def expected_loss(params):
        pairs = jnp.array(list(itertools.product(range(3), repeat=2)))
        losses, log_p = jax.vmap(led, (None, 0))(params, pairs)
        return (jnp.exp(log_p) * losses).sum()

    exact = jax.jit(jax.grad(expected_loss))(params)
    assert abs(nnx.to_pure_dict(exact)["aligner"]["weight"]).max() > 1e-3, "where to look does not matter here: the test is void"
    mean = jax.tree.map(lambda g: jnp.einsum("X,X...->...", p, g[first]), estimates)
    jax.tree.map(lambda m, e: np.testing.assert_allclose(m, e, rtol=0, atol=1e-4 * max(1, abs(e).max())), mean, exact)


def test_straight_through_is_the_place_forward_and_the_relaxation_backward():
    model, (tokens, source) = make(STRAIGHT_THROUGH), batch()
    assert not jax.tree.leaves(nnx.state(model, (ScoreFunction, Loss)))  # it needs neither
    log_p = jnp.log(jnp.array([[0.2, 0.5, 0.3, 0.0]]))
    values, key = jnp.array([1.0, -2.0, 4.0, 7.0]), jax.random.key(3)
    options = model.aligner.options
    (weights, _), gradient = look(options, log_p, key, None), jax.grad(lambda log_p: look(options, log_p, key, None)[0][0] @ values)(log_p)
    noisy = (log_p + jax.random.gumbel(key, log_p.shape))[0, :3]
    np.testing.assert_allclose(weights[0], np.eye(4)[int(noisy.argmax())], atol=1e-6)
    relaxed = jax.grad(lambda noisy: jax.nn.softmax(noisy / 0.7) @ values[:3])(noisy)
    np.testing.assert_allclose(gradient[0], [*relaxed, 0], atol=1e-6)
    draws = [np.asarray(model(tokens, **source, key=jax.random.key(n))) for n in (0, 0, 1)]
    assert (draws[0] == draws[1]).all() and (draws[0] != draws[2]).any()


def test_places_that_are_hardly_ever_drawn_leave_gradients_finite():
    log_p = jax.nn.log_softmax(jnp.array([[0.0, -95.0, -1e4]]))
    total = lambda log_p: sum(x.sum() for x in look(ALIGNMENTS["hard"].options(), log_p, jax.random.key(0), jnp.array([False]))[1])
    assert np.isfinite(jax.grad(total)(log_p)).all()


@pytest.mark.parametrize("spec", ["none", "general", "hard"])
def test_a_picture_is_read_as_the_grid_of_its_features(spec):
    """Steps equal teacher forcing, every parameter of the convolutions learns, and the decoder starts from the mean."""
    model, tokens = make(spec, image_shape=PICTURE, cell="lstm"), batch()[0]
    picture = jax.random.uniform(jax.random.key(0), (B, *PICTURE))
    cache = model.start(B, T, source=picture)
    memory = model.encoder(picture)
    assert memory.shape == (B, model.source_len, D) and model.source_len == 2 * 3
    np.testing.assert_allclose(cache["layers"]["0"][0], np.tanh(memory.mean(axis=1) @ model.first[0][...]), atol=1e-5)
    _, logits = jax.lax.scan(lambda cache, token: model.step(token, cache)[::-1], cache, tokens.T)
    np.testing.assert_allclose(logits.swapaxes(0, 1), model(tokens, source=picture), rtol=0, atol=1e-5)
    assert model.alignments(tokens, source=picture).shape == (B, T, 6)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    loss = lambda params: jnp.square(nnx.merge(graph, params, rest)(tokens, source=picture, key=jax.random.key(0))).sum()
    gradients = nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))["encoder"]
    assert all(np.isfinite(g).all() and (np.asarray(g) != 0).any() for g in jax.tree.leaves(gradients))
    assert model.flops_per_step(2, T)["model"] > 12 * model.encoder.multiply_adds() and model.activation_bytes(2, T) == 2 * model.activation_bytes(1, T)


@pytest.mark.parametrize("spec", [*SPECS, STRAIGHT_THROUGH])
def test_gradients_reach_every_parameter_and_are_finite(spec):
    model, (tokens, source) = make(spec, layers=2), batch()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        inner = nnx.merge(graph, params, rest)
        logits = inner(tokens, **source, key=jax.random.key(0))
        left = sum(x.sum() for x in jax.tree.leaves(nnx.state(inner, (ScoreFunction, Loss))))
        return jnp.square(jax.nn.log_softmax(logits)).sum() + left

    for path, gradient in jax.tree_util.tree_flatten_with_path(jax.jit(jax.grad(loss))(params))[0]:
        assert np.isfinite(gradient).all() and (np.asarray(gradient) != 0).any(), path


def test_flops_and_memory_grow_with_what_they_count():
    additive, none = make("additive"), make("none")
    assert additive.flops_per_step(B, T)["attention"] > none.flops_per_step(B, T)["attention"] == 0
    matrices = sum(p.size for p in jax.tree.leaves(nnx.state(none.cells, nnx.Param)) if p.ndim == 2)
    assert none.flops_per_step(2, T)["model"] == 2 * none.flops_per_step(1, T)["model"] > 6 * T * matrices
    assert additive.activation_bytes(B, 2 * T) > additive.activation_bytes(B, T) > 0


def test_flops_of_an_alignment_count_its_pairs_and_its_matrices_by_what_they_turn():
    D, W = 12, 2
    in_window = sum(abs(t - s) <= W for t in range(T) for s in range(S))
    of = {"dot": (T * S * 4 * D, 0), "general": (T * S * 4 * D, S), "concat": (T * S * 6 * D, T + S), "local_m(window=2)": (in_window * 4 * D, S), "local_p(window=2)": (T * (2 * W + 1) * 4 * D, T + S)}
    for spec, (pairs, turned) in of.items():
        assert make(spec, D=D).flops_per_step(1, T)["attention"] == 3 * pairs + 6 * turned * D * D, spec


@pytest.mark.parametrize(
    "mistake, words",
    [
        (lambda: make("additive", D=7, N=1), "D=7: must be even"),
        (lambda: make("local_p(window=0)"), "window=0: must be a whole number of at least 1"),
        (lambda: make("hard(expected=2)"), "expected=2: must be a number"),
    ],
)
def test_mistakes_are_named(mistake, words):
    with pytest.raises(UserError) as error:
        mistake()
    assert words in str(error.value) and "\n" not in str(error.value)
