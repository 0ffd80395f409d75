"""Additive attention: a key's score is that of a small network on query and key, e_ts = v' tanh(W q_t + U k_s), not their product.

Bahdanau et al. 2015, sec. 3.1 and appendix A.1.2: weights softmax_s(e_ts), without any 1/sqrt(H). As in their code U k is computed once a
key; the tanh of each pair lives for one tile of pairs (ops.additive), so memory is linear in T and time is T S R.
Beyond the paper: a network a head (W, v a query head, U a key head), and a causal form over s <= t. The paper starts W and U at N(0, 0.001^2)
and v at 0; here all are N(0, 1 / fan-in), as all else in this zoo.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from attn_zoo.attention.base import Attention, Bound, Paper, Variant, repeat_kv
from attn_zoo.attention.full import pattern
from attn_zoo.attention.pattern import dense_mask
from attn_zoo.ops import backends
from attn_zoo.ops.additive import additive_attention
from attn_zoo.ops.block_mask import count_pairs
from attn_zoo.ops.slots import softmax_row
from attn_zoo.spec import check_int


@dataclasses.dataclass(frozen=True)
class Options:
    """hidden: units R of the scoring network, a head; None: the head dim (in the paper it is the width of the states, 1000)."""

    hidden: int | None = None

    def __post_init__(self):
        check_int("hidden", self.hidden, 1, optional=True)


class Additive(Attention):
    """A scoring network a head."""

    anywhere = True

    def __init__(self, options: Options, dims, *, shared: dict, rngs: nnx.Rngs):
        super().__init__(options, dims)
        N, K, H, R = dims.num_heads, dims.num_kv_heads, dims.head_dim, options.hidden or dims.head_dim
        draw = lambda *shape, fan_in: nnx.Param(jax.random.normal(rngs.params(), shape) * fan_in**-0.5)
        self.query = draw(N, H, R, fan_in=H)
        self.key = draw(K, H, R, fan_in=H)
        self.weight = draw(N, R, fan_in=R)

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
        q_BTNR, k_BSKR = self.project(q_BTNH.astype(wide), k_BSKH.astype(wide))
        options = {"causal": self.dims.causal, "valid_BS": valid_BS, "backend": self.backend()}
        return additive_attention(q_BTNR, k_BSKR, self.weight[...].astype(wide), v_BSKH.astype(wide), **options)

    def backend(self, masked=False):
        return backends.choose_additive(self.dims.backend, self.dims.dtype)

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        N, T, S = self.dims.num_heads, q_BTNH.shape[1], k_BSKH.shape[1]
        mask_TBS = jnp.broadcast_to(dense_mask(pattern(self.dims.causal), T, S, valid_BS)[:, 0], (len(q_BTNH), T, S)).swapaxes(0, 1)

        def one_query(args):
            q_BNR, mask_BS = args
            scores_BSN = jnp.einsum("BSNR,NR->BSN", jnp.tanh(q_BNR[:, None] + k_BSNR), self.weight[...])
            weights_BSN = jnp.where(mask_BS[:, :, None], jnp.exp(scores_BSN), 0.0)  # |e| <= sum |v|: nothing overflows
            total_B1N = weights_BSN.sum(axis=1, keepdims=True)
            return jnp.einsum("BSN,BSNH->BNH", weights_BSN / jnp.where(total_B1N == 0, 1.0, total_B1N), v_BSNH)

        with jax.default_matmul_precision("highest"):
            q_BTNR, k_BSKR = self.project(q_BTNH, k_BSKH)
            k_BSNR, v_BSNH = repeat_kv(k_BSKR, N), repeat_kv(v_BSKH, N)
            return jax.lax.map(one_query, (q_BTNR.swapaxes(0, 1), mask_TBS)).swapaxes(0, 1)

    def init_cache(self, B, max_len):
        """Keys are kept projected."""
        self.check_decoding(max_len)
        K, H, R = self.dims.num_kv_heads, self.dims.head_dim, self.weight.shape[-1]
        return {"k": jnp.zeros((B, max_len, K, R)), "v": jnp.zeros((B, max_len, K, H), self.dims.dtype), "t": jnp.zeros((), jnp.int32)}

    def step(self, q_B1NH, k_B1KH, v_B1KH, cache):
        t, N = cache["t"], self.dims.num_heads
        q_B1NR, k_B1KR = self.project(*(x.astype(jnp.float32) for x in (q_B1NH, k_B1KH)))
        k_BLKR, v_BLKH = (jax.lax.dynamic_update_slice_in_dim(cache[name], x.astype(cache[name].dtype), t, 1) for name, x in (("k", k_B1KR), ("v", v_B1KH)))
        scores_BNL = jnp.einsum("BLNR,NR->BNL", jnp.tanh(q_B1NR + repeat_kv(k_BLKR, N)), self.weight[...])
        scores_BNL = jnp.where(jnp.arange(scores_BNL.shape[-1]) <= t, scores_BNL, -jnp.inf)
        return softmax_row(scores_BNL, v_BLKH, q_B1NH.dtype)[0], {"k": k_BLKR, "v": v_BLKH, "t": t + 1}

    def project(self, q_BTNH, k_BSKH):
        """(W q, U k), [B, T, N, R] and [B, S, K, R]."""
        return jnp.einsum("BTNH,NHR->BTNR", q_BTNH, self.query[...]), jnp.einsum("BSKH,KHR->BSKR", k_BSKH, self.key[...])


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool) -> float:
    """Projections, 2 H R a position; sum, tanh and inner product, 4 R a pair; weighted sum, 2 H a pair."""
    R = options.hidden or H
    return float(B * N * (2 * H * R * (T + S) + (4 * R + 2 * H) * count_pairs(pattern(causal), T, S)))


ADDITIVE = Variant(
    name="additive",
    family="dense",
    options=Options,
    build=Additive,
    paper=Paper(
        "bahdanau2015neural",
        "Neural Machine Translation by Jointly Learning to Align and Translate",
        "Bahdanau, Dzmitry and Cho, Kyunghyun and Bengio, Yoshua",
        2015,
        "3rd International Conference on Learning Representations",
    ),
    complexity="T S R",
    flops=flops,
    time_order=2.0,
    memory_order=1.0,
    exact_when=lambda T: None,
    decode=True,
    bound=Bound("both tend to the mean of the visible values as keys tend to 0; tanh(q + k) is never a product of q and k", scale=0.001, error=0.01),
)
