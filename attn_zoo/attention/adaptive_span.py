"""Adaptive span: every head learns how far back it looks, and pays for it.

Weights exp(s_ij) m(|i - j|), renormalized, with m(x) = clip((ramp + z - x) / ramp, 0, 1) and one span z a head, in positions
(Sukhbaatar et al. 2019, eq. 4 to 6). As in the authors' code the parameter is z / max_span, kept in [0, 1], so that an optimizer's step
size means the same at every max_span; the penalty is `penalty` times the mean of z over heads, added per layer.
Beyond the paper: |i - j| also looks ahead when not causal.

The computed window is the largest span that a head has now, rounded up to a block. It is static: `specialize` renews it from the parameter
between steps, and the step is compiled again when it has changed.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_zoo.attention.base import Loss, Paper, Statistic, Variant, softmax_reference
from attn_zoo.attention.pattern import SlotDecoding, dense_mask, pair_flops, pattern_plan
from attn_zoo.ops import backends
from attn_zoo.ops.blocked import NEG, ScoreMod
from attn_zoo.ops.patterns import Band
from attn_zoo.spec import check, check_int, check_number

BLOCK = 64  # the computed window is a multiple of this


@dataclasses.dataclass(frozen=True)
class Options:
    """max_span, ramp, init (the first z) in positions; penalty: weight of the mean span in the loss."""

    max_span: int = 1024
    ramp: int = 32
    penalty: float = 2e-6
    init: float = 128

    def __post_init__(self):
        check_int("max_span", self.max_span, 1)
        check_int("ramp", self.ramp, 1)
        check_number("penalty", self.penalty, 0)
        check_number("init", self.init, 0)
        check(self.init <= self.max_span, "init", self.init, f"must be at most max_span={self.max_span}")


@jax.custom_vjp
def _clip(x):
    """clip(x, 0, 1) whose gradient vanishes only where a descent step would leave [0, 1]: a span at its bound can come back."""
    return jnp.clip(x, 0.0, 1.0)


_clip.defvjp(lambda x: (_clip(x), x), lambda x, g: (jnp.where(((x <= 0) & (g > 0)) | ((x >= 1) & (g < 0)), 0.0, g),))


def soft_mask(distance, span, ramp):
    """m(x) of eq. 5."""
    return jnp.clip((ramp + span - distance) / ramp, 0.0, 1.0)


class AdaptiveSpan(SlotDecoding):
    """A learned soft window per head."""

    def __init__(self, options: Options, dims, *, shared: dict, rngs: nnx.Rngs):
        super().__init__(options, dims)
        self.ratio = nnx.Param(jnp.full((dims.num_heads,), options.init / options.max_span, jnp.float32))
        self.window = self._window(float(np.float32(options.max_span) * np.float32(options.init / options.max_span)))  # as learned_spans has it
        self.penalty = Loss(jnp.zeros(()))
        self.spans = Statistic(jnp.full((dims.num_heads,), options.init, jnp.float32))

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        span_N = self.computed_spans()
        self.leave("penalty", self.options.penalty * span_N.mean())
        self.leave("spans", jax.lax.stop_gradient(span_N))
        mod = ScoreMod(lambda scores, i, j, span: _add_log_mask(scores, abs(i - j), span, self.options.ramp), span_N, by_distance=True)
        return backends.attention(q_BTNH, k_BSKH, v_BSKH, pattern=self.pattern(), valid_BS=valid_BS, score_mod=mod, backend=self.backend(valid_BS is not None))

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        T, S = q_BTNH.shape[1], k_BSKH.shape[1]
        distance_TS = abs(np.arange(T)[:, None] - np.arange(S)[None, :])
        m_NTS = soft_mask(distance_TS, self.learned_spans()[:, None, None], self.options.ramp)
        causal = dense_mask(Band(ahead=0 if self.dims.causal else None), T, S, valid_BS)
        return softmax_reference(q_BTNH, k_BSKH, v_BSKH, causal & (m_NTS > 0), bias=jnp.log(jnp.where(m_NTS > 0, m_NTS, 1.0)))

    def learned_spans(self):
        """z of every head, [N], in positions."""
        return self.options.max_span * _clip(self.ratio[...])

    def computed_spans(self):
        """The same; a span that outgrew the window since `specialize` is NaN, rather than being cut unnoticed."""
        span_N = self.learned_spans()
        return span_N if self.window >= self.dims.max_len else jnp.where(self.options.ramp + span_N <= self.window + 1, span_N, jnp.nan)

    def seen(self):
        return self.pattern()

    def step(self, q_B1NH, k_B1KH, v_B1KH, cache):
        def bias(j_L):
            return _add_log_mask(0.0, cache["t"] - j_L, self.computed_spans()[:, None], self.options.ramp)

        o_B1NH, _, cache = self.slot_step(q_B1NH, k_B1KH, v_B1KH, cache, bias=bias)
        return o_B1NH, cache | {"t": cache["t"] + 1}

    def pattern(self):
        """The band that covers the largest span."""
        return Band(self.window, 0 if self.dims.causal else self.window)

    def specialize(self):
        span = float(jnp.max(self.learned_spans()))
        if math.isfinite(span):  # what is not shows in the loss
            self.window = self._window(span)

    def _window(self, span: float) -> int:
        reach = math.ceil(self.options.ramp + span) - 1  # the largest whole distance with m > 0
        return min(-(-reach // BLOCK) * BLOCK, self.dims.max_len)

    def flops(self, B, T, S):
        """Over the spans learned so far; an abstract layer (nnx.eval_shape) is counted at its first ones."""
        abstract = not isinstance(self.ratio.get_value(), jax.Array)
        spans = [self.options.init] * self.dims.num_heads if abstract else np.asarray(self.learned_spans()).tolist()
        return sum(flops(dataclasses.replace(self.options, init=z), B, T, S, 1, self.dims.head_dim, self.dims.causal) for z in spans)

    def backend(self, masked=False):
        return backends.choose(self.dims.backend, self.pattern(), self.dims.dtype, self.dims.head_dim, masked=masked, modified="by distance")

    def plan(self, T, S, masked=False):
        return pattern_plan(self.backend(masked), self.pattern(), T, S, self.dims) | {"window": self.window}


def _add_log_mask(scores, distance, span, ramp):
    m = soft_mask(distance, span, ramp)
    # A span that is NaN stays NaN: through the order of the two cases, and where a GPU's minimum and maximum drop it, through the sum.
    return jnp.where(m <= 0, NEG + 0 * span, scores + jnp.log(jnp.where(m <= 0, 1.0, m)))


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool) -> float:
    """Pairs with m > 0 at span `init`."""
    reach = math.ceil(options.ramp + options.init) - 1
    i = np.arange(T)
    last = np.minimum(i if causal else i + reach, S - 1)
    return pair_flops(float(np.maximum(last - np.maximum(i - reach, 0) + 1, 0).sum()), B, N, H)


ADAPTIVE_SPAN = Variant(
    name="adaptive_span",
    family="adaptive",
    options=Options,
    build=AdaptiveSpan,
    paper=Paper(
        "sukhbaatar2019adaptive",
        "Adaptive Attention Span in Transformers",
        "Sukhbaatar, Sainbayar and Grave, Edouard and Bojanowski, Piotr and Joulin, Armand",
        2019,
        "Proceedings of the 57th Annual Meeting of the Association for Computational Linguistics",
    ),
    complexity="T max(z)",
    flops=flops,
    time_order=1.0,
    memory_order=1.0,
    exact_when=lambda T: {"max_span": T, "init": T},
    decode=True,
    state_order=0.0,
)
