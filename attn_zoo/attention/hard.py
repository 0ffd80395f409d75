"""Hard attention: each query looks at one key, drawn from the softmax weights, and learns where to look from how well that went.

Xu et al. 2015, sec. 4.1: s_t ~ Multinoulli(softmax of the scores), o_t = v_{s_t} (eq. 8 and 9). A draw has no derivative, so the weights learn by
REINFORCE (eq. 11 and 12; Williams 1992): the gradient of the expected loss is that of the loss at the sample plus, for each example,
    score_weight (loss - baseline) d log p(samples) - entropy_weight d H.
The layer leaves log p as a ScoreFunction; the train step, which alone knows the loss, multiplies, and keeps the moving baseline. As in the
paper an example takes, with probability `expected`, here a layer, the softmax average in place of samples, and then adds no score term.
estimator='straight_through' is a later alternative, and needs no loss: the same sample forward, and backward the gradient of the Gumbel-softmax
relaxation exp((score + gumbel) / temperature), whose largest entry is the sample (Jang et al. 2017, sec. 2.2).
Without a random key (evaluation) the key of the largest score is taken, and queries and keys get no gradient.

Samples are drawn a query and head, from scaled dot products; the paper's are one a word, from a network on region and state. The entropy is
the mean over queries and heads, so that its weight means the same at every length. Memory is linear in T: draws are argmaxima of scores and Gumbel
noise, found block by block; log p and H come from logsumexp and mean key of softmax attention, on the layer's backend.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attn_zoo.attention.base import Bound, Loss, Paper, ScoreFunction, Statistic, Variant, repeat_kv
from attn_zoo.attention.full import pattern
from attn_zoo.attention.pattern import SlotDecoding, dense_mask
from attn_zoo.ops import backends
from attn_zoo.ops.block_mask import count_pairs
from attn_zoo.ops.blocked import NEG, TILE_BYTES, ScoreMod, blocked_attention
from attn_zoo.ops.native_gathered import native_best_keys
from attn_zoo.ops.patterns import CAUSAL
from attn_zoo.ops.rows import dot_rows, first_largest
from attn_zoo.ops.slots import put, score_row
from attn_zoo.spec import check, check_choice, check_number

KEY_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Options:
    """estimator: 'score' (REINFORCE) or 'straight_through' (Gumbel), whose softmax has `temperature`; all else is of 'score'.

    score_weight and entropy_weight: lambda_r and lambda_e of the paper; expected: how often an example takes the average.
    """

    estimator: str = "score"
    score_weight: float = 1.0
    entropy_weight: float = 0.002
    expected: float = 0.5
    temperature: float = 1.0

    def __post_init__(self):
        check_choice("estimator", self.estimator, ("score", "straight_through"))
        check_number("score_weight", self.score_weight, 0)
        check_number("entropy_weight", self.entropy_weight, 0)
        check_number("expected", self.expected, 0, 1)
        check_number("temperature", self.temperature, 0)
        check(self.temperature > 0, "temperature", self.temperature, "must be above 0")


def draw_seeds(key, B, N):
    """Where each head's noise starts, [B, N, 2]: whole numbers below 2^24 as floats, since the engine differentiates what it passes along."""
    return jax.random.randint(key, (B, N, 2), 0, 2**24).astype(jnp.float32)


def gumbel(seeds, i, j):
    """Standard Gumbel noise of query i and key j, the same in whatever tile they meet; broadcasts seeds [..., 2] against i and j.

    -log(-log(1 - u)) with 32 random bits from pcg4d, a hash of four numbers (Jarzynski and Olano 2020).
    """
    x, y, z, w = (lax.convert_element_type(n, jnp.uint32) * np.uint32(1664525) + np.uint32(1013904223) for n in (i, j, seeds[..., 0], seeds[..., 1]))

    def mix(x, y, z, w):
        x = x + y * w
        y = y + z * x
        z = z + x * y
        return x, y, z, w + y * z

    *_, bits = mix(*(n ^ (n >> np.uint32(16)) for n in mix(x, y, z, w)))
    u = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)  # fine where u is small, which is where the largest noise is
    return -jnp.log(-jnp.log1p(-u))


def largest(q_BTNH, k_BSKH, seeds_BN2, *, causal, valid_BS, scale):
    """The visible key of largest score, plus noise if there are seeds, [B, N, T]; -1 where none is visible. Not differentiable."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G, bk = N // K, min(KEY_BLOCK, S)
    bq = max(1, min(T, TILE_BYTES // (4 * B * N * bk)))
    q, k = (lax.stop_gradient(x).astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (q_BTNH, k_BSKH))
    q = jnp.pad(q, ((0, 0), (0, -T % bq), (0, 0), (0, 0))).reshape(B, -1, K, G, H).transpose(0, 2, 3, 1, 4)
    k = jnp.pad(k, ((0, 0), (0, -S % bk), (0, 0), (0, 0))).swapaxes(1, 2)
    valid = None if valid_BS is None else jnp.pad(valid_BS, ((0, 0), (0, -S % bk)))
    seeds = None if seeds_BN2 is None else seeds_BN2.reshape(B, K, G, 1, 1, 2)

    def query_block(c):
        i, q_c = c * bq + jnp.arange(bq), lax.dynamic_slice_in_dim(q, c * bq, bq, 3)

        def body(n, carry):
            best, index = carry
            j = n * bk + jnp.arange(bk)[:, None]
            scores = scale * jnp.einsum("BKSH,BKGTH->BKGST", lax.dynamic_slice_in_dim(k, n * bk, bk, 2), q_c, precision="highest")
            scores = scores if seeds is None else scores + gumbel(seeds, i, j)
            seen = (j <= jnp.minimum(i, S - 1)) if causal else j < S
            if valid is not None:
                seen = seen & lax.dynamic_slice_in_dim(valid, n * bk, bk, 1)[:, None, None, :, None]
            here, first = first_largest(jnp.where(seen, scores, NEG), axis=-2)
            return jnp.maximum(best, here), jnp.where(here > best, n * bk + first, index)

        blocks = k.shape[2] // bk
        needed = jnp.minimum(blocks, ((c + 1) * bq - 1) // bk + 1) if causal else blocks
        start = jnp.full((B, K, G, bq), NEG / 2, q.dtype), jnp.full((B, K, G, bq), -1)
        return lax.fori_loop(0, needed, body, start)[1]

    index = lax.map(query_block, jnp.arange(q.shape[3] // bq))
    return jnp.moveaxis(index, 0, 3).reshape(B, N, -1)[..., :T]


def pick(x_BSKH, index_BNT):
    """x at each head's chosen positions, [B, T, N, H], zeros for -1; in float32, since a key's gradient sums over all queries that chose it."""
    B, S, K, H = x_BSKH.shape
    N, T = index_BNT.shape[1:]
    x_BKSH = x_BSKH.swapaxes(1, 2).astype(jnp.promote_types(x_BSKH.dtype, jnp.float32))
    index_BKR = jnp.maximum(index_BNT, 0).reshape(B, K, N // K * T)
    o_BNTH = jnp.take_along_axis(x_BKSH, index_BKR[..., None], axis=2).reshape(B, N, T, H)
    return jnp.where(index_BNT[..., None] >= 0, o_BNTH, 0).swapaxes(1, 2)


class Hard(SlotDecoding):
    """One sampled key a query and head."""

    pools_queries = True  # not an output, but the log-probability that is left: what stands in padding must not enter it
    rowwise = True
    gradients_without_key = False
    anywhere = True
    wide_parts = True

    @property
    def has_parts(self):  # the noise of the relaxation is a score modification with a hash in it
        return self.options.estimator == "score"

    def __init__(self, options: Options, dims):
        super().__init__(options, dims)
        if options.estimator == "score":
            self.log_prob = ScoreFunction(jnp.zeros(()))
            self.bonus = Loss(jnp.zeros(()))
            self.entropy = Statistic(jnp.zeros(()))

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key, *, valid_BT):
        if key is None:
            if self.options.estimator == "score":
                self.leave("log_prob", jnp.zeros(()))
                self.leave("bonus", jnp.zeros(()))
            return pick(v_BSKH, self.choose(q_BTNH, k_BSKH, valid_BS, None))
        sample_key, expected_key = jax.random.split(key)
        seeds_BN2 = draw_seeds(sample_key, q_BTNH.shape[0], self.dims.num_heads)
        index_BNT = self.choose(q_BTNH, k_BSKH, valid_BS, seeds_BN2)
        o_BTNH = pick(v_BSKH, index_BNT)
        if self.options.estimator == "straight_through":
            soft_BTNH = self.relaxed(q_BTNH, k_BSKH, lax.stop_gradient(v_BSKH), valid_BS, seeds_BN2).astype(o_BTNH.dtype)
            return o_BTNH + (soft_BTNH - lax.stop_gradient(soft_BTNH))
        average_B = self.takes_average(expected_key, q_BTNH.shape[0])
        self.leave_log_prob(q_BTNH, k_BSKH, index_BNT, average_B, valid_BS, valid_BT)
        if self.options.expected == 0:
            return o_BTNH
        soft_BTNH, _ = self.part(q_BTNH, k_BSKH, v_BSKH, pattern=pattern(self.dims.causal), valid_BS=valid_BS)
        return jnp.where(average_B[:, None, None, None], soft_BTNH, o_BTNH)

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key, *, valid_BT):
        B, T, N, H = q_BTNH.shape
        S = k_BSKH.shape[1]
        mask = dense_mask(pattern(self.dims.causal), T, S, valid_BS)
        softmax = lambda scores: jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores, NEG)), 0.0)
        scores_BNTS = H**-0.5 * jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, repeat_kv(k_BSKH, N), precision="highest")
        noisy_BNTS = scores_BNTS
        if key is not None:
            sample_key, expected_key = jax.random.split(key)
            noisy_BNTS = scores_BNTS + gumbel(draw_seeds(sample_key, B, N)[:, :, None, None], np.arange(T)[:, None], np.arange(S))
        weights_BNTS = jax.nn.one_hot(jnp.where(mask, noisy_BNTS, NEG).argmax(axis=-1), S) * mask
        if key is not None and self.options.estimator == "straight_through":
            relaxed_BNTS = softmax(noisy_BNTS / self.options.temperature)
            weights_BNTS = weights_BNTS + relaxed_BNTS - lax.stop_gradient(relaxed_BNTS)
        elif key is not None:
            weights_BNTS = jnp.where(self.takes_average(expected_key, B)[:, None, None, None], softmax(scores_BNTS), weights_BNTS)
        return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, repeat_kv(v_BSKH, N), precision="highest")

    def seen(self):
        return CAUSAL

    def step(self, q_B1NH, k_B1KH, v_B1KH, cache):
        L, t = cache["k"].shape[1], cache["t"]
        cache = put(k_B1KH, v_B1KH, cache, self.slots().within(L))
        scores_BNL = score_row(q_B1NH.astype(jnp.float32), cache["k"].astype(jnp.float32), precision="highest")
        index_BN1 = jnp.where(jnp.arange(L) <= t, scores_BNL, NEG).argmax(axis=-1, keepdims=True)
        return pick(cache["v"], index_BN1).astype(q_B1NH.dtype), cache | {"t": t + 1}

    def choose(self, q_BTNH, k_BSKH, valid_BS, seeds_BN2):
        """The position that each query and head looks at, [B, N, T]: a draw from the softmax where there are seeds (Gumbel 1954), else its mode."""
        if seeds_BN2 is None and self.backend(valid_BS is not None) == "native":
            index_BNT1, seen_BNT1 = native_best_keys(q_BTNH, k_BSKH, valid_BS, 1, self.dims.causal)
            return jnp.where(seen_BNT1, index_BNT1, -1)[..., 0]
        return largest(q_BTNH, k_BSKH, seeds_BN2, causal=self.dims.causal, valid_BS=valid_BS, scale=self.dims.head_dim**-0.5)

    def beside(self, backend):
        """Of the choice by scores and noise; without a random key that is the native kernels' on a CPU."""
        return "xla"

    def plan(self, T, S, masked=False):
        return super().plan(T, S, masked) | {"without_key": backends.native_or_xla(self.backend(masked))}

    def takes_average(self, key, B):
        """Which examples take the softmax average, [B]."""
        return jax.random.bernoulli(key, float(self.options.expected), (B,))

    def leave_log_prob(self, q_BTNH, k_BSKH, index_BNT, average_B, valid_BS, valid_BT):
        """Leaves score_weight log p(samples) of each example, the entropy bonus and the mean entropy in nats."""
        scale = self.dims.head_dim**-0.5
        q_BTNH, k_BSKH = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (q_BTNH, k_BSKH))
        # Attention to the keys themselves gives the mean key, and with it the mean score: H = logsumexp - E[score].
        mean_key_BTNH, lse_BTN = self.part(q_BTNH, k_BSKH, k_BSKH, pattern=pattern(self.dims.causal), valid_BS=valid_BS)
        seen_BTN = index_BNT.swapaxes(1, 2) >= 0
        if valid_BT is not None:
            seen_BTN = seen_BTN & valid_BT[:, :, None]
        below_lse = lambda k_BTNH: jnp.where(seen_BTN, scale * dot_rows(q_BTNH, k_BTNH) - jnp.where(seen_BTN, lse_BTN, 0.0), 0.0)
        log_prob_B = below_lse(pick(k_BSKH, index_BNT)).sum(axis=(1, 2))
        entropy = -below_lse(mean_key_BTNH).sum() / jnp.maximum(seen_BTN.sum(), 1)
        self.leave("log_prob", self.options.score_weight * jnp.where(average_B, 0.0, log_prob_B))
        self.leave("bonus", -self.options.entropy_weight * entropy)
        self.leave("entropy", lax.stop_gradient(entropy))

    def relaxed(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, seeds_BN2):
        """Gumbel-softmax attention with the noise of the draw, an example at a time, since each has seeds of its own."""
        mod = lambda scores, i, j, seeds: (scores + gumbel(seeds, i, j)) / self.options.temperature

        def example(q, k, v, valid, seeds):
            valid = None if valid is None else valid[None]
            return blocked_attention(q[None], k[None], v[None], pattern=pattern(self.dims.causal), valid_BS=valid, score_mod=ScoreMod(mod, seeds))[0][0]

        return jax.vmap(example)(q_BTNH, k_BSKH, v_BSKH, valid_BS, seeds_BN2)


HARD = Variant(
    name="hard",
    family="dense",
    options=Options,
    build=lambda options, dims, *, shared, rngs: Hard(options, dims),
    paper=Paper(
        "xu2015show",
        "Show, Attend and Tell: Neural Image Caption Generation with Visual Attention",
        "Xu, Kelvin and Ba, Jimmy and Kiros, Ryan and Cho, Kyunghyun and Courville, Aaron and Salakhutdinov, Ruslan and Zemel, Richard and Bengio, Yoshua",
        2015,
        "Proceedings of the 32nd International Conference on Machine Learning",
    ),
    complexity="T S",
    # The scores alone: a value is read, not summed.
    flops=lambda options, B, T, S, N, H, causal: 2.0 * B * N * H * count_pairs(pattern(causal), T, S),
    time_order=2.0,
    memory_order=1.0,
    exact_when=lambda T: None,
    decode=True,
    bound=Bound("one key is never an average, but as keys grow the softmax too takes the largest score alone", scale=1e5, error=1e-3),
)
