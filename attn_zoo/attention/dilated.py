"""Dilated sliding window: `window` keys on each side, `dilation` positions apart; |i - j| <= w d and (i - j) divisible by d.

Beltagy et al. 2020, sec. 3.1, fig. 2c. The sequence is folded to (T / d, d), where the dilated window is a plain one.
"""

import dataclasses

import numpy as np

from attn_zoo.attention.base import Variant, softmax_reference
from attn_zoo.attention.local import LOCAL
from attn_zoo.attention.pattern import MergedAttention, pair_flops
from attn_zoo.ops.fold import fold, fold_valid, unfold
from attn_zoo.ops.patterns import Band, Every
from attn_zoo.ops.slots import Slots
from attn_zoo.spec import check_int


@dataclasses.dataclass(frozen=True)
class Options:
    """window: keys on each side; dilation: positions between them."""

    window: int = 128
    dilation: int = 2

    def __post_init__(self):
        check_int("window", self.window, 0)
        check_int("dilation", self.dilation, 1)


class Dilated(MergedAttention):
    """A sliding window with gaps."""

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        (B, T), S, w = q_BTNH.shape[:2], k_BSKH.shape[1], self.options.window
        d = min(self.options.dilation, max(T, S))  # beyond, a query sees itself alone, and folding would only pad
        valid = fold_valid(valid_BS, B, S, d)
        band = Band(w, 0 if self.dims.causal else w)
        return unfold(self.part(*(fold(x, d) for x in (q_BTNH, k_BSKH, v_BSKH)), pattern=band, valid_BS=valid)[0], d, T)

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        i, j = np.arange(q_BTNH.shape[1])[:, None], np.arange(k_BSKH.shape[1])[None, :]
        d, w = self.options.dilation, self.options.window
        mask = (abs(i - j) <= w * d) & ((i - j) % d == 0) & ((j <= i) | (not self.dims.causal))
        return softmax_reference(q_BTNH, k_BSKH, v_BSKH, mask if valid_BS is None else mask & valid_BS[:, None, None, :])

    def seen(self):
        return Band(self.options.window * self.options.dilation, 0) & Every(self.options.dilation)

    def slots(self):
        """A ring as long as the window with its gaps."""
        return Slots(self.options.window * self.options.dilation + 1, self.options.window + 1).within(self.dims.max_len)


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool) -> float:
    """Pairs counted a row at a time: steps of d back and ahead that stay inside."""
    i, d, w = np.arange(T), options.dilation, options.window
    ahead = np.zeros(T, int) if causal else np.minimum(w, (S - 1 - i) // d)  # negative where even j = i is beyond S
    back = np.minimum(w, i // d)
    return pair_flops(float(np.maximum(back + np.where(i < S, ahead, (S - 1 - i) // d) + 1, 0).sum()), B, N, H)


DILATED = Variant(
    name="dilated",
    family="position-based sparse",
    options=Options,
    build=lambda options, dims, *, shared, rngs: Dilated(options, dims),
    paper=LOCAL.paper,
    complexity="T W",
    flops=flops,
    time_order=1.0,
    memory_order=1.0,
    exact_when=lambda T: {"window": T, "dilation": 1},
    decode=True,
    state_order=0.0,
)
