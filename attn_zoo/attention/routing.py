"""Routing Transformer: queries and keys are drawn to learned centroids, and attend within the cluster that a centroid collects.

Roy et al. 2021, sec. 4.1 and algorithm 1. On the sphere (layer norm without scale and bias), each of C centroids a head takes the `window` queries
and the `window` keys with the largest dot product, so clusters are of one size, and a query may be in none (its output is zero) or in
several (their outputs are averaged). Centroids are not trained by gradients: in training they move towards the tokens nearest to them,
m <- decay m + (1 - decay) mean of the queries and keys whose largest dot product is with m. When causal, keys are the queries.

Where paper and authors' code differ: the mean is the code's; the paper's sum would let the centroid of a large cluster outgrow the others and
take all. The code averages over its own moving counts, divides a query's sum of outputs by its clusters + 0.01, not by their number, adds
1e-4 times the tokens' distance from their centroids to the loss, and gives half of the heads local attention; none of this is done here.
Scores of normalised vectors are scaled by H^-1/2; the code scales queries before it normalises them, which undoes it.
The layer routes by keys alone when causal, so a query not equal to its key (it is equal in a model) is looked for where its key is.

Causal: no gradient or value flows back from the future, but which tokens a centroid takes depends on the whole sequence, in the paper too:
a later token can displace an earlier one.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from attn_zoo.attention.base import Attention, Paper, Statistic, Variant, repeat_kv, softmax_reference
from attn_zoo.attention.pattern import pair_flops
from attn_zoo.ops import backends
from attn_zoo.ops.native import core_count
from attn_zoo.ops.tiled import tiled_attention
from attn_zoo.spec import check, check_int, check_number

CENTROIDS = 16  # whose products with all tokens are held at once: no more numbers than a quarter of the tokens' own, at 64 channels; each reading of the tokens serves so many
ADDED_BYTES = 2**16  # of what hides pairs, for each core, in the clusters that the native kernels attend to at once; a cluster at the least


@dataclasses.dataclass(frozen=True)
class Options:
    """clusters: None takes near sqrt(max_len); window: queries and keys a cluster, None takes T / clusters; decay: of the centroids.

    normalize: whether scores are of normalised queries and keys, as routing always is.
    """

    clusters: int | None = None
    window: int | None = None
    decay: float = 0.999
    normalize: bool = True

    def __post_init__(self):
        check_int("clusters", self.clusters, 1, optional=True)
        check_int("window", self.window, 1, optional=True)
        check_number("decay", self.decay, 0, 1)
        check(isinstance(self.normalize, bool), "normalize", self.normalize, "must be True or False")


class Centroids(nnx.Variable):
    """[N, C, H], renewed in training calls."""


def clusters_of(options: Options, max_len: int) -> int:
    """C."""
    return options.clusters or round(math.sqrt(max_len))


def window_of(options: Options, clusters: int, T: int) -> int:
    """W, the tokens a centroid takes of T."""
    return min(T, options.window or -(-T // clusters))


def on_sphere(x_BTNH):
    """Layer norm without scale and bias, in float32 at least: vectors of mean 0 and length sqrt(H)."""
    x_BTNH = x_BTNH.astype(jnp.promote_types(x_BTNH.dtype, jnp.float32))
    x_BTNH = x_BTNH - x_BTNH.mean(axis=-1, keepdims=True)
    return x_BTNH * lax.rsqrt(jnp.mean(x_BTNH**2, axis=-1, keepdims=True) + 1e-6)


def memberships(x_BTNH, centroids_NCH, valid_BT, window: int):
    """(positions of the `window` vectors that each centroid takes, in rising order; which of them are valid), both [B, N, C, W]."""
    B, T, N, _ = x_BTNH.shape
    x_BTNH = lax.stop_gradient(x_BTNH)

    def take(centroid_NH):
        affinity_BNT = jnp.einsum("BTNH,NH->BNT", x_BTNH, centroid_NH, precision="highest")
        if valid_BT is not None:
            affinity_BNT = jnp.where(valid_BT[:, None], affinity_BNT, -jnp.inf)
        best_BNW, index_BNW = lax.top_k(affinity_BNT, window)
        return lax.sort((index_BNW, best_BNW > -jnp.inf), num_keys=1)

    taken = lax.map(take, centroids_NCH.swapaxes(0, 1), batch_size=min(CENTROIDS, centroids_NCH.shape[1]))
    return tuple(jnp.moveaxis(x, 0, 2) for x in taken)


def routed_attention(q_BTNH, k_BTNH, v_BTNH, taken_q, taken_k, causal: bool, backend: str):
    """Attention within clusters of (index, member) [B, N, C, W], averaged over the clusters of a query: [B, T, N, H]."""
    B, T, N, H = q_BTNH.shape
    C, W = taken_q[0].shape[2:]

    def gather(x_BTNH, index_BNCW):
        return jnp.take_along_axis(x_BTNH.swapaxes(1, 2), index_BNCW.reshape(B, N, C * W, 1), axis=2).reshape(B * N * C, W, H)

    def pairs(about):
        i_W, j_W, member_W = about
        return member_W & ((j_W <= i_W[:, None]) | (not causal)), 0.0

    (q_index, q_member), (k_index, k_member) = taken_q, taken_k
    about = tuple(x.reshape(B * N * C, W) for x in (q_index, k_index, k_member))
    tiles = gather(q_BTNH, q_index)[:, None], gather(k_BTNH, k_index), gather(v_BTNH, k_index)
    o, _ = tiled_attention(*tiles, pairs, about, backend=backend, added_bytes=max(ADDED_BYTES, 4 * W * W) * core_count())
    total = jax.vmap(jax.vmap(lambda x, index: jax.ops.segment_sum(x, index, num_segments=T)))
    flat = lambda x: x.reshape(B, N, C * W, -1)
    weight = flat(q_member).astype(o.dtype)
    o_BNTH, times_BNT1 = (total(x, q_index.reshape(B, N, C * W)) for x in (flat(o) * weight, weight))
    return (o_BNTH / jnp.maximum(times_BNT1, 1)).swapaxes(1, 2)


def nearest_sums(x_BTNH, centroids_NCH, valid_BT):
    """Sum [N, C, H] and number [N, C] of the valid vectors whose largest dot product is with each centroid."""
    B, T, N, H = x_BTNH.shape
    C = centroids_NCH.shape[1]
    nearest = lambda x_BNH: jnp.einsum("BNH,NCH->BNC", x_BNH, centroids_NCH, precision="highest").argmax(axis=-1)
    nearest_TBN = lax.map(nearest, x_BTNH.swapaxes(0, 1), batch_size=max(1, min(T, 2**20 // (B * N * C))))
    rows = (nearest_TBN + C * jnp.arange(N)).swapaxes(0, 1).reshape(-1)
    weight_BTN = jnp.ones((B, T, N)) if valid_BT is None else jnp.broadcast_to(valid_BT[..., None], (B, T, N)).astype(jnp.float32)
    total = lambda x, *rest: jax.ops.segment_sum(x.reshape(-1, *rest), rows, num_segments=N * C).reshape(N, C, *rest)
    return total(x_BTNH * weight_BTN[..., None], H), total(weight_BTN)


class Routing(Attention):
    """Attention within clusters of equal size."""

    pools_queries = True

    def __init__(self, options: Options, dims, *, shared: dict, rngs: nnx.Rngs):
        super().__init__(options, dims)
        self.shares_query_key = dims.causal
        shape = dims.num_heads, clusters_of(options, dims.max_len), dims.head_dim
        self.centroids = Centroids(on_sphere(jax.random.normal(rngs.params(), shape)))
        self.balance = Statistic(jnp.zeros(dims.num_heads))  # exp(entropy) of the tokens' nearest centroids, over C: 1 if all collect alike

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key, *, valid_BT=None):
        (q, k, v), sphere, taken = self.prepare(q_BTNH, k_BSKH, v_BSKH, valid_BS, valid_BT)
        if key is not None:
            self.move_centroids(sphere, (valid_BT, valid_BS))
        return routed_attention(q, k, v, *taken, self.dims.causal, self.backend())

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key, *, valid_BT=None):
        (q, k, v), _, taken = self.prepare(q_BTNH, k_BSKH, v_BSKH, valid_BS, valid_BT)
        T = q.shape[1]
        in_q, in_k = (((index[..., None] == jnp.arange(T)) & member[..., None]).any(axis=3) for index, member in taken)  # [B, N, C, T]
        earlier = jnp.tril(jnp.ones((T, T), bool)) if self.dims.causal else True

        @jax.checkpoint
        def one_cluster(members):
            mine, others = members
            return softmax_reference(q, k, v, mine[..., :, None] & others[..., None, :] & earlier)

        o_BTNH = lax.map(one_cluster, (jnp.moveaxis(in_q, 2, 0), jnp.moveaxis(in_k, 2, 0))).sum(axis=0)
        return o_BTNH / jnp.maximum(in_q.sum(axis=2), 1).swapaxes(1, 2)[..., None]

    def prepare(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, valid_BT):
        """(q, k, v of all heads in float32; queries and keys on the sphere; what the centroids take of either)."""
        N, wide = self.dims.num_heads, jnp.promote_types(q_BTNH.dtype, jnp.float32)
        q, k, v = q_BTNH.astype(wide), repeat_kv(k_BSKH, N).astype(wide), repeat_kv(v_BSKH, N).astype(wide)
        sphere = on_sphere(q), on_sphere(k)
        centroids_NCH = self.centroids[...]
        window = window_of(self.options, centroids_NCH.shape[1], q.shape[1])
        taken_k = memberships(sphere[1], centroids_NCH, valid_BS, window)
        taken_q = taken_k if self.dims.causal else memberships(sphere[0], centroids_NCH, valid_BT, window)
        return (*sphere, v) if self.options.normalize else (q, k, v), sphere, (taken_q, taken_k)

    def move_centroids(self, sphere, valid):
        """One step of the moving average. A centroid that is nearest to no token stays."""
        centroids_NCH, decay = self.centroids[...], self.options.decay
        sums_NCH, counts_NC = jax.tree.map(jnp.add, *(nearest_sums(lax.stop_gradient(x), centroids_NCH, ok) for x, ok in zip(sphere, valid)))
        mean_NCH = sums_NCH / jnp.maximum(counts_NC, 1)[..., None]
        self.leave("centroids", jnp.where(counts_NC[..., None] > 0, decay * centroids_NCH + (1 - decay) * mean_NCH, centroids_NCH))
        share_NC = counts_NC / jnp.maximum(counts_NC.sum(axis=1, keepdims=True), 1)
        self.leave("balance", jnp.exp(jax.scipy.special.entr(share_NC).sum(axis=1)) / centroids_NCH.shape[1])

    def backend(self, masked=False):
        return backends.choose_tiles(self.dims.backend, self.dims.dtype, self.dims.head_dim)

    def flops(self, B, T, S):
        options = dataclasses.replace(self.options, clusters=clusters_of(self.options, self.dims.max_len))
        return flops(options, B, T, S, self.dims.num_heads, self.dims.head_dim, self.dims.causal)

    def plan(self, T, S, masked=False):
        clusters = clusters_of(self.options, self.dims.max_len)
        return super().plan(T, S, masked) | {"clusters": clusters, "window": window_of(self.options, clusters, T)}


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool) -> float:
    """Dot products with the centroids (queries and keys are one when causal), and the pairs within clusters."""
    C = clusters_of(options, max(T, S))
    W = window_of(options, C, T)
    return 2.0 * B * N * H * C * (T if causal else T + S) + pair_flops(C * (W * (W + 1) / 2 if causal else W * W), B, N, H)


ROUTING = Variant(
    name="routing",
    family="content-based sparse",
    options=Options,
    build=Routing,
    paper=Paper(
        "roy2021routing",
        "Efficient Content-Based Sparse Attention with Routing Transformers",
        "Roy, Aurko and Saffar, Mohammad and Vaswani, Ashish and Grangier, David",
        2021,
        "Transactions of the Association for Computational Linguistics 9",
    ),
    complexity="T C + C W^2; T sqrt(T) at C = sqrt(T), W = T / C",
    flops=flops,
    time_order=1.5,
    memory_order=1.0,
    exact_when=lambda T: {"clusters": 1, "window": T, "normalize": False},
    decode="which positions a centroid takes is decided over the whole sequence",
    foresight="a centroid takes its nearest positions of the whole sequence",
    cross="a causal layer gives a position's query and key one membership, so both must be of one sequence",
)
