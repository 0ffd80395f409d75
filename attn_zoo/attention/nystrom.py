"""Nyströmformer: the attention matrix approximated from its rows and columns at a few landmarks.

F A^+ B V with F = softmax(Q K~'), A = softmax(Q~ K~'), B = softmax(Q~ K'), where the landmarks Q~, K~ are means over segments of the sequence, and
a few steps of an iteration of third order give the pseudo-inverse A^+ (Xiong et al. 2021, algorithm 1). Nothing larger than T x R arises.

Where the authors' code leaves room or differs: the iteration starts from A' / |A|_1 of each matrix, as the paper has it and as the code's second
option does; its default takes the largest |A|_1 in the batch, by which one sequence would change another. Segments are as equal as T allows
(the code's T divides), only valid positions are averaged, and a segment without any is no landmark. As in the code, sequences of no more than
`landmarks` positions have softmax attention itself, which costs less there. All is float32, since A^+ amplifies rounding.
Beyond the paper: queries and keys may be of two sequences, since A^+ exists for any shape.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from attn_zoo.attention.base import Attention, Paper, Variant, repeat_kv, softmax_reference
from attn_zoo.attention.pattern import pair_flops
from attn_zoo.ops import backends
from attn_zoo.ops.convolution import convolve
from attn_zoo.ops.native_inverse import native_pseudo_inverse
from attn_zoo.ops.patterns import FULL
from attn_zoo.spec import Unsupported, check, check_int


@dataclasses.dataclass(frozen=True)
class Options:
    """landmarks: R; iterations: of the pseudo-inverse; residual_kernel: taps of a convolution of the values, one filter a head, added to the output.

    The authors have 64 landmarks for T = 512, where A^+ takes two fifths of the work at H = 64; 6 iterations; some 33 taps, or None.
    """

    landmarks: int = 48
    iterations: int = 6
    residual_kernel: int | None = None

    def __post_init__(self):
        check_int("landmarks", self.landmarks, 1)
        check_int("iterations", self.iterations, 1)
        check_int("residual_kernel", self.residual_kernel, 1, optional=True)
        check(self.residual_kernel is None or self.residual_kernel % 2 == 1, "residual_kernel", self.residual_kernel, "must be odd, or None")


def segment_means(x_BTNH, valid_BT, R: int):
    """Means over the valid positions of segment r, those t with floor(t R / T) = r: ([B, R, N, H], [B, R] whether there is any)."""
    B, T = x_BTNH.shape[:2]
    R = min(R, T)
    if T % R == 0:  # the same, without an index
        take = lambda x: x.reshape(B, R, T // R, *x.shape[2:])
    else:
        bounds = -(-np.arange(R + 1) * T // R)  # the first t with t R >= r T
        index_RL = bounds[:-1, None] + np.arange(np.diff(bounds).max())
        # Beyond its segment a row points past the end, each entry elsewhere, so that it reads zero and the gradient writes no position twice.
        index_RL = np.where(index_RL < bounds[1:, None], index_RL, T + np.arange(index_RL.size).reshape(index_RL.shape))
        take = lambda x: x.at[:, index_RL].get(mode="fill", fill_value=0, unique_indices=True)
    valid_BRL = take(jnp.ones((B, T), bool) if valid_BT is None else valid_BT)
    count_BR = valid_BRL.sum(axis=2)
    total_BRNH = jnp.where(valid_BRL[..., None, None], take(x_BTNH), 0).sum(axis=2)
    return total_BRNH / jnp.maximum(count_BR, 1)[:, :, None, None], count_BR > 0


def kernel(q_BTNH, k_BSNH, row_BT=None, column_BS=None):
    """softmax(q k' / sqrt(H)), [B, N, T, S], over the keys in `column_BS`; zero in rows outside `row_BT`."""
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, precision="highest") * q_BTNH.shape[-1] ** -0.5
    seen = jnp.ones((1, 1, 1, 1), bool)
    seen = seen if row_BT is None else seen & row_BT[:, None, :, None]
    seen = seen if column_BS is None else seen & column_BS[:, None, None, :]
    return jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores_BNTS, -1e30), axis=-1), 0.0)


def pseudo_inverse(A, iterations: int, backend: str = "xla"):
    """The Moore-Penrose inverse of matrices [..., m, n] of weights, rows of which sum to 1 (or less), approximately, [..., n, m].

    Starts from A' / |A|_1: the norm |A|_inf that the paper also divides by is 1, and its gradient would be rounding. Rows and columns of zeros stay so.
    Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4. Small singular values come last: at first a step multiplies their part of Z by 13 / 4.
    `backend` is "xla" or "native".
    """
    norm = A.sum(axis=-2).max(axis=-1)[..., None, None]
    Z = A.swapaxes(-1, -2) / jnp.where(norm == 0, 1.0, norm)
    if backend == "native":
        return native_pseudo_inverse(A, Z, iterations)
    product = functools.partial(jnp.matmul, precision="highest")
    I = jnp.eye(A.shape[-2], dtype=A.dtype)

    def step(_, Z):
        AZ = product(A, Z)
        return product(Z, 13 * I - product(AZ, 15 * I - product(AZ, 7 * I - AZ))) / 4

    return lax.fori_loop(0, iterations, step, Z, unroll=True)


def nystrom_attention(q_BTNH, k_BSKH, v_BSKH, valid_BT, valid_BS, options: Options, part=backends.attention_and_logsumexp, backend: str = "xla"):
    """F (A^+ (B V)), [B, T, N, H] in float32; A is [Q, R], landmarks of queries by landmarks of keys. `part` computes F and B, and `backend` A^+."""
    q_BTNH, k_BSKH, v_BSKH = (x.astype(jnp.float32) for x in (q_BTNH, k_BSKH, v_BSKH))
    q_BQNH, row_BQ = segment_means(q_BTNH, valid_BT, options.landmarks)
    k_BRKH, column_BR = segment_means(k_BSKH, valid_BS, options.landmarks)
    k_BRNH = repeat_kv(k_BRKH, q_BTNH.shape[2])
    BV_BQNH, _ = part(q_BQNH, k_BSKH, v_BSKH, pattern=FULL, valid_BS=valid_BS)
    Z_BNRQ = pseudo_inverse(kernel(q_BQNH, k_BRNH, row_BQ, column_BR), options.iterations, backend)
    slots_BRNH = jnp.einsum("BNRQ,BQNH->BRNH", Z_BNRQ, BV_BQNH, precision="highest")
    return part(q_BTNH, k_BRNH, slots_BRNH, pattern=FULL, valid_BS=None if valid_BS is None else column_BR)[0]


def nystrom_reference(q_BTNH, k_BSKH, v_BSKH, valid_BT, valid_BS, options: Options):
    """(F A^+ B) V with its T x S matrix, from landmarks averaged one by one."""
    (T, N), S = q_BTNH.shape[1:3], k_BSKH.shape[1]
    k_BSNH, v_BSNH = repeat_kv(k_BSKH, N), repeat_kv(v_BSKH, N)
    valid_BT, valid_BS = (jnp.ones(x.shape[:2], bool) if valid is None else valid for x, valid in ((q_BTNH, valid_BT), (k_BSKH, valid_BS)))

    def landmarks(x, valid, R):
        segment = np.arange(x.shape[1]) * R // x.shape[1]
        members = [(segment == r) & valid for r in range(R)]  # [B, T] each
        means = [jnp.einsum("BT,BTNH->BNH", m, x, precision="highest") / jnp.maximum(m.sum(axis=1), 1)[:, None, None] for m in members]
        return jnp.stack(means, axis=1), jnp.stack([m.any(axis=1) for m in members], axis=1)

    q_BRNH, row_BR = landmarks(q_BTNH, valid_BT, min(options.landmarks, T))
    k_BRNH, column_BR = landmarks(k_BSNH, valid_BS, min(options.landmarks, S))
    F, A, B = kernel(q_BTNH, k_BRNH, None, column_BR), kernel(q_BRNH, k_BRNH, row_BR, column_BR), kernel(q_BRNH, k_BSNH, row_BR, valid_BS)
    weights_BNTS = jnp.matmul(jnp.matmul(F, pseudo_inverse(A, options.iterations), precision="highest"), B, precision="highest")
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH, precision="highest")


class Nystrom(Attention):
    """Nyström approximation, plus the convolution of values where asked for."""

    pools_queries = True
    has_parts = wide_parts = True

    def __init__(self, options: Options, dims, *, shared: dict, rngs: nnx.Rngs):
        super().__init__(options, dims)
        W = options.residual_kernel
        if W is not None:  # the code's draw, that of a PyTorch convolution
            self.taps = nnx.Param(jax.random.uniform(rngs.params(), (dims.num_heads, W), minval=-(W**-0.5), maxval=W**-0.5))

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key, valid_BT=None):
        backend = self.beside(self.backend(valid_BS is not None))
        if max(q_BTNH.shape[1], k_BSKH.shape[1]) <= self.options.landmarks:
            o_BTNH, _ = self.part(q_BTNH, k_BSKH, v_BSKH, pattern=FULL, valid_BS=valid_BS)
        else:
            o_BTNH = nystrom_attention(q_BTNH, k_BSKH, v_BSKH, valid_BT, valid_BS, self.options, self.part, backend)
        if self.options.residual_kernel is None:
            return o_BTNH
        self._check_residual(q_BTNH, v_BSKH)
        return o_BTNH + convolve(v_BSKH, self.taps[...], backend=backend)

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key, valid_BT=None):
        if max(q_BTNH.shape[1], k_BSKH.shape[1]) <= self.options.landmarks:
            o_BTNH = softmax_reference(q_BTNH, k_BSKH, v_BSKH, jnp.ones((1, 1, 1, 1), bool) if valid_BS is None else valid_BS[:, None, None, :])
        else:
            o_BTNH = nystrom_reference(q_BTNH, k_BSKH, v_BSKH, valid_BT, valid_BS, self.options)
        if self.options.residual_kernel is None:
            return o_BTNH
        self._check_residual(q_BTNH, v_BSKH)
        T, W = q_BTNH.shape[1], self.options.residual_kernel
        tap_TS = np.arange(T)[None, :] - np.arange(T)[:, None] + W // 2
        weights_NTS = jnp.where((tap_TS >= 0) & (tap_TS < W), self.taps[...][:, np.clip(tap_TS, 0, W - 1)], 0.0)
        return o_BTNH + jnp.einsum("NTS,BSNH->BTNH", weights_NTS, repeat_kv(v_BSKH, self.dims.num_heads), precision="highest")

    def beside(self, backend):
        """Of the pseudo-inverse and the convolution."""
        return backends.native_or_xla(backend)

    def plan(self, T, S, masked=False):
        full = max(T, S) <= self.options.landmarks and self.options.residual_kernel is None
        return {"backend": self.backend(masked) if full else self.engines(masked)}

    def _check_residual(self, q_BTNH, v_BSKH):
        T, S = q_BTNH.shape[1], v_BSKH.shape[1]
        if T != S:
            raise Unsupported(f"nystrom(residual_kernel={self.options.residual_kernel}) adds the values at the queries' own positions, so T={T} must equal S={S}")


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool) -> float:
    """F, B and A with what they weigh, four products of R x R matrices an iteration, and the convolution's taps."""
    residual = 2.0 * B * N * S * H * (options.residual_kernel or 0)
    if max(T, S) <= options.landmarks:
        return pair_flops(T * S, B, N, H) + residual
    Q, R = min(options.landmarks, T), min(options.landmarks, S)
    inverse = 4.0 * B * N * options.iterations * (Q * Q * R + Q**3)  # A Z and the last product; the two between are Q x Q
    return pair_flops(T * R + Q * S + Q * R, B, N, H) + inverse + residual


NYSTROM = Variant(
    name="nystrom",
    family="memory compression",
    options=Options,
    build=Nystrom,
    paper=Paper(
        "xiong2021nystromformer",
        "Nystr{\\\"o}mformer: A Nystr{\\\"o}m-Based Algorithm for Approximating Self-Attention",
        "Xiong, Yunyang and Zeng, Zhanpeng and Chakraborty, Rudrasis and Tan, Mingxing and Fung, Glenn and Li, Yin and Singh, Vikas",
        2021,
        "Proceedings of the AAAI Conference on Artificial Intelligence 35",
    ),
    complexity="(T + S) R + R^3",
    flops=flops,
    time_order=1.0,
    memory_order=1.0,
    exact_when=lambda T: {"landmarks": T},
    causal="its landmarks are means over segments of the whole sequence, so every output would see the future",
)
