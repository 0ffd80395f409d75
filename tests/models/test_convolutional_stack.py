"""A stack of dilated convolutions: its equations, what it sees, and its generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_zoo import config
from attn_zoo.models import BODIES
from attn_zoo.models.convolutional_stack import DilatedLayer
from attn_zoo.spec import Unsupported, UserError, parse_one

B, T, V, D = 2, 23, 7, 6


def make(spec="dilated(kernel=3, cycle=2)", *, causal=True, per_token=True, **fields):
    model = config.Model(**({"D": D, "N": 1, "layers": 3, "positions": "none", "body": "convolutional"} | fields))
    sizes = dict(inputs_vocab=V, num_outputs=V, max_len=T, causal=causal, per_token=per_token, source_vocab=0, source_len=0, image_shape=None)
    return BODIES["convolutional"].build(model, variant=[parse_one(spec)], attention=config.Attention(), rngs=nnx.Rngs(0), **sizes)


def tokens(seed=0):
    return jax.random.randint(jax.random.key(seed), (B, T), 0, V)


@pytest.mark.parametrize("causal", [True, False])
def test_a_layer_is_its_equation_position_by_position(causal):
    layer = DilatedLayer(D, 3, 4, causal, "layernorm", 1.0, jnp.float32, nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
    h, kernel = np.asarray(layer.norm(jnp.asarray(x))), np.asarray(layer.filter[...])
    for t in range(T):
        places = [t - 8, t - 4, t] if causal else [t - 4, t, t + 4]
        both = sum(h[:, p] @ kernel[m] for m, p in enumerate(places) if 0 <= p < T)
        expected = x[:, t] + np.tanh(both[:, :D]) / (1 + np.exp(-both[:, D:])) @ np.asarray(layer.out[...])
        np.testing.assert_allclose(layer(jnp.asarray(x))[:, t], expected, rtol=0, atol=1e-5)


def test_what_an_output_sees_is_the_receptive_field():
    model = make(tie_embeddings=False)
    assert model.receptive_field == 1 + 2 * (1 + 2 + 1)

    def output(noise):
        inner = nnx.merge(*nnx.split(model))
        embedding = inner.embedding
        inner.embedding = lambda ids: embedding(ids) + noise
        return inner(tokens())[:, 15].sum()

    reached = (np.asarray(jax.grad(output)(jnp.zeros((B, T, D)))) != 0).any(axis=(0, 2))
    np.testing.assert_array_equal(np.flatnonzero(reached), np.arange(15 - model.receptive_field + 1, 16))


@pytest.mark.parametrize("fields", [{}, {"positions": "learned", "norm": "rmsnorm", "tie_embeddings": False}])
def test_steps_equal_the_parallel_form(fields):
    model = make(**fields)
    step = lambda cache, token: model.step(token, cache)[::-1]
    _, logits = jax.lax.scan(step, model.start(B, T), tokens().T)
    np.testing.assert_allclose(logits.swapaxes(0, 1), model(tokens()), rtol=0, atol=1e-5)


def test_padding_changes_nothing():
    model, valid = make(causal=False), jnp.arange(T) < jnp.array([[T], [9]])
    run = jax.jit(lambda ids: model(ids, valid_BT=valid))
    a, b = run(tokens()), run(jnp.where(valid, tokens(), (tokens() + 1) % V))
    np.testing.assert_array_equal(a[np.asarray(valid)], b[np.asarray(valid)])
    assert make(causal=False, per_token=False)(tokens(), valid_BT=valid).shape == (B, V)


S = 9  # of a source, shorter than the target


def make_with_source(**fields):
    model = config.Model(**({"D": D, "N": 1, "layers": 3, "positions": "none", "body": "convolutional"} | fields))
    sizes = dict(inputs_vocab=V, num_outputs=V, max_len=T, causal=True, per_token=True, source_vocab=V, source_len=S, image_shape=None)
    return BODIES["convolutional"].build(model, variant=[parse_one("dilated")], attention=config.Attention(), rngs=nnx.Rngs(0), **sizes)


def sources():
    """Tokens, of which the second sequence has four."""
    return {"source": tokens(1)[:, :S], "source_valid": jnp.arange(S) < jnp.array([[S], [4]])}


def test_what_enters_is_the_source_where_the_target_stands():
    model = make_with_source(encoder_layers=2)
    entering = np.asarray(model.encode(**sources(), T=T))
    assert entering.shape == (B, T, D) and len(model.encoder.layers) == 2
    np.testing.assert_array_equal(entering[0, S:], 0)
    np.testing.assert_array_equal(entering[1, 4:], 0)
    h_SD = model.encoder.embedding(sources()["source"][1:, :4])
    for layer in model.encoder.layers:
        h_SD = layer(h_SD)
    np.testing.assert_allclose(entering[1, :4], (model.encoder.final_norm(h_SD) @ model.bridge[...])[0], rtol=0, atol=1e-5)


def test_the_decoder_reads_the_source_as_far_as_the_taps_reach():
    """By two layers of the encoder 3 places around the position, and by three of the decoder those of the 14 positions before."""
    model = make_with_source(encoder_layers=2, tie_embeddings=False)
    embedding = model.encoder.embedding

    def output(noise):
        inner = nnx.merge(*nnx.split(model))
        inner.encoder.embedding = lambda ids: embedding(ids) + noise
        return inner(tokens(), source=sources()["source"])[:, t].sum()

    for t in (0, 4, 20):
        reached = (np.asarray(jax.grad(output)(jnp.zeros((B, S, D)))) != 0).any(axis=(0, 2))
        np.testing.assert_array_equal(np.flatnonzero(reached), np.arange(max(0, t - 14 - 3), min(S, t + 4)))


@pytest.mark.parametrize("fields", [{}, {"positions": "sinusoidal", "norm": "rmsnorm", "encoder_layers": 1}])
def test_steps_equal_the_parallel_form_with_a_source(fields):
    model = make_with_source(**fields)
    step = lambda cache, token: model.step(token, cache)[::-1]
    _, logits = jax.lax.scan(step, model.start(B, T, **sources()), tokens().T)
    np.testing.assert_allclose(logits.swapaxes(0, 1), model(tokens(), **sources()), rtol=0, atol=1e-5)


def test_padding_of_a_source_changes_nothing():
    model, other = make_with_source(), sources()
    run = jax.jit(lambda source: model(tokens(), source=source, source_valid=other["source_valid"]))
    changed = jnp.where(other["source_valid"], other["source"], (other["source"] + 1) % V)
    np.testing.assert_array_equal(run(other["source"]), run(changed))
    short = model(tokens()[1:], source=other["source"][1:, :4])
    np.testing.assert_allclose(run(other["source"])[1:], short, rtol=0, atol=1e-5)


def test_a_source_that_is_too_long_is_refused():
    with pytest.raises(UserError, match="a source of 23 is over source_len=9"):
        make_with_source()(tokens(), source=tokens())


def test_mistakes_are_named():
    with pytest.raises(UserError, match="kernel=2: must be odd"):
        make("dilated(kernel=2)", causal=False)
    with pytest.raises(UserError, match="kernel=1: must be a whole number of at least 2"):
        make("dilated(kernel=1)")
    with pytest.raises(Unsupported, match="read ahead"):
        make(causal=False).start(B, T)


def test_flops_count_every_matrix():
    model = make(tie_embeddings=False)
    layer = 3 * D * 2 * D + D * D
    assert model.flops_per_step(2, T) == {"attention": 0.0, "model": 6.0 * 2 * T * (3 * layer + V * D)}
    reading = make_with_source(tie_embeddings=False)
    assert reading.flops_per_step(2, T) == {"attention": 0.0, "model": 6.0 * 2 * (T * (3 * layer + V * D) + S * (3 * layer + D * D))}
    assert model.activation_bytes(2, T) == 2 * model.activation_bytes(1, T)
