"""What a variant of a sweep means: of the body that the sweep names, or of its own."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from attn_zoo import config
from attn_zoo.attention import VARIANTS
from attn_zoo.models import ALIGNMENTS, BODIES, READERS, read_variant, read_variants
from attn_zoo.models.convolutional_stack import CONVOLUTIONS
from attn_zoo.spec import Spec, UserError

SHARED = config.Model(D=32, layers=2, N=2)


@pytest.mark.parametrize(
    "text, canonical, body, specs, changed",
    [
        ("full", "full", "transformer", ["full"], {}),
        ("[local(window=256), full]", "[local, full]", "transformer", ["local", "full"], {}),
        ("transformer(full)", "full", "transformer", ["full"], {}),
        ("transformer(local, full, layers=2)", "[local, full]", "transformer", ["local", "full"], {}),
        ("transformer(full, D=64)", "transformer(full, D=64)", "transformer", ["full"], {"D": 64}),
        ("recurrent(additive)", "recurrent(additive)", "recurrent", ["additive"], {}),
        ("recurrent(local_m(window=10), cell='lstm', layers=1)", "recurrent(local_m, layers=1, cell='lstm')", "recurrent", ["local_m"], {"layers": 1, "cell": "lstm"}),
        ("convolutional(dilated(kernel=5), dropout=0, D=32)", "convolutional(dilated(kernel=5))", "convolutional", ["dilated(kernel=5)"], {}),
        ("convolutional(dilated, dropout=1e-1)", "convolutional(dilated, dropout=0.1)", "convolutional", ["dilated"], {"dropout": 0.1}),
        ("transformer(mix(local*2, full))", "mix(local*2, full)", "transformer", ["mix(local*2, full)"], {}),
    ],
)
def test_a_variant_is_its_specs_and_its_model_under_one_name(text, canonical, body, specs, changed):
    entry = read_variant(text, SHARED)
    assert (entry.text, [str(spec) for spec in entry.specs]) == (canonical, specs)
    assert entry.model == dataclasses.replace(SHARED, body=body, **changed) and entry.body is BODIES[body]
    assert read_variant(entry.text, SHARED) == entry


def test_a_name_is_of_the_body_that_the_sweep_has():
    recurrent = dataclasses.replace(SHARED, body="recurrent")
    assert [entry.text for entry in read_variants("dot, transformer(full), recurrent(hard, D=32)", recurrent)] == ["dot", "transformer(full)", "hard"]
    assert read_variant("local_m", recurrent).model is recurrent


@pytest.mark.parametrize(
    "text, message",
    [
        ("recurrent", "recurrent: a model is given with its variant, or with those that its layers cycle through, as in recurrent(none)"),
        ("recurrent(parts=3)", "a model is given with its variant"),
        ("transformer(full*2)", "as in transformer(full)"),
        ("recurrent(full)", "there is no alignment 'full'; valid: none, additive"),
        ("recurrent(additiv)", "did you mean 'additive'?"),
        ("transformer(recurrent(none))", "there is no attention variant 'recurrent'"),
        ("recurrent(none, N=2)", "a recurrent model has no setting 'N'; valid: D, layers, dropout, encoder_layers, cell"),
        ("recurrent(none, layer=2)", "did you mean 'layers'?"),
        ("recurrent(none, dtype='bfloat16')", "dtype is of the whole sweep; use --set model.dtype=bfloat16"),
        ("transformer(full, remat=True)", "remat is of the whole sweep; use --set model.remat=True"),
        ("transformer(full, D='x')", "transformer(full, D='x'): D='x': must be of type int"),
        ("transformer(full, D=33)", "D=33: must be a multiple of N=2"),
        ("[recurrent(none), full]", "recurrent is a whole model, and no layer of one"),
        ("full, full", "expected one variant"),
    ],
)
def test_mistakes_are_named(text, message):
    with pytest.raises(UserError) as error:
        read_variant(text, SHARED)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_no_variant_has_the_name_of_a_body():
    assert not BODIES.keys() & (VARIANTS.keys() | ALIGNMENTS.keys() | READERS.keys() | CONVOLUTIONS.keys())
    assert BODIES.keys() == config.SETTINGS.keys() and all(body.plainest in body.registry for body in BODIES.values())


PAIRS = dict(inputs_vocab=9, num_outputs=9, max_len=12, causal=True, per_token=True, source_vocab=9, source_len=8, image_shape=None)
SIZES = {
    "transformer": PAIRS,
    "recurrent": PAIRS,
    "convolutional": PAIRS,
    "reader": PAIRS | dict(causal=False, per_token=False),
    "convnet": PAIRS | dict(inputs_vocab=0, causal=False, per_token=False, source_len=0, max_len=64, image_shape=(16, 16, 3)),
}


class Watched(config.Model):
    """Knows which of its settings were read."""

    def __getattribute__(self, name):
        if name in Watched.__dataclass_fields__:
            read.add(name)
        return super().__getattribute__(name)


read: set[str] = set()


@pytest.mark.parametrize("body", [body for body in BODIES if body != "transformer"])  # a Transformer makes copies of all its settings
def test_a_body_reads_the_settings_that_are_said_to_have_a_meaning_and_no_others(body):
    """Built for a task, run with dropout, and estimated."""
    model, sizes = Watched(**dataclasses.asdict(dataclasses.replace(SHARED, body=body))), SIZES[body]
    spec = "full" if body == "convnet" else BODIES[body].plainest
    specs = list(read_variant(spec, dataclasses.replace(SHARED, body=body)).specs)
    read.clear()

    def run():
        made = BODIES[body].build(model, variant=specs, attention=config.Attention(), rngs=nnx.Rngs(0), **sizes)
        if body == "convnet":
            return made(jnp.zeros((2, 16, 16, 3)), key=jax.random.key(0))
        return made(jnp.zeros((2, 12), jnp.int32), source=jnp.zeros((2, 8), jnp.int32), key=jax.random.key(0))

    jax.eval_shape(run)
    if body == "convolutional":  # which also classifies sequences, and then pools
        pooled = sizes | dict(causal=False, per_token=False, source_len=0)
        jax.eval_shape(lambda: BODIES[body].build(model, variant=specs, attention=config.Attention(), rngs=nnx.Rngs(0), **pooled)(jnp.zeros((2, 12), jnp.int32)))
    assert read - {"body"} == set(config.SETTINGS[body])


# Of settings that change what a Transformer with an encoder computes, other values than the default; `pool` does so where one classifies.
OTHER = dict(
    D=16, layers=1, N=4, K=1, H=8, F=8, norm="rmsnorm", norm_position="post", ffn="swiglu", positions="rotary", dropout=0.5, tie_embeddings=False, share_embeddings=True,
    encoder_layers=1, where=("cross",), cross="linear", dtype="bfloat16", remat=True,
)  # fmt: skip


def test_a_transformer_reads_all_settings_but_the_recurrent_cell():
    assert set(config.SETTINGS["transformer"]) == {*OTHER, "pool"} == {field.name for field in dataclasses.fields(config.Model)} - {"body", "cell"}
    hlo = lambda **changes: str(jax.make_jaxpr(lambda: output(dataclasses.replace(SHARED, **changes)))())
    assert hlo(cell="lstm") == hlo()
    for name, value in OTHER.items():
        here = dict(cross="linear") if name == "where" else {}  # as the variant is full, it shows in the place of another
        assert hlo(**here | {name: value}) != hlo(**here), f"{name}={value!r} changes nothing"


def output(model: config.Model):
    made = BODIES["transformer"].build(model, variant=[Spec("full")], attention=config.Attention(), rngs=nnx.Rngs(0), **PAIRS)
    return made(jnp.zeros((2, 12), jnp.int32), source=jnp.zeros((2, 8), jnp.int32), key=jax.random.key(0))


@pytest.mark.parametrize("text", ["recurrent(additive, D=90)", "convolutional(dilated, D=82)"])
def test_a_row_is_not_asked_for_what_its_model_has_no_use_for(text):
    """Heads that divide D, of an even size to turn."""
    shared = config.Model(D=32, layers=2, N=4, positions="rotary")
    assert read_variant(text, shared).text == text
