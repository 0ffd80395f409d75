"""Block-local attention: the sequence is cut into blocks, and a query sees its own block alone, i // b == j // b.

The "local attention" of Liu et al. 2018, sec. 4.2.2 ("within each block independently"); Image Transformer's and blockwise attention's
simplest form.
"""

import dataclasses

from attn_zoo.attention.base import Paper, Variant
from attn_zoo.attention.pattern import PatternAttention, pair_flops
from attn_zoo.ops.block_mask import count_pairs
from attn_zoo.ops.patterns import CAUSAL, BlockTable, Pattern
from attn_zoo.spec import check_int

LIU2018 = Paper(
    "liu2018generating",
    "Generating Wikipedia by Summarizing Long Sequences",
    "Liu, Peter J. and Saleh, Mohammad and Pot, Etienne and Goodrich, Ben and Sepassi, Ryan and Kaiser, {\\L}ukasz and Shazeer, Noam",
    2018,
    "International Conference on Learning Representations",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """block: positions in a block."""

    block: int = 256

    def __post_init__(self):
        check_int("block", self.block, 1)


def pattern(block: int, T: int, causal: bool) -> Pattern:
    """Own block; earlier positions of it when causal."""
    own = BlockTable(block, tuple((I,) for I in range(-(-T // block))))
    return CAUSAL & own if causal else own


class BlockLocal(PatternAttention):
    """Blocks that do not see each other."""

    def pattern(self, T, S):
        return pattern(self.options.block, T, self.dims.causal)


BLOCK_LOCAL = Variant(
    name="block_local",
    family="position-based sparse",
    options=Options,
    build=lambda options, dims, *, shared, rngs: BlockLocal(options, dims),
    paper=LIU2018,
    complexity="T b",
    flops=lambda options, B, T, S, N, H, causal: pair_flops(count_pairs(pattern(options.block, T, causal), T, S), B, N, H),
    time_order=1.0,
    memory_order=1.0,
    exact_when=lambda T: {"block": T},
    decode=True,
    state_order=0.0,
)
