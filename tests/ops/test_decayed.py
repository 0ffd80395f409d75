"""The decayed scan against its sum, written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_zoo.ops.decayed import decayed_attention


def written_out(q, k, v, log_decay):
    """o_t = sum_{j <= t} exp(L_t - L_j) (q_t' k_j) v_j, dense."""
    G = q.shape[2] // k.shape[2]
    k, v, log_decay = (jnp.repeat(x, G, 2) for x in (k, v, log_decay))
    t = np.arange(q.shape[1])
    between = (t[None, :, None] < t) & (t <= t[:, None, None])  # [t, j, u]: j < u <= t, whose decays sum to L_t - L_j without cancellation
    gap = jnp.einsum("TSU,BUN->BTSN", between.astype(np.float32), log_decay, precision="highest")
    seen = (t[:, None] >= t)[None, :, :, None]
    weights = jnp.exp(jnp.where(seen, gap, -jnp.inf)) * jnp.einsum("BTNR,BSNR->BTSN", q, k, precision="highest")
    return jnp.einsum("BTSN,BSNH->BTNH", weights, v, precision="highest")


@functools.partial(jax.jit, static_argnums=0)
def results(f, args, weights):
    """(output, gradients) of a loss that weighs every output differently."""
    o, pull = jax.vjp(f, *args)
    return o, *pull(weights)


@pytest.mark.parametrize("strength, tolerance", [(0.0, 2e-5), (0.1, 2e-5), (40.0, 1e-4)], ids=["no decay", "slow", "at once"])
def test_equals_its_sum(strength, tolerance):
    """At 40 a position the running sum within a chunk reaches thousands, and differences of it lose digits."""
    T = 140  # a chunk and a part of one
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (2, T, 4, 8), (2, T, 2, 8), (2, T, 2, 16)
    q, k, v = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes))
    log_decay = -strength * jax.random.uniform(keys[3], (2, T, 2))
    weights = jax.random.normal(keys[4], (2, T, 4, 16))
    for a, e in zip(*(results(f, (q, k, v, log_decay), weights) for f in (decayed_attention, written_out)), strict=True):
        assert np.isfinite(np.asarray(a)).all()
        np.testing.assert_allclose(a, e, atol=tolerance * max(1.0, float(abs(e).max())))


def test_one_position_sees_itself_undecayed():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 1, 1, 8))
    o = decayed_attention(q, k, v, jnp.full((2, 1, 1), -3.0))
    np.testing.assert_allclose(o, (q * k).sum(axis=-1, keepdims=True) * v, rtol=1e-5)
