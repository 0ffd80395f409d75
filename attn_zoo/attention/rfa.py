"""Random feature attention (RFA): exp(q'k) of unit queries and keys, estimated by random sines and cosines, with a gate for recency.

phi(x) = sqrt(1/R) [sin(w_1'x), ..., sin(w_R'x), cos(w_1'x), ..., cos(w_R'x)] with w_i = sigma * N(0, I) estimates exp(-|sigma (x - y)|^2 / 2), which
for vectors of length one is exp(sigma^2 x'y) up to a factor that cancels (Peng et al. 2021, sec. 2.2 and 3.1). The w are drawn per
key/value head; sigma is learned, per head and channel as in the authors' code. With `gate` (sec. 3.2), causal only:

    g_t = sigmoid(w_g' k_t + b_g),  S_t = g_t S_{t-1} + (1 - g_t) phi(k_t) v_t',  z_t = g_t z_{t-1} + (1 - g_t) phi(k_t),  o_t = S_t' phi(q_t) / phi(q_t)' z_t.

The gate reads the head's key instead of the layer's input. An estimated kernel can be negative, and a denominator near zero; the paper is silent on
that, the authors' code holds the denominator at a constant or above. Here it is held at FLOOR times what it would be were all kernel values 1, so
that an output is never longer than the values over FLOOR, at any length and gate.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from attn_zoo.attention.base import Attention, Bound, Paper, Variant, repeat_kv
from attn_zoo.attention.linear import state_flops
from attn_zoo.attention.performer import Features
from attn_zoo.ops import backends
from attn_zoo.ops.angles import sine_and_cosine
from attn_zoo.ops.decayed import decayed_sums
from attn_zoo.ops.linear import init_state, linear_attention, state_step, with_ones
from attn_zoo.ops.pallas_features import serves, sine_features
from attn_zoo.ops.rows import dot_rows, scale_rows
from attn_zoo.spec import Unsupported, check, check_int

FLOOR = 0.01  # of the mean kernel value; that of sigma = 1 is at least exp(-2)
TINY = 1e-12  # of a denominator, whose inverse square is in the gradient


@dataclasses.dataclass(frozen=True)
class Options:
    """features: random directions a head, a sine and a cosine each; gate: recency gate (causal only); redraw: new directions at every training step."""

    features: int = 64
    gate: bool = False
    redraw: bool = False

    def __post_init__(self):
        check_int("features", self.features, 1)
        check(isinstance(self.gate, bool), "gate", self.gate, "must be True or False")
        check(isinstance(self.redraw, bool), "redraw", self.redraw, "must be True or False")


class RandomFeatureAttention(Attention):
    """RFA and RFA-Gate."""

    def __init__(self, options: Options, dims, *, shared: dict, rngs: nnx.Rngs):
        super().__init__(options, dims)
        if options.gate and not dims.causal:
            raise Unsupported("rfa(gate=True) lets the past of every position fade, so it is causal only; gate=False is not")
        K, H = dims.num_kv_heads, dims.head_dim
        self.directions = Features(jax.random.normal(rngs.params(), (K, options.features, H)))
        self.sigma = nnx.Param(jnp.ones((K, H)))
        if options.gate:
            self.gate_kernel = nnx.Param(jax.random.normal(rngs.params(), (K, H)) * H**-0.5)
            self.gate_bias = nnx.Param(jnp.zeros((K,)))

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        valid_BSK, backend = validity(valid_BS, k_BSKH), self.backend(valid_BS is not None)
        phi_q, phi_k = self.features(q_BTNH, k_BSKH, valid_BS, key, backend)
        T, N = q_BTNH.shape[1:3]
        if self.options.gate:
            if T != k_BSKH.shape[1]:
                raise Unsupported(f"rfa(gate=True) fades by the positions of one sequence (T={T}, S={k_BSKH.shape[1]}); gate=False does not")
            log_gate_BTK, write_BTK = self.gates(k_BSKH, valid_BSK)
            o_BTNH, norm_BTN = decayed_sums(phi_q, phi_k * write_BTK[..., None], v_BSKH, log_gate_BTK, backend=backend)
            weight_BTK = -jnp.expm1(jnp.cumsum(log_gate_BTK, axis=1))  # sum_j (1 - g_j) prod_{j < l <= t} g_l
            return divide(o_BTNH, norm_BTN, jnp.repeat(weight_BTK, N // self.dims.num_kv_heads, axis=2))
        count_BSK = valid_BSK.astype(jnp.float32)
        weight_BTK = jnp.cumsum(count_BSK, axis=1) if self.dims.causal else count_BSK.sum(axis=1, keepdims=True)
        weight_BTK = weight_BTK[:, jnp.minimum(jnp.arange(T), weight_BTK.shape[1] - 1)]
        return linear_attention(phi_q, phi_k, v_BSKH, causal=self.dims.causal, backend=backend, least_BTK=least(weight_BTK))

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        phi_q, phi_k = self.features(q_BTNH, k_BSKH, valid_BS, key)
        T, N = q_BTNH.shape[1:3]
        valid_BSK = validity(valid_BS, k_BSKH)
        weights_BNTS = jnp.moveaxis(repeat_kv(valid_BSK, N), 1, 2)[:, :, None].astype(jnp.float32)
        if self.options.gate:
            log_gate_BSK, write_BSK = self.gates(k_BSKH, valid_BSK)
            total_BNS, write_BNS = (jnp.moveaxis(repeat_kv(x, N), 1, 2) for x in (jnp.cumsum(log_gate_BSK, axis=1), write_BSK))
            weights_BNTS = jnp.exp(jnp.minimum(total_BNS[..., :, None] - total_BNS[..., None, :], 0)) * write_BNS[:, :, None]
        weights_BNTS = jnp.broadcast_to(weights_BNTS, (*weights_BNTS.shape[:2], T, k_BSKH.shape[1]))
        weights_BNTS = jnp.tril(weights_BNTS) if self.dims.causal else weights_BNTS
        scores_BNTS = weights_BNTS * jnp.einsum("BTNR,BSNR->BNTS", phi_q, repeat_kv(phi_k, N), precision="highest")
        o_BTNH = jnp.einsum("BNTS,BSNH->BTNH", scores_BNTS, repeat_kv(v_BSKH, N), precision="highest")
        return divide(o_BTNH, *(jnp.moveaxis(x.sum(axis=-1), 1, 2) for x in (scores_BNTS, weights_BNTS)))

    @property
    def anywhere(self):
        return not self.options.gate

    def init_cache(self, B, max_len):
        """The sums, and with a gate the running sum of its logarithms, from which the weight of all keys follows."""
        self.check_decoding(max_len)
        d = self.dims
        cache = init_state(B, d.num_kv_heads, 2 * self.options.features, d.head_dim + 1)
        return cache | {"log_gate": jnp.zeros((B, d.num_kv_heads))} if self.options.gate else cache

    def step(self, q_B1NH, k_B1KH, v_B1KH, cache):
        phi_q, phi_k = self.features(q_B1NH, k_B1KH, None, None)
        new, G = {"t": cache["t"] + 1}, self.dims.num_heads // self.dims.num_kv_heads
        if self.options.gate:
            log_gate_B1K, write_B1K = self.gates(k_B1KH, validity(None, k_B1KH))
            sums, new["state"] = state_step(phi_q, phi_k * write_B1K[..., None], with_ones(v_B1KH), cache["state"], log_gate_B1K[:, 0])
            new["log_gate"] = cache["log_gate"] + log_gate_B1K[:, 0]
            weight_B1N = jnp.repeat(-jnp.expm1(new["log_gate"])[:, None], G, axis=2)
        else:
            sums, new["state"] = state_step(phi_q, phi_k, with_ones(v_B1KH), cache["state"])
            weight_B1N = new["t"].astype(jnp.float32)
        return divide(sums[..., :-1], sums[..., -1], weight_B1N).astype(q_B1NH.dtype), new

    def features(self, q_BTNH, k_BSKH, valid_BS, key, backend="xla"):
        """(phi(q), phi(k)), [..., 2 R], float32, zeros for invalid keys. On backend "pallas" bfloat16 of bfloat16, as its products want them, but for gated keys."""
        w_KRH = self.directions[...]
        if self.options.redraw and key is not None:
            w_KRH = jax.random.normal(key, w_KRH.shape)
            self.leave("directions", w_KRH)
        w_KRH = w_KRH * self.sigma[...][:, None]
        if self.beside(backend) == "pallas":
            # What a gate still multiplies is rounded after that alone: twice would show where an estimated denominator is near zero.
            return sine_features(q_BTNH, w_KRH), sine_features(k_BSKH, w_KRH, valid_BS, wide=self.options.gate)
        phi_q, phi_k = (random_features(x, jnp.repeat(w_KRH, x.shape[2] // len(w_KRH), axis=0)) for x in (q_BTNH, k_BSKH))
        return phi_q, phi_k if valid_BS is None else jnp.where(valid_BS[:, :, None, None], phi_k, 0)

    def beside(self, backend):
        """Of the features."""
        return "xla" if backend == "pallas" and not serves(self.dims.head_dim) else backend

    def gates(self, k_BSKH, valid_BSK):
        """(log g, 1 - g), [B, S, K], float32; an invalid position keeps everything and writes nothing."""
        logit_BSK = jnp.einsum("BSKH,KH->BSK", k_BSKH.astype(jnp.float32), self.gate_kernel[...]) + self.gate_bias[...]
        return jnp.where(valid_BSK, jax.nn.log_sigmoid(logit_BSK), 0), jnp.where(valid_BSK, jax.nn.sigmoid(-logit_BSK), 0)

    def backend(self, masked=False):
        return backends.choose_scan(self.dims.backend, self.dims.dtype)

    def flops(self, B, T, S):
        d = self.dims
        return flops(self.options, B, T, S, d.num_heads, d.head_dim, d.causal, K=d.num_kv_heads)


def random_features(x_BTNH, w_NRH):
    """sqrt(1/R) [sin(w'x), cos(w'x)] of x divided by its length, [B, T, N, 2 R], float32."""
    x = x_BTNH.astype(jnp.float32)
    x = scale_rows(x, jax.lax.rsqrt(dot_rows(x, x) + 1e-6))  # smooth at zero, where invalid keys are
    angles = jnp.einsum("BTNH,NRH->BTNR", x, w_NRH, precision="highest")
    return jnp.concatenate(sine_and_cosine(angles), axis=-1) * w_NRH.shape[1] ** -0.5


def validity(valid_BS, k_BSKH):
    """valid_BS, or all True, for each key/value head."""
    return jnp.broadcast_to(True if valid_BS is None else valid_BS[:, :, None], k_BSKH.shape[:3])


def divide(o_BTNH, norm_BTN, weight_BTN):
    """o / norm, the norm held at FLOOR times the weight of all visible keys; where that is nothing, so is o."""
    return scale_rows(o_BTNH, 1 / jnp.maximum(norm_BTN, least(weight_BTN)))


def least(weight):
    """What the denominator is held at."""
    return jnp.maximum(FLOOR * weight, TINY)


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool, K: int | None = None) -> float:
    """R directions of queries and keys, state update and read-out over 2 R features; K key/value heads (N by default)."""
    K = K or N
    return 2.0 * B * (T * N + S * K) * H * options.features + state_flops(B, T, S, N, K, 2 * options.features, H)


RFA = Variant(
    name="rfa",
    family="linearized",
    options=Options,
    build=RandomFeatureAttention,
    paper=Paper(
        "peng2021random",
        "Random Feature Attention",
        "Peng, Hao and Pappas, Nikolaos and Yogatama, Dani and Schwartz, Roy and Smith, Noah A. and Kong, Lingpeng",
        2021,
        "International Conference on Learning Representations",
    ),
    complexity="T R",
    flops=flops,
    time_order=1.0,
    memory_order=1.0,
    exact_when=lambda T: None,
    decode=True,
    state_order=0.0,
    # Measured 0.17, of queries and keys that are not as long as the average. Causal, the mean of the values is 0.68 away.
    bound=Bound("with sigma = 1 an estimate of softmax attention to keys a quarter as long, at H = 16", scale=0.25, error=0.2, options=(("features", 1024),)),
)
