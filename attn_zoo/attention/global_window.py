"""Sliding window with global tokens: the first `globals` positions see all and are seen by all; others see `window` keys on each side.

Beltagy et al. 2020, sec. 3.1. Where the task chooses the global positions there, they are the first ones here; ETC (Ainslie et al. 2020) has
the same form with the global tokens beside the input. With `separate`, global queries have projections of their own ("linear projections for
global attention"); as in the authors' code, all others see the global keys by the common projections. Since a variant receives projected
queries, keys and values, these are learned H x H maps of them, one a head, that start at the identity, as the paper's start as copies.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from attn_zoo.attention.base import Variant, softmax_reference
from attn_zoo.attention.local import LOCAL
from attn_zoo.attention.pattern import PatternAttention, dense_mask, pair_flops
from attn_zoo.ops import backends
from attn_zoo.ops.block_mask import count_pairs
from attn_zoo.ops.patterns import CAUSAL, FULL, Band, Pattern, Prefix
from attn_zoo.ops.slots import score_row, softmax_row
from attn_zoo.spec import check, check_int


@dataclasses.dataclass(frozen=True)
class Options:
    """window: keys on each side; globals: positions at the start; separate: own projections for global queries."""

    window: int = 128
    globals: int = 16
    separate: bool = False

    def __post_init__(self):
        check_int("window", self.window, 0)
        check_int("globals", self.globals, 0)
        check(isinstance(self.separate, bool), "separate", self.separate, "must be True or False")


def pattern(window: int, globals: int, causal: bool) -> Pattern:
    """|i - j| <= window, or i or j < globals."""
    seen = Prefix(globals) | Band(window, window)
    return CAUSAL & seen if causal else seen


class GlobalWindow(PatternAttention):
    """Longformer's attention."""

    def __init__(self, options: Options, dims, *, shared: dict, rngs: nnx.Rngs):
        super().__init__(options, dims)
        self.separate = options.separate and options.globals > 0
        if self.separate:
            identity = lambda heads: nnx.Param(jnp.broadcast_to(jnp.eye(dims.head_dim), (heads, dims.head_dim, dims.head_dim)))
            self.query_map, self.key_map, self.value_map = identity(dims.num_heads), identity(dims.num_kv_heads), identity(dims.num_kv_heads)

    def pattern(self, T, S):
        return pattern(self.options.window, self.options.globals, self.dims.causal)

    def plan(self, T, S, masked=False):
        plan = super().plan(T, S, masked)
        return {name: value for name, value in plan.items() if name != "computed_pairs" or not self.separate}  # the rows of globals are computed beside

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        o_BTNH = super().attend(q_BTNH, k_BSKH, v_BSKH, valid_BS, key)
        if not self.separate:
            return o_BTNH
        g_BTNH = backends.attention(*self.mapped(q_BTNH, k_BSKH, v_BSKH), pattern=self.global_pattern, valid_BS=valid_BS, backend=self.backend())
        return jnp.concatenate([g_BTNH, o_BTNH[:, self.options.globals :]], axis=1)

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        o_BTNH = super().attend_reference(q_BTNH, k_BSKH, v_BSKH, valid_BS, key)
        if not self.separate:
            return o_BTNH
        q, k, v = self.mapped(q_BTNH, k_BSKH, v_BSKH)
        g_BTNH = softmax_reference(q, k, v, dense_mask(self.global_pattern, q.shape[1], k.shape[1], valid_BS))
        return jnp.concatenate([g_BTNH, o_BTNH[:, self.options.globals :]], axis=1)

    def step(self, q_B1NH, k_B1KH, v_B1KH, cache):
        o_B1NH, _, cache = self.slot_step(q_B1NH, k_B1KH, v_B1KH, cache)
        t = cache["t"]
        if self.separate:
            # Global keys are the first and never leave: they stand in the first slots, in order.
            first = {name: cache[name][:, : self.options.globals] for name in ("k", "v")}
            q, k, v = self.mapped(q_B1NH, first["k"], first["v"])
            scores = jnp.where(jnp.arange(k.shape[1]) <= t, score_row(q, k), -jnp.inf)
            o_B1NH = jnp.where(t < self.options.globals, softmax_row(scores, v, o_B1NH.dtype)[0], o_B1NH)
        return o_B1NH, cache | {"t": t + 1}

    def cross_state(self, k_BSKH, v_BSKH, valid_BS, max_len):
        state = super().cross_state(k_BSKH, v_BSKH, valid_BS, max_len)
        return state | dict(zip(("global_k", "global_v"), self.mapped_keys(k_BSKH, v_BSKH))) if self.separate else state

    def cross_step(self, q_B1NH, cache):
        o_B1NH, after = super().cross_step(q_B1NH, cache)
        if self.separate:
            scores = jnp.where(cache["valid"][:, None], score_row(turn(q_B1NH, self.query_map), cache["global_k"]), -jnp.inf)
            o_B1NH = jnp.where(cache["t"] < self.options.globals, softmax_row(scores, cache["global_v"], o_B1NH.dtype)[0], o_B1NH)
        return o_B1NH, after

    @property
    def global_pattern(self) -> Pattern:
        """What a global query sees."""
        return CAUSAL if self.dims.causal else FULL

    def mapped(self, q_BTNH, k_BSKH, v_BSKH):
        """Global queries, and all keys and values, in the projections of global attention."""
        return turn(q_BTNH[:, : self.options.globals], self.query_map), *self.mapped_keys(k_BSKH, v_BSKH)

    def mapped_keys(self, k_BSKH, v_BSKH):
        """(keys, values) in the projections of global attention."""
        return turn(k_BSKH, self.key_map), turn(v_BSKH, self.value_map)


def turn(x_BTNH, m_NHJ):
    """Each head by its matrix."""
    return jnp.einsum("BTNH,NHJ->BTNJ", x_BTNH, m_NHJ[...].astype(x_BTNH.dtype), precision="highest")


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool) -> float:
    """The pairs of the pattern, and the maps of separate projections."""
    maps = 2.0 * B * N * H * H * (min(options.globals, T) + 2 * S) if options.separate else 0.0
    return pair_flops(count_pairs(pattern(options.window, options.globals, causal), T, S), B, N, H) + maps


GLOBAL_WINDOW = Variant(
    name="global_window",
    family="position-based sparse",
    options=Options,
    build=GlobalWindow,
    paper=LOCAL.paper,
    complexity="T (W + g)",
    flops=flops,
    time_order=1.0,
    memory_order=1.0,
    exact_when=lambda T: {"window": T},
    decode=True,
    state_order=0.0,
)
