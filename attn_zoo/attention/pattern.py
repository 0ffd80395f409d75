"""The common form of the variants that are a Pattern: softmax attention over the pairs that a function of indices shows."""

import jax.numpy as jnp
import numpy as np

from attn_zoo.attention.base import Attention, Dims, softmax_reference
from attn_zoo.ops import backends
from attn_zoo.ops.block_mask import block_mask, count_pairs
from attn_zoo.ops.patterns import Pattern
from attn_zoo.ops.slots import Slots, attend_slots, init_slots, plan_slots, put, score_row, softmax_row


class SlotDecoding(Attention):
    """Generation for what is softmax attention over the pairs of a pattern: the state is the keys that a later query still sees."""

    def seen(self) -> Pattern:
        """The pairs among the positions that this attention was built for, causality included."""
        raise NotImplementedError

    def slots(self) -> Slots:
        """Where their keys are kept."""
        return plan_slots(self.seen(), self.dims.max_len)

    def init_cache(self, B, max_len):
        self.check_decoding(max_len)
        return init_slots(self.slots().within(max_len), B, self.dims.num_kv_heads, self.dims.head_dim, self.dims.dtype)

    def step(self, q_B1NH, k_B1KH, v_B1KH, cache):
        o_B1NH, _, cache = self.slot_step(q_B1NH, k_B1KH, v_B1KH, cache)
        return o_B1NH, cache | {"t": cache["t"] + 1}

    def slot_step(self, q_B1NH, k_B1KH, v_B1KH, cache, **scores):
        """(output, logsumexp, the cache with this key and value, and its t as it was); `scores` as attend_slots takes it."""
        slots = self.slots().within(cache["k"].shape[1])
        cache = put(k_B1KH, v_B1KH, cache, slots)
        return *attend_slots(q_B1NH, cache, self.seen(), slots, **scores), cache


class PatternAttention(SlotDecoding):
    """Scaled dot-product attention over `self.pattern(T, S)`."""

    def pattern(self, T: int, S: int) -> Pattern:
        """The pairs seen among T queries and S keys, causality included. A row of it must not depend on T: a decoder asks for the rows of max_len, one by one."""
        raise NotImplementedError

    def seen(self):
        return self.pattern(self.dims.max_len, self.dims.max_len)

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        pattern = self.pattern(q_BTNH.shape[1], k_BSKH.shape[1])
        how = dict(padding=self.dims.padding, backend=self.backend(valid_BS is not None))
        return backends.attention(q_BTNH, k_BSKH, v_BSKH, pattern=pattern, valid_BS=valid_BS, **how)

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        T, S = q_BTNH.shape[1], k_BSKH.shape[1]
        return softmax_reference(q_BTNH, k_BSKH, v_BSKH, dense_mask(self.pattern(T, S), T, S, valid_BS))

    def cross_state(self, k_BSKH, v_BSKH, valid_BS, max_len):
        """The keys and values: what one query sees of them is a row of the pattern."""
        return {"k": k_BSKH, "v": v_BSKH, "valid": valid_BS}

    def cross_step(self, q_B1NH, cache):
        t, S = cache["t"], cache["k"].shape[1]
        seen_BS = self.pattern(self.dims.max_len, S).mask(t, jnp.arange(S)) & cache["valid"]
        o_B1NH, _ = softmax_row(jnp.where(seen_BS[:, None], score_row(q_B1NH, cache["k"]), -jnp.inf), cache["v"], q_B1NH.dtype)
        return o_B1NH, cache | {"t": t + 1}

    def backend(self, masked=False):
        return backends.choose(self.dims.backend, self.pattern(1, 1), self.dims.dtype, self.dims.head_dim, masked=masked and self.dims.padding)

    def plan(self, T, S, masked=False):
        plan = pattern_plan(self.backend(masked), self.pattern(T, S), T, S, self.dims)
        # Of these variants the listed blocks are all the work, which tells what a pair of them costs.
        return plan | ({"computed_pairs": round(plan["computed_density"] * T * S)} if "computed_density" in plan else {})


class MergedAttention(SlotDecoding):
    """Softmax attention over a pattern that is folded first, or merged from several parts, each of them computed by `part`."""

    has_parts = True

    def plan(self, T, S, masked=False):
        return parts_plan(self, T, S, masked)


def dense_mask(pattern: Pattern, T: int, S: int, valid_BS=None):
    """The pattern as a [1 or B, 1, T, S] array, for references."""
    mask = pattern.mask(np.arange(T)[:, None], np.arange(S)[None, :])[None, None]
    return mask if valid_BS is None else mask & valid_BS[:, None, None, :]


def pattern_plan(backend: str, pattern: Pattern, T: int, S: int, dims: Dims) -> dict:
    """For the record: the backend, its blocks, and the densities of pairs and of computed blocks."""
    plan = {"backend": backend, "density": count_pairs(pattern, T, S) / (T * S)}
    blocks = backends.blocks(backend, pattern, T, S, dims.dtype, dims.head_dim)
    if blocks is not None:
        computed = block_mask(pattern, T, S, *blocks).computed_pairs
        plan |= {"q_block": blocks[0], "k_block": blocks[1], "computed_density": computed / (T * S)}
    return plan


def parts_plan(layer: Attention, T: int, S: int, masked: bool, *, pairs: float | None = None, beside: int | None = None) -> dict:
    """As `pattern_plan`, of a layer that is merged from parts: all blocks of all of them, and the pairs that are computed beside them, over T x S.

    pairs: those that are seen; None if they are all that the layer's FLOPs count. beside: None if the parts are all the work.
    """
    backend, d = layer.backend(masked), layer.dims
    pairs = layer.flops(1, T, S) / pair_flops(1, 1, d.num_heads, d.head_dim) if pairs is None else pairs
    plan, asked = {"backend": layer.engines(masked), "density": pairs / (T * S)}, layer.asked_parts(T, S)
    sizes = [backends.blocks(backend, pattern, q[1], k[1], d.dtype, d.head_dim) for pattern, q, k in asked]
    if None in sizes:
        return plan
    computed = sum(q[0] * q[2] / d.num_heads * block_mask(pattern, q[1], k[1], *size).computed_pairs for (pattern, q, k), size in zip(asked, sizes))
    plan |= {"q_block": sizes[0][0], "k_block": sizes[0][1], "computed_density": (computed + (beside or 0)) / (T * S)}
    return plan | ({"computed_pairs": round(computed)} if beside is None else {})


def pair_flops(pairs: float, B: int, N: int, H: int) -> float:
    """Forward FLOPs of scores and weighted sum, 2 x 2 H a pair; the softmax itself is not counted, as is customary."""
    return 4.0 * B * N * H * pairs
