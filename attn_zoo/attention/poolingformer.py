"""Poolingformer: a sliding window, and around it a wider one whose keys and values are pooled.

Level one is `local`: |i - j| <= window. Level two attends to slots that each pool `kernel` positions every `stride`, those whose middle is
at most `second` away; the two outputs are added (Zhang et al. 2021, sec. 3). Pooling is the mean or the largest value of the valid
positions of a slot, or the paper's best, 'ldconv', a lightweight dynamic convolution: their weighted mean with weights softmax(x_m W), x_m the
vector in the middle of the slot; W starts at zero, which is the mean.

Departures: in the paper the second level makes queries, keys and values of its own from the first level's output; a layer of this zoo has one
set of them, so both levels read it. Causal is beyond the paper: a slot is seen once its last position is not after the query.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_zoo.attention.base import Attention, Paper, Variant, softmax_reference
from attn_zoo.attention.pattern import dense_mask, pair_flops, pattern_plan
from attn_zoo.ops import backends
from attn_zoo.ops.block_mask import count_pairs
from attn_zoo.ops.patterns import Band, Pattern
from attn_zoo.ops.slots import Slots, attend_slots, init_slots, plan_slots, put, score_row, softmax_row
from attn_zoo.spec import check, check_choice, check_int

POOLINGS = ("mean", "max", "ldconv")


@dataclasses.dataclass(frozen=True)
class Options:
    """window: of level one, on each side; second: of level two, in positions, 0 for none; pool: how a slot is made of `kernel` positions, every `stride`."""

    window: int = 128
    second: int = 512
    pool: str = "ldconv"
    kernel: int = 5
    stride: int = 4

    def __post_init__(self):
        check_int("window", self.window, 0)
        check_int("second", self.second, 0)
        check_choice("pool", self.pool, POOLINGS)
        check_int("stride", self.stride, 1)
        check_int("kernel", self.kernel, 1)
        check(self.kernel >= self.stride, "kernel", self.kernel, f"must be at least stride={self.stride}, or positions would be left out")


@dataclasses.dataclass(frozen=True)
class NearSlots(Pattern):
    """low <= i - stride c <= high, for query i and slot c."""

    stride: int
    low: int
    high: int

    def mask(self, i, j):
        distance = i - self.stride * j
        return (distance >= self.low) & (distance <= self.high)

    def blocks(self, i0, i1, j0, j1):
        least, most = i0 - self.stride * j1, i1 - self.stride * j0
        return (least <= self.high) & (most >= self.low), (least >= self.low) & (most <= self.high)

    @property
    def width(self):
        return max((self.high - self.low) // self.stride + 1, 1)


def window_pattern(options: Options, causal: bool) -> Pattern:
    """The keys that a query sees."""
    return Band(options.window, 0 if causal else options.window)


def slot_pattern(options: Options, causal: bool) -> Pattern:
    """The slots that a query sees."""
    middle = options.kernel // 2
    return NearSlots(options.stride, options.kernel - 1 if causal else middle - options.second, middle + options.second)


def num_slots(options: Options, S: int) -> int:
    """Slots that cover S positions."""
    return 1 + -(-max(0, S - options.kernel) // options.stride)


class Poolingformer(Attention):
    """Two windows, the wider one pooled."""

    def __init__(self, options: Options, dims, *, shared: dict, rngs: nnx.Rngs):
        super().__init__(options, dims)
        if options.second and options.pool == "ldconv":
            zeros = lambda: nnx.Param(jnp.zeros((dims.num_kv_heads, dims.head_dim, options.kernel)))
            self.key_weights, self.value_weights = zeros(), zeros()

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        masked = valid_BS is not None
        run = lambda k, v, pattern, valid: backends.attention(q_BTNH, k, v, pattern=pattern, valid_BS=valid, backend=self.backend_of(pattern, masked))
        o_BTNH = run(k_BSKH, v_BSKH, window_pattern(self.options, self.dims.causal), valid_BS)
        if not self.options.second:
            return o_BTNH
        k_BCKH, v_BCKH, valid_BC = self.pooled(k_BSKH, v_BSKH, valid_BS)
        return o_BTNH + run(k_BCKH, v_BCKH, slot_pattern(self.options, self.dims.causal), valid_BC if masked else None)

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        T, causal = q_BTNH.shape[1], self.dims.causal
        o_BTNH = softmax_reference(q_BTNH, k_BSKH, v_BSKH, dense_mask(window_pattern(self.options, causal), T, k_BSKH.shape[1], valid_BS))
        if not self.options.second:
            return o_BTNH
        k_BCKH, v_BCKH, valid_BC = self.pooled(k_BSKH, v_BSKH, valid_BS)
        return o_BTNH + softmax_reference(q_BTNH, k_BCKH, v_BCKH, dense_mask(slot_pattern(self.options, causal), T, k_BCKH.shape[1], valid_BC))

    def init_cache(self, B, max_len):
        """A ring of the window's keys, one of the slots that the second level still sees, and the last `kernel` keys and values as they are."""
        self.check_decoding(max_len)
        K, H, dtype = self.dims.num_kv_heads, self.dims.head_dim, self.dims.dtype
        cache = init_slots(plan_slots(window_pattern(self.options, True), max_len), B, K, H, dtype)
        if not self.options.second:
            return cache
        zeros = lambda n: jnp.zeros((B, n, K, H), dtype)
        C = min(slot_pattern(self.options, True).width, num_slots(self.options, max_len)) + 1  # the last takes what is no slot
        return cache | {"slot_k": zeros(C), "slot_v": zeros(C), "last_k": zeros(self.options.kernel), "last_v": zeros(self.options.kernel)}

    def step(self, q_B1NH, k_B1KH, v_B1KH, cache):
        t, o = cache["t"], self.options
        window, slots = window_pattern(o, True), slot_pattern(o, True)
        ring = Slots(cache["k"].shape[1], cache["k"].shape[1])
        cache = put(k_B1KH, v_B1KH, cache, ring)
        o_B1NH, _ = attend_slots(q_B1NH, cache, window, ring)
        if o.second:
            C = cache["slot_k"].shape[1] - 1
            started = t - (o.kernel - 1)  # where the slot begins that ends here, if one does
            newest = started // o.stride  # the last slot that is whole
            place = jnp.where((started >= 0) & (started % o.stride == 0), newest % C, C)
            last = {name: jnp.concatenate([cache[f"last_{name}"][:, 1:], x.astype(self.dims.dtype)], axis=1) for name, x in (("k", k_B1KH), ("v", v_B1KH))}
            pooled_k, pooled_v, _ = self.pooled(last["k"], last["v"], None)
            for name, x in (("k", pooled_k), ("v", pooled_v)):
                update = jax.lax.dynamic_update_slice_in_dim(cache[f"slot_{name}"], x.astype(self.dims.dtype), place, 1)
                cache = cache | {f"slot_{name}": update, f"last_{name}": last[name]}
            number_C = newest - (newest - jnp.arange(C)) % C
            seen_C = (started >= 0) & (number_C >= 0) & slots.mask(t, number_C)
            scores = jnp.where(seen_C, score_row(q_B1NH, cache["slot_k"][:, :C]), -jnp.inf)
            o_B1NH = o_B1NH + softmax_row(scores, cache["slot_v"][:, :C], o_B1NH.dtype)[0]
        return o_B1NH, cache | {"t": t + 1}

    def pooled(self, k_BSKH, v_BSKH, valid_BS):
        """(keys, values, validity) of the slots; a slot is valid when any of its positions is."""
        B, S = k_BSKH.shape[:2]
        field_CP = self.options.stride * np.arange(num_slots(self.options, S))[:, None] + np.arange(self.options.kernel)
        missing = int(field_CP.max()) + 1 - S
        valid_BS = jnp.pad(jnp.ones((B, S), bool) if valid_BS is None else valid_BS, ((0, 0), (0, max(missing, 0))))
        valid_BCP = valid_BS[:, field_CP]
        weights = (self.key_weights[...], self.value_weights[...]) if self.options.pool == "ldconv" else (None, None)
        pool = lambda x, w: pool_slots(jnp.pad(x, ((0, 0), (0, max(missing, 0)), (0, 0), (0, 0))), valid_BCP, field_CP, self.options.pool, w)
        return *(pool(x, w) for x, w in zip((k_BSKH, v_BSKH), weights)), valid_BCP.any(axis=-1)

    def patterns(self):
        """Of the levels."""
        levels = [window_pattern(self.options, self.dims.causal)]
        return [*levels, slot_pattern(self.options, self.dims.causal)] if self.options.second else levels

    def backend_of(self, pattern, masked):
        return backends.choose(self.dims.backend, pattern, self.dims.dtype, self.dims.head_dim, masked=masked)

    def backend(self, masked=False):
        return " + ".join(dict.fromkeys(self.backend_of(pattern, masked) for pattern in self.patterns()))

    def plan(self, T, S, masked=False):
        sizes = (S, num_slots(self.options, S))
        plans = [pattern_plan(self.backend_of(pattern, masked), pattern, T, size, self.dims) for pattern, size in zip(self.patterns(), sizes)]
        return plans[0] | {"backend": self.backend(masked)} | ({"slots": sizes[1], "second": plans[1]} if self.options.second else {})

    def flops(self, B, T, S):
        d = self.dims
        return flops(self.options, B, T, S, d.num_heads, d.head_dim, d.causal, K=d.num_kv_heads)


def pool_slots(x_BSKH, valid_BCP, field_CP, pool: str, weights_KHP=None):
    """[B, C, K, H]: each slot pooled over the valid ones of its positions `field`, [C, P]; zeros where there is none."""
    wide_BSKH = x_BSKH.astype(jnp.promote_types(x_BSKH.dtype, jnp.float32))
    taps = [wide_BSKH[:, field_CP[:, p]] for p in range(field_CP.shape[1])]
    seen = [valid_BCP[:, :, p, None, None] for p in range(field_CP.shape[1])]
    if pool == "max":
        largest = jnp.stack([jnp.where(s, tap, -jnp.inf) for tap, s in zip(taps, seen)]).max(axis=0)
        return jnp.where(valid_BCP.any(axis=-1)[:, :, None, None], largest, 0).astype(x_BSKH.dtype)
    if pool == "mean":
        share_BCKP = jnp.broadcast_to(valid_BCP[:, :, None], (*valid_BCP.shape[:2], x_BSKH.shape[2], valid_BCP.shape[2]))
    else:
        logits_BCKP = jnp.einsum("BCKH,KHP->BCKP", taps[field_CP.shape[1] // 2], weights_KHP, precision="highest")
        logits_BCKP = jnp.where(valid_BCP[:, :, None], logits_BCKP, -jnp.inf)
        top_BCK1 = jax.lax.stop_gradient(jnp.max(logits_BCKP, axis=-1, keepdims=True))
        share_BCKP = jnp.where(valid_BCP[:, :, None], jnp.exp(logits_BCKP - jnp.where(jnp.isfinite(top_BCK1), top_BCK1, 0.0)), 0.0)
    total_BCK1 = share_BCKP.sum(axis=-1, keepdims=True)
    share_BCKP = share_BCKP / jnp.where(total_BCK1 == 0, 1, total_BCK1)
    return sum(share_BCKP[..., p, None] * tap for p, tap in enumerate(taps)).astype(x_BSKH.dtype)


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool, K: int | None = None) -> float:
    """The pairs of both windows, and the pooling of keys and values of K key/value heads (N by default)."""
    pairs = count_pairs(window_pattern(options, causal), T, S)
    if not options.second:
        return pair_flops(pairs, B, N, H)
    C = num_slots(options, S)
    pooling = 2 * 2.0 * B * (K or N) * C * options.kernel * H * (2 if options.pool == "ldconv" else 1)
    return pair_flops(pairs + count_pairs(slot_pattern(options, causal), T, C), B, N, H) + pooling


POOLINGFORMER = Variant(
    name="poolingformer",
    family="memory compression",
    options=Options,
    build=Poolingformer,
    paper=Paper(
        "zhang2021poolingformer",
        "Poolingformer: Long Document Modeling with Pooling Attention",
        "Zhang, Hang and Gong, Yeyun and Shen, Yelong and Li, Weisheng and Lv, Jiancheng and Duan, Nan and Chen, Weizhu",
        2021,
        "Proceedings of the 38th International Conference on Machine Learning",
    ),
    complexity="T (W + W' / s)",
    flops=flops,
    time_order=1.0,
    memory_order=1.0,
    exact_when=lambda T: {"window": T, "second": 0},
    decode=True,
    state_order=0.0,
)
