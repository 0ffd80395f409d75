"""Merging: softmax attention over disjoint key sets, put together, is attention over their union."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_zoo.ops.merge import merge

B, T, S, N, H = 2, 9, 14, 3, 4


def normals(scale=1.0):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(B, length, N, H)) * scale, jnp.float32) for length in (T, S, S)]


def attend(q, k, v, seen_TS):
    """Dense (output, logsumexp) over the pairs in seen_TS; zeros and -inf in rows without any."""
    any_T = seen_TS.any(axis=1)
    scores = jnp.where(seen_TS | ~any_T[:, None], jnp.einsum("BTNH,BSNH->BNTS", q, k, precision="highest"), -jnp.inf)
    lse_BNT = jax.scipy.special.logsumexp(scores, axis=-1)
    weights = jnp.where(seen_TS, jnp.exp(scores - lse_BNT[..., None]), 0)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, v, precision="highest"), jnp.where(any_T, lse_BNT, -jnp.inf).swapaxes(1, 2)


def disjoint_parts():
    """Three masks [T, S] that share no pair. Row 0 is in none of them, row 1 in the first alone, row 2 in the last two."""
    owner = np.random.default_rng(0).integers(0, 4, (T, S))  # 3: in no part
    owner[0], owner[1], owner[2] = 3, np.where(owner[1] < 2, 0, 3), np.where(owner[2] == 0, 1, owner[2])
    return [owner == part for part in range(3)]


@functools.partial(jax.jit, static_argnums=0)
def results(f, *args):
    """((o, lse), gradients) of a loss that weighs every o and every finite lse differently."""
    weights = np.random.default_rng(3).normal(size=(B, T, N, H + 1)).astype(np.float32)

    def loss(*args):
        o, lse = f(*args)
        return (o * weights[..., 1:]).sum() + jnp.where(lse > -jnp.inf, lse * weights[..., 0], 0).sum(), (o, lse)

    (_, outputs), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*args)
    return outputs, gradients


def assert_close(actual, expected, tolerance=2e-6):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance)


def in_parts(q, k, v):
    return merge(*(attend(q, k, v, part) for part in disjoint_parts()))


def at_once(q, k, v):
    return attend(q, k, v, sum(disjoint_parts()) > 0)


@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["ordinary-scores", "scores-of-thousands"])
def test_union_of_disjoint_sets(scale):
    outputs, gradients = results(in_parts, *normals(scale))
    expected, expected_gradients = results(at_once, *normals(scale))
    tolerance = 2e-6 * scale**2
    assert_close(outputs, expected, tolerance)
    assert_close(gradients, expected_gradients, tolerance)
    o, lse = outputs
    assert (o[:, 0] == 0).all() and (lse[:, 0] == -jnp.inf).all() and np.isfinite(lse[:, 1:]).all()
    assert (gradients[0][:, 0] == 0).all() and all(np.isfinite(g).all() for g in gradients)


def test_gradients_reach_the_parts_as_they_are():
    """With respect to (o, lse) of each part: finite everywhere, zero where a part has no keys."""
    parts = [attend(*normals(), part) for part in disjoint_parts()]

    @jax.grad
    def gradients_of(parts):
        o, lse = merge(*parts)
        return jnp.sin(o).sum() + jnp.where(lse > -jnp.inf, lse, 0).sum()

    gradients = jax.jit(gradients_of)(parts)
    for (o, lse), (do, dlse) in zip(parts, gradients):
        unseen = np.asarray(lse == -jnp.inf)
        assert unseen.any() and np.isfinite(do).all() and np.isfinite(dlse).all()
        assert (do[unseen] == 0).all() and (dlse[unseen] == 0).all() and (dlse[~unseen] != 0).all()


def test_order_and_grouping_do_not_matter():
    a, b, c = (attend(*normals(), part) for part in disjoint_parts())
    expected = merge(a, b, c)
    for other in (merge(c, a, b), merge(merge(a, b), c), merge(a, merge(b, c)), merge(merge(a, c), b)):
        assert_close(other, expected)


def test_a_part_without_keys_changes_nothing():
    part = attend(*normals(), disjoint_parts()[0])
    nothing = jnp.zeros((B, T, N, H)), jnp.full((B, T, N), -jnp.inf)
    for merged in (merge(part), merge(part, nothing), merge(nothing, part)):
        jax.tree.map(np.testing.assert_array_equal, merged, part)
    jax.tree.map(np.testing.assert_array_equal, merge(nothing, nothing), nothing)


def test_half_precision_outputs_keep_a_float32_logsumexp():
    """400 parts of equal weight: their sum in bfloat16 would stall at 0.5."""
    one = jnp.full((1, 1, 1, 4), 0.75, jnp.bfloat16), jnp.full((1, 1, 1), 5.0)
    o, lse = merge(*[one] * 400)
    assert o.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    np.testing.assert_array_equal(o.astype(jnp.float32), 0.75)
    np.testing.assert_allclose(lse, 5 + np.log(400), rtol=1e-6)
