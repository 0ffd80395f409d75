"""Readers: answers against sums over words and places, the zoo's attention over attention, and what must not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from attn_zoo import config, make_attention
from attn_zoo.models import BODIES, READERS, reader
from attn_zoo.spec import UserError, parse_one

B, T, S, V, D = 3, 5, 12, 9, 8
VALID_S = np.arange(S) < np.array([[S], [7], [3]])
VALID_T = np.arange(T) < np.array([[T], [3], [4]])


def build(spec, **changes):
    model = config.Model(D=D, layers=1, body="reader")
    sizes = dict(inputs_vocab=V, num_outputs=V, max_len=T, causal=False, per_token=False, source_vocab=V, source_len=S, image_shape=None) | changes
    return BODIES["reader"].build(model, variant=[parse_one(spec)], attention=config.Attention(), rngs=nnx.Rngs(0), **sizes)


def batch(seed=0):
    """(query, the keywords of a call); a third of the document's words are candidates."""
    rng = np.random.default_rng(seed)
    candidates = (np.arange(S) % 3 == 0) & VALID_S
    ids = lambda n: jnp.asarray(rng.integers(3, V, size=(B, n)), jnp.int32)
    query, document = ids(T), ids(S)
    return query, {"source": document, "source_valid": jnp.asarray(VALID_S), "candidates": jnp.asarray(candidates), "valid_BT": jnp.asarray(VALID_T)}


def parts(model, query, given):
    """(q, g, d) of the model, in float64."""
    q, g = model.query(query, valid_BS=given["valid_BT"])
    d, _ = model.document(given["source"], valid_BS=given["source_valid"])
    return (np.asarray(x, np.float64) for x in (q, g, d))


def normalized(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


@pytest.mark.parametrize("name", ["attention_sum", "attention_over_attention"])
def test_an_answer_is_the_attention_summed_over_the_places_of_a_word(name):
    model, (query, given) = build(name), batch()
    q, g, d = parts(model, query, given)
    found = np.asarray(jnp.exp(model(query, **given)))
    for row in range(B):
        n, m = VALID_S[row].sum(), VALID_T[row].sum()
        if name == "attention_sum":
            s = normalized(d[row, :n] @ g[row])
        else:
            M = d[row, :n] @ q[row, :m].T
            alpha = np.stack([normalized(M[:, t]) for t in range(m)], axis=1)
            beta = np.mean([normalized(M[i]) for i in range(n)], axis=0)
            s = alpha @ beta
        assert s.sum() == pytest.approx(1)
        P = np.zeros(V)
        for i in range(n):
            if given["candidates"][row, i]:
                P[given["source"][row, i]] += s[i]
        np.testing.assert_allclose(found[row], P / P.sum(), atol=2e-6)


def test_without_candidates_every_word_of_the_document_is_one():
    model, (query, given) = build("attention_over_attention"), batch()
    everywhere = given | {"candidates": given["source_valid"]}
    np.testing.assert_array_equal(model(query, **given | {"candidates": None}), model(query, **everywhere))


def test_the_attention_is_that_of_the_zoo():
    """With one head of D channels, queries scaled by sqrt(D), since the paper does not divide by it: the sum of values by s is what the variant gives."""
    model, (query, given) = build("attention_over_attention"), batch()
    q, _, d = (jnp.asarray(x, jnp.float32) for x in parts(model, query, given))
    values = jax.random.normal(jax.random.key(0), (B, S, 1, D))
    zoo = make_attention("attention_over_attention", num_heads=1, head_dim=D, max_len=S)
    o_BTNH = zoo(D**0.5 * q[:, :, None], d[:, :, None], values, valid_BS=given["source_valid"], valid_BT=given["valid_BT"])
    s_BS = jnp.exp(reader.log_attended(q, d, given["valid_BT"], given["source_valid"]))
    np.testing.assert_allclose(o_BTNH[:, 0, 0], jnp.einsum("BS,BSD->BD", s_BS, values[:, :, 0]), atol=1e-5)


def test_a_place_far_from_likely_has_a_probability_that_learns():
    """exp(-200) is zero in float32; its logarithm, and the gradient of it, are not."""
    log_s, words, places = jnp.array([[0.0, -200.0, -201.0]]), jnp.array([[1, 2, 2]]), jnp.ones((1, 3), bool)
    log_P, grad = jax.value_and_grad(lambda log_s: reader.log_sum_by_word(log_s, words, places, 4)[0, 2])(log_s)
    assert log_P == pytest.approx(-200 + np.log1p(np.exp(-1)))
    np.testing.assert_allclose(grad, [[-1, 1 / (1 + np.exp(-1)), 1 / (1 + np.e)]], atol=1e-6)


def test_without_attention_words_are_judged_by_the_query_alone():
    model, (query, given) = build("none"), batch()
    _, g = model.query(query, valid_BS=given["valid_BT"])
    found = np.asarray(jnp.exp(model(query, **given)))
    for row in range(B):
        offered = sorted({int(w) for w, c in zip(given["source"][row], given["candidates"][row]) if c})
        scores = np.asarray(model.query.tokens[...])[offered] @ np.asarray(g[row])
        np.testing.assert_allclose(found[row, offered], normalized(scores), rtol=1e-4)
        assert found[row].sum() == pytest.approx(1) and set(np.flatnonzero(found[row])) == set(offered)


@pytest.mark.parametrize("name", READERS)
def test_padding_changes_nothing(name):
    model, (query, given) = build(name), batch()
    other_query, other = batch(seed=1)
    mixed = given | {"source": jnp.where(VALID_S, given["source"], other["source"]), "candidates": given["candidates"] | ~VALID_S}
    np.testing.assert_array_equal(model(jnp.where(VALID_T, query, other_query), **mixed), model(query, **given))


@pytest.mark.parametrize("name", READERS)
def test_loss_and_gradients_are_finite_and_it_learns(name):
    """Also of a row that is all padding, as batches of evaluation may have, and where the answer stands nowhere."""
    model, (query, given) = build(name), batch()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    answers = jnp.array([int(given["source"][row, 0]) for row in range(B)])

    def loss(params, weights, given):
        logits = nnx.merge(graph, params, rest)(query, **given)
        return (optax.softmax_cross_entropy_with_integer_labels(logits, answers) * weights).sum()

    empty = {n: jnp.zeros_like(x) if x.dtype == bool else x for n, x in given.items()}
    for weights, seen in ((jnp.zeros(B), empty), (jnp.ones(B), empty)):
        value, grads = jax.jit(jax.value_and_grad(loss))(params, weights, seen)
        assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    optimizer = optax.adam(2e-2)
    state, step = optimizer.init(params), jax.jit(jax.value_and_grad(loss))
    first = None
    for _ in range(60):
        value, grads = step(params, jnp.ones(B), given)
        first = value if first is None else first
        updates, state = optimizer.update(grads, state)
        params = optax.apply_updates(params, updates)
    assert value < 0.3 * first


def test_the_table_of_embeddings_is_one_and_counted_once():
    for name, encoders in (("none", 1), ("attention_sum", 2), ("attention_over_attention", 2)):
        leaves = jax.tree.leaves(nnx.state(build(name), nnx.Param))
        assert [x.shape for x in leaves].count((V, D)) == 1
        assert len(leaves) == 1 + encoders * 6, "two directions of two kernels and a bias"


def test_what_is_no_query_and_document_is_refused():
    for changes in ({"source_len": 0, "source_vocab": 0}, {"per_token": True}, {"source_vocab": V + 1}, {"causal": True}):
        with pytest.raises(UserError, match="reader"):
            build("attention_sum", **changes)
    with pytest.raises(UserError, match="attention_sum"):
        build("attention_sum(D=3)")
