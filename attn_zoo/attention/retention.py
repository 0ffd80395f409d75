"""Retention: linear attention in which every head forgets at its own fixed rate, o_t = norm(sum_{j <= t} gamma^(t - j) (q_t' k_j) v_j).

Sun et al. 2023 (RetNet), eq. 5 to 8: gamma = 1 - 2^(-first - h) for head h. As in their paragraph on score normalization, scores are divided by
sqrt(H), decays by the square root of their sum over a row, and the result by max(|sum of the scores|, 1), a constant to the gradient as in their
code. Then each head's output is divided by its root mean square, their group norm, which has no parameters and to which those factors
matter only through its epsilon. Left to the layer around it: the rotation of queries and keys (positions='rotary') and the swish gate.
Beyond the paper: bidirectionally the decay is gamma^|t - j|, and query heads that share keys and values share their decay.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from attn_zoo.attention.base import Attention, Bound, Paper, Variant, repeat_kv
from attn_zoo.ops import backends
from attn_zoo.ops.decayed import decayed_sums, group_norm, normed_sums
from attn_zoo.ops.linear import init_state, state_step, with_ones
from attn_zoo.spec import check_number


@dataclasses.dataclass(frozen=True)
class Options:
    """first: a position takes 2^-first of the past from head 0, and from each further head half as much as from the one before."""

    first: float = 5.0

    def __post_init__(self):
        check_number("first", self.first, 0.1, 20)


class Retention(Attention):
    """Fixed exponential decay per key/value head."""

    def log_decays(self) -> np.ndarray:
        """log gamma of each key/value head, [K], float64."""
        return np.log1p(-(2.0 ** -(self.options.first + np.arange(self.dims.num_kv_heads))))

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        B, T, N, _ = q_BTNH.shape
        log_decay_BTK = jnp.broadcast_to(self.log_decays().astype(np.float32), (B, T, self.dims.num_kv_heads))
        scale_TN, backend = jnp.asarray(self.score_scale(T)), self.backend(valid_BS is not None)
        if self.dims.causal:
            return normed_sums(q_BTNH, k_BSKH, v_BSKH, log_decay_BTK, scale_TN, backend=backend)
        sums = functools.partial(decayed_sums, log_decay_BTK=log_decay_BTK, backend=backend)
        o_BTNH, scores_BTN = sums(q_BTNH, k_BSKH, v_BSKH)
        o_ahead, scores_ahead = (x[:, ::-1] for x in sums(*(x[:, ::-1] for x in (q_BTNH, k_BSKH, v_BSKH))))
        own_BTN = jnp.einsum("BTNH,BTNH->BTN", *(x.astype(o_BTNH.dtype) for x in (q_BTNH, repeat_kv(k_BSKH, N))))  # is in both
        o_BTNH, scores_BTN = o_BTNH + o_ahead - own_BTN[..., None] * repeat_kv(v_BSKH, N), scores_BTN + scores_ahead - own_BTN
        return group_norm(o_BTNH, scores_BTN, scale_TN)

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        T, N = q_BTNH.shape[1:3]
        t = np.arange(T)
        decay_KTS = np.exp(self.log_decays()[:, None, None] * abs(t[:, None] - t))
        decay_KTS = np.tril(decay_KTS) if self.dims.causal else decay_KTS
        decay_KTS = decay_KTS / np.sqrt(decay_KTS.sum(axis=-1, keepdims=True))
        scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, repeat_kv(k_BSKH, N), precision="highest") * self.dims.head_dim**-0.5
        scores_BNTS = scores_BNTS * np.repeat(decay_KTS, N // self.dims.num_kv_heads, axis=0).astype(np.float32)
        o_BTNH = jnp.einsum("BNTS,BSNH->BTNH", scores_BNTS, repeat_kv(v_BSKH, N), precision="highest")
        return group_norm(o_BTNH, jnp.moveaxis(scores_BNTS.sum(axis=-1), 1, 2))

    def init_cache(self, B, max_len):
        self.check_decoding(max_len)
        d = self.dims
        return init_state(B, d.num_kv_heads, d.head_dim, d.head_dim + 1)

    def step(self, q_B1NH, k_B1KH, v_B1KH, cache):
        o, state = state_step(q_B1NH, k_B1KH, with_ones(v_B1KH), cache["state"], jnp.asarray(self.log_decays(), jnp.float32))
        scale_N = jnp.asarray(self.score_scale(self.dims.max_len))[cache["t"]]
        return group_norm(o[..., :-1], o[..., -1], scale_N).astype(q_B1NH.dtype), {"state": state, "t": cache["t"] + 1}

    def score_scale(self, T: int) -> np.ndarray:
        """1 / sqrt(H sum_j gamma^|t - j|) of each position and query head, [T, N], the sum over j <= t, or all j if not causal."""
        log_K, t_T1 = self.log_decays(), np.arange(T)[:, None]
        back, ahead = ((np.expm1(n * log_K) / np.expm1(log_K)) for n in (t_T1 + 1, T - t_T1))  # geometric sums of n terms
        total_TK = back if self.dims.causal else back + ahead - 1
        scale_TK = ((self.dims.head_dim * total_TK) ** -0.5).astype(np.float32)
        return np.repeat(scale_TK, self.dims.num_heads // self.dims.num_kv_heads, axis=1)

    def backend(self, masked=False):
        return backends.choose_scan(self.dims.backend, self.dims.dtype)

    def flops(self, B, T, S):
        d = self.dims
        return flops(self.options, B, T, S, d.num_heads, d.head_dim, d.causal, K=d.num_kv_heads)


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool, K: int | None = None) -> float:
    """State update of each of K key/value heads (N by default) and read-out, of values and sum of scores; twice when bidirectional."""
    return 2.0 * B * (T * N + S * (K or N)) * H * (H + 1) * (1 if causal else 2)


RETENTION = Variant(
    name="retention",
    family="linearized",
    options=Options,
    build=lambda options, dims, *, shared, rngs: Retention(options, dims),
    paper=Paper(
        "sun2023retentive",
        "Retentive Network: A Successor to Transformer for Large Language Models",
        "Sun, Yutao and Dong, Li and Huang, Shaohan and Ma, Shuming and Xia, Yuqing and Xue, Jilong and Wang, Jianyong and Wei, Furu",
        2023,
        "arXiv:2307.08621",
    ),
    complexity="T H",
    flops=flops,
    time_order=1.0,
    memory_order=1.0,
    exact_when=lambda T: None,
    decode=True,
    state_order=0.0,
    bound=Bound(
        # Measured 4.4 and 0.32. The same outputs with their sign turned, moved by one position or swapped between the two heads are at 4.8 or more; zeros and
        # means of the values are nearer, but means have a cosine of 0.29 at most, and zeros none.
        "no limit of it is a softmax, with scores of either sign and outputs of length sqrt(H); while it forgets nothing it leans to the same values",
        scale=10.0,
        error=4.6,
        cosine=0.3,
        options=(("first", 20.0),),
    ),
    cross="its decay is by the distance between two positions of one sequence",
)
