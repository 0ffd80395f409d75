"""The blocked engine against dense attention in float64: both results, and the gradients of both."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_zoo.ops import blocked
from attn_zoo.ops.blocked import ScoreMod, block_sizes, blocked_attention, rows_per_step
from attn_zoo.ops.patterns import CAUSAL, FULL, Band, BlockTable, Pattern, Prefix


@dataclasses.dataclass(frozen=True)
class Stripes(Pattern):
    """A mask and nothing else."""

    period: int

    def mask(self, i, j):
        return (3 * i + j) % self.period == 0


def normals(B, T, S, N, K, H, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H))]


def dense(q_BTNH, k_BSKH, v_BSKH, params, *, pattern, valid_BS=None, fn=None, scale=None):
    """(output, logsumexp) with every score at once; a score function gets params of shape [N, 1, 1, ...]."""
    (T, N, H), (S, K) = q_BTNH.shape[1:], k_BSKH.shape[1:3]
    i, j = np.arange(T)[:, None], np.arange(S)[None, :]
    k_BSNH, v_BSNH = (jnp.repeat(x, N // K, axis=2) for x in (k_BSKH, v_BSKH))
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) * (H**-0.5 if scale is None else scale)
    if fn is not None:
        scores_BNTS = fn(scores_BNTS, i, j, jax.tree.map(lambda x: x[:, None, None], params))
    seen = np.broadcast_to(pattern.mask(i, j), (T, S)) & (True if valid_BS is None else valid_BS[:, None, None, :])
    seen_BNTS = jnp.broadcast_to(seen, scores_BNTS.shape)
    any_BNT = seen_BNTS.any(axis=-1)
    # In a row that sees nothing, the scores take the place of -inf, so that gradients are zero and not NaN.
    lse_BNT = jax.scipy.special.logsumexp(jnp.where(seen_BNTS | ~any_BNT[..., None], scores_BNTS, -jnp.inf), axis=-1)
    weights_BNTS = jnp.where(seen_BNTS, jnp.exp(scores_BNTS - lse_BNT[..., None]), 0)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH), jnp.where(any_BNT, lse_BNT, -jnp.inf).swapaxes(1, 2)


@functools.partial(jax.jit, static_argnums=0)
def results(attend, q, k, v, params=()):
    """((o, lse), gradients with respect to q, k, v and params) of a loss that weighs every o and every finite lse differently."""
    weights = np.random.default_rng(5)
    wo, wl = weights.normal(size=q.shape), weights.normal(size=q.shape[:3])

    def loss(q, k, v, params):
        o, lse = attend(q, k, v, params)
        return (o * wo.astype(o.dtype)).sum() + jnp.where(lse > -jnp.inf, lse * wl.astype(lse.dtype), 0).sum(), (o, lse)

    (_, outputs), gradients = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(q, k, v, params)
    return outputs, gradients


def engine(score_fn=None, **kwargs):
    return lambda q, k, v, params: blocked_attention(q, k, v, score_mod=score_fn and ScoreMod(score_fn, params), **kwargs)


def exact(q, k, v, params=(), **kwargs):
    """`results` of the dense form in float64."""
    with jax.enable_x64(True):
        args = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float32), jnp.float64), (q, k, v, params))
        return jax.tree.map(np.asarray, results(lambda *args: dense(*args, **kwargs), *args))


def assert_close(actual, expected, tolerance):
    """Largest difference within `tolerance` of the largest expected value, leaf by leaf; -inf where -inf is expected."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_array_equal(np.isfinite(a), np.isfinite(e))
        largest = abs(e[np.isfinite(e)]).max(initial=1.0)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * largest)


def holes(B, S):
    """Validity with holes; the last sequence has no valid key at all."""
    valid = np.random.default_rng(0).random((B, S)) > 0.3
    valid[-1] = False
    return jnp.asarray(valid)


def random_table(block, T, S):
    rng = np.random.default_rng(0)
    return BlockTable(block, tuple(tuple(rng.integers(0, -(-S // block), 2).tolist()) for _ in range(-(-T // block))))


# pattern, T, S, N, K, validity with holes, further arguments of blocked_attention
CASES = {
    "full-default-blocks": (FULL, 63, 63, 2, 2, False, {}),
    "full-cross-grouped-holes": (FULL, 50, 83, 4, 2, True, {"block": 16}),
    "causal-grouped": (CAUSAL, 100, 100, 4, 1, False, {"block": 24}),
    "window-holes-scale": (Band(5, 3), 77, 77, 2, 2, True, {"block": 16, "scale": 0.7}),
    "window-beyond-the-keys": (Band(4, 0), 60, 21, 2, 1, False, {"block": 16}),
    "prefix-and-table": (CAUSAL & (Prefix(7) | random_table(8, 90, 90)), 90, 90, 2, 1, True, {"block": 24}),
    "a-mask-alone": (~Stripes(3) & Band(30, 30), 70, 45, 2, 2, False, {"block": 32}),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_dense_attention(name):
    pattern, T, S, N, K, masked, kwargs = CASES[name]
    q, k, v = normals(2, T, S, N, K, 16)
    valid = holes(2, S) if masked else None
    (o, lse), gradients = results(engine(pattern=pattern, valid_BS=valid, **kwargs), q, k, v)
    expected, expected_gradients = exact(q, k, v, pattern=pattern, valid_BS=valid, scale=kwargs.get("scale"))
    assert (o.dtype, lse.dtype) == (jnp.float32, jnp.float32)
    assert_close((o, lse), expected, 2e-6)
    assert_close(gradients, expected_gradients, 3e-6)


def test_a_row_that_sees_nothing_gives_zeros_and_moves_nothing():
    """Row 0 sees nothing, as no key is before it; the keys 30 to 39 are seen by no row; the last sequence has no valid key."""
    q, k, v = normals(3, 40, 40, 2, 1, 16)
    valid = jnp.ones((3, 40), bool).at[:, 30:].set(False).at[2].set(False)
    (o, lse), (dq, dk, dv, _) = results(engine(pattern=Band(ahead=-1), valid_BS=valid, block=16), q, k, v)
    assert (o[:, 0] == 0).all() and (lse[:, 0] == -jnp.inf).all() and (o[2] == 0).all() and (lse[2] == -jnp.inf).all()
    assert (dq[:, 0] == 0).all() and (dk[:, 30:] == 0).all() and (dv[:, 30:] == 0).all()
    assert all((x[2] == 0).all() and np.isfinite(x).all() for x in (dq, dk, dv))
    assert np.isfinite(lse[:2, 1:]).all() and (dv[:2, :30] != 0).all(axis=(2, 3)).all()


def bend(scores, i, j, params):
    """A soft cap and a slope by distance on either side: nonlinear in the scores, in a tree of parameters."""
    cap, slopes = params["cap"], params["slopes"]
    slope = jnp.where(j <= i, slopes[..., 0], slopes[..., 1])
    return cap * jnp.tanh(scores / cap) - slope * abs(i - j)


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16], ids=["a-head-a-step", "two-heads", "a-sequence", "two-sequences", "all-at-once"])
def test_score_mod_and_its_parameters(rows, monkeypatch):
    monkeypatch.setattr(blocked, "TILE_BYTES", rows * 2 * 16 * 16 * 4)
    q, k, v = normals(4, 53, 61, 8, 4, 16)
    rng, valid = np.random.default_rng(1), holes(4, 61)
    params = {"cap": jnp.asarray(rng.uniform(1, 3, 8), jnp.float32), "slopes": jnp.asarray(rng.uniform(0.01, 0.3, (8, 2)), jnp.float32)}
    pattern = Band(40, 25)
    outputs, gradients = results(engine(bend, pattern=pattern, valid_BS=valid, block=16), q, k, v, params)
    expected, expected_gradients = exact(q, k, v, params, pattern=pattern, valid_BS=valid, fn=bend)
    assert gradients[3]["slopes"].shape == (8, 2) and (abs(gradients[3]["slopes"]) > 1e-3).all()
    assert_close(outputs, expected, 2e-6)
    assert_close(gradients, expected_gradients, 5e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
def test_half_precision_sums_in_float32(dtype):
    """Sums over 1024 blocks of 16 equal terms, of keys in the forward and of queries in the backward pass, are exact.

    Kept in bfloat16, a sum of ones stalls at 256 and one of sixteens at 4096.
    """
    few, many = 16, 2**14
    full = lambda value, length: jnp.full((1, length, 1, 16), value, dtype)
    run = jax.jit(lambda q, k, v: blocked_attention(q, k, v, pattern=FULL, block=16))
    o, lse = run(full(0, few), full(0, many), full(1, many))
    assert o.dtype == dtype and lse.dtype == jnp.float32
    np.testing.assert_array_equal(o.astype(jnp.float32), 1)
    np.testing.assert_allclose(lse, np.log(many), rtol=1e-6)
    (o, lse), pull = jax.vjp(run, full(0, many), full(0, few), full(1, few))
    dv = pull((jnp.ones_like(o), jnp.zeros_like(lse)))[2]  # every key gets 1 / 16 from each of the queries
    np.testing.assert_array_equal(dv.astype(jnp.float32), many / few)


def test_bfloat16_is_as_good_as_its_own_rounding():
    q, k, v = normals(1, 300, 300, 2, 1, 64, jnp.bfloat16)
    (o, lse), gradients = results(engine(pattern=CAUSAL, block=64), q, k, v)
    expected, expected_gradients = exact(q, k, v, pattern=CAUSAL)
    assert all(x.dtype == jnp.bfloat16 for x in (o, *gradients[:3]))
    assert_close(o, expected[0], 2**-8)  # one rounding of the weights, one of the output, 2^-9 each
    assert_close(lse, expected[1], 1e-6)
    assert_close(gradients, expected_gradients, 2**-7)


def test_blocks_and_tiles_change_nothing(monkeypatch):
    q, k, v = normals(2, 75, 75, 4, 2, 16)
    valid = holes(2, 75)
    run = lambda block: results(engine(pattern=Band(20, 0) | Prefix(3), valid_BS=valid, block=block), q, k, v)
    expected = run(None)
    for block, tile_bytes in ((16, 1), (40, 2**30)):
        monkeypatch.setattr(blocked, "TILE_BYTES", tile_bytes)
        assert_close(run(block), expected, 1e-6)


def test_equal_patterns_compile_once():
    run = jax.jit(lambda q, k, v, valid, pattern: blocked_attention(q, k, v, pattern=pattern, valid_BS=valid), static_argnames="pattern")
    for seed in (0, 1):
        q, k, v = (x + seed for x in normals(1, 20, 20, 1, 1, 8))
        run(q, k, v, jnp.arange(20)[None] != seed, pattern=Band(3, 0) | BlockTable(4, ((0,), (1,), (1, 2), (3,), (0, 4))))
    assert run._cache_size() == 1


def test_no_product_runs_over_blocks_that_are_not_listed():
    """A query block that sees one key block takes one turn of the loop, so garbage in any other block is never read."""
    q, k, v = normals(1, 64, 64, 1, 1, 16)
    pattern = BlockTable(16, ((0,), (2,), (0,), (2,)))
    poisoned = [x.at[:, 16:32].set(jnp.nan).at[:, 48:].set(jnp.nan) for x in (k, v)]
    attend = engine(pattern=pattern, block=16)
    jax.tree.map(np.testing.assert_array_equal, results(attend, q, *poisoned), results(attend, q, k, v))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 4096), st.integers(1, 4096), st.none() | st.integers(0, 3000), st.none() | st.integers(0, 3000))
def test_block_sizes_fit_the_lengths(T, S, back, ahead):
    for size, length in zip(block_sizes(Band(back, ahead), T, S), (T, S)):
        assert 1 <= size <= 512 and size < length + 16


@pytest.mark.parametrize("native", [1, 3, 16, 31, 32, 64, 100, 512, 768, 1000, 1024, 4096])
def test_engine_blocks_never_straddle_table_blocks(native):
    for size in block_sizes(CAUSAL & (Prefix(7) | BlockTable(native, ((0,),))), 2**20, 2**20):
        assert size % native == 0 or native % size == 0
        assert 32 <= size <= 512


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 2**23))
def test_rows_per_step_is_the_largest_divisor_that_fits(R, row_bytes):
    fitting = [p for p in range(1, R + 1) if R % p == 0 and p * row_bytes <= blocked.TILE_BYTES]
    assert rows_per_step(R, row_bytes) == max(fitting, default=1)
