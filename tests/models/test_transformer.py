"""The Transformer: shapes and dtypes of every option, and the laws that hold whatever the variant."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from attn_zoo.models import param_counts
from attn_zoo.spec import Unsupported, UserError

POSITIONS = ("learned", "sinusoidal", "sinusoidal_concat", "rotary", "none")
FORMS = list(itertools.product(("layernorm", "rmsnorm"), ("pre", "post"), ("relu", "gelu", "swiglu")))
SETTINGS = list(itertools.product(("float32", "bfloat16"), ("tied", "untied", "mean", "first"), ("decoder", "encoder")))


def outside_attention(model):
    """Parameters by path, without those of the variants."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return {path: value for path, value in leaves if not any(getattr(k, "key", None) == "attention" for k in path)}


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("norm, norm_position, ffn", FORMS, ids=["-".join(form) for form in FORMS])
def test_forms(build, tokens, positions, norm, norm_position, ffn):
    model = build(positions=positions, norm=norm, norm_position=norm_position, ffn=ffn, layers=1, dropout=0.1)
    logits = model(tokens(2, 9), key=jax.random.key(0))
    assert logits.shape == (2, 9, 10) and logits.dtype == jnp.float32
    assert jnp.isfinite(logits).all() and len(np.unique(logits)) > 100


@pytest.mark.parametrize("dtype, head, direction", SETTINGS, ids=["-".join(setting) for setting in SETTINGS])
def test_settings(build, tokens, dtype, head, direction):
    per_token = head in ("tied", "untied")
    model = build(
        dtype=dtype,
        causal=direction == "decoder",
        per_token=per_token,
        num_outputs=10 if per_token else 3,
        tie_embeddings=head != "untied",
        pool="first" if head == "first" else "mean",
    )
    logits = model(tokens(2, 9), valid_BT=jnp.arange(9) < jnp.array([[9], [4]]))
    assert logits.shape == ((2, 9, 10) if per_token else (2, 3)) and logits.dtype == jnp.float32
    assert {str(p.dtype) for p in jax.tree.leaves(nnx.state(model, nnx.Param))} == {"float32"}
    assert [block.mixer.attention.query_dtype for block in model.blocks] == [dtype, dtype]


def test_bfloat16_computes_the_same_function_more_coarsely(build, tokens):
    fine, coarse = (build(dtype=dtype)(tokens(2, 9)) for dtype in ("float32", "bfloat16"))
    difference = np.abs(fine - coarse).max()
    assert 0 < difference < 0.03 * np.abs(fine).max()


@pytest.mark.parametrize("variant, positions", [("full", "learned"), ("[local(window=2), linear]", "rotary")])
def test_decoder_gradients_with_respect_to_later_inputs_are_zero(build, variant, positions):
    gradient_TS = input_gradients(build(variant, causal=True, positions=positions, inputs_vocab=8, num_outputs=5, max_len=8, tie_embeddings=False))
    later = np.triu(np.ones((8, 8), bool), 1)
    assert (gradient_TS[later] == 0).all() and (gradient_TS[~later] > 0).all()


def test_encoder_gradients_reach_every_input(build):
    assert (input_gradients(build("full", inputs_vocab=8, num_outputs=5, max_len=8, tie_embeddings=False)) > 0).all()


def input_gradients(model):
    """[T, S]: how strongly the logits of position t depend on the embedding of the input at s. Every position has a token of its own,
    so the rows of the embedding's gradient are positions."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def weighed_logits(params):
        return nnx.merge(graph, nnx.State(params), rest)(jnp.arange(8)[None])[0] @ jnp.arange(1.0, 6.0)

    jacobian_TSD = jax.jit(jax.jacrev(weighed_logits))(nnx.to_pure_dict(params))["embedding"]["tokens"]
    return np.abs(jacobian_TSD).sum(axis=-1)


@pytest.mark.parametrize("head", ["per-token", "mean", "first"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_contents_of_invalid_positions_change_nothing_valid(build, tokens, head, side):
    model = build(per_token=head == "per-token", pool="first" if head == "first" else "mean")
    lengths = jnp.array([[9], [6], [1]])
    valid = jnp.arange(9) < lengths if side == "right" else jnp.arange(9) >= 9 - lengths
    inputs = tokens(3, 9)
    changed = jnp.where(valid, inputs, (inputs + 1 + tokens(3, 9, seed=1) % 8) % 10)
    keep = np.asarray(valid) if head == "per-token" else slice(None)
    one, two = (np.asarray(model(x, valid_BT=valid))[keep] for x in (inputs, changed))
    np.testing.assert_array_equal(one, two)
    assert (np.asarray(model(inputs))[keep] != np.asarray(model(changed))[keep]).any()  # the mask is what does it


def test_a_sequence_without_valid_positions_pools_to_something_finite(build, tokens):
    for pool in ("mean", "first"):
        assert jnp.isfinite(build(per_token=False, pool=pool)(tokens(2, 9), valid_BT=jnp.zeros((2, 9), bool))).all()


def test_dropout_needs_a_key_and_is_a_function_of_it(build, tokens):
    model, inputs = build(dropout=0.2), tokens(2, 9)
    one, same, other = (model(inputs, key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any() and (one != model(inputs)).any()
    np.testing.assert_array_equal(model(inputs), build(dropout=0.0)(inputs, key=jax.random.key(0)))


def test_dropout_acts_on_embeddings_and_both_branches(build, tokens):
    rate, inputs, key = 0.9, tokens(20, 12), jax.random.key(0)
    model = build("full", dropout=rate, layers=1)
    model.final_norm.bias[...] = jnp.ones(8)
    graph, params = nnx.split(model)

    @jax.jit
    def silenced(out, down):
        """The share of numbers that the block leaves untouched, and of positions that the model reads out as zero vectors."""
        model = nnx.merge(graph, params, copy=True)
        block, x = model.blocks[0], model.embedding(inputs)
        block.mixer.out[...], block.ffn.down[...] = out * block.mixer.out[...], down * block.ffn.down[...]
        of_zeros = jnp.ones(8) @ model.embedding.tokens[:10].T
        return (block(x, key=key) == x).mean(), jnp.isclose(model(inputs, key=key), of_zeros, atol=1e-6).all(axis=-1).mean()

    near = lambda share, expected, n: abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / n)
    assert near(silenced(1.0, 0.0)[0], rate, inputs.size * 8)  # attention alone
    assert near(silenced(0.0, 1.0)[0], rate, inputs.size * 8)  # feed-forward alone
    assert near(silenced(0.0, 0.0)[1], rate**8, inputs.size)  # embeddings alone


def test_every_layer_has_randomness_of_its_own(build, tokens):
    model = build(layers=3)
    draws = lambda: [float(block.mixer.attention.draw[...]) for block in model.blocks]
    model(tokens(2, 9))
    assert draws() == [-1, -1, -1]
    model(tokens(2, 9), key=jax.random.key(0))
    first = draws()
    model(tokens(2, 9), key=jax.random.key(1))
    assert len({*first, *draws()}) == 6


def test_tied_embeddings_are_one_array(build, tokens):
    tied, untied = (build(tie_embeddings=tie) for tie in (True, False))
    assert param_counts(untied)["total"] - param_counts(tied)["total"] == 10 * 8
    before = tied(tokens(2, 9))
    tied.embedding.tokens[10] = jnp.full(8, 7.0)  # the eleventh input is no output, and is not in these tokens
    np.testing.assert_array_equal(before, tied(tokens(2, 9)))
    tied.embedding.tokens[9] = jnp.full(8, 7.0)
    assert (before[..., 9] != tied(tokens(2, 9))[..., 9]).all()


def test_tied_embeddings_must_cover_the_outputs(build):
    with pytest.raises(UserError, match="tie_embeddings=True: 12 outputs.*11 input"):
        build(num_outputs=12)
    build(num_outputs=12, tie_embeddings=False)
    build(num_outputs=12, per_token=False)  # a classification head is never tied


@pytest.mark.parametrize("head", ["tied", "untied", "pooled"])
def test_logits_start_near_uniform(build, tokens, head):
    model = build("full", D=64, N=4, max_len=32, tie_embeddings=head == "tied", per_token=head != "pooled")
    logits = jax.jit(lambda x: model(x))(tokens(8, 32))
    targets = tokens(8, 32, seed=1) if head != "pooled" else jnp.arange(8)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
    assert abs(entropy - math.log(10)) < 0.1


def test_variants_are_cycled_over_layers(build):
    model = build("[local(window=1), full, linear]", layers=5)
    assert [block.mixer.attention.variant.name for block in model.blocks] == ["local", "full", "linear", "local", "full"]


def test_more_variants_than_layers_is_an_error(build):
    with pytest.raises(UserError, match=r"a list of 3 variants, where layers=2"):
        build("[local(window=1), full, linear]", layers=2)


def test_what_a_variant_cannot_do_is_raised_when_built(build):
    with pytest.raises(Unsupported, match="linformer cannot be causal"):
        build("linformer(rank=4)", causal=True)


def test_backend_and_sizes_reach_the_variant(build):
    dims = build(N=4, K=2, H=6, causal=True, dtype="bfloat16").blocks[0].mixer.attention.dims
    assert (dims.num_heads, dims.num_kv_heads, dims.head_dim, dims.max_len, dims.causal, dims.dtype) == (4, 2, 6, 12, True, jnp.bfloat16)


@pytest.mark.parametrize("variant", ["linformer(rank=4)", "adaptive_span(max_span=12, init=3)"])
def test_variants_differ_in_their_attention_alone(build, variant):
    full, other = outside_attention(build("full")), outside_attention(build(variant))
    assert full.keys() == other.keys()
    assert all((full[path] == other[path]).all() for path in full)
    assert any((full[path] != value).any() for path, value in outside_attention(build(variant, seed=1)).items())


def test_a_sequence_longer_than_the_model_was_built_for_is_an_error(build, tokens):
    with pytest.raises(UserError, match="length 13 is over max_len=12"):
        build()(tokens(2, 13))


def test_a_plain_jitted_step_on_pure_dicts_learns(build, tokens):
    graph, params, rest = nnx.split(build("[linformer(rank=4), adaptive_span(max_span=12, init=3)]", dropout=0.05), nnx.Param, ...)
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
    inputs, targets = tokens(4, 12), tokens(4, 12, seed=1)
    compilations = []

    @jax.jit
    def step(params, rest, inputs, key):
        compilations.append(inputs.shape)

        def loss(params):
            model = nnx.merge(graph, nnx.State(params), nnx.State(rest))
            entropy = optax.softmax_cross_entropy_with_integer_labels(model(inputs, key=key), targets).mean()
            return entropy, nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[2])

        (entropy, rest), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.3 * g, params, grads), rest, entropy

    losses = []
    for i in range(30):
        params, rest, entropy = step(params, rest, inputs, jax.random.key(i))
        losses.append(float(entropy))
    assert len(compilations) == 1
    assert losses[-1] < 0.7 * losses[0]


def test_parameters_are_counted_once(build):
    D, F, layers, max_len = 8, 32, 2, 12
    blocks = layers * (4 * D * D + 2 * D * F + 4 * D)
    assert param_counts(build("full")) == {"total": 11 * D + max_len * D + blocks + 2 * D, "attention": 0}
    gated = layers * (D * 12 + 2 * D * 6 + 12 * D + 3 * D * 24 + 2 * D)  # N=2, K=1, H=6; rmsnorm has no biases
    assert param_counts(build("full", K=1, H=6, ffn="swiglu", norm="rmsnorm", positions="rotary"))["total"] == 11 * D + gated + D
    none, shared = param_counts(build("linformer(rank=4, share='none')")), param_counts(build("linformer(rank=4, share='layers')"))
    assert none["attention"] == layers * 2 * 2 * 4 * max_len and shared["attention"] == 4 * max_len
    assert none["total"] - none["attention"] == shared["total"] - shared["attention"] == param_counts(build("full"))["total"]


def test_blocks_without_feed_forward(build):
    """Only what is outside the attention's matrices and norm goes, and a layer has one branch to scale instead of two."""
    D, layers = 8, 2
    whole, alone = build("full"), build("full", ffn="none")
    assert param_counts(whole)["total"] - param_counts(alone)["total"] == layers * (2 * D * 4 * D + 2 * D)
    difference = whole.flops_per_step(3, 10)["model"] - alone.flops_per_step(3, 10)["model"]
    assert difference == 6 * 3 * 10 * layers * 2 * D * 4 * D
    assert whole.activation_bytes(3, 10) - alone.activation_bytes(3, 10) == 4 * 3 * 10 * layers * (2 * D + 2 * 4 * D)
    first_out, out = whole.blocks[0].mixer.out[...], alone.blocks[0].mixer.out[...]
    np.testing.assert_allclose(out, math.sqrt(2) * first_out, rtol=1e-6)
    with pytest.raises(UserError, match="F=16: has no meaning with ffn='none'"):
        build("full", ffn="none", F=16)


def test_persistent_memory_can_hold_as_many_parameters_as_the_feed_forward_it_replaces(build):
    D, F, layers = 8, 32, 2
    alone = build(f"persistent(slots={F})", ffn="none")
    assert param_counts(alone)["attention"] == layers * 2 * D * F
    assert param_counts(build("full"))["total"] - param_counts(alone)["total"] == layers * 2 * D  # the second norm


def test_flops_count_matrices_readout_and_useful_pairs(build):
    B, T, D, F = 3, 10, 8, 32
    dense = 2 * (4 * D * D + 2 * D * F)
    pairs = 4 * B * T * T * D
    assert build("full").flops_per_step(B, T) == {"attention": 3 * 2 * pairs, "model": 3 * 2 * pairs + 6 * B * T * (dense + D * 10)}
    pooled = build("full", per_token=False, num_outputs=5, positions="sinusoidal_concat").flops_per_step(B, T)
    assert pooled["model"] - pooled["attention"] == 6 * B * (T * (dense + 2 * D * D) + D * 5)
    assert build("full", causal=True).flops_per_step(B, T)["attention"] == 3 * 2 * pairs * (T + 1) / (2 * T)
    linformer = build("[linformer(rank=4), full]")  # its projections are counted by the variant, not as dense layers
    assert linformer.flops_per_step(B, T)["attention"] == 3 * sum(block.mixer.attention.flops(B, T, T) for block in linformer.blocks)
    assert linformer.flops_per_step(B, T)["model"] - linformer.flops_per_step(B, T)["attention"] == 6 * B * T * (dense + D * 10)


def test_an_abstract_model_is_counted_without_being_built(build):
    for variant in ("full", "linformer(rank=4, share='layers')", "adaptive_span(max_span=12, init=3)"):
        abstract, model = nnx.eval_shape(lambda: build(variant)), build(variant)
        assert param_counts(abstract) == param_counts(model) and abstract.flops_per_step(2, 12) == model.flops_per_step(2, 12)
        assert abstract.activation_bytes(2, 12) == model.activation_bytes(2, 12)
