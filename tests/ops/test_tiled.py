"""Tiled attention against the formula: pairs and biases of each tile, its logsumexp, rows that see nothing, and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ON_CPU

from attn_zoo.ops.tiled import tiled_attention

G = 2
compiled = pytest.mark.skipif(ON_CPU != "native", reason="the native kernels are not compiled here")


def dense(q, k, v, seen, bias):
    """All tiles at once."""
    scores = jnp.einsum("MGTH,MSH->MGTS", q, k, precision="highest") / np.sqrt(q.shape[-1]) + bias[:, None]
    weights = jnp.where(seen[:, None], jnp.exp(scores), 0.0)
    total = weights.sum(-1)
    some = total > 0
    o = jnp.einsum("MGTS,MSH->MGTH", weights, v, precision="highest") / jnp.where(some, total, 1.0)[..., None]
    return o, jnp.where(some, jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)


@pytest.mark.parametrize("backend", ["xla", pytest.param("native", marks=compiled)])
@pytest.mark.parametrize("M, T, S, H", [(7, 5, 9, 4), (90, 70, 130, 16)])
def test_formula_and_gradients(M, T, S, H, backend):
    rng = np.random.default_rng(0)
    q, k, v, bias = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((M, G, T, H), (M, S, H), (M, S, H), (M, T, S)))
    seen = jnp.asarray(rng.random((M, T, S)) > 0.5).at[3, 2].set(False)  # one row sees nothing

    def objective(attend):
        def loss(q, k, v):
            o, lse = attend(q, k, v)
            return jnp.sin(o).sum() + jnp.where(jnp.isneginf(lse), 0.0, jnp.cos(lse)).sum(), (o, lse)

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    tiled = objective(lambda q, k, v: tiled_attention(q, k, v, lambda about: about, (seen, bias), backend=backend))
    for a, e in zip(jax.tree.leaves(tiled), jax.tree.leaves(objective(lambda q, k, v: dense(q, k, v, seen, bias)))):
        assert not np.isnan(a).any()
        np.testing.assert_allclose(a, e, rtol=0, atol=4e-6)
    o, lse = tiled[1]
    assert (o[3, :, 2] == 0).all() and np.isneginf(lse[3, :, 2]).all() and np.isneginf(lse).sum() == G * (~seen.any(axis=-1)).sum()
