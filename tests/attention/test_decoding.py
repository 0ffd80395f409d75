"""Gate 7, over the registry: generation step by step is the parallel form, position by position, with the state that a variant promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_zoo import VARIANTS, Unsupported, UserError, make_attention
from attn_zoo.attention import find
from attn_zoo.attention.base import Variant
from attn_zoo.attention.linear import KernelDecoding
from attn_zoo.attention.pattern import PatternAttention

DECODERS = [name for name, v in VARIANTS.items() if v.causal is True]
# At their default options, and at others that a short sequence tells apart from full attention.
SPECS = [
    *DECODERS,
    "additive(hidden=5)",
    "luong_local(window=3)",
    "luong_local(window=4, align='monotonic', score='dot')",
    "persistent(slots=0)",
    "local(window=5)",
    "strided(stride=8)",
    "strided(stride=6, band=20)",
    "block(block=4, window_blocks=1, global_blocks=1, random_blocks=1)",
    "block(block=5, window_blocks=0, global_blocks=0, random_blocks=0)",
    "block_local(block=8)",
    "dilated(window=3, dilation=4)",
    "fixed(stride=8, summary=2)",
    "axial(width=7)",
    "axial(width=7, axis='row')",
    "axial(width=7, axis='column')",
    "global_window(window=5, globals=3)",
    "global_window(window=5, globals=3, separate=True)",
    "bigbird(window=4, globals=6, random=3)",
    "star(ring=2)",
    "star(relay=False)",
    "random(k=4)",
    "tree(neighbours=2)",
    "sinkhorn(block=8)",
    "topk(k=5)",
    "linear(feature_map='dpfp')",
    "linear(feature_map='cosformer')",
    "rfa(gate=True)",
    "delta(feature_map='elu')",
    "memory_compressed(stride=2, kernel=5)",
    "memory_compressed(first=False)",
    "luna(memory=3)",
    "poolingformer(window=4, second=12)",
    "poolingformer(window=2, second=9, pool='max', kernel=4, stride=2)",
    "adaptive_span(max_span=24, init=6, ramp=4)",
    "mix(local(window=4), linear)",
]
T, MAX_LEN = 45, 52


def build(spec, *, causal=True, max_len=MAX_LEN, dtype=jnp.float32, grouped=True):
    """With grouped heads where the variant has keys of its own, and no parameter left at a start (zeros, ones) that hides it."""
    sizes = dict(num_heads=4, head_dim=8, max_len=max_len, causal=causal, dtype=dtype)
    attention = make_attention(spec, num_kv_heads=4, rngs=nnx.Rngs(0), **sizes)
    if grouped and not attention.shares_query_key:
        attention = make_attention(spec, num_kv_heads=2, rngs=nnx.Rngs(0), **sizes)
    if "adaptive_span" not in spec:
        graph, params, rest = nnx.split(attention, nnx.Param, ...)
        leaves, tree = jax.tree.flatten(params)
        moved = [x + 0.3 * jax.random.normal(jax.random.key(n), x.shape) for n, x in enumerate(leaves)]
        attention = nnx.merge(graph, tree.unflatten(moved), rest)
    return attention


def inputs(attention, T, S=None, seed=0):
    d, keys = attention.dims, jax.random.split(jax.random.key(seed), 3)
    q, k, v = (jax.random.normal(key, (2, n, heads, d.head_dim)).astype(d.dtype) for key, n, heads in zip(keys, (T, S or T, S or T), (d.num_heads, d.num_kv_heads, d.num_kv_heads)))
    return q, q if attention.shares_query_key else k, v


def steps(attention, q, k, v):
    """Outputs of all positions, one after the other, in one compiled loop."""
    graph, state = nnx.split(attention)

    @jax.jit
    def run(q, k, v):
        attention = nnx.merge(graph, state)

        def one(cache, qkv):
            o, cache = attention.step(*(x[:, None] for x in qkv), cache)
            return cache, o[:, 0]

        cache = attention.init_cache(len(q), q.shape[1])
        cache, o = jax.lax.scan(one, cache, tuple(x.swapaxes(0, 1) for x in (q, k, v)))
        return o.swapaxes(0, 1), cache["t"]

    return run(q, k, v)


def assert_close(actual, expected, tolerance):
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(1.0, abs(expected).max()))


@pytest.mark.parametrize("spec", SPECS)
def test_steps_equal_the_parallel_form(spec):
    attention = build(spec)
    q, k, v = inputs(attention, T)
    o, t = steps(attention, q, k, v)
    assert o.shape == q.shape and o.dtype == q.dtype and int(t) == T
    if not find(spec)[0].foresight:
        assert_close(o, jax.jit(lambda *qkv: attention(*qkv))(q, k, v), 2e-5)
        return
    # What chooses over the whole sequence can only have chosen over what there was.
    upto = jax.jit(lambda t: attention(q, k, v, valid_BS=jnp.broadcast_to(jnp.arange(T) <= t, q.shape[:2])))
    for t in range(T):
        assert_close(o[:, t], upto(t)[:, t], 2e-5)


def test_a_step_keeps_the_dtypes_of_its_query_and_of_the_state():
    for name in DECODERS:
        attention = make_attention(name, num_heads=2, head_dim=8, max_len=MAX_LEN, causal=True, dtype=jnp.bfloat16)
        cache = jax.eval_shape(lambda: attention.init_cache(2, T))
        o, after = jax.eval_shape(attention.step, *(jax.ShapeDtypeStruct((2, 1, 2, 8), jnp.bfloat16) for _ in "qkv"), cache)
        assert o.dtype == jnp.bfloat16, name
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), cache), name


@pytest.mark.parametrize("name", ["full", "strided", "linear", "star"])
def test_steps_in_half_precision_equal_the_parallel_form(name):
    attention = build(name, dtype=jnp.bfloat16)
    q, k, v = inputs(attention, 9)
    assert_close(steps(attention, q, k, v)[0], attention.reference(q, k, v), 4e-2)


@pytest.mark.parametrize("name", DECODERS)
def test_the_state_grows_as_claimed(name):
    lengths, sizes = (1024, 2048, 4096, 8192), []
    for length in lengths:
        attention = make_attention(name, num_heads=2, head_dim=8, max_len=length, causal=True)
        cache = jax.eval_shape(lambda: attention.init_cache(1, length))
        sizes.append(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)))
    slope = np.polyfit(np.log(lengths), np.log(sizes), 1)[0]
    assert slope <= VARIANTS[name].state_order + 0.15, f"bytes of state {sizes}"


@pytest.mark.parametrize("name", [name for name in DECODERS if VARIANTS[name].decode is not True])
def test_what_feeds_the_sequence_again_says_why(name, capsys):
    assert VARIANTS[name].decode != next(f.default for f in dataclasses.fields(Variant) if f.name == "decode")
    print(f"{name} has no incremental form: {VARIANTS[name].decode}")


def test_rows_of_a_state_are_rows_of_the_batch():
    """Beam search reorders a state by its rows: every array but the scalars leads with the batch."""
    for name in DECODERS:
        cache = jax.eval_shape(lambda: build(name).init_cache(3, T))
        assert all(x.ndim == 0 or x.shape[0] == 3 for x in jax.tree.leaves(cache)), name
        assert cache["t"].shape == ()


CROSS = [name for name, v in VARIANTS.items() if v.cross is True]


CROSS_SPECS = [
    *CROSS,
    "luong_local(window=2)",
    "luong_local(window=2, align='monotonic')",
    "local(window=3)",
    "global_window(window=2, globals=3, separate=True)",
    "block(block=4, window_blocks=1, global_blocks=1, random_blocks=1)",
    "linear(feature_map='cosformer')",
    "linformer(projection='conv', rank=5)",
    "mix(linear, local(window=3))",
    "mix(hard, local(window=3))",
]


@pytest.mark.parametrize("S", [7, 13])
@pytest.mark.parametrize("name", CROSS_SPECS)
def test_cross_attention_step_by_step_equals_the_parallel_form(name, S):
    attention = build(name, causal=False)
    q, k, v = inputs(attention, 7, S)
    valid = jnp.arange(S) < jnp.array([[S], [4]])
    if not attention.rowwise:
        with pytest.raises(Unsupported, match="depends on the other queries"):
            attention.init_cross_cache(k, v, 7, valid_BS=valid)
        return
    graph, state = nnx.split(attention)

    @jax.jit
    def run(q, k, v):
        attention = nnx.merge(graph, state)
        step = lambda cache, q: attention.cross_step(q[:, None], cache)[::-1]
        return jax.lax.scan(step, attention.init_cross_cache(k, v, 7, valid_BS=valid), q.swapaxes(0, 1))[1][:, :, 0].swapaxes(0, 1)

    assert_close(run(q, k, v), attention(q, k, v, valid_BS=valid, valid_BT=jnp.ones((2, 7), bool)), 2e-5)
    cache = jax.eval_shape(lambda: attention.init_cross_cache(k, v, 7, valid_BS=valid))
    assert all(x.ndim == 0 or x.shape[0] == 2 for x in jax.tree.leaves(cache)), "beam search reorders a state by its rows"


@pytest.mark.parametrize("name", CROSS_SPECS)
def test_a_decoder_asks_one_query_at_a_time_wherever_its_position_means_nothing(name):
    attention = build(name, causal=False, max_len=400)  # beyond the windows of all defaults
    if not attention.rowwise:
        return
    q, k, v = inputs(attention, 400)
    attend = jax.jit(lambda q: attention(q, k, v))
    permuted = np.abs(np.asarray(attend(q[:, ::-1]) - attend(q)[:, ::-1])).max() < 1e-5
    assert attention.anywhere == permuted
    if attention.anywhere or isinstance(attention, PatternAttention | KernelDecoding):  # and then keeps no queries
        assert "q" not in jax.eval_shape(lambda: attention.init_cross_cache(k, v, 7))


@pytest.mark.parametrize("name", [name for name, v in VARIANTS.items() if v.cross is not True] + ["mix(full, retention)"])
def test_what_cannot_cross_is_refused_at_equal_lengths_too(name):
    attention = build(name, causal=False)
    with pytest.raises(Unsupported, match="cannot attend across sequences"):
        attention.init_cross_cache(*inputs(attention, 7)[1:], 7)


def test_keys_that_are_the_queries_are_kept_once_unless_heads_share_them():
    for K, kept in ((4, {"q", "v", "t"}), (2, {"q", "k", "v", "t"})):
        attention = make_attention("lsh", num_heads=4, num_kv_heads=K, head_dim=8, max_len=MAX_LEN, causal=True, rngs=nnx.Rngs(0))
        q, _, v = inputs(attention, 9)
        k = q[:, :, ::4 // K]
        o, _ = steps(attention, q, k, v)
        assert set(jax.eval_shape(lambda: attention.init_cache(2, 9))) == kept
        assert_close(o[:, :1], attention(q[:, :1], k[:, :1], v[:, :1]), 2e-5)


def test_cross_attention_is_not_causal_and_no_longer_than_built():
    attention = build("local", causal=False)
    q, k, v = inputs(attention, 5)
    with pytest.raises(UserError, match=f"length {MAX_LEN + 1} is over max_len={MAX_LEN}"):
        attention.init_cross_cache(k, v, MAX_LEN + 1)
    with pytest.raises(Unsupported, match="built with a causal mask"):
        build("local").init_cross_cache(k, v, 5)


def test_a_decoder_is_causal_and_no_longer_than_built():
    with pytest.raises(Unsupported, match="without a causal mask"):
        build("full", causal=False).init_cache(1, T)
    with pytest.raises(UserError, match=f"max_len={MAX_LEN + 1} is over the max_len={MAX_LEN}"):
        build("local").init_cache(1, MAX_LEN + 1)
