"""Reformer: positions are sorted by a locality-sensitive hash, so that similar ones stand near, and attend in chunks of that order.

Kitaev et al. 2020, sec. 2. Queries and keys are one vector, k = q / |q|. A round of angular hashing puts x into bucket argmax [x R; -x R]
with a random R; the sequence is sorted by (bucket, position) and cut into chunks of `bucket_size` positions, twice the mean bucket; a query
sees its own chunk and the one before (eq. 5), only earlier positions when causal, and itself only if it sees nothing else. Rounds are
united by their logsumexp (eq. 6 and appendix A). There a pair that met in n rounds weighs 1 / n in each; here it is seen in the first of
them alone, which comes to the same.

Where the paper and the authors' code (trax) differ, as in the code: scores are q'k / |k|, without another 1 / sqrt(H); a chunk is not divided
at bucket borders, as in their experiments (eq. 4 divides it: across_buckets=False); more than 128 buckets are hashed as two factors.
As in the paper, where versions of the code differ: pairs are counted once, and the first chunk does not look back to the last.
Departures: rotations are drawn for every head and round of a call with a key, but shared by the examples of a batch; the paper's penalty of
10^5 on a query itself is taken to its limit, which it reaches in float32. The layer hashes its keys alone: they are the queries in
a model, and where they are not, a query is looked for where its key stands.

Causal: no gradient or value flows back from the future, but where chunks are cut depends on the whole sequence, as in the authors' code:
a later token can change which earlier ones a query is compared with.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from attn_zoo.attention.base import Attention, Paper, Variant, repeat_kv, softmax_reference
from attn_zoo.attention.pattern import pair_flops
from attn_zoo.ops import backends
from attn_zoo.ops.merge import merge
from attn_zoo.ops.native_rounds import native_buckets, native_rounds
from attn_zoo.ops.rows import first_largest
from attn_zoo.ops.tiled import tiled_attention
from attn_zoo.spec import check, check_int


@dataclasses.dataclass(frozen=True)
class Options:
    """num_hashes: rounds; bucket_size: positions in a chunk; seed: of the rotations in a call without a key.

    across_buckets: whether all pairs of a chunk are seen, or those of one bucket; normalize_keys: k / |k|, or k / sqrt(H), in the scores;
    attend_self: whether a query sees itself as any other position.
    """

    num_hashes: int = 4
    bucket_size: int = 64
    seed: int = 0
    across_buckets: bool = True
    normalize_keys: bool = True
    attend_self: bool = False

    def __post_init__(self):
        check_int("num_hashes", self.num_hashes, 1)
        check_int("bucket_size", self.bucket_size, 1)
        check_int("seed", self.seed, 0)
        for name in ("across_buckets", "normalize_keys", "attend_self"):
            check(isinstance(getattr(self, name), bool), name, getattr(self, name), "must be True or False")


def bucket_factors(T: int, bucket_size: int) -> tuple[int, ...]:
    """Even numbers whose product is the number of buckets, 2 T / m (paper, sec. 2); two of them beyond 128 buckets, so that hashing stays cheap."""
    buckets = 2 * max(1, T // bucket_size)
    if buckets <= 128:
        return (buckets,)
    first = 2 ** math.ceil(math.log2(math.sqrt(buckets)))
    return first, 2 * (buckets // (2 * first))


def hash_buckets(k_BTKH, rotations_RKHC, factors: tuple[int, ...]):
    """The bucket of every vector in every round, [R, B, K, T]; a scaled vector falls into the same one."""
    k_BTKH = lax.stop_gradient(k_BTKH).astype(jnp.float32)

    def one_round(rotations_KHC):
        rotated_BKCT = jnp.einsum("BTKH,KHC->BKCT", k_BTKH, rotations_KHC, precision="highest")
        bucket_BKT, start, step = 0, 0, 1
        for factor in factors:
            part_BKCT = rotated_BKCT[:, :, start : start + factor // 2]
            (most, ahead), (least, behind) = first_largest(part_BKCT, 2), first_largest(-part_BKCT, 2)
            nearest_BKT = jnp.where(most >= least, ahead, factor // 2 + behind)
            bucket_BKT = bucket_BKT + step * nearest_BKT
            start, step = start + factor // 2, step * factor
        return bucket_BKT

    return lax.map(one_round, rotations_RKHC)


def normalized(k_BTKH, options: Options):
    """Keys of root mean square 1, in float32 at least."""
    k_BTKH = k_BTKH.astype(jnp.promote_types(k_BTKH.dtype, jnp.float32))
    return k_BTKH * lax.rsqrt(jnp.mean(k_BTKH**2, axis=-1, keepdims=True) + 1e-6) if options.normalize_keys else k_BTKH


def lsh_attention(q_BTNH, k_BTKH, v_BTKH, valid_BT, bucket_RBKT, options: Options, causal: bool, backend: str = "xla"):
    """Attention over the pairs that met in some round, [B, T, N, H]. In `bucket` the invalid positions come last."""
    N, wide = q_BTNH.shape[2], jnp.promote_types(q_BTNH.dtype, jnp.float32)
    attend = {"xla": attention_in_rounds, "native": native_rounds}[backend]
    q, k, v = q_BTNH.astype(wide), normalized(k_BTKH, options), v_BTKH.astype(wide)
    T = q.shape[1]
    window = min(options.bucket_size, T)
    order, rank = sorted_places(bucket_RBKT, math.prod(bucket_factors(T, options.bucket_size)))
    # Query and key met where their places differ by 0 or 1. A place is a chunk or, within buckets, a chunk of one bucket.
    place = rank // window if options.across_buckets else bucket_RBKT * (-(-T // window) + 1) + rank // window
    o_BTNH, lse_BTN = attend(q, k, v, order, place, window=window, valid_BT=valid_BT, causal=causal, itself=options.attend_self)
    return jnp.where(jnp.isneginf(lse_BTN)[..., None], repeat_kv(v_BTKH, N), o_BTNH)


def attention_in_rounds(q_BTNH, k_BTKH, v_BTKH, order_RBKT, place_RBKT, *, window: int, valid_BT, causal: bool, itself: bool):
    """As `native_rounds`, round by round in tiles of a chunk by two."""
    B, T, N, H = q_BTNH.shape
    R, K = order_RBKT.shape[0], k_BTKH.shape[2]
    G, W, C = N // K, window, -(-T // window)
    beyond = [(0, 0)] * 3 + [(0, C * W - T)]
    order, place = jnp.pad(order_RBKT, beyond), jnp.pad(place_RBKT, beyond)
    order = order.at[..., T:].set(jnp.arange(T, C * W, dtype=order.dtype))
    rank = inverse_of(order)

    def rows(x, *rest):  # [B, T, ...] -> [B, K, C W, ...]
        return jnp.pad(x.reshape(B, T, K, *rest).swapaxes(1, 2), [(0, 0), (0, 0), (0, C * W - T)] + [(0, 0)] * len(rest))

    q, k, v = rows(q_BTNH, G * H), rows(k_BTKH, H), rows(v_BTKH, H)
    valid = jnp.broadcast_to(jnp.pad(jnp.ones((B, T), bool) if valid_BT is None else valid_BT, ((0, 0), (0, C * W - T)))[:, None], (B, K, C * W))

    def chunks(x):  # [B, K, C W, ...] -> [B K C, W, ...]
        return x.reshape(B * K * C, W, *x.shape[3:])

    def with_previous(x):  # [B, K, C W, ...] -> [B K C, 2 W, ...]; before the first chunk stand zeros, which are not valid
        x = x.reshape(B, K, C, W, *x.shape[3:])
        before = jnp.pad(x[:, :, :-1], [(0, 0), (0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 3))
        return jnp.concatenate([before, x], axis=3).reshape(B * K * C, 2 * W, *x.shape[4:])

    def met(place_i, place_j):
        apart = place_i[:, None] - place_j[None, :]
        return (apart == 0) | (apart == 1)

    @jax.checkpoint
    def one_round(args):
        r, order, rank = args

        def pairs(about):
            i, j, valid, here_i, here_j, place_i, place_j = about
            seen = met(here_i, here_j) & valid
            for n in range(R - 1):
                seen &= ~met(place_i[n], place_j[n])
            if causal:
                seen &= j <= i[:, None]
            if not itself:
                seen &= j != i[:, None]
            return seen, 0.0

        sort = lambda x: jnp.take_along_axis(x, order, axis=2)
        of_rounds = lambda tile, places: jax.vmap(lambda x: tile(sort(x)), out_axes=1)(places)
        here = sort(jnp.take(place, r, axis=0))
        earlier = jnp.where(jnp.arange(R)[:, None, None, None] < r, place, -(2**30))  # in other rounds no query meets a key
        about = chunks(order), with_previous(order), with_previous(sort(valid)), chunks(here), with_previous(here), of_rounds(chunks, earlier), of_rounds(with_previous, place)
        tiles = chunks(permute(q, order, rank)).reshape(-1, W, G, H).swapaxes(1, 2)
        o, lse = tiled_attention(tiles, *(with_previous(permute(x, order, rank)) for x in (k, v)), pairs, about)
        o = permute(o.swapaxes(1, 2).reshape(B, K, C * W, G * H), rank, order)[:, :, :T]
        lse = permute(lse.swapaxes(1, 2).reshape(B, K, C * W, G), rank, order)[:, :, :T]
        return o.swapaxes(1, 2).reshape(B, T, N, H), lse.swapaxes(1, 2).reshape(B, T, N)

    return merge(*zip(*lax.map(one_round, (jnp.arange(R), order, rank))))


def sorted_places(bucket, most: int):
    """(which position stands at each place in the order of (bucket, position), and the place of each position), int32 like `bucket` [..., T], of 0 to `most`.

    One sort of whole numbers where they can hold both, which on a CPU takes a tenth of the time of two argsorts.
    """
    T = bucket.shape[-1]
    positions = jnp.arange(T, dtype=jnp.int32)
    if (most + 1) * T <= jnp.iinfo(jnp.int32).max:
        order = jnp.sort(bucket * T + positions, axis=-1) % T
    else:
        order = jnp.argsort(bucket, axis=-1, stable=True)
    return order, inverse_of(order)


def inverse_of(order):
    """The place of each position, where `order` [..., T] tells the position at each place."""
    flat, places = order.reshape(-1, order.shape[-1]), jnp.arange(order.shape[-1], dtype=order.dtype)
    rank = jax.vmap(lambda order: jnp.zeros_like(order).at[order].set(places, unique_indices=True))(flat)
    return rank.reshape(order.shape)


@jax.custom_vjp
def permute(x_BKTH, order_BKT, inverse_BKT):
    """x in the given order along T; the gradient goes back through the inverse, where that of a gather would be a scatter."""
    return jnp.take_along_axis(x_BKTH, order_BKT[..., None], axis=2)


permute.defvjp(lambda x, order, inverse: (permute(x, order, inverse), (order, inverse)), lambda orders, g: (permute(g, *orders[::-1]), None, None))


class Lsh(Attention):
    """Attention among positions of like hash."""

    shares_query_key = True

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        return lsh_attention(q_BTNH, k_BSKH, v_BSKH, valid_BS, self.buckets(k_BSKH, valid_BS, key), self.options, self.dims.causal, self.backend())

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        T, N = q_BTNH.shape[1:3]
        b_RBKT, i = self.buckets(k_BSKH, valid_BS, key), jnp.arange(T)
        mine, other = b_RBKT[..., :, None], b_RBKT[..., None, :]
        before = (other < mine) | ((other == mine) & (i[None, :] < i[:, None]))
        chunk = before.sum(axis=-1) // min(self.options.bucket_size, T)
        apart = chunk[..., :, None] - chunk[..., None, :]
        mask = ((0 <= apart) & (apart <= 1) & ((mine == other) | self.options.across_buckets)).any(axis=0)
        mask &= ((i[None, :] <= i[:, None]) | (not self.dims.causal)) & ((i[None, :] != i[:, None]) | self.options.attend_self)
        mask = jnp.repeat(mask if valid_BS is None else mask & valid_BS[:, None, None, :], N // self.dims.num_kv_heads, axis=1)
        o_BTNH = softmax_reference(q_BTNH, normalized(k_BSKH, self.options), v_BSKH, mask)
        return jnp.where(mask.any(axis=-1).swapaxes(1, 2)[..., None], o_BTNH, repeat_kv(v_BSKH, N))

    def buckets(self, k_BSKH, valid_BS, key):
        """[R, B, K, S], with invalid positions in a bucket of their own after all others."""
        T, K, H = k_BSKH.shape[1:]
        factors = bucket_factors(T, self.options.bucket_size)
        key = jax.random.key(self.options.seed) if key is None else key
        rotations = jax.random.normal(key, (self.options.num_hashes, K, H, sum(factors) // 2))
        bucket_RBKT = {"xla": hash_buckets, "native": native_buckets}[self.backend()](k_BSKH, rotations, factors)
        return bucket_RBKT if valid_BS is None else jnp.where(valid_BS[:, None, :], bucket_RBKT, math.prod(factors))

    def backend(self, masked=False):
        return backends.choose_tiles(self.dims.backend, self.dims.dtype, self.dims.head_dim)

    def plan(self, T, S, masked=False):
        return super().plan(T, S, masked) | {"buckets": math.prod(bucket_factors(T, self.options.bucket_size)), "chunks": -(-T // self.options.bucket_size)}


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool) -> float:
    """The rotations, and the pairs expected to be seen in every round, when buckets are equally full."""
    factors, W = bucket_factors(T, options.bucket_size), min(options.bucket_size, T)
    others = T * (2 * W if options.across_buckets else T / math.prod(factors)) - (W * W if options.across_buckets else 0) - T
    pairs = (others / 2 if causal else others) + (T if options.attend_self else 0)
    return options.num_hashes * (pair_flops(pairs, B, N, H) + 2.0 * B * N * T * H * (sum(factors) // 2))


LSH = Variant(
    name="lsh",
    family="content-based sparse",
    options=Options,
    build=lambda options, dims, *, shared, rngs: Lsh(options, dims),
    paper=Paper(
        "kitaev2020reformer",
        "Reformer: The Efficient Transformer",
        "Kitaev, Nikita and Kaiser, {\\L}ukasz and Levskaya, Anselm",
        2020,
        "International Conference on Learning Representations",
    ),
    complexity="T R m; sorting T log T",
    flops=flops,
    time_order=1.0,
    memory_order=1.0,
    exact_when=lambda T: {"num_hashes": 1, "bucket_size": T, "normalize_keys": False, "attend_self": True},
    decode="buckets are sorted anew whenever a position is added",
    foresight="how a bucket is cut into chunks, and how many there are, follows from all positions",
    cross="it sorts one sequence whose queries are its keys, so it cannot attend to another",
)
