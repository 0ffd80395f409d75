"""Set Transformer's induced attention: its formula, and that it is of a set."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_zoo import make_attention

T, S, N, K, H, R = 7, 11, 4, 2, 8, 3


def make():
    attention = make_attention(f"set(inducing={R})", num_heads=N, num_kv_heads=K, head_dim=H, max_len=16, rngs=nnx.Rngs(0))
    for i, param in enumerate((attention.key_map, attention.value_map)):
        param[...] += 0.3 * jax.random.normal(jax.random.key(i), param.shape)
    return attention


def inputs():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((1, T, N, H), (1, S, K, H), (1, S, K, H))]


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def test_formula_head_by_head():
    attention, (q, k, v) = make(), inputs()
    o = np.asarray(jax.jit(attention)(q, k, v))
    I, Wk, Wv = (np.asarray(p[...], np.float64) for p in (attention.points, attention.key_map, attention.value_map))
    q, k, v = (np.asarray(x[0], np.float64) for x in (q, k, v))
    for n in range(N):
        g = n // (N // K)
        h = softmax(I[:, g] @ k[:, g].T / np.sqrt(H)) @ v[:, g]
        np.testing.assert_allclose(o[0, :, n], softmax(q[:, n] @ (h @ Wk[g]).T / np.sqrt(H)) @ (h @ Wv[g]), rtol=0, atol=3e-6)


def test_the_order_of_the_context_does_not_matter():
    attention, (q, k, v) = make(), inputs()
    order = np.random.default_rng(1).permutation(S)
    np.testing.assert_allclose(attention(q, k[:, order], v[:, order]), attention(q, k, v), rtol=0, atol=3e-6)
