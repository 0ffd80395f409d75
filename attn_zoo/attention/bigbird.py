"""BigBird as its paper defines it, position by position: a window, global tokens, and random keys for every query.

Query i sees key j when |i - j| <= window, or i or j < globals, or j is among the `random` keys drawn for i (Zaheer et al. 2020, sec. 2; its
"internal" global tokens, ITC). The form that its authors compute, in blocks, is `block`. Here the draw is without replacement from
the keys that the other two parts leave (the earlier ones of them when causal), the same for all heads. The window and the global tokens are
computed in blocks, the random keys, which fill none, are gathered, and the two, being disjoint, are merged by their logsumexp.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from attn_zoo.attention.base import Variant, softmax_reference
from attn_zoo.attention.block import BLOCK
from attn_zoo.attention.global_window import pattern
from attn_zoo.attention.pattern import MergedAttention, dense_mask, pair_flops, parts_plan
from attn_zoo.ops import backends
from attn_zoo.ops.block_mask import count_pairs
from attn_zoo.ops.draws import draw_distinct
from attn_zoo.ops.gathered import gathered_attention, listed_mask
from attn_zoo.ops.merge import merge
from attn_zoo.ops.patterns import CAUSAL, Pattern
from attn_zoo.ops.slots import attend_listed, put
from attn_zoo.spec import check_int


@dataclasses.dataclass(frozen=True)
class Options:
    """window: keys on each side; globals: positions at the start; random: keys drawn for each query; seed: of the draw."""

    window: int = 128
    globals: int = 16
    random: int = 32
    seed: int = 0

    def __post_init__(self):
        for name in ("window", "globals", "random", "seed"):
            check_int(name, getattr(self, name), 0)


def free_keys(options: Options, T: int, S: int, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """How many keys window and globals leave to each query, before its window and after it, [T] each. A global query has none left."""
    i = np.arange(T)
    before = np.maximum(np.minimum(i - options.window, S) - options.globals, 0)
    after = np.zeros(T, int) if causal else np.where(i < options.globals, 0, np.maximum(S - (i + options.window + 1), 0))
    return before, after


@functools.lru_cache(maxsize=32)
def draw(options: Options, T: int, S: int, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """(index [T, R], seen [T, R]): the random keys of each query, as gathered_attention takes them."""
    before, after = free_keys(options, T, S, causal)
    number, seen = draw_distinct(options.random, before + after, options.seed)
    after_window = np.arange(T)[:, None] + options.window + 1 + number - before[:, None]
    return np.where(seen, np.where(number < before[:, None], options.globals + number, after_window), 0).astype(np.int32), seen


class BigBird(MergedAttention):
    """Window, global tokens and random keys."""

    def pattern(self) -> Pattern:
        """The window and the global tokens."""
        return pattern(self.options.window, self.options.globals, self.dims.causal)

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        blocks = self.part(q_BTNH, k_BSKH, v_BSKH, pattern=self.pattern(), valid_BS=valid_BS)
        index, seen = draw(self.options, q_BTNH.shape[1], k_BSKH.shape[1], self.dims.causal)
        if not seen.any():
            return blocks[0]
        backend = self.beside(self.backend(valid_BS is not None))
        return merge(blocks, gathered_attention(q_BTNH, k_BSKH, v_BSKH, jnp.asarray(index), jnp.asarray(seen), valid_BS=valid_BS, backend=backend))[0]

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        T, S = q_BTNH.shape[1], k_BSKH.shape[1]
        mask = dense_mask(self.pattern(), T, S) | listed_mask(*draw(self.options, T, S, self.dims.causal), S)
        return softmax_reference(q_BTNH, k_BSKH, v_BSKH, mask if valid_BS is None else mask & valid_BS[:, None, None, :])

    def seen(self):
        """Which any key may be, by a later query's draw."""
        return CAUSAL

    def step(self, q_B1NH, k_B1KH, v_B1KH, cache):
        t, T = cache["t"], self.dims.max_len
        cache = put(k_B1KH, v_B1KH, cache, self.slots().within(cache["k"].shape[1]))
        index, seen = (jnp.asarray(x)[t] for x in draw(self.options, T, T, True))
        window, first = t - jnp.arange(self.options.window + 1), jnp.arange(min(self.options.globals, T))
        in_window = window >= 0
        all_seen = jnp.concatenate([in_window, first < t - self.options.window, seen])  # a global key in the window is there already
        return attend_listed(q_B1NH, cache, jnp.concatenate([jnp.maximum(window, 0), first, index]), all_seen)[0], cache | {"t": t + 1}

    def beside(self, backend):
        """Of the lists of random keys."""
        return backends.native_or_xla(backend)

    def plan(self, T, S, masked=False):
        index, seen = draw(self.options, T, S, self.dims.causal)
        if not seen.any():  # all keys are in the window
            return parts_plan(self, T, S, masked) | {"backend": self.backend(masked)}
        return parts_plan(self, T, S, masked, beside=index.size)


def pairs(options: Options, T: int, S: int, causal: bool) -> int:
    """All that are seen: window, globals and random keys, which are disjoint."""
    free = sum(free_keys(options, T, S, causal))
    return count_pairs(pattern(options.window, options.globals, causal), T, S) + int(np.minimum(free, options.random).sum())


BIGBIRD = Variant(
    name="bigbird",
    family="position-based sparse",
    options=Options,
    build=lambda options, dims, *, shared, rngs: BigBird(options, dims),
    paper=BLOCK.paper,
    complexity="T (W + g + r)",
    flops=lambda options, B, T, S, N, H, causal: pair_flops(pairs(options, T, S, causal), B, N, H),
    time_order=1.0,
    memory_order=1.0,
    exact_when=lambda T: {"window": 4, "globals": 2, "random": T},  # all three parts at work
    decode=True,
)
