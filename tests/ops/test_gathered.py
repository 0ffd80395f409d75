"""The gather engine, and the native kernels that stand for it on a CPU, against dense attention over the same pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ON_CPU

from attn_zoo.attention.base import softmax_reference
from attn_zoo.ops import gathered, native
from attn_zoo.ops.gathered import gathered_attention

B, T, S, N, H, R = 2, 37, 53, 4, 8, 6


def lists(shape, seed=0):
    """(index, seen) of R distinct keys a row, some places unused, a row that lists nothing; and the dense mask they mean."""
    rng = np.random.default_rng(seed)
    index = np.argsort(rng.random((*shape, S)), axis=-1)[..., :R]
    seen = rng.random(index.shape) < 0.8
    seen[..., 5, :] = False
    mask = np.zeros((*shape, S), bool)
    np.put_along_axis(mask, index, seen, axis=-1)
    return jnp.asarray(index), jnp.asarray(seen), mask


def arrays(K, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (B, n, heads, H)).astype(dtype) for key, n, heads in zip(keys, (T, S, S), (N, K, K))]


@pytest.mark.parametrize("backend", ["xla", pytest.param("native", marks=pytest.mark.skipif(ON_CPU != "native", reason=f"{native.library()}"))])
@pytest.mark.parametrize("per_head", [False, True], ids=["one list", "a list a key head"])
@pytest.mark.parametrize("K", [4, 2])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)], ids=["f32", "bf16"])
def test_equals_dense_attention_over_the_listed_pairs(per_head, K, dtype, tolerance, backend, monkeypatch):
    monkeypatch.setattr(gathered, "GATHER_BYTES", 4 * B * K * R * H * 5)  # five queries a step, which does not divide T
    index, seen, mask = lists((B, K, T) if per_head else (T,))
    mask = np.repeat(mask, N // K, axis=1) if per_head else mask[None, None]
    valid = jnp.asarray(np.random.default_rng(1).random((B, S)) < 0.9)
    weights = jax.random.normal(jax.random.key(1), (B, T, N, H))

    def fast(q, k, v):
        o, lse = gathered_attention(q, k, v, index, seen, valid_BS=valid, backend=backend)
        return (o * weights).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum(), (o, lse)

    def slow(q, k, v):
        shown = mask & valid[:, None, None, :]
        o = softmax_reference(q, k, v, shown)
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, jnp.repeat(k, N // K, axis=2), precision="highest") * H**-0.5
        lse = jax.nn.logsumexp(scores, axis=-1, where=shown).swapaxes(1, 2)
        return (o * weights).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum(), (o, lse)

    args = arrays(K, dtype)
    (_, found), gradients = jax.jit(jax.value_and_grad(fast, (0, 1, 2), has_aux=True))(*args)
    (_, expected), expected_gradients = jax.value_and_grad(slow, (0, 1, 2), has_aux=True)(*(x.astype(jnp.float32) for x in args))
    assert (np.asarray(found[0])[:, 5] == 0).all() and (np.asarray(found[1])[:, 5] == -np.inf).all()
    for a, e in zip((*found, *gradients), (*expected, *expected_gradients)):
        a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
        finite = np.isfinite(e)
        assert (np.isfinite(a) == finite).all()
        np.testing.assert_allclose(a[finite], e[finite], rtol=0, atol=tolerance * max(1, abs(e[finite]).max()))
