"""Sparse Sinkhorn attention: blocks of keys are softly sorted by a learned network, and a query sees its own block and the one sorted to it.

Tay et al. 2020: blocks are summarized and mapped to logits over blocks by a learned map (sec. 3.1), made a soft permutation R by Sinkhorn's alternating
normalization (rows, then columns, in log space), with Gumbel noise in training; block I of the sorted keys is sum_J R[I, J] K_J, likewise
of the values. The own and the sorted block share one softmax. Causal (sec. 3.3): block I is summarized by what stands up to its first
position, and takes from blocks before it alone.

Departures. Causal rows are normalized once and columns not at all: a column's sum over all rows would tell of the future, and over the rows
up to I it draws R to the one permutation that is strictly causal, the shift by one block, whatever the logits. Sorting is one linear map
a head of the keys' summaries, as in the first author's public code. Summaries are means, not sums: the map absorbs the factor, but a
causal sum would make the logits grow with position. The first block has no sorted one when causal. With padding, blocks without a valid
key are not sorted, and where a slot of a sorted block mixes valid and invalid positions, the weight of the invalid ones goes to the valid.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from attn_zoo.attention.base import Attention, Paper, Variant, softmax_reference
from attn_zoo.attention.block_local import pattern as own_block
from attn_zoo.attention.pattern import dense_mask, pair_flops, parts_plan
from attn_zoo.ops.block_mask import count_pairs
from attn_zoo.ops.merge import merge
from attn_zoo.ops.slots import score_row, softmax_row
from attn_zoo.spec import check, check_int, check_number

NEG = -1e30  # log of a weight that is zero; finite, so that differences are not NaN
LEAST_SHARE = 1e-6  # below it a slot's valid positions no longer stand for the invalid ones, and the slot fades to zeros


@dataclasses.dataclass(frozen=True)
class Options:
    """block: positions in a block, None takes about sqrt(max_len); iterations: of Sinkhorn's, not causal; temperature: the lower, the harder R."""

    block: int | None = None
    iterations: int = 7
    temperature: float = 0.75

    def __post_init__(self):
        check_int("block", self.block, 1, optional=True)
        check_int("iterations", self.iterations, 1)
        check_number("temperature", self.temperature, 0)
        check(self.temperature > 0, "temperature", self.temperature, "must be above 0")


def block_of(options: Options, max_len: int) -> int:
    """The block in positions. Near sqrt(max_len), where attending, T b, and sorting, T^2 / b, cost the same."""
    return options.block or 16 * max(1, round(math.sqrt(max_len) / 16))


def soft_permutation(logits_CC, seen_CC, iterations: int, causal: bool):
    """R = exp(logits) with rows and columns normalized in turn, or once its rows when causal. Tay et al. 2020, sec. 3.1.

    logits [..., C, C]; R is zero where not `seen`, and so is a row or column that sees nothing.
    """
    seen = lambda x: jnp.where(seen_CC, x, NEG)
    normalize = lambda x, axis: seen(x - jax.nn.logsumexp(x, axis=axis, keepdims=True))
    log_R = seen(logits_CC)
    if causal:
        log_R = normalize(log_R, -1)
    else:
        log_R = lax.fori_loop(0, iterations, lambda _, x: normalize(normalize(x, -1), -2), log_R)
    return jnp.where(seen_CC, jnp.exp(log_R), 0.0)


def summaries(k_BCWKH, valid_BCW, causal: bool):
    """[B, C, K, H]: the mean of the valid keys of each block; when causal, of all from the first to that block's first. Invalid keys are zeros."""
    if not causal:
        return k_BCWKH.sum(axis=2) / jnp.maximum(valid_BCW.sum(axis=2), 1)[..., None, None]
    B, C, W = valid_BCW.shape
    first = lambda x: jnp.cumsum(x.reshape(B, C * W, *x.shape[3:]), axis=1)[:, ::W]
    return first(k_BCWKH) / jnp.maximum(first(valid_BCW), 1)[..., None, None]


class Sinkhorn(Attention):
    """Own block and sorted block."""

    has_parts = True

    def __init__(self, options: Options, dims, *, shared: dict, rngs: nnx.Rngs):
        super().__init__(options, dims)
        self.block = block_of(options, dims.max_len)
        blocks = -(-dims.max_len // self.block)
        # The mean of a block of white keys has variance 1 / block: logits start with variance 1.
        draw = jax.random.normal(rngs.params(), (dims.num_kv_heads, dims.head_dim, blocks))
        self.weight = nnx.Param(draw * math.sqrt(self.block / dims.head_dim))
        self.bias = nnx.Param(jnp.zeros((dims.num_kv_heads, blocks)))

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        T, causal = q_BTNH.shape[1], self.dims.causal
        own = self.part(q_BTNH, k_BSKH, v_BSKH, pattern=own_block(self.block, T, causal), valid_BS=valid_BS)
        if T <= self.block:
            return own[0]  # one block, which would be sorted to itself
        blocks_BCW, valid_BCW = self.cut(valid_BS, *k_BSKH.shape[:2])
        k_BCWKH, v_BCWKH = (blocks_BCW(x.astype(jnp.promote_types(x.dtype, jnp.float32))) for x in (k_BSKH, v_BSKH))

        seen_BCC = self.may_sort(valid_BCW)
        logits_BKCC = self.logits(summaries(k_BCWKH, valid_BCW, causal), key)
        R_BKCC = soft_permutation(logits_BKCC, seen_BCC[:, None], self.options.iterations, causal)

        flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])
        share_BCWK = jnp.einsum("BKIJ,BJW->BIWK", R_BKCC, valid_BCW.astype(R_BKCC.dtype)) / _or_one(R_BKCC.sum(axis=-1)).swapaxes(1, 2)[:, :, None]
        sort = lambda x: jnp.einsum("BKIJ,BJWKH->BIWKH", R_BKCC, x) / jnp.maximum(share_BCWK, LEAST_SHARE)[..., None]
        sorted_k, sorted_v = (flat(sort(x)).astype(k_BSKH.dtype) for x in (k_BCWKH, v_BCWKH))
        sorted_valid = flat(jnp.einsum("BIJ,BJW->BIW", seen_BCC.astype(jnp.float32), valid_BCW.astype(jnp.float32)) > 0)
        other = self.part(q_BTNH, sorted_k, sorted_v, pattern=own_block(self.block, T, False), valid_BS=sorted_valid)
        return merge(own, other)[0]

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        (B, T, N, H), W, causal = q_BTNH.shape, self.block, self.dims.causal
        own = dense_mask(own_block(W, T, causal), T, T, valid_BS)
        if T <= W:
            return softmax_reference(q_BTNH, k_BSKH, v_BSKH, own)
        _, valid_BCW = self.cut(valid_BS, B, T)
        C = valid_BCW.shape[1]
        valid_BS = valid_BCW.reshape(B, C * W)
        k_all, v_all = (jnp.pad(x, ((0, 0), (0, C * W - T), (0, 0), (0, 0))) for x in (k_BSKH, v_BSKH))

        I, s = np.arange(C)[:, None], np.arange(C * W)[None, :]
        counts_BCS = valid_BS[:, None] & (s <= I * W if causal else s // W == I)
        means = jnp.einsum("BCS,BSKH->BCKH", counts_BCS / jnp.maximum(counts_BCS.sum(axis=-1, keepdims=True), 1), k_all, precision="highest")
        logits = self.logits(means, key)
        seen = self.may_sort(valid_BCW)[:, None]
        R = jnp.where(seen, jnp.exp(logits - lax.stop_gradient(logits.max(axis=-1, keepdims=True))), 0.0)
        R = R / _or_one(R.sum(axis=-1, keepdims=True))
        for _ in range(0 if causal else self.options.iterations):
            R = R / _or_one(R.sum(axis=-1, keepdims=True))
            R = R / _or_one(R.sum(axis=-2, keepdims=True))

        # R over positions: what every position of the sorted sequence takes from every position of the keys.
        spread = lambda x: jnp.repeat(jnp.repeat(x, W, axis=-2), W, axis=-1) * ((s.T - s) % W == 0)
        takes_BKSS = spread(R) * valid_BS[:, None, None]
        share = takes_BKSS.sum(axis=-1, keepdims=True) / _or_one(spread(R).sum(axis=-1, keepdims=True))
        takes_BKSS = takes_BKSS / jnp.maximum(share, LEAST_SHARE)
        slot_valid = (spread(seen) & valid_BS[:, None, None]).any(axis=-1)
        sorted_k, sorted_v = (jnp.einsum("BKSJ,BJKH->BSKH", takes_BKSS, x, precision="highest") for x in (k_all, v_all))
        k_both, v_both = (jnp.concatenate(x, axis=1) for x in ((k_BSKH, sorted_k), (v_BSKH, sorted_v)))
        other = (np.arange(T)[:, None] // W == s // W) & slot_valid[:, :, None]
        return softmax_reference(q_BTNH, k_both, v_both, jnp.concatenate([jnp.broadcast_to(own, (B, 1, T, T)), other], axis=-1))

    def init_cache(self, B, max_len):
        """All keys and values, of which whole blocks are sorted; the sum of the keys so far; the block that is sorted to the current one."""
        self.check_decoding(max_len)
        K, H, W = self.dims.num_kv_heads, self.dims.head_dim, self.block
        zeros = lambda n, dtype: jnp.zeros((B, n, K, H), dtype)
        rows = -(-max_len // W) * W
        cache = {"k": zeros(rows, self.dims.dtype), "v": zeros(rows, self.dims.dtype), "sorted_k": zeros(W, jnp.float32), "sorted_v": zeros(W, jnp.float32)}
        return cache | {"sum": jnp.zeros((B, K, H)), "t": jnp.zeros((), jnp.int32)}

    def step(self, q_B1NH, k_B1KH, v_B1KH, cache):
        t, W = cache["t"], self.block
        k, v = (lax.dynamic_update_slice_in_dim(cache[name], x.astype(cache[name].dtype), t, 1) for name, x in (("k", k_B1KH), ("v", v_B1KH)))
        total_BKH = cache["sum"] + k_B1KH[:, 0].astype(jnp.float32)
        I = t // W

        def sort():
            """R's row of this block, from the summary of all up to its first position, which is here."""
            blocks = k.shape[1] // W
            logits_BKC = (jnp.einsum("BKH,KHJ->BKJ", total_BKH / (t + 1), self.weight[:, :, :blocks], precision="highest") + self.bias[:, :blocks]) / self.options.temperature
            before_C = jnp.arange(blocks) < I
            R_BKC = jnp.where(before_C, jax.nn.softmax(jnp.where(before_C, logits_BKC, NEG)), 0.0)
            cut = lambda x: x.reshape(x.shape[0], blocks, W, *x.shape[2:]).astype(jnp.float32)
            return tuple(jnp.einsum("BKJ,BJWKH->BWKH", R_BKC, cut(x)) for x in (k, v))

        sorted_k, sorted_v = lax.cond(t % W == 0, sort, lambda: (cache["sorted_k"], cache["sorted_v"]))
        own_k, own_v = (lax.dynamic_slice_in_dim(x, I * W, W, 1) for x in (k, v))
        both_k, both_v = (jnp.concatenate([own, other.astype(own.dtype)], axis=1) for own, other in ((own_k, sorted_k), (own_v, sorted_v)))
        seen = jnp.concatenate([jnp.arange(W) <= t % W, jnp.full(W, I > 0)])
        o_B1NH, _ = softmax_row(jnp.where(seen, score_row(q_B1NH, both_k), -jnp.inf), both_v, q_B1NH.dtype)
        return o_B1NH, {"k": k, "v": v, "sorted_k": sorted_k, "sorted_v": sorted_v, "sum": total_BKH, "t": t + 1}

    def cut(self, valid_BS, B: int, S: int):
        """(function that cuts [B, S, ...] into [B, C, W, ...], padded with zeros; which positions are valid, [B, C, W])."""
        W = self.block
        C = -(-S // W)
        blocks = lambda x: jnp.pad(x, [(0, 0), (0, C * W - S)] + [(0, 0)] * (x.ndim - 2)).reshape(x.shape[0], C, W, *x.shape[2:])
        return blocks, blocks(jnp.ones((B, S), bool) if valid_BS is None else valid_BS)

    def may_sort(self, valid_BCW):
        """Which blocks J may be sorted to I, [B, C, C]: those that hold a valid key, earlier ones when causal."""
        alive_BC = valid_BCW.any(axis=-1)
        seen_BCC = alive_BC[:, :, None] & alive_BC[:, None, :]
        return jnp.tril(seen_BCC, -1) if self.dims.causal else seen_BCC

    def logits(self, means_BCKH, key):
        """The sorting network, [B, K, C, C]: row I from the summary of block I; noisy where a key is given."""
        C = means_BCKH.shape[1]
        logits = jnp.einsum("BIKH,KHJ->BKIJ", means_BCKH, self.weight[:, :, :C], precision="highest") + self.bias[:, None, :C]
        noise = 0.0 if key is None else jax.random.gumbel(key, logits.shape)
        return (logits + noise) / self.options.temperature

    def flops(self, B, T, S):
        return flops(dataclasses.replace(self.options, block=self.block), B, T, S, self.dims.num_heads, self.dims.head_dim, self.dims.causal)

    def plan(self, T, S, masked=False):
        return parts_plan(self, T, S, masked, pairs=_pairs(self.block, T, self.dims.causal), beside=0) | {"block": self.block}


def _or_one(x):
    return jnp.where(x == 0, 1.0, x)


def _pairs(block: int, T: int, causal: bool) -> float:
    """Query-key pairs in own and sorted blocks."""
    own = count_pairs(own_block(block, T, causal), T, T)
    return own if T <= block else own + (T - block * causal) * block


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool) -> float:
    """Attention to own and sorted blocks, and the mixing of keys and values of every pair of blocks."""
    block = block_of(options, T)
    blocks = -(-T // block)
    sources = 0 if blocks == 1 else blocks * (blocks - 1) / 2 if causal else blocks**2
    return pair_flops(_pairs(block, T, causal) + sources * block, B, N, H)


SINKHORN = Variant(
    name="sinkhorn",
    family="content-based sparse",
    options=Options,
    build=Sinkhorn,
    paper=Paper(
        "tay2020sparse",
        "Sparse Sinkhorn Attention",
        "Tay, Yi and Bahri, Dara and Yang, Liu and Metzler, Donald and Juan, Da-Cheng",
        2020,
        "Proceedings of the 37th International Conference on Machine Learning",
    ),
    complexity="T b + T^2 / b; T sqrt(T) at b = sqrt(T)",
    flops=flops,
    time_order=1.5,
    memory_order=1.0,
    exact_when=lambda T: {"block": T},
    decode=True,
    cross="a query block attends to the sorted block of its own number, which needs one sequence for queries and keys",
)
