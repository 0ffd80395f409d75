"""Luong's local attention: each query chooses a place p_t among the keys and attends to the `window` D positions on each side of it.

Luong et al. 2015, sec. 3.2. align='predictive' (local-p): p_t = S sigmoid(v_p' tanh(W_p q_t)) (eq. 9), a softmax over the keys of
[p_t - D, p_t + D] times exp(-(s - p_t)^2 / (2 sigma^2)), sigma = D / 2 (eq. 10). As in the paper these weights are not renormalized, and the
place learns through the Gaussian alone. align='monotonic' (local-m): p_t = t and no Gaussian (eq. 7), in self-attention the same as `local`.
A window that leaves the sequence loses what is outside of it; one without any key gives zeros.

Scores are q'k / sqrt(H) as everywhere in this zoo; score='dot' is Luong's q'k (eq. 8), and his `general` is what the projections to
queries and keys make of it. W_p and v_p are a head's own. Positions count from 0. S is the length of the sequence without the padding at
its end. Causal is beyond the paper, which attends to a source known as a whole: S becomes the part of it that query t sees,
p_t = min(t + 1, S) sigmoid(...), and a window ends at t.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_zoo.attention.base import Paper, Variant, repeat_kv, softmax_reference
from attn_zoo.attention.pattern import SlotDecoding, dense_mask, pair_flops, pattern_plan
from attn_zoo.ops import backends
from attn_zoo.ops.block_mask import count_pairs
from attn_zoo.ops.gathered import gathered_attention
from attn_zoo.ops.patterns import CAUSAL, Band, Pattern
from attn_zoo.ops.slots import put
from attn_zoo.spec import check_choice, check_int


@dataclasses.dataclass(frozen=True)
class Options:
    """window: D, positions on each side (the paper's is 10); align: 'predictive' or 'monotonic'; score: 'scaled_dot' or 'dot'."""

    window: int = 10
    align: str = "predictive"
    score: str = "scaled_dot"

    def __post_init__(self):
        check_int("window", self.window, 1)
        check_choice("align", self.align, ("predictive", "monotonic"))
        check_choice("score", self.score, ("scaled_dot", "dot"))


def pattern(options: Options, causal: bool) -> Pattern:
    """The window of local-m."""
    return Band(options.window, 0 if causal else options.window)


class LuongLocal(SlotDecoding):
    """A window around a predicted place, or around the query's own."""

    def __init__(self, options: Options, dims, *, shared: dict, rngs: nnx.Rngs):
        super().__init__(options, dims)
        if options.align == "predictive":
            N, H = dims.num_heads, dims.head_dim
            self.place_hidden = nnx.Param(jax.random.normal(rngs.params(), (N, H, H)) * H**-0.5)  # W_p
            self.place_weight = nnx.Param(jax.random.normal(rngs.params(), (N, H)) * H**-0.5)  # v_p

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        if self.options.align == "monotonic":
            backend = self.backend(valid_BS is not None)
            return backends.attention(q_BTNH, k_BSKH, v_BSKH, pattern=self.pattern(), valid_BS=valid_BS, scale=self.scale(), backend=backend)
        N, T, S, D = self.dims.num_heads, q_BTNH.shape[1], k_BSKH.shape[1], self.options.window
        place_BNT1 = self.places(q_BTNH, S, valid_BS)[..., None]
        R = min(2 * D + 1, S)  # the most keys that a window holds
        first_BNT1 = jnp.clip(jnp.ceil(jax.lax.stop_gradient(place_BNT1)).astype(jnp.int32) - D, 0, S - R)
        index_BNTR = first_BNT1 + jnp.arange(R)
        seen_BNTR = self.near(index_BNTR, place_BNT1, np.arange(T)[:, None])
        # Heads that share keys look at different places, so each has its own list of them.
        k_BSNH, v_BSNH = repeat_kv(k_BSKH, N), repeat_kv(v_BSKH, N)
        factor_BNTR = self.gaussian(index_BNTR, place_BNT1)
        return gathered_attention(q_BTNH, k_BSNH, v_BSNH, index_BNTR, seen_BNTR, valid_BS=valid_BS, scale=self.scale(), factor_TR=factor_BNTR, backend=self.backend())[0]

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        N, T, S = self.dims.num_heads, q_BTNH.shape[1], k_BSKH.shape[1]
        if self.options.align == "monotonic":
            return softmax_reference(q_BTNH, k_BSKH, v_BSKH, dense_mask(self.pattern(), T, S, valid_BS), scale=self.scale())
        place_BNT1, position_S = self.places(q_BTNH, S, valid_BS)[..., None], np.arange(S)
        mask_BNTS = self.near(position_S, place_BNT1, np.arange(T)[:, None]) & (True if valid_BS is None else valid_BS[:, None, None])
        # The softmax weights themselves are what attention makes of one-hot values.
        one_hot_BSNS = jnp.broadcast_to(jnp.eye(S)[:, None], (len(k_BSKH), S, N, S))
        a_BTNS = softmax_reference(q_BTNH, repeat_kv(k_BSKH, N), one_hot_BSNS, mask_BNTS, scale=self.scale())
        a_BNTS = a_BTNS.swapaxes(1, 2) * self.gaussian(position_S, place_BNT1)
        return jnp.einsum("BNTS,BSNH->BTNH", a_BNTS, repeat_kv(v_BSKH, N), precision="highest")

    def places(self, q_BTNH, S, valid_BS):
        """p_t of every head, [B, N, T], real numbers between 0 and the keys seen. Eq. 9."""
        length_B1 = jnp.full((1, 1), S) if valid_BS is None else jnp.max(jnp.where(valid_BS, jnp.arange(1, S + 1), 0), axis=1, keepdims=True)
        seen_BT = jnp.minimum(length_B1, jnp.arange(1, q_BTNH.shape[1] + 1)) if self.dims.causal else length_B1
        return seen_BT[:, None] * self.shares(q_BTNH)

    def shares(self, q_BTNH):
        """sigmoid(v_p' tanh(W_p q_t)) of every head, [B, N, T]: where in the keys its place is."""
        q_BTNH = q_BTNH.astype(jnp.promote_types(q_BTNH.dtype, jnp.float32))
        hidden_BNTR = jnp.tanh(jnp.einsum("BTNH,NHR->BNTR", q_BTNH, self.place_hidden[...], precision="highest"))
        return jax.nn.sigmoid(jnp.einsum("BNTR,NR->BNT", hidden_BNTR, self.place_weight[...], precision="highest"))

    @property
    def anywhere(self):
        return self.options.align == "predictive"

    def seen(self):
        return CAUSAL if self.options.align == "predictive" else self.pattern()

    def step(self, q_B1NH, k_B1KH, v_B1KH, cache):
        if self.options.align == "monotonic":
            o_B1NH, _, cache = self.slot_step(q_B1NH, k_B1KH, v_B1KH, cache, scale=self.scale())
            return o_B1NH, cache | {"t": cache["t"] + 1}
        t, L = cache["t"], cache["k"].shape[1]
        cache = put(k_B1KH, v_B1KH, cache, self.slots().within(L))
        place_BN11 = (t + 1) * self.shares(q_B1NH)[..., None]
        R = min(2 * self.options.window + 1, L)
        index_BN1R = jnp.clip(jnp.ceil(place_BN11).astype(jnp.int32) - self.options.window, 0, L - R) + jnp.arange(R)
        # Of the whole cache, a head reads its window alone.
        row_B, head_N = jnp.arange(len(q_B1NH)), jnp.arange(self.dims.num_heads) // (self.dims.num_heads // self.dims.num_kv_heads)
        k_BRNH, v_BRNH = (cache[name][row_B[:, None, None], index_BN1R[:, :, 0], head_N[:, None]].swapaxes(1, 2) for name in ("k", "v"))
        window_BN1R = jnp.broadcast_to(jnp.arange(R), index_BN1R.shape)
        seen_BN1R, factor_BN1R = self.near(index_BN1R, place_BN11, t), self.gaussian(index_BN1R, place_BN11)
        o_B1NH, _ = gathered_attention(q_B1NH, k_BRNH, v_BRNH, window_BN1R, seen_BN1R, scale=self.scale(), factor_TR=factor_BN1R)
        return o_B1NH, cache | {"t": t + 1}

    def near(self, s, place, t):
        """Whether key s is in the window around `place`, and not after query t when causal."""
        near = abs(s - place) <= self.options.window
        return near & (s <= t) if self.dims.causal else near

    def gaussian(self, s, place):
        """What multiplies the weight of key s, sigma = D / 2. Eq. 10."""
        sigma = self.options.window / 2
        return jnp.exp(-((s - place) ** 2) / (2 * sigma**2))

    def scale(self):
        return 1.0 if self.options.score == "dot" else self.dims.head_dim**-0.5

    def pattern(self) -> Pattern:
        return pattern(self.options, self.dims.causal)

    def backend(self, masked=False):
        if self.options.align == "predictive":
            return backends.choose_lists(self.dims.backend, self.dims.dtype)
        return backends.choose(self.dims.backend, self.pattern(), self.dims.dtype, self.dims.head_dim, masked=masked)

    def plan(self, T, S, masked=False):
        backend = self.backend(masked)
        return {"backend": backend} if self.options.align == "predictive" else pattern_plan(backend, self.pattern(), T, S, self.dims)


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool) -> float:
    """Pairs in the windows; a predicted place, no whole number, has 2 D keys around it, if so many are seen, and costs 2 H^2 + 2 H itself."""
    if options.align == "monotonic":
        return pair_flops(count_pairs(pattern(options, causal), T, S), B, N, H)
    pairs = np.minimum(2 * options.window, np.minimum(np.arange(1, T + 1), S) if causal else np.full(T, S)).sum()
    return pair_flops(float(pairs), B, N, H) + B * N * T * (2.0 * H * H + 2 * H)


LUONG_LOCAL = Variant(
    name="luong_local",
    family="dense",
    options=Options,
    build=LuongLocal,
    paper=Paper(
        "luong2015effective",
        "Effective Approaches to Attention-based Neural Machine Translation",
        "Luong, Minh-Thang and Pham, Hieu and Manning, Christopher D.",
        2015,
        "Proceedings of the 2015 Conference on Empirical Methods in Natural Language Processing",
    ),
    complexity="T W",
    flops=flops,
    time_order=1.0,
    memory_order=1.0,
    exact_when=lambda T: {"align": "monotonic", "window": T},
    decode=True,
)
