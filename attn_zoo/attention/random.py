"""Random attention: every query sees `k` random keys, drawn once and the same for all heads and calls.

The random part of Zaheer et al. 2020, sec. 2, alone. A draw is without replacement from the keys that the query may see: all S, or those
with j <= i when causal, so that a causal draw does not change as the sequence grows. Its pairs fill no blocks: keys are gathered.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from attn_zoo.attention.base import Variant, softmax_reference
from attn_zoo.attention.block import BLOCK
from attn_zoo.attention.pattern import SlotDecoding, pair_flops
from attn_zoo.ops import backends
from attn_zoo.ops.draws import draw_distinct
from attn_zoo.ops.gathered import gathered_attention, listed_mask
from attn_zoo.ops.patterns import CAUSAL
from attn_zoo.ops.slots import attend_listed, put
from attn_zoo.spec import check_int


@dataclasses.dataclass(frozen=True)
class Options:
    """k: keys that a query sees; seed: of the draw."""

    k: int = 32
    seed: int = 0

    def __post_init__(self):
        check_int("k", self.k, 1)
        check_int("seed", self.seed, 0)


def visible(T: int, S: int, causal: bool) -> np.ndarray:
    """How many keys each query draws among, [T]: they are the first ones."""
    return np.minimum(np.arange(T) + 1, S) if causal else np.full(T, S)


@functools.lru_cache(maxsize=32)
def draw(options: Options, T: int, S: int, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """(index [T, R], seen [T, R]): the keys of each query, as gathered_attention takes them."""
    return draw_distinct(options.k, visible(T, S, causal), options.seed)


class Random(SlotDecoding):
    """A fixed random graph."""

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        index, seen = draw(self.options, q_BTNH.shape[1], k_BSKH.shape[1], self.dims.causal)
        return gathered_attention(q_BTNH, k_BSKH, v_BSKH, jnp.asarray(index), jnp.asarray(seen), valid_BS=valid_BS, backend=self.backend())[0]

    def backend(self, masked=False):
        return backends.choose_lists(self.dims.backend, self.dims.dtype)

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        T, S = q_BTNH.shape[1], k_BSKH.shape[1]
        mask = listed_mask(*draw(self.options, T, S, self.dims.causal), S)
        return softmax_reference(q_BTNH, k_BSKH, v_BSKH, mask if valid_BS is None else mask & valid_BS[:, None, None, :])

    def seen(self):
        """Which any key may be, by a later query."""
        return CAUSAL

    def step(self, q_B1NH, k_B1KH, v_B1KH, cache):
        t, T = cache["t"], self.dims.max_len
        cache = put(k_B1KH, v_B1KH, cache, self.slots().within(cache["k"].shape[1]))
        index, seen = draw(self.options, T, T, True)
        return attend_listed(q_B1NH, cache, jnp.asarray(index)[t], jnp.asarray(seen)[t])[0], cache | {"t": t + 1}


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool) -> float:
    """min(k, visible) pairs a row."""
    return pair_flops(float(np.minimum(visible(T, S, causal), options.k).sum()), B, N, H)


RANDOM = Variant(
    name="random",
    family="position-based sparse",
    options=Options,
    build=lambda options, dims, *, shared, rngs: Random(options, dims),
    paper=BLOCK.paper,
    complexity="T k",
    flops=flops,
    time_order=1.0,
    memory_order=1.0,
    exact_when=lambda T: {"k": T},
    decode=True,
)
