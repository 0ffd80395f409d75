"""The C++ kernels of additive attention: against XLA's tiles, at numbers where a product of exponentials would overflow, and under what JAX does to them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pallas_linear import assert_close, both_forms, inputs, layer, results
from tiny import ON_CPU

from attn_zoo.ops import native
from attn_zoo.ops.additive import additive_attention
from attn_zoo.ops.backends import choose_additive
from attn_zoo.spec import Unsupported, UserError

pytestmark = pytest.mark.skipif(ON_CPU != "native", reason=f"{native.library()}")

SHAPES = {  # T, S, N, K, R, H: a tile is 64 queries by 64 keys, a vector of hidden units or channels 16 at most
    "one-of-each": (1, 1, 1, 1, 1, 1),
    "K1": (63, 70, 3, 1, 16, 9),
    "whole-tiles": (64, 128, 4, 2, 64, 64),
    "a-row-more": (65, 17, 2, 2, 17, 33),
    "many-tiles": (200, 150, 2, 1, 40, 16),
}


def arrays(T, S, N, K, R, H, dtype=jnp.float32, size=1.0):
    rng = np.random.default_rng(T)
    scaled = [(2, T, N, R), (2, S, K, R)]
    drawn = [size * rng.normal(size=shape) for shape in scaled] + [rng.normal(size=shape) for shape in ((N, R), (2, S, K, H))]
    return [jnp.asarray(x, dtype) for x in drawn]


both = lambda f, args: [results(functools.partial(f, backend=backend), args) for backend in ("native", "xla")]


def in_float64(f, args):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, results(f, [np.asarray(x, np.float64) for x in args]))


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_xla_with_holes(shape, causal):
    args = arrays(*SHAPES[shape])
    valid = jnp.asarray(np.random.default_rng(0).random((2, SHAPES[shape][1])) < 0.8).at[1, :20].set(False)  # which the first queries see nothing but
    for more in ({}, {"valid_BS": valid}):
        assert_close(*both(functools.partial(additive_attention, causal=causal, **more), args), 5e-6)
    o = additive_attention(*args, causal=causal, valid_BS=valid.at[0].set(False), backend="native")
    assert (o[0] == 0).all() and np.isfinite(o).all()


@pytest.mark.parametrize("size", [15.0, 40.0, 1e4])
def test_at_numbers_that_have_no_exponential(size):
    """tanh(q + k) of two large numbers of unlike sign is no +-1 alone. Where it is, nothing overflows."""
    q, k, weight, v = arrays(70, 130, 2, 1, 20, 16, size=size)
    k = k.at[:, :64, :, ::2].set(-q[:, :64, :1, ::2])  # sums around 0
    f = functools.partial(additive_attention, causal=False)
    actual = results(functools.partial(f, backend="native"), (q, k, weight, v))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(actual))
    assert_close(actual, in_float64(f, (q, k, weight, v)), 1e-5 if size < 1e4 else 5e-3)  # float32 resolves 1e-3 there


@pytest.mark.parametrize("size, most", [(0.01, 3e-5), (2.0, 5e-7), (5.0, 5e-7)])
def test_accuracy_is_that_of_float32(size, most):
    """Beside float64, as near as XLA's tanh comes; where tanh is small, its error is not: the gradient of its weights shows that."""
    args = arrays(100, 100, 2, 2, 32, 16, size=size)
    exact = in_float64(functools.partial(additive_attention, causal=True), args)
    for a, x, e in zip(*map(jax.tree.leaves, (*both(functools.partial(additive_attention, causal=True), args), exact))):
        error = lambda x: np.sqrt(np.mean((np.asarray(x, np.float64) - e) ** 2) / np.mean(np.square(e)))
        assert error(a) < max(3 * error(x), most)


def test_no_other_pair_changes_a_bit():
    """A large number has its pairs computed in another way, and only those."""
    q, k, weight, v = arrays(100, 100, 2, 1, 20, 16)
    f = jax.jit(functools.partial(additive_attention, causal=True, backend="native"))
    o = f(q, k, weight, v)
    np.testing.assert_array_equal(f(q.at[:, 50].set(1e3), k, weight, v)[:, np.arange(100) != 50], o[:, np.arange(100) != 50])
    np.testing.assert_array_equal(f(q, k.at[:, 50].set(1e3), weight, v)[:, :50], o[:, :50])


def test_under_vmap_and_checkpoint():
    args, f = arrays(70, 70, 2, 1, 8, 8), functools.partial(additive_attention, causal=True, backend="native")
    expected = results(f, args)
    assert_close(results(jax.checkpoint(f), args), expected, 1e-6)
    one_by_one = lambda q, k, weight, v: jax.vmap(lambda *x: f(x[0][None], x[1][None], weight, x[2][None])[0])(q, k, v)
    assert_close(results(one_by_one, args), expected, 1e-6)


@pytest.mark.parametrize("which", range(4), ids=["q", "k", "weight", "v"])
def test_what_is_no_number_is_not_lost_and_goes_to_no_earlier_tile(which):
    """A run that diverges has to show it."""
    args = arrays(100, 100, 1, 1, 8, 8)
    args[which] = args[which].at[:, 3 if which == 2 else 80].set(jnp.nan)
    o = additive_attention(*args, causal=True, backend="native")
    reached = {0: np.arange(100) == 80, 2: np.full(100, True)}.get(which, np.arange(100) >= 80)
    assert np.isnan(o[:, reached]).all() and (which == 2 or np.isfinite(o[:, :64]).all())


def test_working_memory_is_linear():
    """What a pass takes is an argument to XLA, which sees it."""
    peaks = []
    for T in (1024, 2048, 4096):
        args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, T, 8, 64), (1, T, 8, 64), (8, 64), (1, T, 8, 64))]
        f = jax.jit(jax.grad(lambda *args: additive_attention(*args, causal=True, backend="native").sum(), (0, 1, 2, 3)))
        peaks.append(f.lower(*args).compile().memory_analysis().temp_size_in_bytes)
    assert peaks[2] < 2.1 * peaks[1] < 4.3 * peaks[0]


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_the_variant_equals_its_reference_on_either(causal):
    """Outputs and gradients, those of the parameters too, with ragged validity; and the record says what ran."""
    q, k, v, _ = inputs(90, R=16, H=16)
    valid = jnp.arange(90)[None] < jnp.array([[90], [61]])
    for backend, ran in (("auto", "native"), ("native", "native"), ("xla", "xla")):
        attention = layer("additive", causal, backend=backend)
        assert_close(*both_forms(attention, q, k, v, valid), 1e-5)
        assert attention.plan(90, 90, True)["backend"] == attention.backend() == ran
        assert ("ffi_call" in str(jax.make_jaxpr(attention)(q, k, v))) == (ran == "native")


def test_refuses_with_the_reason(monkeypatch):
    with pytest.raises(UserError, match="attention.backend='native' cannot serve here: it takes float32, bfloat16 or float16, not float64; use auto or xla"):
        choose_additive("native", jnp.float64)
    with pytest.raises(UserError, match="attention.backend='pallas' cannot serve here: its scores are products of queries and keys; use auto or xla"):
        choose_additive("pallas", jnp.float32)
    assert choose_additive("auto", jnp.float64) == "xla"
    with jax.enable_x64(True), pytest.raises(Unsupported, match="the native kernels cannot serve here: it takes float32, bfloat16 or float16, not float64"):
        additive_attention(*arrays(9, 9, 1, 1, 8, 8, jnp.float64), causal=True, backend="native")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match="attention.backend='native' cannot serve here: it is for CPUs, and this runs on gpu"):
        choose_additive("native", jnp.float32)
