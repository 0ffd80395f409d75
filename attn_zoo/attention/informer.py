"""Informer's ProbSparse attention: the queries that differ most from uniform attention attend to all keys, the others take the mean value.

Zhou et al. 2021, algorithm 1: U = factor ln S keys are sampled, M(q) = max_j s_j - mean_j s_j over the scores of the sample (eq. 4) tells how
peaked a query's attention is, and the u = factor ln T queries of largest M are the active ones. The logarithms are rounded up, as in the
authors' code. The sample is one for all queries and without repeats, `Q K_sample'` of algorithm 1 (the authors' code draws one a query).

Causal as in the authors' decoder: active queries see the past alone, and M ranks the queries of the whole sequence, over sampled keys
of the whole sequence. So no value and no gradient comes from the future, but which queries are active does depend on it. Departure: a
lazy query takes the mean of the values up to it, not their sum as in the code, since the mean is what uniform attention over them gives.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from attn_zoo.attention.base import Attention, Paper, Variant, repeat_kv, softmax_reference
from attn_zoo.attention.pattern import dense_mask, pair_flops
from attn_zoo.ops import backends
from attn_zoo.ops.block_mask import count_pairs
from attn_zoo.ops.linear import linear_attention
from attn_zoo.ops.patterns import CAUSAL, FULL
from attn_zoo.ops.tiled import tiled_attention
from attn_zoo.spec import check_int


@dataclasses.dataclass(frozen=True)
class Options:
    """factor: c of the paper, for both counts: c ln S sampled keys and c ln T active queries."""

    factor: int = 5

    def __post_init__(self):
        check_int("factor", self.factor, 1)


def count(factor: int, length: int) -> int:
    """How many of `length` keys are sampled, or of `length` queries active."""
    return min(length, factor * max(1, math.ceil(math.log(length))))


class SampleOrder(nnx.Variable):
    """[max_len] in [0, 1): of the valid keys, those of largest value are sampled."""


class Informer(Attention):
    """Full attention for the active queries alone."""

    pools_queries = True

    def __init__(self, options: Options, dims, *, shared: dict, rngs: nnx.Rngs):
        super().__init__(options, dims)
        self.order = SampleOrder(jax.random.uniform(rngs.params(), (dims.max_len,)))

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key, *, valid_BT):
        (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
        q, k, v = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (q_BTNH, k_BSKH, v_BSKH))
        active_BNR = self.active(q_BTNH, k_BSKH, valid_BS, valid_BT, key)
        q_BNRH, backend = jnp.take_along_axis(q.swapaxes(1, 2), active_BNR[..., None], axis=2), self.backend()
        o_BNRH = rows_attention(q_BNRH, k, v, active_BNR if self.dims.causal else None, valid_BS, backend)
        o_BTNH = repeat_kv(mean_values(v, valid_BS, T, self.dims.causal, backend), N)
        put = lambda lazy, index, rows: lazy.at[index].set(rows, unique_indices=True)
        return jax.vmap(jax.vmap(put))(o_BTNH.swapaxes(1, 2), active_BNR, o_BNRH).swapaxes(1, 2)

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key, *, valid_BT):
        T, N, S = *q_BTNH.shape[1:3], k_BSKH.shape[1]
        visible = dense_mask(CAUSAL if self.dims.causal else FULL, T, S, valid_BS)
        active = self.active(q_BTNH, k_BSKH, valid_BS, valid_BT, key)
        active_BTN1 = (active[..., None] == np.arange(T)).any(axis=2).swapaxes(1, 2)[..., None]
        lazy = softmax_reference(jnp.zeros_like(q_BTNH), k_BSKH, v_BSKH, visible)
        return jnp.where(active_BTN1, softmax_reference(q_BTNH, k_BSKH, v_BSKH, visible), lazy)

    def active(self, q_BTNH, k_BSKH, valid_BS, valid_BT, key):
        """The positions of the active queries, [B, N, u]. In both forms, so that close calls fall alike."""
        T, N, S = *q_BTNH.shape[1:3], k_BSKH.shape[1]
        order_S = self.order[:S] if key is None else jax.random.uniform(key, (S,))
        M_BNT = sparsity(q_BTNH, repeat_kv(k_BSKH, N), order_S, valid_BS, count(self.options.factor, S))
        if valid_BT is not None:
            M_BNT = jnp.where(valid_BT[:, None], M_BNT, -jnp.inf)
        return lax.top_k(M_BNT, count(self.options.factor, T))[1]

    def backend(self, masked=False):
        return backends.choose_tiles(self.dims.backend, self.dims.dtype, self.dims.head_dim)


def sparsity(q_BTNH, k_BSNH, order_S, valid_BS, size: int):
    """M of every query, [B, N, T], over the `size` valid keys that come first by order_S (the largest first). Zhou et al. 2021, eq. 4."""
    B, S, N, H = k_BSNH.shape
    q, k = (lax.stop_gradient(x).astype(jnp.float32) for x in (q_BTNH, k_BSNH))
    order_BS = jnp.broadcast_to(order_S, (B, S)) if valid_BS is None else jnp.where(valid_BS, order_S, -1.0)
    rank_BU, sample_BU = lax.top_k(order_BS, size)
    scores_BNTU = jnp.einsum("BTNH,BUNH->BNTU", q, jnp.take_along_axis(k, sample_BU[..., None, None], axis=1), precision="highest") * H**-0.5
    sampled = (rank_BU >= 0)[:, None, None]
    mean_BNT = jnp.where(sampled, scores_BNTU, 0.0).sum(axis=-1) / jnp.maximum(sampled.sum(axis=-1), 1)
    return jnp.where(sampled, scores_BNTU, -jnp.inf).max(axis=-1) - mean_BNT


def mean_values(v_BSKH, valid_BS, T: int, causal: bool, backend: str = "xla"):
    """The mean of all valid values, or of those up to each query, [B, T, K, H]; zeros where there is none. `backend`: 'native' takes running sums head by head."""
    B, S, K, H = v_BSKH.shape
    valid_BS = jnp.ones((B, S), bool) if valid_BS is None else valid_BS
    if causal and backend == "native":  # the sums of linearized attention, whose features are 1 at every query and valid key
        counted_BSK1 = jnp.broadcast_to(valid_BS[..., None, None], (B, S, K, 1)).astype(v_BSKH.dtype)
        return linear_attention(jnp.ones((B, T, K, 1), v_BSKH.dtype), counted_BSK1, v_BSKH, causal=True, backend=backend)
    if causal:
        last = np.minimum(np.arange(T), S - 1)
        total, number = jnp.cumsum(v_BSKH, axis=1)[:, last], jnp.cumsum(valid_BS, axis=1)[:, last]
    else:
        total, number = v_BSKH.sum(axis=1, keepdims=True), valid_BS.sum(axis=1, keepdims=True)
    return jnp.broadcast_to(total / jnp.maximum(number, 1)[..., None, None], (B, T, K, H))


def rows_attention(q_BNRH, k_BSKH, v_BSKH, position_BNR, valid_BS, backend: str = "xla"):
    """Softmax attention of R chosen queries over all keys, or those up to their positions if given, [B, N, R, H]. `backend` is of ops.tiled: a tile is all keys of a head."""
    (B, N, R, H), (S, K) = q_BNRH.shape, k_BSKH.shape[1:3]
    rows = B * K, N // K * R
    position = jnp.full(rows, S) if position_BNR is None else position_BNR.reshape(rows)
    valid = jnp.ones((B * K, S), bool) if valid_BS is None else jnp.repeat(valid_BS, K, axis=0)
    keys, values = (x.swapaxes(1, 2).reshape(B * K, S, H) for x in (k_BSKH, v_BSKH))

    def pairs(about):
        i, valid = about
        return (jnp.arange(S) <= i[:, None]) & valid, 0.0

    # What hides pairs may be there for all heads at once: it is no larger than the scores of the sample are for the same number of queries as keys.
    o, _ = tiled_attention(q_BNRH.reshape(B * K, 1, -1, H), keys, values, pairs, (position, valid), backend=backend, added_bytes=4 * B * N * R * S)
    return o.reshape(q_BNRH.shape)


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool) -> float:
    """Scores of the sample, full attention of the active queries (were they spread evenly, when causal), and one sum of the values."""
    visible = count_pairs(CAUSAL if causal else FULL, T, S) / T
    return pair_flops(0.5 * T * count(options.factor, S) + visible * count(options.factor, T) + 0.25 * S, B, N, H)


INFORMER = Variant(
    name="informer",
    family="query prototypes",
    options=Options,
    build=Informer,
    paper=Paper(
        "zhou2021informer",
        "Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting",
        "Zhou, Haoyi and Zhang, Shanghang and Peng, Jieqi and Zhang, Shuai and Li, Jianxin and Xiong, Hui and Zhang, Wancai",
        2021,
        "Proceedings of the AAAI Conference on Artificial Intelligence",
    ),
    complexity="T log S + S log T",
    flops=flops,
    time_order=1.0,
    memory_order=1.0,
    exact_when=lambda T: {"factor": T},
    decode="which queries are active is decided over the whole sequence",
    foresight="which queries are active is decided among all of the sequence",
)
