"""A convolutional network with attention in it as the model of a cell: what it computes, where the layer stands, and what training asks of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_zoo import config
from attn_zoo.attention import VARIANTS, make_attention
from attn_zoo.attention.base import Loss
from attn_zoo.models import BODIES, param_counts
from attn_zoo.spec import UserError, parse_one

SHAPE = (8, 12, 3)
CELLS = (96, 24, 6)  # of three stages
TASK = dict(inputs_vocab=0, num_outputs=3, causal=False, per_token=False, source_vocab=0, source_len=0, image_shape=SHAPE)


def make(spec="full", T=24, attention=config.Attention(), task=TASK, **fields):
    model = config.Model(**({"D": 8, "layers": 3, "N": 2, "body": "convnet"} | fields))
    return BODIES["convnet"].build(model, variant=[parse_one(text) for text in spec.split(" / ")], attention=attention, max_len=T, rngs=nnx.Rngs(0), **task)


def pictures(B=2):
    return jax.random.uniform(jax.random.key(0), (B, *SHAPE))


def test_every_variant_of_the_zoo_is_offered_and_none():
    registry = BODIES["convnet"].registry
    assert set(registry) == {"none", *VARIANTS} and all(registry[name] is VARIANTS[name] for name in VARIANTS)
    assert registry["none"].paper.key not in {v.paper.key for v in VARIANTS.values()}


@pytest.mark.parametrize("T, stage", list(zip(CELLS, range(3))))
def test_attention_stands_after_the_stage_of_T_cells(T, stage):
    model = make(T=T)
    assert model.net.attention_after == stage and [h * w for h, w in model.net.sizes()] == list(CELLS)
    ((attention, queries, keys),) = model.attentions(T)
    assert attention.dims.max_len == queries == keys == T and attention.dims.num_heads == 2
    assert attention.dims.head_dim == (4 if stage == 0 else 8) // 4
    assert [stage.branch.kernel.shape[-1] for stage in model.net.stages] == [4, 8, 8]


def test_logits_are_read_from_the_mean_of_the_cells():
    model = make(H=5)
    model.net.attention.gate[...] = 0.5
    features, logits = jax.jit(lambda x_Bhwc: (model.net(x_Bhwc), model(x_Bhwc)))(pictures())
    assert logits.shape == (2, 3) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, np.asarray(features).mean(axis=(1, 2)) @ np.asarray(model.readout[...]), atol=1e-5)


def test_without_attention_all_else_starts_the_same_and_so_does_the_output():
    full, linformer, none = (make(spec) for spec in ("full", "linformer(rank=4)", "none"))
    states = [nnx.to_pure_dict(nnx.state(model, nnx.Param)) for model in (full, linformer, none)]
    assert "attention" not in states[2]["net"]
    mixers = [state["net"].pop("attention")["mixer"] for state in states[:2]]
    mixers[1].pop("attention")  # what the variant holds itself
    jax.tree.map(np.testing.assert_array_equal, *mixers)
    for state in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, states[0], state)
    run = jax.jit(lambda x_Bhwc: [model(x_Bhwc) for model in (full, none)])
    np.testing.assert_allclose(*run(pictures()), rtol=0, atol=1e-5)  # the gate is still 0


def test_losses_of_the_attention_stay_in_the_model_for_the_train_step():
    model = make("adaptive_span(max_span=8, init=2, ramp=2)")
    model(pictures())
    losses = jax.tree.leaves(nnx.state(model, Loss))
    assert losses and all(float(x) > 0 for x in losses)


def test_flops_are_three_forward_passes_of_every_product():
    B, T, (N, H, c) = 5, 24, (2, 2, 8)
    kernels = [9 * 3 * 4 + 9 * 4 * 4, 9 * 4 * 8 + 9 * 8 * 8, 9 * 8 * 8 + 9 * 8 * 8]
    net = sum(cells * kernel for cells, kernel in zip(CELLS, kernels)) + T * 4 * c * N * H + c * 3
    with_attention, without = make().flops_per_step(B, T), make("none").flops_per_step(B, T)
    assert with_attention["attention"] == 3 * make_attention("full", num_heads=N, head_dim=H, max_len=T).flops(B, T, T)
    assert with_attention["model"] == with_attention["attention"] + 6 * B * net
    assert without == {"attention": 0.0, "model": 6.0 * B * (net - T * 4 * c * N * H)}


def test_what_a_step_keeps_grows_with_batch_and_heads_and_halves_in_bfloat16():
    bytes_of = lambda **fields: make(**fields).activation_bytes(3, 24)
    assert bytes_of() == 3 * make().activation_bytes(1, 24) > bytes_of(spec="none") > 0
    assert bytes_of(dtype="bfloat16") < 0.6 * bytes_of()


def test_parameters_of_the_variant_are_counted_apart():
    assert param_counts(make("none"))["attention"] == param_counts(make())["attention"] == 0
    learned = param_counts(make("linformer(rank=4)"))
    assert learned["attention"] > 0 and learned["total"] == param_counts(make())["total"] + learned["attention"]


@pytest.mark.parametrize(
    "mistake, words",
    [
        (lambda: make(T=25), "seq_len=25: must be the cells of a grid that the network has with layers=3: 96, 24, 6"),
        (lambda: make(D=7, N=1), "D=7: must be even"),
        (lambda: make(D=6, N=2), "channels=6: must be a multiple of 2 N = 4"),
        (lambda: make("full / linear"), "a list of 2 variants: a convolutional network has one layer of attention"),
        (lambda: make(task=TASK | {"inputs_vocab": 9}), "model.body='convnet' reads a picture and no tokens"),
        (lambda: make(task=TASK | {"num_outputs": 1}), "num_outputs=1: must be a whole number of at least 2"),
        (lambda: make()(jnp.zeros((1, 12, 8, 3))), "picture=(12, 8, 3): must have the shape (8, 12, 3)"),
    ],
)
def test_mistakes_are_named(mistake, words):
    with pytest.raises(UserError) as error:
        mistake()
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("body, spec", [("transformer", "full"), ("recurrent", "dot"), ("convolutional", "dilated")])
def test_what_reads_tokens_refuses_pictures_alone(body, spec):
    model = config.Model(D=8, N=2, layers=1, body=body)
    with pytest.raises(UserError, match="reads tokens.*use model.body='convnet'"):
        BODIES[body].build(model, variant=[parse_one(spec)], attention=config.Attention(), max_len=24, rngs=nnx.Rngs(0), **TASK)
