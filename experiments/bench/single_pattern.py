"""Which variants are softmax attention over a single pattern, so that another implementation can be given the same pairs."""

from attn_zoo.attention.base import Attention
from attn_zoo.attention.pattern import PatternAttention, SlotDecoding, pair_flops
from attn_zoo.ops.block_mask import count_pairs
from attn_zoo.ops.patterns import Pattern


def single_pattern(attention: Attention, T: int) -> Pattern | None:
    """The pairs that a variant sees among T positions, built for them, or None where it does more than a softmax over pairs that positions decide.

    Those that the zoo computes in parts, to be merged, tell what a decoder sees; it is theirs if it holds no pair more than they count, which takes seconds to
    count at T = 32,768.
    """
    seen = claimed_pattern(attention, T)
    if seen is None or isinstance(attention, PatternAttention):
        return seen
    return seen if pair_flops(count_pairs(seen, T, T), 1, attention.dims.num_heads, attention.dims.head_dim) == attention.flops(1, T, T) else None


def claimed_pattern(attention: Attention, T: int) -> Pattern | None:
    """The same, uncounted."""
    if isinstance(attention, PatternAttention):
        return attention.pattern(T, T)
    in_parts = isinstance(attention, SlotDecoding) and attention.variant.family == "position-based sparse" and attention.dims.causal
    return attention.seen() if in_parts else None
