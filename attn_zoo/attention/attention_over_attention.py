"""Attention over attention: the queries' attentions over the context, averaged with weights that the context gives to the queries.

With scores M_ts = q_t k_s / sqrt(H) (Cui et al. 2017, sec. 3; without the scale there), alpha_t = softmax over s of M_ts, the attention of every query over the
document, beta_s = softmax over t of M_ts, the attention of every document position over the query, and its mean over the document, beta_t. The result is
the attended attention sum_t beta_t alpha_t: one distribution over the document. The paper reads answers off it; a layer has to give vectors, so here it weighs
the values, sum_t beta_t alpha_t V, and every query position gets that same vector.

No T x S array is needed: sum_t beta_t (alpha_t V) = mean_s sum_t beta_ts o_t with o = alpha V, which is attention of the keys over the queries, whose values
are the outputs of the attention of the queries over the keys. Two calls of the blocked engine.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attn_zoo.attention.base import Attention, Bound, Paper, Variant, repeat_kv
from attn_zoo.attention.pattern import pair_flops
from attn_zoo.ops import backends
from attn_zoo.ops.patterns import FULL


@dataclasses.dataclass(frozen=True)
class Options:
    """It has no options."""


def attention_over_attention(q_BTNH, k_BSKH, v_BSKH, valid_BS=None, valid_BT=None, part=backends.attention_and_logsumexp):
    """The attended values, [B, T, N, H], the same for every t."""
    o_BTNH, _ = part(q_BTNH, k_BSKH, v_BSKH, pattern=FULL, valid_BS=valid_BS)
    u_BSNH, _ = part(repeat_kv(k_BSKH, q_BTNH.shape[2]), q_BTNH, o_BTNH, pattern=FULL, valid_BS=valid_BT)
    u_BSNH = u_BSNH.astype(jnp.promote_types(u_BSNH.dtype, jnp.float32))
    weights_BS = jnp.ones(u_BSNH.shape[:2]) if valid_BS is None else valid_BS.astype(u_BSNH.dtype)
    total_BNH = jnp.einsum("BS,BSNH->BNH", weights_BS, u_BSNH)
    return jnp.broadcast_to((total_BNH / jnp.maximum(weights_BS.sum(axis=1), 1)[:, None, None])[:, None], q_BTNH.shape)


class AttentionOverAttention(Attention):
    """One attended vector a head, at every query position."""

    pools_queries = True
    has_parts = True

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key, *, valid_BT):
        return attention_over_attention(q_BTNH, k_BSKH, v_BSKH, valid_BS, valid_BT, self.part)

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key, *, valid_BT):
        (B, T, N, H), S = q_BTNH.shape, k_BSKH.shape[1]
        valid_BS = jnp.ones((B, S), bool) if valid_BS is None else valid_BS
        valid_BT = jnp.ones((B, T), bool) if valid_BT is None else valid_BT
        with jax.default_matmul_precision("highest"):
            M_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, repeat_kv(k_BSKH, N)) * H**-0.5
            alpha_BNTS = _softmax(M_BNTS, valid_BS[:, None, None, :], axis=3)
            beta_BNTS = jnp.where(valid_BS[:, None, None, :], _softmax(M_BNTS, valid_BT[:, None, :, None], axis=2), 0)
            beta_BNT = beta_BNTS.sum(axis=3) / jnp.maximum(valid_BS.sum(axis=1), 1)[:, None, None]
            attended_BNS = jnp.einsum("BNT,BNTS->BNS", beta_BNT, alpha_BNTS)
            o_BNH = jnp.einsum("BNS,BSNH->BNH", attended_BNS, repeat_kv(v_BSKH, N))
        return jnp.broadcast_to(o_BNH[:, None], q_BTNH.shape)


def _softmax(scores, valid, axis):
    return jnp.where(valid, jax.nn.softmax(jnp.where(valid, scores, -1e30), axis=axis), 0)


ATTENTION_OVER_ATTENTION = Variant(
    name="attention_over_attention",
    family="dense",
    options=Options,
    build=lambda options, dims, *, shared, rngs: AttentionOverAttention(options, dims),
    paper=Paper(
        "cui2017attention",
        "Attention-over-Attention Neural Networks for Reading Comprehension",
        "Cui, Yiming and Chen, Zhipeng and Wei, Si and Wang, Shijin and Liu, Ting and Hu, Guoping",
        2017,
        "Proceedings of the 55th Annual Meeting of the Association for Computational Linguistics",
    ),
    complexity="2 T S",
    flops=lambda options, B, T, S, N, H, causal: 2 * pair_flops(T * S, B, N, H),  # attention of queries over keys, and of keys over queries
    time_order=2.0,
    memory_order=1.0,
    exact_when=lambda T: None,
    bound=Bound("both tend to the mean of the values as keys tend to 0", scale=0.01, error=0.01),
    causal="its one attended vector mixes all queries and all keys, so every output would see the future",
)
