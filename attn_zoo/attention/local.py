"""Restricted self-attention: a query sees the keys at most `window` positions away, |i - j| <= W (causal: itself and W back).

Proposed as "restricted" self-attention in Vaswani et al. 2017, sec. 4; as local windows in Liu et al. 2018 and Beltagy et al. 2020.
Exact for every i: a true sliding window, not blocks that see their neighbours.
"""

import dataclasses

from attn_zoo.attention.base import Paper, Variant
from attn_zoo.attention.pattern import PatternAttention, pair_flops
from attn_zoo.ops.block_mask import count_pairs
from attn_zoo.ops.patterns import Band, Pattern
from attn_zoo.spec import check_int


@dataclasses.dataclass(frozen=True)
class Options:
    """window: how many positions away, on each side, a key may be."""

    window: int = 256

    def __post_init__(self):
        check_int("window", self.window, 0)


def pattern(options: Options, causal: bool) -> Pattern:
    """i - window <= j <= i + window, or <= i when causal."""
    return Band(options.window, 0 if causal else options.window)


class Local(PatternAttention):
    """A sliding window."""

    def pattern(self, T, S):
        return pattern(self.options, self.dims.causal)


LOCAL = Variant(
    name="local",
    family="position-based sparse",
    options=Options,
    build=lambda options, dims, *, shared, rngs: Local(options, dims),
    paper=Paper(
        "beltagy2020longformer",
        "Longformer: The Long-Document Transformer",
        "Beltagy, Iz and Peters, Matthew E. and Cohan, Arman",
        2020,
        "arXiv:2004.05150",
    ),
    complexity="T W",
    flops=lambda options, B, T, S, N, H, causal: pair_flops(count_pairs(pattern(options, causal), T, S), B, N, H),
    time_order=1.0,
    memory_order=1.0,
    exact_when=lambda T: {"window": T},
    decode=True,
    state_order=0.0,
)
