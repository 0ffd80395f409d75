"""The C++ kernels for rounds of sorting: against XLA's tiles and dense attention, under what JAX does to them, and the buckets of hashing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pallas_linear import assert_close, results
from tiny import ON_CPU

from attn_zoo import make_attention
from attn_zoo.attention.lsh import attention_in_rounds, hash_buckets, inverse_of
from attn_zoo.ops import native
from attn_zoo.ops.native_rounds import native_buckets, native_rounds

pytestmark = pytest.mark.skipif(ON_CPU != "native", reason=f"{native.library()}")

SHAPES = {  # T, N, K, H, R, window: tiles are 64 queries by 64 keys
    "one-of-each": (1, 1, 1, 1, 1, 1),
    "a-tile-a-chunk": (256, 2, 2, 64, 2, 64),
    "chunks-inside-a-tile": (150, 4, 2, 20, 4, 7),
    "chunks-across-tiles": (333, 3, 1, 16, 3, 100),
    "one-chunk": (130, 2, 2, 65, 3, 130),
}


def arrays(T, N, K, H, dtype=jnp.float32):
    rng = np.random.default_rng(T)
    return [jnp.asarray(rng.normal(size=(2, T, heads, H)), dtype) for heads in (N, K, K)]


def rounds(T, K, R, window):
    """(order, place) of random sorting; the places of the last round are those of the first, so that all its pairs met before."""
    order = np.random.default_rng(T + 1).random((R, 2, K, T)).argsort(axis=-1).astype(np.int32)
    order[-1] = order[0]
    return jnp.asarray(order), inverse_of(jnp.asarray(order)) // window


def attend(q, k, v, *, run, **sorting):
    """What can be summed: the logsumexp of a row that sees nothing is -inf."""
    o, lse = run(q, k, v, **sorting)
    return o, jnp.where(lse > -jnp.inf, lse, -3.0)


def dense(q, k, v, *, order_RBKT, place_RBKT, window, valid_BT, causal, itself):
    """All pairs at once."""
    T, G = q.shape[1], q.shape[2] // k.shape[2]
    apart = place_RBKT[..., :, None] - place_RBKT[..., None, :]
    i, j = np.arange(T)[:, None], np.arange(T)[None, :]
    seen = ((apart == 0) | (apart == 1)).any(axis=0) & ((j <= i) | (not causal)) & ((j != i) | itself)
    seen = jnp.repeat(seen if valid_BT is None else seen & valid_BT[:, None, None, :], G, axis=1)
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, jnp.repeat(k, G, axis=2), precision="highest") * q.shape[-1] ** -0.5
    weights = jnp.where(seen, jnp.exp(scores), 0.0)
    total = weights.sum(axis=-1)
    safe = jnp.where(total > 0, total, 1.0)
    o = jnp.einsum("BNTS,BSNH->BTNH", weights / safe[..., None], jnp.repeat(v, G, axis=2), precision="highest")
    return o, jnp.where(total > 0, jnp.log(safe), -jnp.inf).swapaxes(1, 2)


@pytest.mark.parametrize("run", [native_rounds, attention_in_rounds])
@pytest.mark.parametrize("causal, itself, masked", [(True, False, False), (False, True, True), (True, True, True)], ids=["causal", "holes", "causal-holes"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_dense_attention(shape, causal, itself, masked, run):
    T, N, K, H, R, window = SHAPES[shape]
    order, place = rounds(T, K, R, window)
    valid = jnp.asarray(np.random.default_rng(0).random((2, T)) < 0.7) if masked else None
    sorting = {"order_RBKT": order, "place_RBKT": place, "window": window, "valid_BT": valid, "causal": causal, "itself": itself}
    actual, expected = (results(functools.partial(attend, run=f, **sorting), arrays(T, N, K, H)) for f in (run, dense))
    assert_close(actual, expected, 3e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
    order, place = rounds(150, 2, 3, 20)
    args = arrays(150, 4, 2, 32, dtype)
    run = lambda *args: attend(*args, run=native_rounds, order_RBKT=order, place_RBKT=place, window=20)
    (o, lse), gradients = results(run, args)
    expected = results(run, [x.astype(jnp.float32) for x in args])
    assert lse.dtype == jnp.float32 and {x.dtype for x in (o, *gradients)} == {jnp.dtype(dtype)}
    assert_close(lse, expected[0][1], 3e-6)
    assert_close((o, gradients), (expected[0][0], expected[1]), 2.0 ** (-7 if dtype == jnp.bfloat16 else -10))  # the gradient that comes in is rounded too


def test_under_vmap_and_checkpoint():
    args, (order, place) = arrays(150, 4, 2, 16), rounds(150, 2, 3, 20)
    run = lambda q, k, v, order, place: attend(q, k, v, run=native_rounds, order_RBKT=order, place_RBKT=place, window=20)
    expected = results(lambda *args: run(*args, order, place), args)
    assert_close(results(jax.checkpoint(lambda *args: run(*args, order, place)), args), expected, 1e-6)
    one = lambda q, k, v, order, place: jax.tree.map(lambda x: x[0], run(q[None], k[None], v[None], order[:, None], place[:, None]))
    one_by_one = lambda *args: jax.vmap(one, in_axes=(0, 0, 0, 1, 1))(*args, order, place)
    assert_close(results(one_by_one, args), expected, 1e-6)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_no_number_reaches_those_that_see_it_alone(which):
    """A run that diverges has to show it; a value of no weight that is NaN times it spoils its tile too."""
    args, (order, place) = arrays(256, 1, 1, 16), rounds(256, 1, 1, 32)
    args[which] = args[which].at[:, 8].set(jnp.nan)
    o, _ = native_rounds(*args, order, place, window=32)
    place = np.asarray(place)[0, :, 0]
    sees = (place - place[:, 8:9] == 0) | (place - place[:, 8:9] == 1) if which else np.arange(256) == 8
    spoiled = np.isnan(o).any(axis=(2, 3))
    assert spoiled[np.broadcast_to(sees, spoiled.shape)].all() and spoiled.sum() < (2 * 160 if which == 2 else 2 * 65)
    assert which == 2 or (spoiled == sees).all()


def test_a_row_that_sees_nothing_gives_zeros_and_moves_nothing():
    args, (order, place) = arrays(90, 2, 2, 16), rounds(90, 2, 2, 12)
    valid = jnp.ones((2, 90), bool).at[1].set(False)
    run = lambda *args: attend(*args, run=native_rounds, order_RBKT=order, place_RBKT=place, window=12, valid_BT=valid, causal=True, itself=False)
    (o, lse), gradients = results(run, args)
    assert (o[:, 0] == 0).all() and (lse[:, 0] == -3).all() and (o[1] == 0).all() and (lse[1] == -3).all() and (lse[0, 1:] != -3).any()
    assert all((x[1] == 0).all() and np.isfinite(x).all() for x in gradients) and (gradients[0][:, 0] == 0).all()


@pytest.mark.parametrize("factors", [(2,), (34,), (128,), (8, 6), (64, 34)])
@pytest.mark.parametrize("T, K, H", [(1, 1, 1), (64, 2, 16), (150, 3, 20)])
def test_buckets_are_those_of_xla(T, K, H, factors):
    """Of whole numbers, whose products are exact, so that many are equal: the first of them counts."""
    rng = np.random.default_rng(T)
    k = jnp.asarray(rng.integers(-2, 3, (2, T, K, H)), jnp.float32)
    rotations = jnp.asarray(rng.integers(-2, 3, (3, K, H, sum(factors) // 2)), jnp.float32)
    np.testing.assert_array_equal(native_buckets(k, rotations, factors), hash_buckets(k, rotations, factors))


def test_the_layer_runs_both():
    attention = make_attention("lsh", num_heads=2, head_dim=16, max_len=256, causal=True)
    text = jax.jit(attention).lower(*arrays(256, 2, 2, 16)).as_text()
    assert attention.plan(256, 256)["backend"] == "native" and "attn_zoo_rounds_forward" in text and "attn_zoo_buckets" in text


def test_working_memory_is_linear():
    peaks = []
    attention = make_attention("lsh", num_heads=8, head_dim=64, max_len=4096, causal=True)
    for T in (1024, 2048, 4096):
        f = jax.jit(jax.grad(lambda q, k, v: attention(q, k, v).sum(), (0, 1, 2)))
        peaks.append(f.lower(*[jax.ShapeDtypeStruct((1, T, 8, 64), jnp.float32)] * 3).compile().memory_analysis().temp_size_in_bytes)
    assert peaks[2] < 2.1 * peaks[1] < 4.4 * peaks[0]
