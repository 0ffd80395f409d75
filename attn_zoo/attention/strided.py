"""Sparse Transformer's strided pattern: a query sees the last `stride` positions, and every stride-th position before.

|i - j| < s, or (i - j) divisible by s (Child et al. 2019, sec. 4.2; both parts in one head, the "merged" form of sec. 4.3). The columns
would switch on every block of a T x S grid, so they are computed densely after folding T to (T / s, s), where they are rows;
the two parts share the diagonal alone, which the columns leave out, and are merged by their logsumexp.
"""

import dataclasses
import math

import numpy as np

from attn_zoo.attention.base import Attention, Paper, Variant, softmax_reference
from attn_zoo.attention.pattern import pair_flops
from attn_zoo.ops.blocked import block_sizes, blocked_attention
from attn_zoo.ops.fold import fold, fold_valid, unfold
from attn_zoo.ops.merge import merge
from attn_zoo.ops.patterns import Band, Pattern
from attn_zoo.spec import check_int


@dataclasses.dataclass(frozen=True)
class Options:
    """stride: None takes the paper's choice, near sqrt(max_len)."""

    stride: int | None = None

    def __post_init__(self):
        check_int("stride", self.stride, 1, optional=True)


def stride_of(options: Options, max_len: int) -> int:
    """The stride in positions."""
    return options.stride or round(math.sqrt(max_len))


def near_pattern(stride: int, causal: bool) -> Pattern:
    """|i - j| < stride."""
    return Band(stride - 1, 0 if causal else stride - 1)


def column_pattern(causal: bool) -> Pattern:
    """In the folded sequence: every other row of the same column, or every earlier one."""
    return Band(ahead=-1) if causal else ~Band(0, 0)


def strided_attention(q_BTNH, k_BSKH, v_BSKH, valid_BS, stride: int, causal: bool):
    """Attention over the near band and the columns, [B, T, N, H]."""
    B, T = q_BTNH.shape[:2]
    S = k_BSKH.shape[1]
    near = blocked_attention(q_BTNH, k_BSKH, v_BSKH, pattern=near_pattern(stride, causal), valid_BS=valid_BS)
    folded = (fold(x, stride) for x in (q_BTNH, k_BSKH, v_BSKH))
    columns = blocked_attention(*folded, pattern=column_pattern(causal), valid_BS=fold_valid(valid_BS, B, S, stride))
    return merge(near, tuple(unfold(x, stride, T) for x in columns))[0]


class Strided(Attention):
    """Near band plus columns."""

    @property
    def stride(self) -> int:
        return stride_of(self.options, self.dims.max_len)

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        return strided_attention(q_BTNH, k_BSKH, v_BSKH, valid_BS, self.stride, self.dims.causal)

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        i, j = np.arange(q_BTNH.shape[1])[:, None], np.arange(k_BSKH.shape[1])[None, :]
        mask = ((abs(i - j) < self.stride) | ((i - j) % self.stride == 0)) & ((j <= i) | (not self.dims.causal))
        return softmax_reference(q_BTNH, k_BSKH, v_BSKH, mask if valid_BS is None else mask & valid_BS[:, None, None, :])

    def flops(self, B, T, S):
        return pair_flops(count_pairs(self.stride, T, S, self.dims.causal), B, self.dims.num_heads, self.dims.head_dim)

    def plan(self, T, S, masked=False):
        q_block, k_block = block_sizes(near_pattern(self.stride, self.dims.causal), T, S)
        density = count_pairs(self.stride, T, S, self.dims.causal) / (T * S)
        return {"backend": self.backend(masked), "stride": self.stride, "density": density, "q_block": q_block, "k_block": k_block}


def count_pairs(stride: int, T: int, S: int, causal: bool) -> int:
    """Useful pairs, counted a row at a time: the band, plus the columns, less the diagonal they share."""
    i = np.arange(T)
    last = np.minimum(i, S - 1) if causal else np.full(T, S - 1)
    first, end = np.maximum(i - stride + 1, 0), np.minimum(i + stride - 1, last)
    near = np.maximum(end - first + 1, 0)
    columns = np.maximum((last - i % stride) // stride + 1, 0)  # j = i mod s, i mod s + s, ... up to `last`
    return int((near + columns - (i < S)).sum())


STRIDED = Variant(
    name="strided",
    family="position-based sparse",
    options=Options,
    build=lambda options, dims, *, shared, rngs: Strided(options, dims),
    paper=Paper(
        "child2019generating",
        "Generating Long Sequences with Sparse Transformers",
        "Child, Rewon and Gray, Scott and Radford, Alec and Sutskever, Ilya",
        2019,
        "arXiv:1904.10509",
    ),
    complexity="T (s + S / s); T sqrt(T) at s = sqrt(T)",
    flops=lambda options, B, T, S, N, H, causal: pair_flops(count_pairs(stride_of(options, max(T, S)), T, S, causal), B, N, H),
    time_order=1.5,
    memory_order=1.0,
    exact_when=lambda T: {"stride": T},
)
