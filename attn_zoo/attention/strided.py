"""Sparse Transformer's strided pattern: a query sees the positions near it, and every stride-th position farther away.

|i - j| <= band, or (i - j) divisible by stride (Child et al. 2019, sec. 4.2; both parts in one head, the "merged" form of sec. 4.3). The paper
has band = stride - 1, the default. An image in raster order has stride = its width (times its channels, if they are positions of their own):
the strided part is then a pixel's column, and the band, if that of a row is too wide, its neighbours to the left and right.

The columns would switch on every block of a T x S grid, so they are computed densely after folding T to (T / stride, stride), where they are
rows; columns leave out what the band has, and the two parts are merged by their logsumexp.
"""

import dataclasses
import math

import numpy as np

from attn_zoo.attention.base import Paper, Variant, softmax_reference
from attn_zoo.attention.pattern import MergedAttention, pair_flops
from attn_zoo.ops import backends
from attn_zoo.ops.fold import fold, fold_valid, unfold
from attn_zoo.ops.merge import merge
from attn_zoo.ops.patterns import CAUSAL, Band, Every, Pattern
from attn_zoo.ops.slots import Slots
from attn_zoo.spec import check_int


@dataclasses.dataclass(frozen=True)
class Options:
    """stride: None takes the paper's choice, near sqrt(max_len); band: positions seen on each side, None is stride - 1."""

    stride: int | None = None
    band: int | None = None

    def __post_init__(self):
        check_int("stride", self.stride, 1, optional=True)
        check_int("band", self.band, 0, optional=True)


def sizes(options: Options, max_len: int) -> tuple[int, int]:
    """(stride, band) in positions."""
    stride = options.stride or round(math.sqrt(max_len))
    return stride, stride - 1 if options.band is None else options.band


def near_pattern(band: int, causal: bool) -> Pattern:
    """|i - j| <= band."""
    return Band(band, 0 if causal else band)


def column_pattern(causal: bool, rows: int = 0) -> Pattern:
    """In the folded sequence, the same column more than `rows` rows away, or before."""
    return Band(ahead=-rows - 1) if causal else ~Band(rows, rows)


def strided_attention(q_BTNH, k_BSKH, v_BSKH, valid_BS, stride: int, band: int, causal: bool, part=backends.attention_and_logsumexp):
    """Attention over the near band and the columns, [B, T, N, H]."""
    B, T = q_BTNH.shape[:2]
    S = k_BSKH.shape[1]
    near = part(q_BTNH, k_BSKH, v_BSKH, pattern=near_pattern(band, causal), valid_BS=valid_BS)
    stride = min(stride, max(T, S))  # beyond, a column is one position, and folding would only pad
    folded = (fold(x, stride) for x in (q_BTNH, k_BSKH, v_BSKH))
    columns = part(*folded, pattern=column_pattern(causal, band // stride), valid_BS=fold_valid(valid_BS, B, S, stride))
    return merge(near, tuple(unfold(x, stride, T) for x in columns))[0]


class Strided(MergedAttention):
    """Near band plus columns."""

    @property
    def sizes(self) -> tuple[int, int]:
        """(stride, band) in positions."""
        return sizes(self.options, self.dims.max_len)

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        return strided_attention(q_BTNH, k_BSKH, v_BSKH, valid_BS, *self.sizes, self.dims.causal, self.part)

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        stride, band = self.sizes
        i, j = np.arange(q_BTNH.shape[1])[:, None], np.arange(k_BSKH.shape[1])[None, :]
        mask = ((abs(i - j) <= band) | ((i - j) % stride == 0)) & ((j <= i) | (not self.dims.causal))
        return softmax_reference(q_BTNH, k_BSKH, v_BSKH, mask if valid_BS is None else mask & valid_BS[:, None, None, :])

    def seen(self):
        stride, band = self.sizes
        return CAUSAL & (Band(band, band) | Every(stride))

    def slots(self):
        """Every key stays in some query's column; a query reads its band and its column."""
        stride, band = self.sizes
        T = self.dims.max_len
        return Slots(T, min(band + 1 + -(-T // stride), T))

    def flops(self, B, T, S):
        return pair_flops(count_pairs(*self.sizes, T, S, self.dims.causal), B, self.dims.num_heads, self.dims.head_dim)

    def plan(self, T, S, masked=False):
        stride, band = self.sizes
        return super().plan(T, S, masked) | {"stride": stride, "band": band}


def count_pairs(stride: int, band: int, T: int, S: int, causal: bool) -> int:
    """Useful pairs, counted a row at a time: the band, plus the columns, less what they share."""
    i = np.arange(T)
    last = np.minimum(i, S - 1) if causal else np.full(T, S - 1)
    first, end = np.maximum(i - band, 0), np.minimum(i + band, last)
    near = np.maximum(end - first + 1, 0)
    column_to = lambda j: np.maximum((j - i % stride) // stride + 1, 0)  # of i mod s, i mod s + s, ... those up to j
    shared = np.maximum(column_to(end) - column_to(first - 1), 0)
    return int((near + column_to(last) - shared).sum())


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
    flops=lambda options, B, T, S, N, H, causal: pair_flops(count_pairs(*sizes(options, max(T, S)), T, S, causal), B, N, H),
    time_order=1.5,
    memory_order=1.0,
    exact_when=lambda T: {"stride": T},
    decode=True,
)
