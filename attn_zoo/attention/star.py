"""Star attention: a query sees its neighbours on a ring and one relay node, which has seen every position.

The Star-Transformer (Guo et al. 2019, algorithm 1): satellites that see i - 1, i, i + 1 and the relay, and a relay that attends to all of them.
There, both have states that persist over cycles; here, a layer is one cycle and knows queries, keys and values alone. So the relay's query is
learned, one a head, instead of projected from its state; it starts at zero, which makes the relay the mean of all positions, as the paper's
starts. The relay attends to the satellites before their update instead of after it, and its attended key and value stand for those of its
state. The token embeddings, which satellites also see in every cycle of the paper, are left out.

Not causal, the ring is closed, as in the paper: position 0 neighbours T - 1. Causal, beyond the paper: query i sees the neighbours before it and
a relay that has seen positions up to i.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_zoo.attention.base import Paper, Variant, repeat_kv
from attn_zoo.attention.pattern import SlotDecoding, pair_flops, pattern_plan
from attn_zoo.ops import backends
from attn_zoo.ops.merge import merge
from attn_zoo.ops.patterns import FULL, Band, Pattern
from attn_zoo.ops.softmax_mean import softmax_mean
from attn_zoo.spec import check, check_int


@dataclasses.dataclass(frozen=True)
class Options:
    """ring: neighbours on each side; relay: whether there is one."""

    ring: int = 1
    relay: bool = True

    def __post_init__(self):
        check_int("ring", self.ring, 0)
        check(isinstance(self.relay, bool), "relay", self.relay, "must be True or False")


def ring_pattern(ring: int, T: int, causal: bool) -> tuple[Pattern, int]:
    """(the pattern, how many keys of each end to repeat beyond the other): a closed ring is a band over keys that are continued round it."""
    if causal:
        return Band(ring, 0), 0
    return (FULL, 0) if 2 * ring + 1 >= T else (Band(0, 2 * ring), ring)


class Star(SlotDecoding):
    """A ring and a relay."""

    has_parts = True

    def __init__(self, options: Options, dims, *, shared: dict, rngs: nnx.Rngs):
        super().__init__(options, dims)
        if options.relay:
            self.relay_query = nnx.Param(jnp.zeros((dims.num_heads, dims.head_dim)))

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        pattern, wrap = ring_pattern(self.options.ring, q_BTNH.shape[1], self.dims.causal)
        round_ring = lambda x: x if x is None or not wrap else jnp.concatenate([x[:, -wrap:], x, x[:, :wrap]], axis=1)
        ring = self.part(q_BTNH, *map(round_ring, (k_BSKH, v_BSKH)), pattern=pattern, valid_BS=round_ring(valid_BS))
        if not self.options.relay:
            return ring[0]
        q_BTNH, k_BSNH, v_BSNH = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (q_BTNH, *self.heads(k_BSKH, v_BSKH)))
        score_BSN = self.scale * jnp.einsum("NH,BSNH->BSN", self.relay_query[...], k_BSNH, precision="highest")
        if valid_BS is not None:
            score_BSN = jnp.where(valid_BS[:, :, None], score_BSN, -jnp.inf)
        backend = self.beside(self.backend(valid_BS is not None))
        relay_BTNR, seen_BTN = softmax_mean(score_BSN, jnp.concatenate([k_BSNH, v_BSNH], axis=-1), causal=self.dims.causal, backend=backend)
        return self.with_relay(q_BTNH, ring, jnp.broadcast_to(relay_BTNR, (*q_BTNH.shape[:3], relay_BTNR.shape[-1])), seen_BTN)

    def with_relay(self, q_BTNH, ring, relay_BTNR, seen_BTN):
        """Attention to the ring, (output, logsumexp), merged with that to the relay's key and value, where it has seen anything."""
        relay_k, relay_v = jnp.split(relay_BTNR, 2, axis=-1)
        # Attention to one key: its output is the value, its logsumexp the score.
        lse_BTN = jnp.where(seen_BTN, self.scale * jnp.einsum("BTNH,BTNH->BTN", q_BTNH, relay_k, precision="highest"), -jnp.inf)
        return merge(ring, (relay_v, lse_BTN))[0]

    def seen(self):
        return ring_pattern(self.options.ring, self.dims.max_len, True)[0]

    def init_cache(self, B, max_len):
        """The ring's keys, and the relay's softmax as it runs: largest score, sum of weights, weighted sum of keys and values."""
        cache, N = super().init_cache(B, max_len), self.dims.num_heads
        if not self.options.relay:
            return cache
        return cache | {"top": jnp.full((B, N), -jnp.inf), "total": jnp.zeros((B, N)), "sum": jnp.zeros((B, N, 2 * self.dims.head_dim))}

    def step(self, q_B1NH, k_B1KH, v_B1KH, cache):
        o_B1NH, lse_B1N, cache = self.slot_step(q_B1NH, k_B1KH, v_B1KH, cache)
        if self.options.relay:
            q_B1NH, k_BNH, v_BNH = (x.astype(jnp.float32) for x in (q_B1NH, *(x[:, 0] for x in self.heads(k_B1KH, v_B1KH))))
            score_BN = self.scale * jnp.einsum("NH,BNH->BN", self.relay_query[...], k_BNH, precision="highest")
            top_BN = jnp.maximum(cache["top"], score_BN)
            old_BN, new_BN = jnp.exp(cache["top"] - top_BN), jnp.exp(score_BN - top_BN)
            total_BN = cache["total"] * old_BN + new_BN
            sum_BNR = cache["sum"] * old_BN[..., None] + jnp.concatenate([k_BNH, v_BNH], axis=-1) * new_BN[..., None]
            relay_B1NR = (sum_BNR / total_BN[..., None])[:, None]
            o_B1NH = self.with_relay(q_B1NH, (o_B1NH, lse_B1N), relay_B1NR, jnp.ones(lse_B1N.shape, bool)).astype(o_B1NH.dtype)
            cache = cache | {"top": top_BN, "total": total_BN, "sum": sum_BNR}
        return o_B1NH, cache | {"t": cache["t"] + 1}

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        """The relay's attention for every query anew, and its key and value beside those of the ring, in one dense softmax."""
        (B, T), (k_BSNH, v_BSNH) = q_BTNH.shape[:2], self.heads(k_BSKH, v_BSKH)
        i, j = np.arange(T)[:, None], np.arange(T)[None, :]
        before = (j <= i) if self.dims.causal else np.ones((T, T), bool)
        distance = abs(i - j) if self.dims.causal else np.minimum(abs(i - j), T - abs(i - j))
        valid_B11S = jnp.ones((B, 1, 1, T), bool) if valid_BS is None else valid_BS[:, None, None, :]
        mask_BNTS = before & valid_B11S
        scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, precision="highest") * self.scale
        ring_BNTS = jnp.where((distance <= self.options.ring) & mask_BNTS, scores_BNTS, -jnp.inf)
        if not self.options.relay:
            return jnp.einsum("BNTS,BSNH->BTNH", _softmax(ring_BNTS), v_BSNH, precision="highest")
        relay_score_BNS = jnp.einsum("NH,BSNH->BNS", self.relay_query[...], k_BSNH, precision="highest") * self.scale
        weights_BNTS = _softmax(jnp.where(mask_BNTS, relay_score_BNS[:, :, None], -jnp.inf))
        relay_k, relay_v = (jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, x, precision="highest") for x in (k_BSNH, v_BSNH))
        to_relay_BNT = jnp.einsum("BTNH,BTNH->BNT", q_BTNH, relay_k, precision="highest") * self.scale
        to_relay_BNT = jnp.where(mask_BNTS.any(axis=-1), to_relay_BNT, -jnp.inf)
        weights = _softmax(jnp.concatenate([ring_BNTS, to_relay_BNT[..., None]], axis=-1))
        o_BTNH = jnp.einsum("BNTS,BSNH->BTNH", weights[..., :-1], v_BSNH, precision="highest")
        return o_BTNH + jnp.moveaxis(weights[..., -1], 1, 2)[..., None] * relay_v

    @property
    def scale(self) -> float:
        return self.dims.head_dim**-0.5

    def heads(self, k_BSKH, v_BSKH):
        """Keys and values a query head, since a relay is one a query head."""
        return repeat_kv(k_BSKH, self.dims.num_heads), repeat_kv(v_BSKH, self.dims.num_heads)

    def beside(self, backend):
        """Of the relay's running mean; the one mean of all keys is always XLA's."""
        return backends.native_or_xla(backend) if self.options.relay and self.dims.causal else backend

    def plan(self, T, S, masked=False):
        pattern, wrap = ring_pattern(self.options.ring, T, self.dims.causal)
        seen = {"backend": self.engines(masked), "density": pairs(self.options, T, self.dims.causal) / (T * S)}
        return pattern_plan(self.backend(masked), pattern, T, S + 2 * wrap, self.dims) | seen


def _softmax(scores):
    """Over the last axis; a row of -inf gives zeros."""
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(top > -jnp.inf, top, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    return weights / jnp.where(total == 0, 1.0, total)


def pairs(options: Options, T: int, causal: bool) -> int:
    """Positions and relay that the queries see."""
    near = np.minimum(np.arange(T), options.ring) + 1 if causal else np.full(T, min(2 * options.ring + 1, T))
    return int(near.sum()) + T * options.relay


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool) -> float:
    """Pairs; and the relay's own attention, one score and two weighted sums a position."""
    return pair_flops(pairs(options, T, causal), B, N, H) + (6.0 * B * N * S * H if options.relay else 0.0)


STAR = Variant(
    name="star",
    family="position-based sparse",
    options=Options,
    build=Star,
    paper=Paper(
        "guo2019star",
        "Star-Transformer",
        "Guo, Qipeng and Qiu, Xipeng and Liu, Pengfei and Shao, Yunfan and Xue, Xiangyang and Zhang, Zheng",
        2019,
        "Proceedings of the 2019 Conference of the North American Chapter of the Association for Computational Linguistics",
    ),
    complexity="T",
    flops=flops,
    time_order=1.0,
    memory_order=1.0,
    exact_when=lambda T: {"ring": T, "relay": False},
    decode=True,
    state_order=0.0,
    cross="its ring joins neighbours within one sequence",
)
