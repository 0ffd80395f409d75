"""What models look at: each layer's weights, in its place, made of the queries and keys that it really has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_zoo import config
from attn_zoo.attention import parse_variant
from attn_zoo.models import BODIES
from attn_zoo.models.looking import look

B, T, S, N = 2, 6, 9, 2
SIZES = {"inputs_vocab": 11, "num_outputs": 11, "max_len": T, "per_token": True}


def build(variant="full", *, causal=True, body="transformer", source=False, image_shape=None, **model):
    sizes = SIZES | {"causal": causal, "source_vocab": 7 if source else 0, "source_len": S if source else 0, "image_shape": image_shape}
    registry = BODIES[body]
    settings = config.Model(**({"D": 16, "layers": 2, "N": N, "body": body} | model))
    return registry.build(settings, variant=parse_variant(variant, registry.registry, registry.kind), attention=config.Attention(), rngs=nnx.Rngs(0), **sizes)


def batch(source=False):
    ids = lambda seed, shape, V: jax.random.randint(jax.random.key(seed), shape, 0, V)
    given = {"source": ids(1, (B, S), 7), "source_valid": jnp.arange(S) < jnp.array([[S], [S - 3]])} if source else {}
    return ids(0, (B, T), 11), given


@pytest.mark.parametrize("position", ["pre", "post"])
def test_the_first_layer_weighs_as_its_projections_say(position):
    """softmax of q k' by hand, of the embedded tokens, normed or not."""
    model = build(norm_position=position)
    inputs, _ = batch()
    block = model.blocks[0]
    x = model.embedding(inputs)
    x = block.attention_norm(x) if position == "pre" else x
    q, k = (np.einsum("BTD,DNH->BTNH", x, kernel[...]) for kernel in (block.mixer.query, block.mixer.key))
    scores = np.where(np.tri(T, dtype=bool), np.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(8), -np.inf)
    expected = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    found = look(model, inputs)
    assert list(found) == ["decoder"] and len(found["decoder"]) == 2
    np.testing.assert_allclose(found["decoder"][0], expected, atol=1e-5)


def test_an_encoder_and_decoder_look_in_three_places():
    inputs, given = batch(source=True)
    found = look(build(source=True, encoder_layers=1), inputs, **given)
    assert {place: [w.shape for w in layers] for place, layers in found.items()} == {
        "cross": [(B, N, T, S)] * 2,
        "decoder": [(B, N, T, T)] * 2,
        "encoder": [(B, N, S, S)],
    }
    for weights in found["cross"]:
        np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
        assert (np.asarray(weights)[1, :, :, S - 3 :] == 0).all(), "padding of the source"


def test_an_encoder_alone():
    inputs, _ = batch()
    valid = jnp.arange(T) < jnp.array([[T], [T - 2]])
    found = look(build(causal=False), inputs, valid_BT=valid, rows=3)
    assert list(found) == ["encoder"] and found["encoder"][0].shape == (B, N, 3, T)
    assert (np.asarray(found["encoder"][0])[1, :, :, T - 2 :] == 0).all()


def test_looking_changes_nothing():
    """Neither what a model holds nor what it says."""
    model = build("adaptive_span(max_span=8, init=2, ramp=2)")
    inputs, _ = batch()
    said = model(inputs)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    look(model, inputs)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model))), before)
    np.testing.assert_array_equal(model(inputs), said)


def test_a_picture_is_looked_at_by_its_cells():
    found = look(build(image_shape=(16, 16, 3), layers=1), batch()[0], source=jax.random.uniform(jax.random.key(2), (B, 16, 16, 3)))
    assert found["cross"][0].shape == (B, N, T, 4 * 4)


@pytest.mark.parametrize("alignment, places", [("additive", ["cross"]), ("none", [])])
def test_a_recurrent_model_has_one_alignment_or_none(alignment, places):
    model = build(alignment, body="recurrent", source=True, layers=1)
    inputs, given = batch(source=True)
    found = look(model, inputs, **given)
    assert list(found) == places
    for weights in found.get("cross", ()):
        np.testing.assert_allclose(weights[:, 0], model.alignments(inputs, **given), atol=1e-6)


def test_what_has_no_attention_looks_at_nothing():
    assert look(build("dilated", body="convolutional"), batch()[0]) == {}
