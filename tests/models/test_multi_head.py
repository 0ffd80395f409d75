"""Multi-head attention: projections, cross-attention, shared queries and keys, rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_zoo.attention import make_attention
from attn_zoo.attention.base import softmax_reference
from attn_zoo.models.layers import rotate
from attn_zoo.models.multi_head import MultiHeadAttention
from attn_zoo.spec import UserError


def layer(N=4, K=None, H=6, D=8, shares_query_key=False, **kwargs):
    attention = make_attention("full", num_heads=N, num_kv_heads=K, head_dim=H, max_len=16, dtype=kwargs.pop("dtype", jnp.float32))
    attention.shares_query_key = shares_query_key
    return MultiHeadAttention(attention, D=D, rngs=nnx.Rngs(0), **kwargs)


def normals(*shapes):
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


def expected(mha, x_BTD, memory_BSD, mask=True, rotary=False):
    """The formula of the paper, with the truth that the registry is held to in the middle."""
    key_kernel = mha.query if mha.shares_query_key else mha.key
    q, k, v = (jnp.einsum("BTD,DNH->BTNH", x, w[...]) for x, w in ((x_BTD, mha.query), (memory_BSD, key_kernel), (memory_BSD, mha.value)))
    if rotary:
        q, k = (rotate(x) for x in (q, k))
    return jnp.einsum("BTNH,NHD->BTD", softmax_reference(q, k, v, jnp.asarray(mask)), mha.out[...])


@pytest.mark.parametrize("case", ["self", "self-rotary", "self-rotary-shared", "cross-rotary", "cross-shared"])
def test_formula(case):
    shared, rotary, cross = "shared" in case, "rotary" in case, "cross" in case
    mha = layer(shares_query_key=shared, rotary=rotary)
    x, memory = normals((2, 7, 8), (2, 9, 8))
    valid = jnp.arange(9 if cross else 7) < jnp.array([[5], [7]])
    source = memory if cross else x
    # Rotary positions belong to self-attention: the two sides of cross-attention share none.
    truth = expected(mha, x, source, valid[:, None, None, :], rotary=rotary and not cross)
    y = jax.jit(lambda x, memory: mha(x, memory, valid_BS=valid))(x, memory if cross else None)
    np.testing.assert_allclose(y, truth, atol=1e-5)


def test_shared_queries_and_keys_have_no_key_projection():
    sizes = {shared: sum(p.size for p in jax.tree.leaves(nnx.state(layer(shares_query_key=shared), nnx.Param))) for shared in (False, True)}
    assert sizes[False] - sizes[True] == 8 * 4 * 6


def test_shared_queries_and_keys_need_as_many_key_heads():
    with pytest.raises(UserError, match="K=2.*K=4"):
        layer(K=2, shares_query_key=True)


def test_rotary_needs_an_even_head_dim():
    with pytest.raises(UserError, match="H=5.*even.*6"):
        layer(H=5, rotary=True)


def test_grouped_queries_share_key_value_heads():
    mha, (x,) = layer(N=4, K=2), normals((1, 5, 8))
    assert mha.key.shape == mha.value.shape == (8, 2, 6)
    np.testing.assert_allclose(jax.jit(lambda x: mha(x))(x), expected(mha, x, x), atol=1e-5)


def test_bfloat16_in_and_out_with_float32_parameters():
    mha, (x,) = layer(dtype=jnp.bfloat16), normals((1, 5, 8))
    y = mha(x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and {p.dtype for p in jax.tree.leaves(nnx.state(mha, nnx.Param))} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(y.astype(jnp.float32), expected(mha, x, x), atol=0.05)


def test_initial_scales_follow_fan_in():
    mha = layer(N=16, H=32, D=128, residual_scale=0.1)
    assert mha.query[...].std() == pytest.approx(128**-0.5, rel=0.02)
    assert mha.value[...].std() == pytest.approx(128**-0.5, rel=0.02)
    assert mha.out[...].std() == pytest.approx(0.1 * (16 * 32) ** -0.5, rel=0.02)
