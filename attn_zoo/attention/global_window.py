"""Sliding window with global tokens: the first `globals` positions see all and are seen by all; others see `window` keys on each side.

Beltagy et al. 2020, sec. 3.1; ETC (Ainslie et al. 2020) has the same form with the global tokens beside the input. With `separate`, global
tokens have projections of their own (Longformer, "linear projections for global attention"): since a variant receives projected queries,
keys and values, these are learned H x H maps of them, one a head, that start at the identity.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from attn_zoo.attention.base import Attention, Variant, softmax_reference
from attn_zoo.attention.local import LOCAL
from attn_zoo.attention.pattern import dense_mask, pair_flops, pattern_plan
from attn_zoo.ops import backends
from attn_zoo.ops.patterns import CAUSAL, FULL, Band, Pattern, Prefix, count_pairs
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


def pattern(options: Options, causal: bool) -> Pattern:
    """Window or global, either way round."""
    seen = Prefix(options.globals) | Band(options.window, options.window)
    return CAUSAL & seen if causal else seen


class GlobalWindow(Attention):
    """Longformer's attention."""

    def __init__(self, options: Options, dims, *, shared, rngs):
        super().__init__(options, dims)
        if options.separate:
            eye = lambda heads: nnx.Param(jnp.broadcast_to(jnp.eye(dims.head_dim), (heads, dims.head_dim, dims.head_dim)))
            self.query_map, self.key_map, self.value_map = eye(dims.num_heads), eye(dims.num_kv_heads), eye(dims.num_kv_heads)

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        run = lambda pattern, *qkv: backends.attention(*qkv, pattern=pattern, valid_BS=valid_BS, backend=self.backend(valid_BS is not None))
        return self._both(run, q_BTNH, k_BSKH, v_BSKH)

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        def run(pattern, q, k, v):
            return softmax_reference(q, k, v, dense_mask(pattern, q.shape[1], k.shape[1], valid_BS))

        return self._both(run, q_BTNH, k_BSKH, v_BSKH)

    def _both(self, run, q_BTNH, k_BSKH, v_BSKH):
        """All queries by the pattern; then, with separate projections, the global ones again."""
        causal, count = self.dims.causal, min(self.options.globals, q_BTNH.shape[1])
        o_BTNH = run(pattern(self.options, causal), q_BTNH, k_BSKH, v_BSKH)
        if not self.options.separate or not count:
            return o_BTNH
        turn = lambda x, m: jnp.einsum("BTNH,NHJ->BTNJ", x, m[...].astype(x.dtype))
        mapped = turn(q_BTNH[:, :count], self.query_map), turn(k_BSKH, self.key_map), turn(v_BSKH, self.value_map)
        return jnp.concatenate([run(CAUSAL if causal else FULL, *mapped).astype(o_BTNH.dtype), o_BTNH[:, count:]], axis=1)

    def backend(self, masked=False):
        return backends.choose(self.dims.backend, pattern(self.options, self.dims.causal), self.dims.dtype, self.dims.head_dim, masked=masked)

    def plan(self, T, S, masked=False):
        return pattern_plan(self.backend(masked), pattern(self.options, self.dims.causal), T, S)


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool) -> float:
    """The pairs of the pattern, and the maps of separate projections."""
    maps = 2.0 * B * N * H * H * (min(options.globals, T) + 2 * S) if options.separate else 0.0
    return pair_flops(count_pairs(pattern(options, causal), T, S), B, N, H) + maps


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
)
