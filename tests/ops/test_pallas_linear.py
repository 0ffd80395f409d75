"""The kernels of linear attention: interpreted on the CPU against the XLA scans and a loop, and lowered for NVIDIA GPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import ON_CPU

from attn_zoo import make_attention
from attn_zoo.attention.linear import elu
from attn_zoo.ops import backends, decayed, pallas_kernels, pallas_linear as kernels, pallas_scan
from attn_zoo.ops.backends import choose_scan
from attn_zoo.ops.decayed import decayed_sums, normed_sums
from attn_zoo.ops.delta import delta_rule
from attn_zoo.ops.linear import kernel_sums, linear_attention
from attn_zoo.ops.tuning import scan_chunk
from attn_zoo.spec import Unsupported, UserError


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels run on the CPU."""
    monkeypatch.setattr(pallas_kernels, "INTERPRET", True)


@pytest.fixture
def gpu(monkeypatch):
    """JAX says that it runs on a GPU that the kernels are for."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(backends, "_compute_capability", lambda: 9.0)


def inputs(T, N=4, K=2, R=20, H=9, decay=0.1, dtype=jnp.float32):
    """Queries, keys, values and log decays down to -decay."""
    rng = np.random.default_rng(T)
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in ((2, T, N, R), (2, T, K, R), (2, T, K, H))]
    return *arrays, jnp.asarray(-decay * rng.random((2, T, K)), jnp.float32)


def results(f, args):
    """(outputs, gradients) of a loss that weighs every number of every output differently."""

    def loss(*args):
        outputs = f(*args)
        return sum((x.astype(jnp.float32) * jnp.cos(jnp.arange(x.size)).reshape(x.shape)).sum() for x in jax.tree.leaves(outputs)), outputs

    (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, tuple(range(len(args))), has_aux=True))(*args)
    return outputs, gradients


def assert_close(actual, expected, tolerance):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * max(1.0, abs(e).max()))


def fades(*args, backend):
    return decayed_sums(*args, backend=backend)


def norms(*args, backend):
    """Of a scale by which some rows are divided by the sum of their scores, and some are not: it shows as epsilon is no trifle here."""
    scale = jnp.exp(-3 * jax.random.uniform(jax.random.key(0), args[0].shape[1:3]))
    if backend == "pallas":  # normed_sums leaves the norm of float32 to XLA
        return kernels.pallas_normed_sums(*args, scale, epsilon=0.5)
    return normed_sums(*args, scale, epsilon=0.5, backend=backend)


def sums(q, k, v, log_decay, backend):
    return kernel_sums(q, k, v, causal=True, backend=backend)


def corrects(q, k, v, log_decay, backend):
    k = jnp.abs(k).astype(jnp.float32)  # as features are: normalized in bfloat16, their gradient would be off by more than all that is tested
    k = k / k.sum(axis=-1, keepdims=True)
    return delta_rule(q, k, v, jnp.exp(20 * log_decay), backend=backend)  # rates in (0, 1)


def divides(q, k, v, log_decay, backend):
    return linear_attention(elu(q), elu(k), v, causal=True, backend=backend)


def maps(q, k, v, log_decay, backend):
    return linear_attention(q, k, v, causal=True, backend=backend, phi=elu)


def holds(q, k, v, log_decay, backend, causal=True):
    """Some denominators are less than what they are held at, and some are not: by the number of keys, of weights that are near the number of features."""
    (B, T, _, R), (S, K) = q.shape, k.shape[1:3]
    seen_T = jnp.minimum(jnp.arange(1, T + 1), S) if causal else jnp.full(T, S)
    least_TK = R * seen_T[:, None] * jax.random.uniform(jax.random.key(0), (T, K), minval=0.5, maxval=2.5)
    return linear_attention(elu(q), elu(k), v, causal=causal, backend=backend, least_BTK=jnp.broadcast_to(least_TK, (B, T, K)))


def sums_all(q, k, v, log_decay, backend):
    return kernel_sums(q, k, v, causal=False, backend=backend)


def maps_all(q, k, v, log_decay, backend):
    return linear_attention(q, k, v, causal=False, backend=backend, phi=elu)


SCANS = {"linear": sums, "decayed": fades, "normed": norms, "delta": corrects, "divided": divides, "mapped": maps, "held": holds}
SUMS = SCANS | {"all": sums_all, "all-mapped": maps_all, "all-held": functools.partial(holds, causal=False)}
SHAPES = {  # a chunk is 64 positions, a tile 32 features or values
    "T1-one-head": {"T": 1, "N": 1, "K": 1},
    "T63-K1-one-tile": {"T": 63, "N": 3, "K": 1},
    "T257-several-tiles": {"T": 257, "R": 40, "H": 35},
    "T100-whole-tiles": {"T": 100, "R": 64, "H": 32},
    "T128-whole-chunks": {"T": 128, "R": 16, "H": 16},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SUMS)
def test_equals_the_xla_scan(name, shape, interpreted):
    args = inputs(**SHAPES[shape])
    actual, expected = (results(functools.partial(SUMS[name], backend=backend), args) for backend in ("pallas", "xla"))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(actual))
    assert_close(actual, expected, 3e-6)


@pytest.mark.parametrize("name", ["linear", "decayed", "normed", "divided", "mapped", "held", "all", "all-mapped", "all-held"])
@pytest.mark.parametrize("chunks, segments", [(15, 3), (19, 4), (24, 6)], ids=["15-in-3", "19-in-4-padded", "24-in-6"])
def test_in_segments_it_is_the_same(name, chunks, segments, interpreted, monkeypatch):
    """As of one sequence: what each segment begins with is what those before it have left."""
    args = inputs(chunks * 16 - (0 if segments == 6 else 5), N=4, K=2, R=16, H=16, decay=0.5)
    monkeypatch.setattr(kernels, "scan_chunk", lambda dtype, H: 16)
    actual, expected = [], []
    for programs, found in ((1, expected), (4 * segments, actual)):
        monkeypatch.setattr(pallas_scan, "PROGRAMS", programs)
        plan, _ = kernels._whole(None, *args[:3])
        assert plan.segments == (segments if found is actual else 1)
        found += results(functools.partial(SUMS[name], backend="pallas"), args)
    assert_close(actual, expected, 3e-6)


def test_features_that_are_made_in_the_kernels_are_rounded_as_those_made_before(interpreted):
    q, k, v, log_decay = inputs(70, R=32, H=16, dtype=jnp.bfloat16)
    before = lambda q, k, v: linear_attention(*(elu(x.astype(jnp.float32)).astype(jnp.bfloat16) for x in (q, k)), v, causal=True, backend="pallas")
    (actual, gradients), (expected, expected_gradients) = results(lambda *args: maps(*args, None, "pallas"), (q, k, v)), results(before, (q, k, v))
    np.testing.assert_array_equal(actual, expected)
    assert_close(gradients, expected_gradients, 2**-8)  # of the features' gradients, rounded on their way out


def test_a_query_that_sees_nothing_is_zero(interpreted):
    """Features of zero, of the first keys, and of one query later: the quotient is zero there, and so are its gradients."""
    q, k, v, _ = inputs(40, N=1, K=1)
    k, q = abs(k).at[:, :7].set(0), abs(q).at[:, 20].set(0)
    o, (dq, dk, dv) = results(lambda q, k, v: linear_attention(q, k, v, causal=True, backend="pallas"), (q, k, v))
    assert not o[:, :7].any() and not o[:, 20].any() and not dq[:, :7].any() and not dv[:, :7].any()
    assert all(np.isfinite(x).all() for x in (o, dq, dk, dv)) and o[:, 7].any()


@pytest.mark.parametrize("H, dtype, fused", [(128, jnp.bfloat16, True), (130, jnp.bfloat16, False), (128, jnp.float32, False)])
def test_rows_are_normalized_in_the_kernel_where_a_program_has_them(H, dtype, fused, interpreted):
    args = inputs(50, N=2, K=1, R=16, H=H, dtype=dtype)
    run = lambda backend: functools.partial(normed_sums, scale_TN=jnp.linspace(1, 0.1, 100).reshape(50, 2), epsilon=0.5, backend=backend)
    assert ("unit_gradient_kernel" in str(jax.make_jaxpr(functools.partial(results, run("pallas")))(args))) == fused
    assert_close(*(results(run(backend), args) for backend in ("pallas", "xla")), 3e-6 if dtype == jnp.float32 else 2**-6)


def test_equals_a_loop(interpreted):
    q, k, v, log_decay = inputs(70, N=2, K=1)
    o, norm = decayed_sums(q, k, v, log_decay, backend="pallas")
    for b in range(2):
        state, total = np.zeros((20, 9)), np.zeros(20)
        for t in range(70):
            fade = np.exp(np.float64(log_decay[b, t, 0]))
            state, total = fade * state + np.outer(k[b, t, 0], v[b, t, 0]), fade * total + np.float64(k[b, t, 0])
            np.testing.assert_allclose(o[b, t], q[b, t] @ state, atol=1e-4)
            np.testing.assert_allclose(norm[b, t], q[b, t] @ total, atol=1e-4)


def test_what_fades_at_once_overflows_nowhere(interpreted, monkeypatch):
    """At 40 a position the running sum within a chunk reaches a thousand, and its exponentials leave float32. In equal chunks it loses equal digits."""
    monkeypatch.setattr(decayed, "CHUNK", scan_chunk(jnp.float32, 9))
    args = inputs(140, decay=40.0)
    actual, expected = (results(functools.partial(fades, backend=backend), args) for backend in ("pallas", "xla"))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(actual))
    assert_close(actual, expected, 3e-5)


@pytest.mark.parametrize("name", ["linear", "divided", "mapped", "held", "all", "all-mapped", "all-held"])
@pytest.mark.parametrize("S", [30, 100])
def test_fewer_or_more_keys_than_queries(S, name, interpreted):
    args = (abs(inputs(67)[0]), *inputs(S)[1:])
    actual, expected = (results(functools.partial(SUMS[name], backend=backend), args) for backend in ("pallas", "xla"))
    assert_close(actual, expected, 3e-6)


def test_denominators_of_either_sign_are_held(interpreted):
    """As estimates may be negative: nearly all are held there, at something tiny where nothing is seen."""
    q, k, v, _ = inputs(70)
    k = k.at[:, :20].set(0)
    least = jnp.broadcast_to(jnp.where(jnp.arange(70) < 20, 1e-12, 30.0)[:, None], (2, 70, 2))
    run = lambda backend: lambda q, k, v: linear_attention(q, k, v, causal=True, backend=backend, least_BTK=least)
    actual, expected = (results(run(backend), (q, k, v)) for backend in ("pallas", "xla"))
    assert not actual[0][:, :20].any()
    assert_close(actual, expected, 3e-6)


def test_bfloat16_sums_in_float32(interpreted):
    """Factors of products are bfloat16: scores, states, outputs and the gradients that come in are rounded once, by 2^-9, and nothing else is."""
    args = inputs(150, dtype=jnp.bfloat16)
    actual, expected = (results(functools.partial(fades, backend=backend), args) for backend in ("pallas", "xla"))
    assert [x.dtype for x in jax.tree.leaves(actual)] == [jnp.float32] * 2 + [jnp.bfloat16] * 3 + [jnp.float32]
    assert_close(actual, expected, 2**-7)


def test_float16_sums_do_not_overflow(interpreted):
    """A state here reaches 2e5, which float16 does not hold."""
    _, k, v, _ = inputs(257, dtype=jnp.float16)
    q, k, v = jnp.full((2, 257, 4, 20), 0.01, jnp.float16), abs(k) * 30, abs(v) * 40
    assert np.einsum("TR,TH->RH", *(np.asarray(x[0, :, 0], np.float64) for x in (k, v))).max() > 1.5e5
    actual, expected = (jax.jit(functools.partial(kernel_sums, causal=True, backend=backend))(q, k, v) for backend in ("pallas", "xla"))
    assert_close(actual, expected, 3e-6)


def test_the_delta_rule_of_bfloat16_multiplies_in_it_and_adds_in_float32(interpreted):
    """Over many chunks, as the error of a sum in bfloat16 would grow with them."""
    args = inputs(700, dtype=jnp.bfloat16)
    (actual, gradients), (expected, expected_gradients) = (results(functools.partial(corrects, backend=backend), args) for backend in ("pallas", "xla"))
    assert actual.dtype == jnp.float32
    assert 1e-6 < abs(actual - expected).max()
    assert_close((actual, gradients), (expected, expected_gradients), 2**-7)


def test_under_vmap_it_is_the_same(interpreted):
    args, scan = inputs(40), functools.partial(fades, backend="pallas")
    mapped = jax.jit(jax.vmap(scan))(*(x[:, None] for x in args))
    assert_close(jax.tree.map(lambda x: x[:, 0], mapped), jax.jit(scan)(*args), 1e-6)


# Variants that run on the kernels: causal, and all but the last two in both directions.
VARIANTS = {
    "linear": "linear",
    "linear-dpfp": "linear(feature_map='dpfp')",
    "linear-cosformer": "linear(feature_map='cosformer')",
    "performer": "performer(features=24)",
    "rfa": "rfa(features=12)",
    "retention": "retention",
    "delta": "delta",
    "rfa-gate": "rfa(features=12, gate=True)",
    "luna": "luna(memory=20)",
}
DIRECTIONS = [(name, True) for name in VARIANTS] + [(name, False) for name in VARIANTS if name not in ("rfa-gate", "luna")]
named = pytest.mark.parametrize("name, causal", DIRECTIONS, ids=lambda x: x if isinstance(x, str) else "causal" if x else "bidirectional")


def layer(spec, causal=True, *, H=16, dtype=jnp.float32, backend="pallas", max_len=96):
    return make_attention(spec, num_heads=4, num_kv_heads=2, head_dim=H, max_len=max_len, causal=causal, dtype=dtype, backend=backend, rngs=nnx.Rngs(1))


def both_forms(attention, q, k, v, valid):
    """What the layer and its reference give: outputs and gradients, those of the parameters too."""
    graph, params, rest = nnx.split(attention, nnx.Param, ...)

    def run(reference):
        def f(q, k, v, params):
            attention = nnx.merge(graph, params, rest)
            return (attention.reference if reference else attention)(q, k, v, valid_BS=valid)

        return results(f, (q, k, v, params))

    return run(False), run(True)


@named
def test_variants_equal_their_reference(name, causal, interpreted):
    """Outputs and gradients, those of the parameters too, with ragged validity. Of dpfp, a first query and its key may share next to no feature: the key's gradient is
    then what rounding leaves of value - output, over a small number, on every backend.
    """
    q, k, v, _ = inputs(90, R=16, H=16)
    valid = jnp.arange(90)[None] < jnp.array([[90], [61]])
    assert_close(*both_forms(layer(VARIANTS[name], causal), q, k, v, valid), 6e-5 if name == "linear-dpfp" else 2e-5)


def ran_on_the_kernels(attention, dtype, masked=False) -> bool:
    shapes = [jax.ShapeDtypeStruct((2, 90, heads, 16), dtype) for heads in (4, 2, 2)]
    valid = jax.ShapeDtypeStruct((2, 90), bool) if masked else None
    program = str(jax.make_jaxpr(lambda q, k, v, valid: attention(q, k, v, valid_BS=valid))(*shapes, valid))
    kind = {"performer": ["positive_kernel"], "rfa": ["sines_kernel"], "delta": ["wy_kernel"]}.get(attention.variant.name, [])
    found = [kernel in program for kernel in ("states_kernel", "output_kernel", *kind)]
    assert len(set(found)) == 1, "some of the kernels alone"
    return found[0]


@named
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
def test_auto_takes_the_kernels_on_a_gpu_and_the_record_says_so(name, causal, dtype, gpu):
    attention = layer(VARIANTS[name], causal, dtype=dtype, backend="auto")
    features_by_xla = name == "delta" and dtype == jnp.float32  # registers do not hold those of dpfp then
    assert attention.backend() == "pallas" and attention.plan(90, 90, True)["backend"] == "pallas" + features_by_xla * " + xla"
    assert ran_on_the_kernels(attention, dtype) and ran_on_the_kernels(attention, dtype, masked=True)
    forced = layer(VARIANTS[name], causal, dtype=dtype, backend="xla")
    assert forced.plan(90, 90)["backend"] == "xla" and not ran_on_the_kernels(forced, dtype)


@named
def test_they_are_not_for_a_cpu(name, causal):
    attention = layer(VARIANTS[name], causal, backend="auto")
    assert attention.plan(90, 90)["backend"] == ON_CPU and not ran_on_the_kernels(attention, jnp.float32)
    with pytest.raises(UserError, match="attention.backend='pallas' cannot serve here: its kernels are for NVIDIA GPUs, and this runs on cpu; use auto or xla"):
        layer(VARIANTS[name], causal).backend()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_a_delta_rule_of_many_features_is_refused_with_the_reason_when_forced_and_left_to_xla_otherwise(causal, gpu):
    with pytest.raises(UserError, match="attention.backend='pallas' cannot serve here: .*at most 256, not 320.*; use auto or xla"):
        layer("delta(nu=2)", causal, H=80).backend()
    assert layer("delta(nu=2)", causal, H=80, backend="auto").backend() == "xla"


def test_sums_over_all_keys_have_no_decay(interpreted):
    with pytest.raises(ValueError, match="log_decay_BTK: .* needs causal=True"):
        kernels.pallas_sums(*inputs(20), causal=False)


def test_cudnn_and_other_dtypes_are_refused(gpu):
    for backend, dtype, reason in (("cudnn", jnp.bfloat16, "softmax attention only"), ("pallas", jnp.float64, "bfloat16, float16 or float32, not float64")):
        with pytest.raises(UserError, match=f"attention.backend='{backend}' cannot serve here: .*{reason}; use auto or xla"):
            choose_scan(backend, dtype)
    assert choose_scan("auto", jnp.float64) == "xla"
    with jax.enable_x64(True), pytest.raises(Unsupported, match="cannot serve here: it takes bfloat16, float16 or float32, not float64"):
        kernel_sums(*[jnp.ones((1, 16, 1, 16), jnp.float64)] * 3, causal=True, backend="pallas")


PLATFORMS = [("cpu", 9.0, ON_CPU), ("tpu", 9.0, "xla"), ("gpu", 7.5, "xla"), ("gpu", 0.0, "xla"), ("gpu", 8.0, "pallas")]


@pytest.mark.parametrize("platform, capability, expected", PLATFORMS)
def test_they_are_for_nvidia_gpus(platform, capability, expected, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(backends, "_compute_capability", lambda: capability)
    assert choose_scan("auto", jnp.bfloat16) == expected and choose_scan("xla", jnp.bfloat16) == "xla"


@named
def test_variants_in_bfloat16_stay_near_float32(name, causal, interpreted):
    """Of outputs and gradients: factors of products are bfloat16 there, features too, and sums float32."""
    shape = (1, 150, 2, 16)
    q, k, v, do = (jax.random.normal(key, shape).astype(jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 4))

    def results(dtype, backend):
        attention = make_attention(VARIANTS[name], num_heads=2, head_dim=16, max_len=150, causal=causal, dtype=dtype, backend=backend, rngs=nnx.Rngs(1))
        o, pull = jax.vjp(jax.jit(attention), *(x.astype(dtype) for x in (q, k, v)))
        return [np.asarray(x, np.float64) for x in (o, *pull(do.astype(dtype)))]

    for actual, expected in zip(results(jnp.bfloat16, "pallas"), results(jnp.float32, "xla")):
        assert np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2)) < 0.01


def lowered(f, *shapes):
    """StableHLO for an H200, on a machine that may have no GPU."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


KERNELS = ("states_kernel", "output_kernel", "dv_kernel", "dqk_kernel", "wy_kernel", "dwy_kernel", "unit_gradient_kernel")


LOWERED = [(name, dtype, 64) for name in ("linear", "decayed") for dtype in kernels.DTYPES] + [("normed", jnp.bfloat16, 64)]
LOWERED += [("linear", dtype, 256) for dtype in kernels.DTYPES] + [("delta", jnp.bfloat16, R) for R in (64, 256)]
LOWERED += [(name, dtype, 64) for name in ("mapped", "all-mapped") for dtype in kernels.DTYPES]


@pytest.mark.parametrize("name, dtype, R", LOWERED, ids=lambda x: x if isinstance(x, str | int) else jnp.dtype(x).name)
def test_lowers_for_cuda(name, dtype, R):
    """Forward and backward: the states, and their gradients by the same kernel; before and after them the systems of a delta rule."""
    shapes = [jax.ShapeDtypeStruct((2, 1024, *rest), dtype) for rest in ((4, R), (2, R), (2, 64))] + [jax.ShapeDtypeStruct((2, 1024, 2), jnp.float32)]
    loss = lambda *args: sum(x.sum() for x in jax.tree.leaves(SUMS[name](*args, backend="pallas")))
    text = lowered(jax.value_and_grad(loss, (0, 1, 2, 3)), *shapes)
    assert [text.count(f'name = "{kernel}"') for kernel in KERNELS] == [2, 1, 1, 1, *([1, 1] if name == "delta" else [0, 0]), int(name == "normed")]
    assert "1024x1024" not in text, "a dense score matrix"
