"""The C++ kernels of linear attention: against XLA's scans and a loop, and under what JAX does to them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_pallas_linear import SCANS, VARIANTS, assert_close, fades, inputs, layer, results
from tiny import ON_CPU

from attn_zoo.attention.performer import exponents, query_features
from attn_zoo.ops import decayed, native
from attn_zoo.ops.backends import choose_scan
from attn_zoo.ops.decayed import decayed_attention, decayed_sums
from attn_zoo.ops.delta import delta_rule
from attn_zoo.ops.linear import kernel_sums
from attn_zoo.ops.native_linear import native_random_feature_sums
from attn_zoo.spec import Unsupported, UserError

pytestmark = pytest.mark.skipif(ON_CPU != "native", reason=f"{native.library()}")


def over_all_keys(q, k, v, log_decay, backend):
    return kernel_sums(q, k, v, causal=False, backend=backend)


def of_random_features(q, k, v, log_decay=None, valid=None, *, backend, causal=True, largest=0.0):
    """Made in the kernels, or beforehand."""
    q, k, v = (x[..., : min(q.shape[-1], v.shape[-1])] for x in (q, k, v))
    w = jnp.asarray(np.random.default_rng(0).normal(size=(24, q.shape[-1])), jnp.float32)
    if backend == "native":
        return native_random_feature_sums(q, k, v, w, valid, causal=causal, largest=largest)
    phi_k = jnp.exp(jnp.minimum(exponents(k, w), largest))
    phi_k = phi_k if valid is None else jnp.where(valid[:, :, None, None], phi_k, 0)
    return kernel_sums(query_features(q, w), phi_k, v, causal=causal)


SCANS = SCANS | {"all-keys": over_all_keys, "random-features": of_random_features}
SHAPES = {  # a chunk is 64 positions, a vector of features or channels 16 at most
    "T1-one-head": {"T": 1, "N": 1, "K": 1},
    "T63-K1": {"T": 63, "N": 3, "K": 1},
    "T64-whole-vectors": {"T": 64, "R": 16, "H": 32},
    "T65-a-row-more": {"T": 65, "R": 17, "H": 15},
    "T257-many-features": {"T": 257, "N": 2, "R": 130, "H": 70},
}
both = lambda f, args: [results(functools.partial(f, backend=backend), args) for backend in ("native", "xla")]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SCANS)
def test_equals_xla(name, shape):
    actual, expected = both(SCANS[name], inputs(**SHAPES[shape]))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(actual))
    assert_close(actual, expected, 3e-6)


@pytest.mark.parametrize("corrected", [False, True], ids=["decayed", "delta"])
def test_equals_a_loop(corrected):
    """Both recurrences as their papers write them, in float64."""
    q, k, v, log_decay = inputs(70, N=2, K=1)
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    gate = jnp.exp(log_decay)
    o = delta_rule(q, k, v, gate, backend="native") if corrected else decayed_sums(q, k, v, log_decay, backend="native")[0]
    for b in range(2):
        state = np.zeros((20, 9))
        for t in range(70):
            key, value, g = (np.float64(x[b, t, 0]) for x in (k, v, gate))
            state = state + g * np.outer(key, value - key @ state) if corrected else g * state + np.outer(key, value)
            np.testing.assert_allclose(o[b, t], q[b, t] @ state, atol=1e-5)


def test_what_fades_at_once_overflows_nowhere(monkeypatch):
    """At 40 a position the running sum within a chunk reaches a thousand, and its exponentials leave float32. In equal chunks it loses equal digits."""
    monkeypatch.setattr(decayed, "CHUNK", 64)
    actual, expected = both(fades, inputs(140, decay=40.0))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(actual))
    assert_close(actual, expected, 5e-5)


@pytest.mark.parametrize("decay", [1e-3, 0.1])
def test_gradients_of_decays_stay_accurate_over_many_chunks(decay):
    """They are sums over all later positions of differences: beside float64, and the scan in float32, whose automatic gradient has other roundings."""
    args = inputs(4096, N=1, K=1, R=16, H=16, decay=decay)

    def gradient(backend):
        loss = lambda log_decay: (decayed_sums(*args[:3], log_decay, backend=backend)[0] * jnp.cos(jnp.arange(4096.0))[:, None, None]).sum()
        return np.asarray(jax.jit(jax.grad(loss))(args[3]))

    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in args]
        loss = lambda log_decay: (decayed_attention(*wide[:3], log_decay) * jnp.cos(jnp.arange(4096.0))[:, None, None]).sum()
        exact = np.asarray(jax.jit(jax.grad(loss))(wide[3]))
    error = lambda backend: np.sqrt(np.mean((gradient(backend) - exact) ** 2) / np.mean(exact**2))
    assert error("native") < max(2 * error("xla"), 1e-5)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_random_features_with_holes_and_unlike_lengths(causal):
    valid = jnp.asarray(np.random.default_rng(0).random((2, 100)) < 0.7).at[1, :70].set(False)  # the second sequence has none at first
    for T in (67, 130):
        args = inputs(T)[0] / 2, *(x / 2 for x in inputs(100)[1:3])
        over = exponents(args[1][..., :9], jnp.asarray(np.random.default_rng(0).normal(size=(24, 9)), jnp.float32)) > 0.0
        assert 0.01 < over.mean() < 0.99
        f = lambda q, k, v, backend: of_random_features(q, k, v, valid=valid, backend=backend, causal=causal)
        assert_close(*both(f, args), 3e-6)
        (o, norm), _ = results(functools.partial(f, backend="native"), args)
        assert not causal or ((o[1, : min(T, 70)] == 0).all() and (norm[1, : min(T, 70)] == 0).all())


@pytest.mark.parametrize("S", [30, 100])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_fewer_or_more_keys_than_queries(causal, S):
    args = inputs(67)[0], *inputs(S)[1:3]
    assert_close(*both(functools.partial(kernel_sums, causal=causal), args), 3e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", SCANS)
def test_half_precision_is_computed_in_float32(name, dtype):
    actual, expected = both(SCANS[name], inputs(150, dtype=dtype))
    outputs, gradients = actual
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(outputs)) and [x.dtype for x in gradients[:3]] == [dtype] * 3
    assert_close(outputs, expected[0], 3e-6)
    assert_close(gradients, expected[1], 2.0 ** (-8 if dtype == jnp.bfloat16 else -11))


@pytest.mark.parametrize("name", SCANS)
def test_under_vmap_and_checkpoint(name):
    args, scan = inputs(75), functools.partial(SCANS[name], backend="native")
    expected = results(scan, args)
    assert_close(results(jax.checkpoint(scan), args), expected, 1e-6)
    outputs, gradients = results(lambda *args: jax.tree.map(lambda x: x[:, 0], jax.vmap(scan)(*(x[:, None] for x in args))), args)
    assert_close((outputs, gradients), expected, 1e-6)


@pytest.mark.parametrize("which", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["linear", "decayed", "delta", "random-features"])
def test_what_is_no_number_is_not_lost_and_goes_to_no_earlier_chunk(name, which):
    """A run that diverges has to show it."""
    arrays = list(inputs(200, N=1, K=1))
    arrays[which] = arrays[which].at[:, 130].set(jnp.nan)
    outputs, _ = results(functools.partial(SCANS[name], backend="native"), arrays)
    o = jax.tree.leaves(outputs)[0]
    assert np.isfinite(o[:, :128]).all()
    if which < 3 or name in ("decayed", "delta"):  # the others have no decays
        assert np.isnan(o[:, 130] if which == 0 else o[:, 130:]).all()


@pytest.mark.parametrize("name", SCANS)
def test_working_memory_is_linear(name):
    """What a pass takes is an argument to XLA, which sees it."""
    peaks = []
    for T in (1024, 2048, 4096):
        shapes = [jax.ShapeDtypeStruct((1, T, 8, *last), jnp.float32) for last in ((64,), (64,), (64,), ())]
        f = jax.jit(jax.grad(lambda *args: sum(x.sum() for x in jax.tree.leaves(SCANS[name](*args, backend="native"))), (0, 1, 2, 3)))
        peaks.append(f.lower(*shapes).compile().memory_analysis().temp_size_in_bytes)
    assert peaks[2] < 2.1 * peaks[1] < 4.3 * peaks[0]


# Variants that run on the kernels in either direction.
DIRECTIONS = [(name, causal) for name in VARIANTS for causal in (False, True) if causal or name not in ("rfa-gate", "luna")]  # luna's other form is softmax
named = pytest.mark.parametrize("name, causal", DIRECTIONS, ids=lambda x: x if isinstance(x, str) else "causal" if x else "bidirectional")


@named
def test_variants_equal_their_reference(name, causal):
    """Outputs and gradients, those of the parameters too, with ragged validity, on the kernels and on XLA's scans."""
    q, k, v, _ = inputs(90, R=16, H=16)
    valid = jnp.arange(90)[None] < jnp.array([[90], [61]])
    for backend in ("native", "xla"):
        graph, params, rest = nnx.split(layer(VARIANTS[name], causal, backend=backend), nnx.Param, ...)

        def run(reference):
            def f(q, k, v, params):
                attention = nnx.merge(graph, params, rest)
                return (attention.reference if reference else attention)(q, k, v, valid_BS=valid)

            return results(f, (q, k, v, params))

        assert_close(run(False), run(True), 1e-4)  # of the first query of linear-dpfp a head weighs its only key 1e-3, and divides by that


@named
def test_auto_runs_them_on_a_cpu_and_the_record_says_so(name, causal):
    for backend, expected in (("auto", "native"), ("native", "native"), ("xla", "xla")):
        attention = layer(VARIANTS[name], causal, backend=backend)
        assert attention.plan(90, 90, True)["backend"] == attention.backend() == expected
        called = "ffi_call" in str(jax.make_jaxpr(attention)(*[jnp.zeros((2, 90, heads, 16)) for heads in (4, 2, 2)]))
        assert called == (expected == "native")


def test_refuses_with_the_reason(monkeypatch):
    with pytest.raises(UserError, match="attention.backend='native' cannot serve here: it takes float32, bfloat16 or float16, not float64; use auto or xla"):
        choose_scan("native", jnp.float64)
    assert choose_scan("auto", jnp.float64) == "xla"
    with jax.enable_x64(True):
        wide = [jnp.ones((1, 16, 1, 16), jnp.float64)] * 3
        for f in (functools.partial(kernel_sums, causal=True), lambda *args, backend: delta_rule(*args, jnp.ones((1, 16, 1)), backend=backend)):
            with pytest.raises(Unsupported, match="the native kernels cannot serve here: it takes float32, bfloat16 or float16, not float64"):
                f(*wide, backend="native")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match="attention.backend='native' cannot serve here: it is for CPUs, and this runs on gpu"):
        choose_scan("native", jnp.float32)
