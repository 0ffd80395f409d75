"""Scaled dot-product attention: every query sees every key. softmax(q k' / sqrt(H)) v, in memory linear in T.

Heads, masks and the scale as in Vaswani et al. 2017, eq. 1; K < N shares key/value heads among queries (Shazeer 2019, Ainslie et al. 2023).
"""

import dataclasses

from attn_zoo.attention.base import Paper, Variant
from attn_zoo.attention.pattern import PatternAttention, pair_flops
from attn_zoo.ops.block_mask import count_pairs
from attn_zoo.ops.patterns import CAUSAL, FULL, Pattern


@dataclasses.dataclass(frozen=True)
class Options:
    """Full attention has no options."""


def pattern(causal: bool) -> Pattern:
    """All pairs, or those with j <= i."""
    return CAUSAL if causal else FULL


class Full(PatternAttention):
    """The field's baseline."""

    anywhere = True

    def pattern(self, T, S):
        return pattern(self.dims.causal)


FULL_VARIANT = Variant(
    name="full",
    family="dense",
    options=Options,
    build=lambda options, dims, *, shared, rngs: Full(options, dims),
    paper=Paper(
        "vaswani2017attention",
        "Attention Is All You Need",
        "Vaswani, Ashish and Shazeer, Noam and Parmar, Niki and Uszkoreit, Jakob and Jones, Llion and Gomez, Aidan N. and Kaiser, {\\L}ukasz and Polosukhin, Illia",
        2017,
        "Advances in Neural Information Processing Systems 30",
    ),
    complexity="T S",
    flops=lambda options, B, T, S, N, H, causal: pair_flops(count_pairs(pattern(causal), T, S), B, N, H),
    time_order=2.0,
    memory_order=1.0,
    exact_when=lambda T: {},
    decode=True,
)
