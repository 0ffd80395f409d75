"""The delta rule in chunks, against the rule position by position."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_zoo.ops import delta
from attn_zoo.ops.delta import delta_rule, unit_lower_inverse


def step_by_step(q, k, v, beta):
    """S_t = S_{t-1} + beta_t (v_t - S_{t-1} k_t) k_t', o_t = S_t q_t."""
    k, v, beta = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v, beta))

    def step(S, x):
        q, k, v, beta = x
        S = S + jnp.einsum("BN,BNH,BNR->BNHR", beta, v - jnp.einsum("BNHR,BNR->BNH", S, k), k)
        return S, jnp.einsum("BNHR,BNR->BNH", S, q)

    S = jnp.zeros((*v.shape[:1], *v.shape[2:], k.shape[-1]))
    return jax.lax.scan(step, S, tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, beta)))[1].swapaxes(0, 1)


def inputs(T, N=4, K=2, R=6, H=5):
    """Keys of length one, rates in (0, 1)."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, T, N, R), (2, T, K, R), (2, T, K, H)))
    return q, k / jnp.linalg.norm(k, axis=-1, keepdims=True), v, jnp.asarray(rng.random((2, T, K)), jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def results(f, args, weights):
    """(output, gradients) of a loss that weighs every output differently."""
    o, pull = jax.vjp(f, *args)
    return o, *pull(weights)


@pytest.mark.parametrize("T", [1, 32, 51], ids=["one", "whole chunks", "part of a chunk"])
def test_equals_the_rule_step_by_step(T, monkeypatch):
    monkeypatch.setattr(delta, "CHUNK", 16)
    args = inputs(T)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, T, 4, 5)), jnp.float32)
    for a, e in zip(results(delta_rule, args, weights), results(step_by_step, args, weights), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=5e-6 * max(1.0, float(abs(e).max())))


def test_it_stays_accurate_where_all_keys_are_one():
    """The worst case of the triangular system: every position corrects every other. The memory is a running average, here of rate 0.9."""
    q, k, v, _ = inputs(150, N=1, K=1)
    k = jnp.broadcast_to(k[:, :1], k.shape)
    o = delta_rule(k, k, v, jnp.full((2, 150, 1), 0.9))
    expected, memory = np.zeros(v.shape), 0.0
    for t in range(150):
        memory = 0.1 * memory + 0.9 * np.asarray(v[:, t], np.float64)
        expected[:, t] = memory
    np.testing.assert_allclose(o, expected, atol=2e-6)


def test_nothing_is_written_at_rate_zero():
    q, k, v, beta = inputs(40)
    off = jnp.arange(40) % 3 == 1
    o = delta_rule(q, k, v, jnp.where(off[None, :, None], 0, beta))
    kept = np.flatnonzero(~off)
    np.testing.assert_allclose(o[:, kept], delta_rule(*(x[:, kept] for x in (q, k, v, beta))), atol=5e-6)


def test_half_precision_is_computed_in_float32():
    args = [x.astype(jnp.bfloat16) for x in inputs(40)]
    o = delta_rule(*args)
    assert o.dtype == jnp.float32
    np.testing.assert_allclose(o, step_by_step(*(x.astype(jnp.float32) for x in args)), atol=5e-6)


@pytest.mark.parametrize("C", [1, 2, 16, 64])
@pytest.mark.parametrize("entries", ["random", "ones"])
def test_a_unit_lower_triangle_is_inverted_as_by_substitution(C, entries):
    """Ones are what equal keys give; their powers, by which a series would sum the inverse, grow beyond float32."""
    full = np.ones((C, C)) if entries == "ones" else np.random.default_rng(0).normal(size=(2, 3, C, C))
    lower = np.tril(full, -1).astype(np.float32)
    expected = np.linalg.inv(np.eye(C) + lower.astype(np.float64))
    np.testing.assert_allclose(unit_lower_inverse(jnp.asarray(lower)), expected, rtol=0, atol=3e-6 * abs(expected).max())
