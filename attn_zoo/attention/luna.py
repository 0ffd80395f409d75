"""Luna: the context is packed into R slots by attention from a short learned sequence P, and unpacked by attention to those slots.

Bidirectional (Ma et al. 2021, sec. 3.1, eq. 4 and 5), with A_pack = softmax(P k' / sqrt(H)) over positions:
    k_P = A_pack k,  v_P = A_pack v,  o = softmax(q k_P' / sqrt(H)) v_P
Causal (sec. 3.3), the softmax over positions would see the future, so A_pack = w(P k' / sqrt(H)) with w = elu + 1, as in the authors' code, and each query has
the packed context of its own past, a running average:
    f(X, Y, Z)_t = 1/t X_t sum_{j <= t} Y_j' Z_j
    A_unpack = softmax(f(q, k, A_pack') / sqrt(H)) over slots,  o = f(A_unpack, A_pack', v)
Both f are causal linear attention without a denominator, here scanned in chunks. 1/t counts valid positions.

Departures: P is a parameter of the layer, [K, R, H], already projected to heads, whereas the paper hands each packed sequence on to the next layer as its P.
Pack and unpack share the layer's keys and values, whereas the authors' code projects anew: the packed sequence (bidirectional), or the keys of A_pack (causal).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from attn_zoo.attention.base import Attention, Bound, Paper, Variant, repeat_kv, softmax_reference
from attn_zoo.attention.linear import FEATURE_MAPS
from attn_zoo.ops import backends
from attn_zoo.ops.linear import kernel_sums, state_step
from attn_zoo.ops.patterns import FULL
from attn_zoo.spec import check_int


@dataclasses.dataclass(frozen=True)
class Options:
    """memory: slots that the context is packed into."""

    memory: int = 16

    def __post_init__(self):
        check_int("memory", self.memory, 1)


def luna_attention(q_BTNH, k_BSKH, v_BSKH, p_KRH, valid_BS=None, part=backends.attention_and_logsumexp):
    """The bidirectional form, [B, T, N, H]."""
    p_BRKH = jnp.broadcast_to(p_KRH.swapaxes(0, 1), (q_BTNH.shape[0], p_KRH.shape[1], *p_KRH.shape[::2])).astype(q_BTNH.dtype)
    k_BRKH, v_BRKH = (part(p_BRKH, k_BSKH, x_BSKH, pattern=FULL, valid_BS=valid_BS)[0] for x_BSKH in (k_BSKH, v_BSKH))
    return part(q_BTNH, k_BRKH, v_BRKH, pattern=FULL)[0]


def causal_luna_attention(q_BTNH, k_BSKH, v_BSKH, p_KRH, valid_BS=None, backend="xla"):
    """The causal form, float32 [B, T, N, H], in O(T) memory. `backend` is of its sums (see backends.choose_scan)."""
    T, N, H = q_BTNH.shape[1:]
    a_BSKR = pack_weights(k_BSKH, p_KRH, valid_BS)
    count_BT = seen_count(a_BSKR.shape[:2], T, valid_BS)
    average = lambda x, y, z: kernel_sums(x, y, z, causal=True, backend=backend)[0] / count_BT[:, :, None, None]
    scores_BTNR = average(q_BTNH, k_BSKH, a_BSKR) * H**-0.5
    return average(jax.nn.softmax(scores_BTNR), a_BSKR, v_BSKH)


def pack_weights(k_BSKH, p_KRH, valid_BS):
    """A_pack of the causal form, w(P k' / sqrt(H)) in float32, [B, S, K, R]; zeros for invalid keys."""
    scores_BSKR = jnp.einsum("BSKH,KRH->BSKR", k_BSKH.astype(p_KRH.dtype), p_KRH) * p_KRH.shape[-1] ** -0.5
    a_BSKR = FEATURE_MAPS["elu"](scores_BSKR)
    return a_BSKR if valid_BS is None else jnp.where(valid_BS[:, :, None, None], a_BSKR, 0)


def seen_count(shape: tuple[int, int], T: int, valid_BS):
    """How many valid keys j <= t there are, [B, T], at least 1: without any, the sums that it divides are zero."""
    S = shape[1]
    count_BS = jnp.cumsum(jnp.ones(shape) if valid_BS is None else valid_BS.astype(jnp.float32), axis=1)
    return jnp.maximum(count_BS[:, jnp.minimum(jnp.arange(T), S - 1)], 1)


class Luna(Attention):
    """Pack, then unpack."""

    anywhere = True

    @property
    def has_parts(self):  # the causal form takes running averages
        return not self.dims.causal

    def __init__(self, options: Options, dims, *, shared: dict, rngs: nnx.Rngs):
        super().__init__(options, dims)
        # N(0, 1), the scale of a projected query.
        self.packing = nnx.Param(jax.random.normal(rngs.params(), (dims.num_kv_heads, options.memory, dims.head_dim)))

    def backend(self, masked=False):
        return backends.choose_scan(self.dims.backend, self.dims.dtype) if self.dims.causal else super().backend(masked)

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        if self.dims.causal:
            return causal_luna_attention(q_BTNH, k_BSKH, v_BSKH, self.packing[...], valid_BS, self.backend(valid_BS is not None))
        return luna_attention(q_BTNH, k_BSKH, v_BSKH, self.packing[...], valid_BS, self.part)

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        B, T, N, H = q_BTNH.shape
        S, p_KRH = k_BSKH.shape[1], self.packing[...]
        valid_BS = jnp.ones((B, S), bool) if valid_BS is None else valid_BS
        if not self.dims.causal:
            p_BRKH = jnp.broadcast_to(p_KRH.swapaxes(0, 1), (B, p_KRH.shape[1], *p_KRH.shape[::2]))
            k_BRKH, v_BRKH = (softmax_reference(p_BRKH, k_BSKH, x, valid_BS[:, None, None, :]) for x in (k_BSKH, v_BSKH))
            return softmax_reference(q_BTNH, k_BRKH, v_BRKH, jnp.ones((1, 1, 1, 1), bool))
        with jax.default_matmul_precision("highest"):
            k_BSNH, v_BSNH, a_BSNR = (repeat_kv(x, N) for x in (k_BSKH, v_BSKH, pack_weights(k_BSKH, p_KRH, valid_BS)))
            seen_BTS = jnp.tri(T, S, dtype=bool) & valid_BS[:, None]
            share_BTS = seen_BTS / jnp.maximum(seen_BTS.sum(axis=-1, keepdims=True), 1)  # f is a product with this, as a matrix
            scores_BTNR = jnp.einsum("BTS,BTNH,BSNH,BSNR->BTNR", share_BTS, q_BTNH, k_BSNH, a_BSNR) * H**-0.5
            return jnp.einsum("BTS,BTNR,BSNR,BSNH->BTNH", share_BTS, jax.nn.softmax(scores_BTNR), a_BSNR, v_BSNH)


    def init_cache(self, B, max_len):
        """The two sums of the causal form: of keys by slot, and of slots by value."""
        self.check_decoding(max_len)
        K, H, R = self.dims.num_kv_heads, self.dims.head_dim, self.options.memory
        return {"packed": jnp.zeros((B, K, H, R)), "values": jnp.zeros((B, K, R, H)), "t": jnp.zeros((), jnp.int32)}

    def step(self, q_B1NH, k_B1KH, v_B1KH, cache):
        t = cache["t"] + 1
        a_B1KR = pack_weights(k_B1KH, self.packing[...], None)
        scores_B1NR, packed = state_step(q_B1NH, k_B1KH, a_B1KR, cache["packed"])
        weights_B1NR = jax.nn.softmax(scores_B1NR / t * self.dims.head_dim**-0.5)
        o_B1NH, values = state_step(weights_B1NR, a_B1KR, v_B1KH, cache["values"])
        return (o_B1NH / t).astype(q_B1NH.dtype), {"packed": packed, "values": values, "t": t}


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool) -> float:
    """Scores, packed keys and packed values of every position; scores and weighted sum of every query. The same for both forms."""
    return 2.0 * B * N * H * options.memory * (3 * S + 2 * T)


LUNA = Variant(
    name="luna",
    family="memory compression",
    options=Options,
    build=Luna,
    paper=Paper(
        "ma2021luna",
        "Luna: Linear Unified Nested Attention",
        "Ma, Xuezhe and Kong, Xiang and Wang, Sinong and Zhou, Chunting and May, Jonathan and Ma, Hao and Zettlemoyer, Luke",
        2021,
        "Advances in Neural Information Processing Systems 34",
    ),
    complexity="(T + S) R",
    flops=flops,
    time_order=1.0,
    memory_order=1.0,
    exact_when=lambda T: None,
    decode=True,
    state_order=0.0,
    bound=Bound("packed values and full attention both tend to the mean of the visible values as keys tend to 0", scale=0.01, error=0.05),
)
