"""Axial attention: positions are laid out in rows of `width`, and a query sees its own row and its own column.

Ho et al. 2019 alternate rows and columns over layers (axis='row', axis='column'); axis='both' has them in one head, as the merged
strided pattern of Child et al. 2019 has on images. The column part is a row after folding; the two share the diagonal alone.
"""

import dataclasses
import math

import numpy as np

from attn_zoo.attention.base import Paper, Variant, softmax_reference
from attn_zoo.attention.block_local import pattern as own_block
from attn_zoo.attention.pattern import MergedAttention, pair_flops
from attn_zoo.attention.strided import column_pattern
from attn_zoo.ops.fold import fold, fold_valid, unfold
from attn_zoo.ops.merge import merge
from attn_zoo.ops.patterns import CAUSAL, FULL, Every
from attn_zoo.ops.slots import Slots
from attn_zoo.spec import check_choice, check_int


@dataclasses.dataclass(frozen=True)
class Options:
    """width: positions in a row, None near sqrt(max_len); axis: 'both', 'row' or 'column'. The height follows from the length."""

    width: int | None = None
    axis: str = "both"

    def __post_init__(self):
        check_int("width", self.width, 1, optional=True)
        check_choice("axis", self.axis, ("both", "row", "column"))


def width_of(options: Options, max_len: int) -> int:
    """Positions in a row."""
    return options.width or round(math.sqrt(max_len))


class Axial(MergedAttention):
    """Rows and columns of a grid."""

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        (B, T), S, causal, axis = q_BTNH.shape[:2], k_BSKH.shape[1], self.dims.causal, self.options.axis
        width = min(width_of(self.options, self.dims.max_len), max(T, S))  # beyond, all is one row, and folding would only pad
        parts = []
        if axis != "column":
            parts.append(self.part(q_BTNH, k_BSKH, v_BSKH, pattern=own_block(width, max(T, S), causal), valid_BS=valid_BS))
        if axis != "row":
            pattern = column_pattern(causal) if axis == "both" else CAUSAL if causal else FULL
            folded = (fold(x, width) for x in (q_BTNH, k_BSKH, v_BSKH))
            column = self.part(*folded, pattern=pattern, valid_BS=fold_valid(valid_BS, B, S, width))
            parts.append(tuple(unfold(x, width, T) for x in column))
        return merge(*parts)[0]

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        i, j = np.arange(q_BTNH.shape[1])[:, None], np.arange(k_BSKH.shape[1])[None, :]
        width, axis = width_of(self.options, self.dims.max_len), self.options.axis
        row, column = i // width == j // width, i % width == j % width
        mask = {"both": row | column, "row": row, "column": column}[axis] & ((j <= i) | (not self.dims.causal))
        return softmax_reference(q_BTNH, k_BSKH, v_BSKH, mask if valid_BS is None else mask & valid_BS[:, None, None, :])

    def seen(self):
        width = width_of(self.options, self.dims.max_len)
        row, column = own_block(width, self.dims.max_len, False), Every(width)
        return CAUSAL & {"both": row | column, "row": row, "column": column}[self.options.axis]

    def slots(self):
        """Every key stays in some query's column, unless there are rows alone."""
        T, axis = self.dims.max_len, self.options.axis
        width = width_of(self.options, T)
        if axis == "row":
            return Slots(width, width).within(T)
        return Slots(T, min(-(-T // width) + (width if axis == "both" else 0), T))

    def flops(self, B, T, S):
        options = dataclasses.replace(self.options, width=width_of(self.options, self.dims.max_len))  # that of max_len, not of this length
        return flops(options, B, T, S, self.dims.num_heads, self.dims.head_dim, self.dims.causal)


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool) -> float:
    """Pairs counted a row of the mask at a time."""
    width, i = width_of(options, max(T, S)), np.arange(T)
    last = np.minimum(i, S - 1) if causal else np.full(T, S - 1)  # the last key that may be seen
    begin = i // width * width
    in_row = np.maximum(np.minimum(last, begin + width - 1) - begin + 1, 0)
    in_column = np.maximum((last - i % width) // width + 1, 0)
    pairs = {"row": in_row, "column": in_column, "both": in_row + in_column - (i < S)}[options.axis]
    return pair_flops(float(pairs.sum()), B, N, H)


AXIAL = Variant(
    name="axial",
    family="position-based sparse",
    options=Options,
    build=lambda options, dims, *, shared, rngs: Axial(options, dims),
    paper=Paper(
        "ho2019axial",
        "Axial Attention in Multidimensional Transformers",
        "Ho, Jonathan and Kalchbrenner, Nal and Weissenborn, Dirk and Salimans, Tim",
        2019,
        "arXiv:1912.12180",
    ),
    complexity="T (w + S / w); T sqrt(T) at w = sqrt(T)",
    flops=flops,
    time_order=1.5,
    memory_order=1.0,
    exact_when=lambda T: {"width": T},
    decode=True,
)
