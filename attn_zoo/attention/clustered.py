"""Clustered attention: queries are clustered, and what a cluster's mean attends to serves all its members; the keys it attends to most are redone per query.

Vyas et al. 2020: queries are hashed to signs of random projections and clustered by K-means in Hamming space (sec. 3.2); the centroid, the mean of
a cluster's queries, attends to all keys (eq. 3 to 5, topk=0). Improved clustered attention (sec. 3.3): on the `topk` keys that the centroid
weighs most, each query's own softmax takes the place of the centroid's and shares out the same mass; the other keys keep the centroid's weights.

As in the authors' code, a projection has a random offset and K-means starts from the first hashes; here the projections stay as drawn with
the layer, and a cluster without members keeps its centroid (in the code, a new draw each). Hamming distances and majorities are products
of signs, exact in float32 and fast on a matrix unit. The assignment itself has no gradient.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from attn_zoo.attention.base import Attention, Paper, Variant, repeat_kv
from attn_zoo.attention.pattern import pair_flops
from attn_zoo.ops import backends
from attn_zoo.ops.gathered import gathered_attention
from attn_zoo.ops.rows import first_largest
from attn_zoo.spec import check_int


@dataclasses.dataclass(frozen=True)
class Options:
    """clusters: of queries, at most one a query; topk: keys a cluster redoes per query (0: none); bits: of a hash; iterations: of K-means."""

    clusters: int = 100
    topk: int = 32
    bits: int = 63
    iterations: int = 10

    def __post_init__(self):
        for name, minimum in (("clusters", 1), ("topk", 0), ("bits", 1), ("iterations", 0)):
            check_int(name, getattr(self, name), minimum)


class Planes(nnx.Variable):
    """[H + 1, bits]: the normals of the hash's hyperplanes and, in the last row, their offsets."""


class Clustered(Attention):
    """Attention of query centroids, redone per query on their best keys."""

    pools_queries = True

    def __init__(self, options: Options, dims, *, shared: dict, rngs: nnx.Rngs):
        super().__init__(options, dims)
        self.planes = Planes(jax.random.normal(rngs.params(), (dims.head_dim + 1, options.bits)))

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key, *, valid_BT):
        wide = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (q_BTNH, k_BSKH, v_BSKH)]
        q_BTNH, k_BSNH, v_BSNH = wide[0], *(repeat_kv(x, self.dims.num_heads) for x in wide[1:])
        label_BNT, member_BNTC = self.cluster(q_BTNH, valid_BT)
        weights_BNCS, scores_BNCS = centroid_weights(q_BTNH, k_BSNH, member_BNTC, valid_BS)
        share_out = lambda x: jnp.einsum("BNTC,BNC...->BTN...", member_BNTC, x)
        if not self.options.topk:
            return share_out(jnp.einsum("BNCS,BSNH->BNCH", weights_BNCS, v_BSNH))
        top_BNCS, index_BNCR, seen_BNCR = best_keys(scores_BNCS, self.options.topk)
        mass_BTN = share_out(jnp.where(top_BNCS, weights_BNCS, 0.0).sum(axis=-1))
        others_BTNH = share_out(jnp.einsum("BNCS,BSNH->BNCH", jnp.where(top_BNCS, 0.0, weights_BNCS), v_BSNH))
        of_cluster = lambda x: jnp.take_along_axis(x, label_BNT[..., None], axis=2)
        best_BTNH, _ = gathered_attention(q_BTNH, k_BSNH, v_BSNH, of_cluster(index_BNCR), of_cluster(seen_BNCR), backend=self.backend())
        return mass_BTN[..., None] * best_BTNH + others_BTNH

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key, *, valid_BT):
        """Densely, T x S weights. Clusters and best keys are chosen as in the fast form; an invalid query is in no cluster and gets zeros."""
        k_BSNH, v_BSNH = (repeat_kv(x, self.dims.num_heads) for x in (k_BSKH, v_BSKH))
        label_BNT, member_BNTC = self.cluster(q_BTNH, valid_BT)
        in_cluster_BNT = member_BNTC.any(axis=-1)
        together_BNTU = (label_BNT[..., None] == label_BNT[..., None, :]) & in_cluster_BNT[:, :, None]
        means_BTNH = jnp.einsum("BNTU,BUNH->BTNH", together_BNTU / jnp.maximum(together_BNTU.sum(axis=-1, keepdims=True), 1), q_BTNH, precision="highest")
        visible = jnp.ones((1, 1, 1, 1), bool) if valid_BS is None else valid_BS[:, None, None]
        weights = lambda q, seen: _softmax(jnp.einsum("BTNH,BSNH->BNTS", q, k_BSNH, precision="highest") * q.shape[-1] ** -0.5, seen)
        weights_BNTS = weights(means_BTNH, visible)
        if self.options.topk:
            _, scores_BNCS = centroid_weights(q_BTNH, k_BSNH, member_BNTC, valid_BS)
            top_BNTS = jnp.take_along_axis(best_keys(scores_BNCS, self.options.topk)[0], label_BNT[..., None], axis=2)
            mass_BNT1 = (weights_BNTS * top_BNTS).sum(axis=-1, keepdims=True)
            weights_BNTS = jnp.where(top_BNTS, mass_BNT1 * weights(q_BTNH, top_BNTS), weights_BNTS)
        return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS * in_cluster_BNT[..., None], v_BSNH, precision="highest")

    def backend(self, masked=False):
        return backends.choose_lists(self.dims.backend, self.dims.dtype) if self.options.topk else super().backend(masked)

    def cluster(self, q_BTNH, valid_BT):
        """(the cluster of each query, [B, N, T]; the valid members of each, one-hot float32, [B, N, T, C])."""
        B, T, N, _ = q_BTNH.shape
        valid_BT = jnp.ones((B, T), bool) if valid_BT is None else valid_BT
        q_BNTH = lax.stop_gradient(q_BTNH).astype(jnp.float32).swapaxes(1, 2)
        planes = self.planes[...]
        signs_BNTb = jnp.where(jnp.einsum("BNTH,Hb->BNTb", q_BNTH, planes[:-1], precision="highest") + planes[-1] > 0, 1.0, -1.0)
        valid_BNT = jnp.broadcast_to(valid_BT[:, None], (B, N, T))
        return kmeans(signs_BNTb, valid_BNT, min(self.options.clusters, T), self.options.iterations)


def kmeans(signs_BNTb, valid_BNT, clusters: int, iterations: int):
    """Lloyd's algorithm on hashes, given as signs +1 and -1: (nearest centroid of each, [B, N, T]; valid members of each, [B, N, T, C]).

    Starts from the first valid hashes. A centroid's bit is the majority of its members', -1 if tied; the nearest is the first of several.
    """
    _, first_BNC = lax.top_k(valid_BNT.astype(jnp.int32), clusters)
    centroid_BNCb = jnp.take_along_axis(signs_BNTb, first_BNC[..., None], axis=2)

    def assign(centroid_BNCb):
        return first_largest(jnp.einsum("BNCb,BNTb->BNCT", centroid_BNCb, signs_BNTb), axis=2)[1]  # bits - 2 x Hamming distance

    @jax.vmap
    @jax.vmap
    def votes(signs_Tb, valid_T, label_T):  # and their number
        total = lambda x: jax.ops.segment_sum(x, label_T, num_segments=clusters)
        return total(jnp.where(valid_T[:, None], signs_Tb, 0.0)), total(valid_T.astype(jnp.int32))

    def update(_, centroid_BNCb):
        votes_BNCb, size_BNC = votes(signs_BNTb, valid_BNT, assign(centroid_BNCb))
        return jnp.where(size_BNC[..., None] > 0, jnp.where(votes_BNCb > 0, 1.0, -1.0), centroid_BNCb)

    label_BNT = assign(lax.fori_loop(0, iterations, update, centroid_BNCb))
    return label_BNT, jax.nn.one_hot(label_BNT, clusters) * valid_BNT[..., None]


def centroid_weights(q_BTNH, k_BSNH, member_BNTC, valid_BS):
    """(softmax weights, scores), each [B, N, C, S], of the clusters' mean queries; invalid keys score -inf. Vyas et al. 2020, eq. 3 and 4."""
    size_BNC1 = jnp.maximum(member_BNTC.sum(axis=2), 1.0)[..., None]
    means_BNCH = jnp.einsum("BNTC,BTNH->BNCH", member_BNTC, q_BTNH, precision="highest") / size_BNC1
    scores_BNCS = jnp.einsum("BNCH,BSNH->BNCS", means_BNCH, k_BSNH, precision="highest") * q_BTNH.shape[-1] ** -0.5
    visible = jnp.ones((1, 1, 1, 1), bool) if valid_BS is None else valid_BS[:, None, None]
    return _softmax(scores_BNCS, visible), jnp.where(visible, scores_BNCS, -jnp.inf)


def best_keys(scores_BNCS, topk: int):
    """The keys of largest score of each cluster: (as a mask, [B, N, C, S]; as indices, [B, N, C, R]; which of these are keys it may see)."""
    values, index_BNCR = lax.top_k(lax.stop_gradient(scores_BNCS), min(topk, scores_BNCS.shape[-1]))
    seen_BNCR = values > -jnp.inf
    return jnp.put_along_axis(jnp.zeros(scores_BNCS.shape, bool), index_BNCR, seen_BNCR, axis=-1, inplace=False), index_BNCR, seen_BNCR


def _softmax(scores, seen):
    """Over the last axis, where seen; zeros where nothing is."""
    scores = jnp.where(seen, scores, -1e30)
    weights = jnp.where(seen, jnp.exp(scores - lax.stop_gradient(scores.max(axis=-1, keepdims=True))), 0.0)
    return weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool) -> float:
    """Hashes, means, the centroids' attention and the best keys of each query. Hamming distances, which are counts of bits, are left out."""
    centroids = min(options.clusters, T)
    return pair_flops(0.5 * T * options.bits + 0.25 * T + centroids * S + T * min(options.topk, S), B, N, H)


CLUSTERED = Variant(
    name="clustered",
    family="query prototypes",
    options=Options,
    build=Clustered,
    paper=Paper(
        "vyas2020fast",
        "Fast Transformers with Clustered Attention",
        "Vyas, Apoorv and Katharopoulos, Angelos and Fleuret, Fran{\\c{c}}ois",
        2020,
        "Advances in Neural Information Processing Systems 33",
    ),
    complexity="C S + T (k + C bits)",
    flops=flops,
    time_order=1.0,
    memory_order=1.0,
    exact_when=lambda T: {"topk": T},
    causal="a cluster's mean is made of queries at all positions, so what it attends to would see the future of the earliest",
)
