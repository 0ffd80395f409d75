"""Keys and values of a decoder, in as few slots as the pattern allows: one query at a time, over the keys it sees.

A key holds its slot until the last query that sees it. For a band that is a ring buffer; where all keys are seen to the end, one slot a position;
for other patterns slots are handed out in order, from what the pattern says of max_len positions.
"""

import dataclasses
import functools
import heapq
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attn_zoo.ops.block_mask import visibility
from attn_zoo.ops.patterns import Band, Pattern


@dataclasses.dataclass(frozen=True)
class Slots:
    """Key j is kept in slot of[j], or j % count where `of` is None; `most` is the most keys that one query sees."""

    count: int
    most: int
    of: tuple[int, ...] | None = None

    def within(self, count: int) -> "Slots":
        """With at most `count` slots, for at most as many steps."""
        return self if self.of is not None else Slots(min(self.count, count), min(self.most, count))


@functools.lru_cache(maxsize=256)
def plan_slots(pattern: Pattern, max_len: int) -> Slots:
    """The slots of a causal pattern among max_len positions."""
    if isinstance(pattern, Band):
        count = max_len if pattern.back is None else min(pattern.back + 1, max_len)
        return Slots(count, count)
    last, seen = visibility(pattern, max_len)
    free: list[int] = []
    held: list[tuple[int, int]] = []  # (last query that sees the key, slot)
    count, of = 0, []
    for j in range(max_len):
        while held and held[0][0] < j:
            heapq.heappush(free, heapq.heappop(held)[1])
        if not free:
            free.append(count)
            count += 1
        of.append(heapq.heappop(free))
        heapq.heappush(held, (int(last[j]), of[-1]))
    return Slots(count, max(int(seen.max()), 1), tuple(of))


def init_slots(slots: Slots, B: int, K: int, H: int, dtype) -> dict[str, Array]:
    """Empty slots, before position 0."""
    cache = {"t": jnp.zeros((), jnp.int32)} | {name: jnp.zeros((B, slots.count, K, H), dtype) for name in ("k", "v")}
    if slots.of is not None:
        cache["position"] = jnp.full((B, slots.count), -1, jnp.int32)  # of the key in each slot; the same in every row
    return cache


def put(k_B1KH: Array, v_B1KH: Array, cache: dict[str, Array], slots: Slots) -> dict[str, Array]:
    """The cache with the key and value of position cache['t'] in it; 't' stays."""
    t = cache["t"]
    slot = t % slots.count if slots.of is None else jnp.asarray(np.array(slots.of, np.int32))[t]
    write = lambda name, x: jax.lax.dynamic_update_slice_in_dim(cache[name], x.astype(cache[name].dtype), slot, 1)
    new = {"k": write("k", k_B1KH), "v": write("v", v_B1KH)}
    if slots.of is not None:
        new["position"] = write("position", jnp.broadcast_to(t, (len(cache["k"]), 1)))
    return cache | new


def positions(cache: dict[str, Array], slots: Slots) -> Array:
    """Of the key in each slot, [L]; negative where there is none yet."""
    if slots.of is not None:
        return cache["position"][0]
    t = cache["t"]
    return t - (t - jnp.arange(slots.count)) % slots.count


def attend_slots(
    q_B1NH: Float[Array, "B 1 N H"],
    cache: dict[str, Array],
    pattern: Pattern,
    slots: Slots,
    *,
    bias: Callable[[Array], Array] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B 1 N H"], Float[Array, "B 1 N"]]:
    """(output, float32 logsumexp) of the query at position cache['t'] over the keys that it sees, as `blocked_attention` gives them.

    `bias`, where there is one, maps positions [L] to what is added to the scaled scores, [N, L]; -inf hides a key.
    """
    j_L = positions(cache, slots)
    seen_L = (j_L >= 0) & pattern.mask(cache["t"], jnp.maximum(j_L, 0))
    k_BLKH, v_BLKH = cache["k"], cache["v"]
    if 2 * slots.most <= slots.count:  # what the query does not see is not read
        index = jnp.nonzero(seen_L, size=slots.most, fill_value=slots.count)[0]
        seen_L, index = index < slots.count, jnp.minimum(index, slots.count - 1)
        j_L, k_BLKH, v_BLKH = j_L[index], k_BLKH[:, index], v_BLKH[:, index]
    scores_BNL = score_row(q_B1NH, k_BLKH, scale)
    if bias is not None:
        scores_BNL = scores_BNL + bias(j_L)
    return softmax_row(jnp.where(seen_L, scores_BNL, -jnp.inf), v_BLKH, q_B1NH.dtype)


def attend_listed(q_B1NH: Array, cache: dict[str, Array], index_R: Array, seen_R: Array) -> tuple[Array, Array]:
    """The same over the keys of the listed slots, where seen; no other key is read."""
    k_BRKH, v_BRKH = cache["k"][:, index_R], cache["v"][:, index_R]
    return softmax_row(jnp.where(seen_R, score_row(q_B1NH, k_BRKH), -jnp.inf), v_BRKH, q_B1NH.dtype)


def score_row(q_B1NH: Array, k_BLKH: Array, scale: float | None = None, precision=None) -> Array:
    """Scaled scores of one query, float32 [B, N, L]."""
    B, _, N, H = q_B1NH.shape
    L, K = k_BLKH.shape[1:3]
    scores = jnp.einsum("BKGH,BLKH->BKGL", q_B1NH.reshape(B, K, N // K, H), k_BLKH, preferred_element_type=jnp.float32, precision=precision)
    return scores.reshape(B, N, L) * (H**-0.5 if scale is None else scale)


def softmax_row(scores_BNL: Array, v_BLKH: Array, dtype) -> tuple[Array, Array]:
    """(output [B, 1, N, H], logsumexp [B, 1, N]) of one query's scores; -inf hides a key, and a query that sees none gives zeros."""
    B, N, L = scores_BNL.shape
    K, H = v_BLKH.shape[2:]
    top_BN1 = scores_BNL.max(axis=-1, keepdims=True, initial=-jnp.inf)
    weights_BNL = jnp.exp(scores_BNL - jnp.where(top_BN1 > -jnp.inf, top_BN1, 0.0))
    total_BN = weights_BNL.sum(axis=-1)
    weights = weights_BNL.reshape(B, K, N // K, L).astype(v_BLKH.dtype)
    o_BNH = jnp.einsum("BKGL,BLKH->BKGH", weights, v_BLKH, preferred_element_type=jnp.float32).reshape(B, N, H)
    any_BN = total_BN > 0
    o_BNH = o_BNH / jnp.where(any_BN, total_BN, 1.0)[..., None]
    lse_BN = jnp.where(any_BN, top_BN1[..., 0] + jnp.log(jnp.where(any_BN, total_BN, 1.0)), -jnp.inf)
    return o_BNH[:, None].astype(dtype), lse_BN[:, None]
