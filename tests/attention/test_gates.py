"""The gates every variant passes, parametrised over the registry: a new variant is tested by its one line."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from attn_zoo import VARIANTS, Unsupported, make_attention
from attn_zoo.spec import Spec

CAUSAL = [(name, causal) for name, v in VARIANTS.items() for causal in (False, True) if v.causal is True or not causal]
ids = lambda case: "-".join(f"{'causal' if x else 'bidirectional'}" if isinstance(x, bool) else f"T{x}" if isinstance(x, int) else str(x) for x in case)
variants = functools.partial(pytest.mark.parametrize, ids=ids)


def make(name, causal, *, max_len, N=2, K=None, H=16, dtype=jnp.float32, **options):
    spec = Spec(name, tuple(options.items()))
    return make_attention(spec, num_heads=N, num_kv_heads=K, head_dim=H, max_len=max_len, causal=causal, dtype=dtype, rngs=nnx.Rngs(1))


def inputs(B, T, S, N, K, H, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes)]


def ragged(B, S):
    """Validity with holes and a short row."""
    valid = np.random.default_rng(0).random((B, S)) > 0.2
    valid[-1, S // 3 :] = False
    return jnp.asarray(valid)


OPTIMIZED = {"xla_backend_optimization_level": 3}  # XLA's default, which conftest.py turns off


def outputs_and_gradients(attention, q, k, v, valid=None, reference=False, compiler_options=None):
    """(o, gradients with respect to q, k, v and the parameters) of a loss that weighs every output differently."""
    graph, params, rest = nnx.split(attention, nnx.Param, ...)
    weights = jax.random.normal(jax.random.key(7), (*q.shape[:3], v.shape[-1]))

    def loss(q, k, v, params):
        attention = nnx.merge(graph, params, rest)
        o = (attention.reference if reference else attention)(q, k, v, valid_BS=valid)
        return (o.astype(jnp.float32) * weights).sum(), o

    (_, o), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True), compiler_options=compiler_options)(q, k, v, params)
    return o, gradients


def assert_close(actual, expected, tolerance):
    """Largest difference within `tolerance` of the largest expected value, leaf by leaf."""
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert a.shape == e.shape and np.isfinite(a).all()
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * max(1.0, abs(e).max()))


# Gate 1: the fast form equals the slow one, where no block divides the length.
SHAPES = {  # T, S, N, K, dtype, ragged validity, tolerance
    "T63-f32": (63, 63, 2, 2, jnp.float32, False, 3e-6),
    "T257-f32-grouped-ragged": (257, 257, 4, 2, jnp.float32, True, 1e-5),
    "T1000-f32-grouped": (1000, 1000, 2, 1, jnp.float32, False, 1e-5),
    "T257-bf16-ragged": (257, 257, 2, 2, jnp.bfloat16, True, 2e-2),
    "T63-S257-f32-ragged": (63, 257, 2, 1, jnp.float32, True, 1e-5),
    "T257-S63-bf16": (257, 63, 2, 2, jnp.bfloat16, False, 2e-2),
}


@pytest.mark.parametrize("shape", SHAPES)
@variants("case", CAUSAL)
def test_equals_reference(case, shape):
    name, causal = case
    T, S, N, K, dtype, masked, tolerance = SHAPES[shape]
    if T != S and VARIANTS[name].cross is not True:
        with pytest.raises(Unsupported, match="cross"):
            make(name, causal, max_len=1000)(*inputs(1, T, S, 2, 2, 16))
        return
    attention = make(name, causal, max_len=1000, N=N, K=K, dtype=dtype)
    q, k, v = inputs(2, T, S, N, K, 16, dtype)
    valid = ragged(2, S) if masked else None
    o, gradients = outputs_and_gradients(attention, q, k, v, valid, compiler_options=OPTIMIZED if shape == "T63-f32" else None)
    expected, expected_gradients = outputs_and_gradients(attention, *(x.astype(jnp.float32) for x in (q, k, v)), valid, reference=True)
    assert o.dtype == dtype and gradients[0].dtype == dtype
    assert_close(o, expected, tolerance)
    assert_close(gradients, expected_gradients, tolerance)


# Gate 2: the limit in which a variant is full attention.
@variants("case", CAUSAL)
def test_equals_full_in_its_limit(case):
    name, causal = case
    T, variant = 63, VARIANTS[name]
    full = make("full", causal, max_len=T)
    q, k, v = inputs(2, T, T, 2, 2, 16)
    options = variant.exact_when(T)
    if options is not None:
        attention = make(name, causal, max_len=T, **options)
        o, gradients = outputs_and_gradients(attention, q, k, v)
        expected, expected_gradients = outputs_and_gradients(full, q, k, v)
        assert_close(o, expected, 3e-6)
        assert_close(gradients[:3], expected_gradients[:3], 3e-6)
        return
    assert variant.bound is not None, f"{name} is never exact, so it must state a bound"
    attention = make(name, causal, max_len=T, **dict(variant.bound.options))
    k = k * variant.bound.scale
    o, expected = attention(q, k, v), full(q, k, v)
    error, cosine = float(abs(o - expected).max()), float((o * expected).sum() / jnp.sqrt(jnp.square(o).sum() * jnp.square(expected).sum()))
    print(f"{name} is never exact ({variant.bound.why}); error {error:.2g} of at most {variant.bound.error:.2g}, cosine {cosine:.2g}, with keys scaled by {variant.bound.scale}")
    assert error <= variant.bound.error and cosine >= variant.bound.cosine


# Gate 3: causality, strictly.
@pytest.mark.parametrize("name", [name for name, causal in CAUSAL if causal])
def test_causal_gradients_are_exactly_zero(name):
    T = 150
    attention = make(name, True, max_len=T)
    args = inputs(1, T, T, 2, 2, 16)

    @jax.jit
    def gradients(t):
        return jax.grad(lambda q, k, v: jnp.take(attention(q, k, v), t, axis=1).sum(), (0, 1, 2))(*args)

    for t in (0, 1, 62, 63, 64, 127, 128, 148):
        dq, dk, dv = gradients(t)
        for gradient in (dq, dk, dv):
            assert (np.asarray(gradient[:, t + 1 :]) == 0).all()
        assert (np.asarray(dv[:, : t + 1]) != 0).any()


@pytest.mark.parametrize("name", [name for name, v in VARIANTS.items() if v.causal is not True])
def test_causal_is_refused_with_the_reason(name):
    with pytest.raises(Unsupported, match="cannot be causal: .{10}"):
        make(name, True, max_len=64)


# Gate 4: padding.
@variants("case", CAUSAL)
def test_padding_changes_nothing(case):
    name, causal = case
    T = 100
    attention = make(name, causal, max_len=128)
    q, k, v = inputs(3, T, T, 2, 2, 16)
    valid = ragged(3, T).at[0].set(True).at[1].set(False)  # one row all valid, one without any valid key, one ragged
    run = jax.jit(lambda q, k, v: attention(q, k, v, valid_BS=valid))
    clean = np.asarray(run(q, k, v))
    garbage = jnp.where(jax.random.bernoulli(jax.random.key(3), 0.5, q.shape), jnp.nan, 1e30)
    dirty = np.asarray(run(*(jnp.where(valid[:, :, None, None], x, garbage) for x in (q, k, v))))
    rows = np.asarray(valid)
    np.testing.assert_array_equal(clean[rows], dirty[rows])
    assert np.isfinite(clean).all()
    assert (clean[1] == 0).all() and (clean[0] != 0).any()


# Gate 5: cost. Two heads of 16, so that T x S dwarfs everything a linear variant needs.
def backward_of(name, causal, T):
    attention = make(name, causal, max_len=T)
    graph, params, rest = nnx.split(attention, nnx.Param, ...)
    loss = lambda q, k, v, params: nnx.merge(graph, params, rest)(q, k, v).sum()
    shapes = [jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)] * 3
    return jax.jit(jax.grad(loss, (0, 1, 2, 3))), (*shapes, params), attention


@variants("case", CAUSAL)
def test_memory_grows_as_claimed(case):
    name, causal = case
    lengths = (1024, 2048, 4096, 8192)
    peaks = []
    for T in lengths:
        f, args, _ = backward_of(name, causal, T)
        peaks.append(f.lower(*args).compile().memory_analysis().temp_size_in_bytes)
    slope = np.polyfit(np.log(lengths), np.log(peaks), 1)[0]
    assert slope <= VARIANTS[name].memory_order + 0.15, f"temporary bytes {peaks}"


@variants("case", [case for case in CAUSAL if VARIANTS[case[0]].memory_order < 2])
def test_no_quadratic_array(case):
    T = 2048
    f, args, _ = backward_of(*case, T)
    biggest = max(largest_arrays(jax.make_jaxpr(f)(*args).jaxpr))
    assert biggest < T * T, f"an array of {biggest} elements at T = S = {T}"


def largest_arrays(jaxpr):
    """Sizes of all arrays in a jaxpr and in those it calls."""
    for equation in jaxpr.eqns:
        for var in itertools.chain(equation.invars, equation.outvars):
            yield int(np.prod(getattr(var.aval, "shape", ()), dtype=np.int64))
        for inner in jaxprs_in_params(equation.params):
            yield from largest_arrays(inner)
    for var in jaxpr.constvars:
        yield int(np.prod(var.aval.shape, dtype=np.int64))


@variants("case", CAUSAL)
def test_work_grows_as_claimed(case):
    """Useful FLOPs by formula, and the pairs in the blocks that the engine lists, where it lists blocks."""
    name, causal = case
    lengths = (2048, 4096, 8192, 16384)
    layers = [make(name, causal, max_len=T) for T in lengths]
    slope = lambda work: np.polyfit(np.log(lengths), np.log(work), 1)[0]
    assert slope([a.flops(1, T, T) for a, T in zip(layers, lengths)]) == pytest.approx(VARIANTS[name].time_order, abs=0.15)
    densities = [a.plan(T, T).get("computed_density") for a, T in zip(layers, lengths)]
    if densities[0] is not None:
        assert slope(np.array(densities) * np.square(lengths)) <= VARIANTS[name].time_order + 0.15


# Gate 6: what JAX does to it.
@variants("case", CAUSAL)
def test_compiles_once_a_shape(case):
    name, causal = case
    run = jax.jit(lambda graph, state, q, k, v: nnx.merge(graph, state)(q, k, v), static_argnums=0)
    for seed in (0, 1):  # a layer made alike is the same program: its options, patterns and dims are equal, and hash alike
        run(*nnx.split(make(name, causal, max_len=64)), *inputs(1, 48, 48, 2, 2, 16, seed=seed))
    assert run._cache_size() == 1


@variants("case", CAUSAL)
def test_large_logits_keep_gradients_finite(case):
    name, causal = case
    q, k, v = inputs(1, 63, 63, 2, 2, 16)
    o, gradients = outputs_and_gradients(make(name, causal, max_len=63), 300 * q, 300 * k, v)
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves((o, gradients)))


@variants("case", CAUSAL)
def test_checkpoint_vmap_and_sharded_batch_change_nothing(case):
    name, causal = case
    attention = make(name, causal, max_len=48)
    args = inputs(4, 48, 48, 2, 2, 16)
    graph, state = nnx.split(attention)

    def loss(q, k, v):
        return jnp.sin(nnx.merge(graph, state)(q, k, v)).sum()

    plain = jax.jit(jax.grad(loss, (0, 1, 2)))
    expected = plain(*args)
    assert_close(jax.jit(jax.grad(jax.checkpoint(loss), (0, 1, 2)))(*args), expected, 1e-6)
    mapped = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2))))(*(x[:, None] for x in args))
    assert_close([x[:, 0] for x in mapped], expected, 1e-6)
    mesh = jax.sharding.Mesh(jax.devices()[:4], "data")
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    assert_close(plain(*(jax.device_put(x, sharding) for x in args)), expected, 1e-6)


def test_every_entry_is_complete():
    for name, variant in VARIANTS.items():
        assert variant.name == name
        assert dataclasses.is_dataclass(variant.options) and variant.options.__doc__
        assert variant.paper.key and variant.paper.title and variant.paper.year >= 2014
        for claim in (variant.causal, variant.cross, variant.decode):
            assert claim is True or (isinstance(claim, str) and len(claim) > 10), f"{name}: a claim is True or the reason why not"
        assert (variant.exact_when(64) is None) == (variant.bound is not None)
