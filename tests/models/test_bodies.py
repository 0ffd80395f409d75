"""What a variant of a sweep means: of the body that the sweep names, or of its own."""

import dataclasses

import jax
import pytest
from flax import nnx

from attn_zoo import config
from attn_zoo.attention import VARIANTS
from attn_zoo.models import ALIGNMENTS, BODIES, READERS, read_variant, read_variants
from attn_zoo.models.convolutional_stack import CONVOLUTIONS
from attn_zoo.spec import UserError

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


OTHER = {
    "D": 48, "layers": 3, "N": 4, "K": 1, "H": 4, "F": 7, "norm": "rmsnorm", "norm_position": "post", "ffn": "swiglu", "positions": "sinusoidal_concat", "dropout": 0.5,
    "tie_embeddings": False, "share_embeddings": True, "encoder_layers": 3, "where": ("cross",), "cross": "linear", "pool": "first", "dtype": "bfloat16", "remat": True,
    "cell": "lstm",
}  # fmt: skip
PAIRS = dict(inputs_vocab=9, num_outputs=9, max_len=12, causal=True, per_token=True, source_vocab=9, source_len=8, image_shape=None)
SIZES = {
    "transformer": PAIRS,
    "recurrent": PAIRS,
    "convolutional": PAIRS,
    "reader": PAIRS | dict(causal=False, per_token=False),
    "convnet": PAIRS | dict(inputs_vocab=0, causal=False, per_token=False, source_len=0, max_len=64, image_shape=(16, 16, 3)),
}


def parameters(model: config.Model):
    body = BODIES[model.body]
    specs = list(read_variant({"convnet": "full"}.get(model.body, body.plainest), model).specs)
    made = nnx.eval_shape(lambda: body.build(model, variant=specs, attention=config.Attention(), rngs=nnx.Rngs(0), **SIZES[model.body]))
    return nnx.to_pure_dict(nnx.state(made, nnx.Param))


@pytest.mark.parametrize("body", BODIES)
def test_a_setting_that_a_body_does_not_read_changes_nothing_of_it(body):
    assert OTHER.keys() == {field.name for field in dataclasses.fields(config.Model)} - {"body"}
    model = dataclasses.replace(SHARED, body=body)
    plain = parameters(model)
    for name in OTHER.keys() - set(config.SETTINGS[body]):
        assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape, plain, parameters(dataclasses.replace(model, **{name: OTHER[name]})))), name
    changed = [n for n in config.SETTINGS[body] if shapes(parameters(dataclasses.replace(model, **{n: OTHER[n]}))) != shapes(plain)]
    assert {"D", "layers"} <= set(changed)


def shapes(tree):
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
