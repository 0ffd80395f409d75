"""Sparse Transformer's fixed pattern: a query sees its own block of `stride` positions, and the last `summary` positions of every other.

j // s == i // s, or j mod s >= s - c (Child et al. 2019, sec. 4.2; both parts in one head). The summary positions are gathered
into a short sequence of c T / s keys; the two parts are disjoint and merged by their logsumexp.
"""

import dataclasses
import math

import numpy as np

from attn_zoo.attention.base import Variant, softmax_reference
from attn_zoo.attention.block_local import pattern as own_block
from attn_zoo.attention.pattern import MergedAttention, pair_flops
from attn_zoo.attention.strided import STRIDED
from attn_zoo.ops.merge import merge
from attn_zoo.ops.patterns import CAUSAL, Pattern
from attn_zoo.ops.slots import Slots
from attn_zoo.spec import check, check_int


@dataclasses.dataclass(frozen=True)
class Options:
    """stride: block length, None near sqrt(max_len); summary: positions at the end of each block that all may see."""

    stride: int | None = None
    summary: int = 4

    def __post_init__(self):
        check_int("stride", self.stride, 1, optional=True)
        check_int("summary", self.summary, 0)
        check(self.stride is None or self.summary <= self.stride, "summary", self.summary, f"must be at most stride={self.stride}")


def sizes(options: Options, max_len: int) -> tuple[int, int]:
    """(stride, summary) in positions."""
    stride = options.stride or round(math.sqrt(max_len))
    return stride, min(options.summary, stride)


@dataclasses.dataclass(frozen=True)
class OtherBlocks(Pattern):
    """Query i in block i // q_size, summary key m of block m // k_size: pairs of different blocks; of earlier ones when causal."""

    q_size: int
    k_size: int
    causal: bool

    def mask(self, i, j):
        I, J = i // self.q_size, j // self.k_size
        return (J < I) if self.causal else (J != I)

    def blocks(self, i0, i1, j0, j1):
        I0, I1, J0, J1 = i0 // self.q_size, i1 // self.q_size, j0 // self.k_size, j1 // self.k_size
        if self.causal:
            return J0 < I1, J1 < I0
        return ~((I0 == I1) & (J0 == J1) & (I0 == J0)), (J1 < I0) | (I1 < J0)

    @property
    def exact(self):
        return True


@dataclasses.dataclass(frozen=True)
class Summaries(Pattern):
    """Keys at the last `summary` positions of blocks of `stride`."""

    stride: int
    summary: int

    def mask(self, i, j):
        return (j % self.stride >= self.stride - self.summary) & (i == i)


class Fixed(MergedAttention):
    """Own block, and summaries of the others."""

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        T, S, causal = q_BTNH.shape[1], k_BSKH.shape[1], self.dims.causal
        stride, summary = sizes(self.options, self.dims.max_len)
        own = self.part(q_BTNH, k_BSKH, v_BSKH, pattern=own_block(stride, max(T, S), causal), valid_BS=valid_BS)
        where = np.flatnonzero(np.arange(S) % stride >= stride - summary)  # in a last, cut block there are fewer: it comes last, so m // summary holds
        if not len(where):
            return own[0]
        others = OtherBlocks(stride, summary, causal)
        valid = None if valid_BS is None else valid_BS[:, where]
        return merge(own, self.part(q_BTNH, k_BSKH[:, where], v_BSKH[:, where], pattern=others, valid_BS=valid))[0]

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        i, j = np.arange(q_BTNH.shape[1])[:, None], np.arange(k_BSKH.shape[1])[None, :]
        stride, summary = sizes(self.options, self.dims.max_len)
        mask = ((i // stride == j // stride) | (j % stride >= stride - summary)) & ((j <= i) | (not self.dims.causal))
        return softmax_reference(q_BTNH, k_BSKH, v_BSKH, mask if valid_BS is None else mask & valid_BS[:, None, None, :])

    def seen(self):
        stride, summary = sizes(self.options, self.dims.max_len)
        return CAUSAL & (own_block(stride, self.dims.max_len, False) | Summaries(stride, summary))

    def slots(self):
        """Slots of their own for the summaries of all blocks, and others that every block uses anew."""
        stride, summary = sizes(self.options, self.dims.max_len)
        block, place = np.divmod(np.arange(self.dims.max_len), stride)
        shared = summary * (int(block[-1]) + 1)
        of = np.where(place >= stride - summary, summary * block + place - (stride - summary), shared + place)
        count = shared + min(stride - summary, self.dims.max_len)
        return Slots(count, count, tuple(of.tolist()))

    def flops(self, B, T, S):
        options = Options(*sizes(self.options, self.dims.max_len))  # that of max_len, not of this length
        return flops(options, B, T, S, self.dims.num_heads, self.dims.head_dim, self.dims.causal)


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool) -> float:
    """Pairs counted a row at a time."""
    stride, summary = sizes(options, max(T, S))
    i = np.arange(T)
    begin = i // stride * stride
    end = np.minimum(np.where(causal, i + 1, begin + stride), S)
    is_summary = np.concatenate([[0], (np.arange(S) % stride >= stride - summary).cumsum()])  # summary keys before j
    before = is_summary[np.minimum(begin, S)]
    after = 0 if causal else is_summary[S] - is_summary[np.minimum(begin + stride, S)]
    return pair_flops(float((np.maximum(end - begin, 0) + before + after).sum()), B, N, H)


FIXED = Variant(
    name="fixed",
    family="position-based sparse",
    options=Options,
    build=lambda options, dims, *, shared, rngs: Fixed(options, dims),
    paper=STRIDED.paper,
    complexity="T (s + c S / s); T sqrt(T) at s = sqrt(T)",
    flops=flops,
    time_order=1.5,
    memory_order=1.0,
    exact_when=lambda T: {"stride": T},
    decode=True,
    state_order=0.5,
)
