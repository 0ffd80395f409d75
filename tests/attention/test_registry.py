"""The registry: specs and their errors, what a layer refuses, and the one path that leads out of a layer."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_zoo import VARIANTS, Unsupported, UserError, make_attention
from attn_zoo.attention import Attention, Loss, Statistic, find, parse_variant, parse_variants, variant_text
from attn_zoo.spec import Spec


def make(spec="full", N=4, H=8, max_len=16, **kwargs):
    return make_attention(spec, num_heads=N, head_dim=H, max_len=max_len, **kwargs)


def inputs(T=12, S=12, N=4, K=4, H=8):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, T, N, H), (2, S, K, H), (2, S, K, H))]


# Specs

MISTAKES = {  # spec -> what the one line must say
    "lokal(window=3)": "no attention variant 'lokal'; did you mean 'local'",
    "zzz": f"no attention variant 'zzz'; valid: {', '.join(VARIANTS)}",
    "local(windw=3)": "'local' has no option 'windw'; did you mean 'window'",
    "full(window=3)": "'full' has no option 'window'; it takes none",
    "local(window=-1)": "window=-1: must be a whole number of at least 0",
    "local(window=True)": "window=True: must be a whole number",
    "strided(stride=0)": "stride=0: must be a whole number of at least 1, or None",
    "block(block=0)": "block=0: must be a whole number of at least 1",
    "block(random_blocks=-2)": "random_blocks=-2: must be a whole number of at least 0",
    "linear(feature_map='elo')": "feature_map='elo': must be one of 'elu', 'relu', 'dpfp', 'cosformer'; did you mean 'elu'",
    "linformer(share='layer')": "share='layer': must be one of .* did you mean 'layers'",
    "linformer(rank=0)": "rank=0: must be a whole number of at least 1",
    "adaptive_span(init=200, max_span=100)": "init=200: must be at most max_span=100",
    "adaptive_span(penalty=-1)": "penalty=-1: must be a number of at least 0",
    "adaptive_span(init=1e999)": "init=inf: must be a number",
    "local(3)": r"options are given by name, as in local\(option=3\)",
    "local(window=3, window=4)": "window.* twice|repeated",
    "local(**{'window': 3})": "local",
    "local(window=x)": "literals",
    "local(window=3": "cannot read",
    "local.window": "cannot read",
    "": "cannot read",
}


@pytest.mark.parametrize("spec", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_would_be_right(spec):
    for read in (make, parse_variants):
        with pytest.raises(UserError, match=MISTAKES[spec]) as raised:
            read(spec)
        assert "\n" not in str(raised.value)


WRONG_TYPES = {
    "local(window=2.5)": "window=2.5: must be a whole number of at least 0",
    "local(window='8')": "window='8': must be a whole number of at least 0",
    "local(window=None)": "window=None: must be a whole number of at least 0",
    "strided(stride='8')": "stride='8': must be a whole number of at least 1, or None",
    "adaptive_span(init=None)": "init=None: must be a number of at least 0",
    "linear(feature_map=None)": "feature_map=None: must be one of 'elu', 'relu'",
    "linear(feature_map=['elu'])": "feature_map=['elu']: must be one of 'elu', 'relu'",
    "linformer(share={})": "share={}: must be one of 'none', 'heads', 'kv', 'layers'",
}


def test_a_value_of_the_wrong_type_is_a_user_error():
    """In a process of its own: here the annotations of the options are checked before their own rules are."""
    program = """
import sys
from attn_zoo.attention import find
for spec in sys.argv[1:]:
    try:
        print(find(spec))
    except Exception as e:
        print(type(e).__name__, e)
"""
    output = subprocess.run([sys.executable, "-c", program, *WRONG_TYPES], capture_output=True, text=True, check=True).stdout.splitlines()
    for (spec, message), line in zip(WRONG_TYPES.items(), output, strict=True):
        assert line.startswith(f"UserError {spec}: {message}"), line


CANONICAL = {
    "full()": "full",
    "local(window=256)": "local",
    " local( window = 0x10 )": "local(window=16)",
    "'linformer(share=\"kv\", rank=8)'": "linformer(rank=8, share='kv')",
    "block(seed=3, block=64, random_blocks=0)": "block(random_blocks=0, seed=3)",
    "strided(stride=None)": "strided",
    "adaptive_span(penalty=0.000002, init=128)": "adaptive_span",
    "adaptive_span(init=64)": "adaptive_span(init=64)",
    "adaptive_span(init=64.0)": "adaptive_span(init=64)",
    "adaptive_span(penalty=0)": "adaptive_span(penalty=0)",
    "adaptive_span(penalty=0.0)": "adaptive_span(penalty=0)",
}


@pytest.mark.parametrize("text", CANONICAL)
def test_one_text_for_one_meaning(text):
    """Cells are told apart by this text, so two ways to write one variant must not make two cells."""
    canonical = variant_text(parse_variant(text))
    assert canonical == variant_text(parse_variant(CANONICAL[text]))
    assert variant_text(parse_variant(canonical)) == canonical
    assert find(canonical)[1] == find(text.strip().strip("'"))[1]


def test_lists_of_variants():
    entries = parse_variants("full, [local(window=256), full], ['strided'], 'linear'")
    assert [variant_text(entry) for entry in entries] == ["full", "[local, full]", "strided", "linear"]
    assert parse_variant("[local(window=8), full]") == parse_variants("['local(window=8)', full()]")[0]
    wrong = {"full, linear": "expected one variant", "[]": "names no attention", "[full, [full]]": "cannot read", "[full, lokal]": "did you mean 'local'"}
    for text, message in wrong.items():
        with pytest.raises(UserError, match=message):
            parse_variant(text)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_option_can_be_written_in_a_spec(name):
    """Options are literals with defaults, so that a table's row can be read back."""
    cls = VARIANTS[name].options
    spec = str(Spec(name, tuple((f.name, f.default) for f in dataclasses.fields(cls))))
    assert find(spec) == (VARIANTS[name], cls())
    assert variant_text(parse_variant(spec)) == name


# What a layer refuses


@pytest.mark.parametrize("kwargs", [{"num_kv_heads": 3}, {"num_kv_heads": 8}, {"num_kv_heads": 0}, {"num_kv_heads": -2}, {"N": 0}, {"H": 0}, {"max_len": 0}], ids=str)
def test_impossible_sizes_are_refused(kwargs):
    with pytest.raises(UserError, match=r"=-?\d+: must"):
        make(**kwargs)


def test_a_call_that_does_not_fit_the_layer_is_refused():
    attention = make(num_kv_heads=2)
    attention(*inputs(K=2))
    with pytest.raises(UserError, match="built for N=4, K=2, H=8"):
        attention(*inputs(K=4))
    with pytest.raises(UserError, match="length 17 is over max_len=16"):
        attention(*inputs(T=17, K=2))
    with pytest.raises(UserError, match="length 20 is over max_len=16"):
        attention(*inputs(S=20, K=2))


@pytest.fixture
def self_only(monkeypatch):
    """Full attention that claims to serve one sequence alone."""
    monkeypatch.setitem(VARIANTS, "self_only", dataclasses.replace(VARIANTS["full"], name="self_only", cross="it has one sequence in mind"))


def test_cross_attention_is_refused_with_the_reason(self_only):
    attention = make("self_only")
    attention(*inputs())
    for run in (attention, attention.reference):
        with pytest.raises(Unsupported, match=r"self_only cannot attend across sequences \(T=12, S=9\): it has one sequence in mind"):
            run(*inputs(S=9))
    make("full")(*inputs(S=9))


DRAWN = "additive, luong_local, persistent, routing, sinkhorn, performer, rfa, delta, clustered, informer, linformer, memory_compressed, set, luna".split(", ")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_layer_is_determined_by_its_spec_and_random_streams(name):
    """And those whose parameters or features are drawn differ with the seed."""
    values = lambda seed: [np.asarray(x) for x in jax.tree.leaves(nnx.state(make(name, rngs=None if seed is None else nnx.Rngs(seed))))]
    for a, b in ((values(3), values(3)), (values(None), values(None))):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    assert any((a != b).any() for a, b in zip(values(3), values(4), strict=True)) == (name in DRAWN)


# What leaves a layer


class Leaving(Attention):
    """Leaves the mean of its values as a loss and as a statistic."""

    def __init__(self, options, dims, *, shared, rngs):
        super().__init__(options, dims)
        self.gain = nnx.Param(jnp.array(2.0))
        self.cost = Loss(jnp.zeros(()))
        self.mean = Statistic(jnp.zeros(()))

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        self.leave("cost", self.gain[...] * v_BSKH.mean())
        self.leave("mean", v_BSKH.mean())
        return q_BTNH * self.gain[...]


@pytest.fixture
def leaving(monkeypatch):
    monkeypatch.setitem(VARIANTS, "leaving", dataclasses.replace(VARIANTS["full"], name="leaving", build=Leaving))
    return make("leaving")


def left_by(layer):
    return [jax.tree.leaves(nnx.state(layer, kind)) for kind in (Loss, Statistic)]


def test_a_layer_that_is_closed_over_leaves_nothing_and_works(leaving):
    args = inputs()
    transforms = {
        "jit": jax.jit(leaving),
        "grad": lambda *args: jax.value_and_grad(lambda q: (lambda o: (o.sum(), o))(leaving(q, *args[1:])), has_aux=True)(args[0])[0][1],
        "vmap": lambda *args: jax.vmap(lambda *args: leaving(*(x[None] for x in args))[0])(*args),
        "checkpoint": jax.checkpoint(lambda *args: leaving(*args)),
    }
    for name, run in transforms.items():
        np.testing.assert_array_equal(run(*args), 2 * args[0], err_msg=name)
        for kind in (Loss, Statistic):
            assert not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(nnx.state(leaving, kind))), f"{name} leaked a tracer"
    assert left_by(make("leaving")) == [[0.0], [0.0]]


MERGED = {  # where the layer's variables that are no parameters come from, in a step that differentiates the parameters
    "as-an-argument": lambda step, params, rest: jax.jit(jax.grad(step, has_aux=True))(params, rest),
    "closed-over": lambda step, params, rest: jax.jit(jax.grad(lambda params: step(params, rest), has_aux=True))(params),
    "without-jit": lambda step, params, rest: jax.grad(step, has_aux=True)(params, rest),
    "recomputed": lambda step, params, rest: jax.jit(jax.grad(jax.checkpoint(step), has_aux=True))(params, rest),
}


@pytest.mark.parametrize("how", MERGED)
def test_a_layer_that_is_merged_inside_leaves_its_loss_and_statistics(leaving, how):
    """A loss of its own reaches the objective however the step is written; it must not be lost in silence."""
    q, k, v = inputs()
    graph, params, rest = nnx.split(leaving, nnx.Param, ...)

    def step(params, rest):
        layer = nnx.merge(graph, params, rest)
        layer(q, k, v)
        losses, statistics = left_by(layer)
        return sum(losses), (losses, statistics)

    gradient, (losses, statistics) = MERGED[how](step, params, rest)
    mean = float(v.mean())
    np.testing.assert_allclose([*losses, *statistics], [2 * mean, mean], rtol=1e-5)
    np.testing.assert_allclose(jax.tree.leaves(gradient), [mean], rtol=1e-5)
