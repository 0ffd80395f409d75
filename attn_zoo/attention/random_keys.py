"""Random attention: every query sees `k` random keys, drawn once and the same for all heads and calls.

The random part of Zaheer et al. 2020, sec. 2, alone. Row i's draw, without replacement, follows from (seed, i) and the number of keys it may
see: all S, or those with j <= i when causal, so a causal draw does not change as the sequence grows. The pairs fill no blocks:
keys are gathered.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from attn_zoo.attention.base import Attention, Variant, softmax_reference
from attn_zoo.attention.block import BLOCK
from attn_zoo.attention.pattern import pair_flops
from attn_zoo.ops.gathered import gathered_attention
from attn_zoo.spec import check_int


@dataclasses.dataclass(frozen=True)
class Options:
    """k: keys a query sees; seed: of the draw."""

    k: int = 32
    seed: int = 0

    def __post_init__(self):
        check_int("k", self.k, 1)
        check_int("seed", self.seed, 0)


@functools.lru_cache(maxsize=32)
def draw(count: int, seed: int, T: int, S: int, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """(index [T, R] int32, seen [T, R]): the keys of each query; unused places are not seen."""
    R = min(count, S)
    index, seen = np.zeros((T, R), np.int32), np.zeros((T, R), bool)
    for i in range(T):
        among = min(i + 1, S) if causal else S
        n = min(R, among)
        index[i, :n] = np.random.default_rng((seed, i)).choice(among, n, replace=False, shuffle=False)
        seen[i, :n] = True
    return index, seen


class RandomKeys(Attention):
    """A fixed random graph."""

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        index, seen = draw(self.options.k, self.options.seed, q_BTNH.shape[1], k_BSKH.shape[1], self.dims.causal)
        return gathered_attention(q_BTNH, k_BSKH, v_BSKH, jnp.asarray(index), jnp.asarray(seen), valid_BS=valid_BS)[0]

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        T, S = q_BTNH.shape[1], k_BSKH.shape[1]
        index, seen = draw(self.options.k, self.options.seed, T, S, self.dims.causal)
        mask = np.zeros((T, S), bool)
        rows, places = np.nonzero(seen)
        mask[rows, index[rows, places]] = True
        return softmax_reference(q_BTNH, k_BSKH, v_BSKH, mask if valid_BS is None else mask & valid_BS[:, None, None, :])


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool) -> float:
    """min(k, visible) pairs a row."""
    among = np.minimum(np.arange(T) + 1, S) if causal else np.full(T, S)
    return pair_flops(float(np.minimum(among, options.k).sum()), B, N, H)


RANDOM = Variant(
    name="random",
    family="position-based sparse",
    options=Options,
    build=lambda options, dims, *, shared, rngs: RandomKeys(options, dims),
    paper=BLOCK.paper,
    complexity="T k",
    flops=flops,
    time_order=1.0,
    memory_order=1.0,
    exact_when=lambda T: {"k": T},
)
