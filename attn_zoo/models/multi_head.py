"""Projections to heads around one attention variant, and back."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from attn_zoo.attention.base import Attention, Cache
from attn_zoo.models.layers import normal, rotate
from attn_zoo.spec import UserError


class MultiHeadAttention(nnx.Module):
    """Multi-head attention of any variant: project to heads, attend, project back. Vaswani et al. 2017, sec. 3.2.2.

    Heads, dims and dtype are those of `attention`; K < N is grouped-query attention (Ainslie et al. 2023). A variant with
    `shares_query_key` (Reformer) gets its queries as keys, and no key projection is made. With `rotary`, self-attention
    rotates queries and keys; cross-attention does not, since its two sides have no common positions.
    """

    def __init__(self, attention: Attention, *, D: int, rotary: bool = False, residual_scale: float = 1.0, rngs: nnx.Rngs):
        dims = attention.dims
        N, K, H = dims.num_heads, dims.num_kv_heads, dims.head_dim
        self.attention = attention
        self.rotary = rotary
        self.dtype = dims.dtype
        self.shares_query_key = getattr(attention, "shares_query_key", False)
        if self.shares_query_key and K != N:
            raise UserError(f"K={K}: this attention uses its queries as keys, so key/value heads must equal query heads, K={N}")
        if rotary and H % 2:
            raise UserError(f"H={H}: rotary positions turn channels in pairs, so the head dim must be even; nearest: {H + 1}")
        query_key, key_key, value_key, out_key = jax.random.split(rngs.params(), 4)
        self.query = normal(query_key, (D, N, H), D**-0.5)
        if not self.shares_query_key:
            self.key = normal(key_key, (D, K, H), D**-0.5)
        self.value = normal(value_key, (D, K, H), D**-0.5)
        self.out = normal(out_key, (N, H, D), residual_scale * (N * H) ** -0.5)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        memory_BSD: Float[Array, "B S D"] | None = None,
        *,
        valid_BS: Bool[Array, "B S"] | None = None,
        valid_BT: Bool[Array, "B T"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attends from x over the valid positions of `memory`, or of x itself; `key` is the variant's random key.

        `valid_BT`, which positions of x are valid where there is a memory, matters only to variants that pool queries.
        """
        if memory_BSD is None:
            q_BTNH, k_BSKH, v_BSKH = self._self_heads(x_BTD)
        else:
            q_BTNH = self._heads(x_BTD, self.query)
            k_BSKH, v_BSKH = self._memory_heads(memory_BSD)
            valid_BT = jnp.ones(x_BTD.shape[:2], bool) if valid_BT is None else valid_BT  # never that of the memory, even if as long
        return self._out(self.attention(q_BTNH, k_BSKH, v_BSKH, valid_BS=valid_BS, valid_BT=valid_BT, key=key))

    def init_cache(self, B: int, max_len: int) -> Cache:
        """The state of causal self-attention before the first of at most `max_len` positions."""
        return self.attention.init_cache(B, max_len)

    def step(self, x_B1D: Float[Array, "B 1 D"], cache: Cache) -> tuple[Float[Array, "B 1 D"], Cache]:
        """Self-attention of one more position: (its output, the state after it)."""
        o_B1NH, cache = self.attention.step(*self._self_heads(x_B1D, cache["t"]), cache)
        return self._out(o_B1NH), cache

    def init_cross_cache(self, memory_BSD: Float[Array, "B S D"], max_len: int, *, valid_BS: Bool[Array, "B S"] | None = None) -> Cache:
        """The state of cross-attention to `memory`, whose keys and values are made once, before the first query."""
        return self.attention.init_cross_cache(*self._memory_heads(memory_BSD), max_len, valid_BS=valid_BS)

    def cross_step(self, x_B1D: Float[Array, "B 1 D"], cache: Cache) -> tuple[Float[Array, "B 1 D"], Cache]:
        """Cross-attention of one more query: (its output, the state after it)."""
        o_B1NH, cache = self.attention.cross_step(self._heads(x_B1D, self.query), cache)
        return self._out(o_B1NH), cache

    def _self_heads(self, x_BTD, start=0):
        q_BTNH = self._heads(x_BTD, self.query)
        k_BTKH = q_BTNH if self.shares_query_key else self._heads(x_BTD, self.key)
        if self.rotary:
            q_BTNH, k_BTKH = rotate(q_BTNH, start), rotate(k_BTKH, start)
        return q_BTNH, k_BTKH, self._heads(x_BTD, self.value)

    def _memory_heads(self, memory_BSD):
        return self._heads(memory_BSD, self.query if self.shares_query_key else self.key), self._heads(memory_BSD, self.value)

    def _out(self, o_BTNH):
        return jnp.einsum("BTNH,NHD->BTD", o_BTNH, self.out[...].astype(self.dtype))

    def _heads(self, x_BTD: Array, kernel: nnx.Param) -> Array:
        return jnp.einsum("BTD,DNH->BTNH", x_BTD, kernel[...].astype(self.dtype))
