"""The kernels of the delta rule's triangular systems: interpreted on the CPU, against the systems solved by XLA and in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pallas_linear import assert_close, results

from attn_zoo.ops import pallas_kernels
from attn_zoo.ops.delta import wy_form
from attn_zoo.ops.pallas_wy import chunk_solutions
from attn_zoo.spec import Unsupported


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """The kernels run on the CPU."""
    monkeypatch.setattr(pallas_kernels, "INTERPRET", True)


def inputs(T, K=2, R=20, H=9, dtype=jnp.float32):
    """Keys of length one and values, and rates in (0, 1)."""
    rng = np.random.default_rng(T)
    k, v = (rng.normal(size=(2, T, K, size)) for size in (R, H))
    return jnp.asarray(k / np.linalg.norm(k, axis=-1, keepdims=True), dtype), jnp.asarray(v, dtype), jnp.asarray(rng.random((2, T, K)), jnp.float32)


def alike(T):
    """Keys of length one that are nearly one, at rates near 2: every row of a system takes from all before it, and the powers of it reach 1e30."""
    k, v, _ = inputs(T)
    k = k[:, :1] + 0.02 * k
    return k / jnp.linalg.norm(k, axis=-1, keepdims=True), v, jnp.full(k.shape[:3], 1.98)


def solved(k, v, beta, c):
    """(W, U) in float64, chunk by chunk."""
    k, v, beta = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (k, v, beta))
    w, u = np.zeros(k.shape), np.zeros(v.shape)
    for start in range(0, k.shape[2], c):
        rows = slice(start, start + c)
        chunk = k[:, :, rows]
        system = np.eye(chunk.shape[2]) + np.tril(beta[:, :, rows, None] * (chunk @ chunk.swapaxes(2, 3)), -1)
        for x, out in ((k, w), (v, u)):
            out[:, :, rows] = np.linalg.solve(system, beta[:, :, rows, None] * x[:, :, rows])
    return w.swapaxes(1, 2), u.swapaxes(1, 2)


SHAPES = {  # a block is 32 positions, a tile at most 64 features or values
    "T1-chunk16": (16, {"T": 1}),
    "T63-chunk64": (64, {"T": 63, "K": 1}),
    "T70-chunk32": (32, {"T": 70}),
    "T257-chunk64-several-tiles": (64, {"T": 257, "R": 72, "H": 70}),
    "T140-chunk128": (128, {"T": 140}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_systems_solved_by_xla(shape):
    c, sizes = SHAPES[shape]
    args = inputs(**sizes)
    actual = results(functools.partial(chunk_solutions, chunk=c), args)
    assert_close(actual, results(lambda *args: wy_form(*args, c), args), 3e-6)


ROUNDING = {jnp.bfloat16: 2**-8, jnp.float16: 2**-11}


@pytest.mark.parametrize("dtype", ROUNDING, ids=lambda dtype: jnp.dtype(dtype).name)
def test_in_half_precision_only_what_is_given_and_returned_is_rounded(dtype):
    """By half a unit in the last place at most, of gradients as of W and U; in float32 the rates' gradient is not."""
    args = inputs(150, R=40, dtype=dtype)

    def widened(*args):  # cotangents are rounded on their way in, by astype's own gradient
        return tuple(x.astype(dtype) for x in wy_form(args[0].astype(jnp.float32), args[1].astype(jnp.float32), args[2], 64))

    (actual, gradients), (_, expected_gradients) = results(functools.partial(chunk_solutions, chunk=64), args), results(widened, args)
    assert [x.dtype for x in (*actual, *gradients)] == [dtype] * 4 + [jnp.float32]
    assert_close(actual, solved(*args, 64), 1.02 * ROUNDING[dtype])
    assert_close(gradients[:2], expected_gradients[:2], 2.04 * ROUNDING[dtype])  # both are rounded
    assert_close(gradients[2], expected_gradients[2], 3e-5)


def test_where_keys_are_alike_they_are_as_accurate_as_float32_can_be():
    """Outputs and gradients, by their distance from float64: W and U of 50 are differences there, of which XLA's float32 leaves four digits."""
    args = alike(64)
    with jax.enable_x64(True):
        exact = results(lambda *args: wy_form(*args, 64), [jnp.asarray(np.asarray(x), jnp.float64) for x in args])
        exact = [np.asarray(x) for x in jax.tree.leaves(exact)]

    def errors(solve):
        return [abs(np.asarray(x, np.float64) - e).max() / abs(e).max() for x, e in zip(jax.tree.leaves(results(solve, args)), exact, strict=True)]

    actual, xla = errors(functools.partial(chunk_solutions, chunk=64)), errors(lambda *args: wy_form(*args, 64))
    assert max(actual) < 2e-5 and all(a < 1.2 * x for a, x in zip(actual, xla))


def test_where_keys_are_alike_bfloat16_is_rounded_once():
    """As it would not be if the inverse were rounded before it multiplies values."""
    k, v, beta = alike(128)
    k, v = k.astype(jnp.bfloat16), v.astype(jnp.bfloat16)
    assert_close(jax.jit(functools.partial(chunk_solutions, chunk=64))(k, v, beta), solved(k, v, beta, 64), 1.02 * ROUNDING[jnp.bfloat16])


def test_what_is_not_written_has_no_part():
    """At rate zero W and U are zero, and the other rows what they are without it."""
    k, v, beta = inputs(64)
    off = np.arange(64) % 4 == 1
    solve = functools.partial(chunk_solutions, chunk=64)
    for x, kept in zip(solve(k, v, jnp.where(off[:, None], 0, beta)), solve(*(x[:, ~off] for x in (k, v, beta)))):
        np.testing.assert_array_equal(x[:, off], 0)
        np.testing.assert_allclose(x[:, ~off], kept, atol=2e-6)


def test_keys_are_rounded_to_the_dtype_of_values():
    k, v, beta = inputs(40)
    v = v.astype(jnp.bfloat16)
    actual, expected = (chunk_solutions(k, v, beta, chunk=64) for k in (k, k.astype(jnp.bfloat16)))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_under_vmap_it_is_the_same():
    args, solve = inputs(40), functools.partial(chunk_solutions, chunk=16)
    mapped = jax.jit(jax.vmap(solve))(*(x[:, None] for x in args))
    assert_close([x[:, 0] for x in mapped], jax.jit(solve)(*args), 1e-6)


def test_too_many_features_are_refused():
    with pytest.raises(Unsupported, match="the features of a delta rule must be at most 256, not 257"):
        chunk_solutions(*inputs(4, R=257), chunk=16)
