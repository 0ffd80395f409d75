"""Block-sparse attention in BigBird's form: a window of blocks, global blocks, and random blocks.

With I = i // block and J = j // block, query i sees key j when |I - J| <= window_blocks, or I or J < global_blocks, or J is among
the random_blocks drawn for I (Zaheer et al. 2020, sec. 2, "internal transformer construction"). The draw is without replacement from the
blocks that the window and the global blocks leave (earlier blocks when causal), fixed by (seed, I) alone.
"""

import dataclasses
import functools

import numpy as np

from attn_zoo.attention.base import Paper, Variant
from attn_zoo.attention.pattern import PatternAttention, pair_flops
from attn_zoo.ops.block_mask import count_pairs
from attn_zoo.ops.patterns import CAUSAL, BlockTable, Pattern, Prefix
from attn_zoo.spec import check_int


@dataclasses.dataclass(frozen=True)
class Options:
    """block: positions in a block; the other counts are blocks, and any of them may be 0; seed: of the random draw."""

    block: int = 64
    window_blocks: int = 1
    global_blocks: int = 1
    random_blocks: int = 2
    seed: int = 0

    def __post_init__(self):
        check_int("block", self.block, 1)
        for name in ("window_blocks", "global_blocks", "random_blocks", "seed"):
            check_int(name, getattr(self, name), 0)


@functools.lru_cache(maxsize=64)
def pattern(options: Options, T: int, S: int, causal: bool) -> Pattern:
    """The union of the three parts over T queries and S keys."""
    rows, columns = -(-T // options.block), -(-S // options.block)
    table = tuple(tuple(_window(options, I, columns)) + tuple(_draw(options, I, columns, causal)) for I in range(rows))
    seen = Prefix(options.global_blocks * options.block) | BlockTable(options.block, table)
    return CAUSAL & seen if causal else seen


def _window(options: Options, I: int, columns: int) -> range:
    return range(max(0, I - options.window_blocks), min(columns, I + options.window_blocks + 1))


def _draw(options: Options, I: int, columns: int, causal: bool) -> list[int]:
    window = _window(options, I, columns)
    first, last = options.global_blocks, min(columns, window.start if causal else columns)
    left = [J for J in range(first, last) if J not in window]
    if I < options.global_blocks or not left or not options.random_blocks:
        return []
    draw = np.random.default_rng((options.seed, I)).choice(left, size=min(options.random_blocks, len(left)), replace=False)
    return sorted(draw.tolist())


class Block(PatternAttention):
    """Window, global and random blocks."""

    def pattern(self, T, S):
        return pattern(self.options, T, S, self.dims.causal)


BLOCK = Variant(
    name="block",
    family="position-based sparse",
    options=Options,
    build=lambda options, dims, *, shared, rngs: Block(options, dims),
    paper=Paper(
        "zaheer2020bigbird",
        "Big Bird: Transformers for Longer Sequences",
        "Zaheer, Manzil and Guruganesh, Guru and Dubey, Kumar Avinava and Ainslie, Joshua and Alberti, Chris and Ontanon, Santiago and Pham, Philip and Ravula, Anirudh and Wang, Qifan and Yang, Li and Ahmed, Amr",
        2020,
        "Advances in Neural Information Processing Systems 33",
    ),
    complexity="T b (2w + 1 + 2g + r)",
    flops=lambda options, B, T, S, N, H, causal: pair_flops(count_pairs(pattern(options, T, S, causal), T, S), B, N, H),
    time_order=1.0,
    memory_order=1.0,
    exact_when=lambda T: {"block": 16, "window_blocks": -(-T // 16), "global_blocks": 0, "random_blocks": 0},
    decode=True,
)
