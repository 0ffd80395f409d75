"""Keys and values of a decoder, in as few slots as the pattern allows: one query at a time, over the keys it sees.

A key holds its slot until the last query that sees it. For a band that is a ring buffer; where all keys are seen to the end, one slot a position;
for other patterns slots are handed out in order, from what the pattern says of max_len positions.
"""

import dataclasses
import functools
import heapq

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attn_zoo.ops.patterns import Band, Pattern, visibility


@dataclasses.dataclass(frozen=True)
class Slots:
    """Where each of max_len keys is kept: key j in slot of[j], or j % count where `of` is None; `most` is the most keys that one query sees."""

    max_len: int
    count: int
    most: int
    of: np.ndarray | None = None


@functools.lru_cache(maxsize=256)
def plan_slots(pattern: Pattern, max_len: int) -> Slots:
    """The slots of a causal pattern."""
    if isinstance(pattern, Band):
        count = max_len if pattern.back is None else min(pattern.back + 1, max_len)
        return Slots(max_len, count, count)
    last, seen = visibility(pattern, max_len)
    most = max(int(seen.max()), 1)
    free: list[int] = []
    held: list[tuple[int, int]] = []  # (last query that sees the key, slot)
    count, of = 0, np.zeros(max_len, np.int32)
    for j in range(max_len):
        while held and held[0][0] < j:
            heapq.heappush(free, heapq.heappop(held)[1])
        if not free:
            free.append(count)
            count += 1
        of[j] = heapq.heappop(free)
        heapq.heappush(held, (int(last[j]), int(of[j])))
    return Slots(max_len, count, most, None if count == max_len else of)


def init_slots(slots: Slots, B: int, K: int, H: int, dtype) -> dict[str, Array]:
    """Empty slots, before position 0."""
    arrays = {name: jnp.zeros((B, slots.count, K, H), dtype) for name in ("k", "v")}
    if slots.of is not None:
        arrays["position"] = jnp.full((B, slots.count), -1, jnp.int32)  # of the key in each slot; the same in every row
    return arrays | {"t": jnp.zeros((), jnp.int32)}


def put(k_B1KH: Array, v_B1KH: Array, cache: dict[str, Array], slots: Slots) -> dict[str, Array]:
    """The cache with the key and value of position t = cache['t'] in it; t is left to `attend_slots`."""
    t = cache["t"]
    slot = t % slots.count if slots.of is None else jnp.asarray(slots.of)[t]
    new = {name: jax.lax.dynamic_update_slice_in_dim(cache[name], x.astype(cache[name].dtype), slot, 1) for name, x in (("k", k_B1KH), ("v", v_B1KH))}
    if slots.of is not None:
        new["position"] = jax.lax.dynamic_update_slice_in_dim(cache["position"], jnp.broadcast_to(t, (len(cache["k"]), 1)), slot, 1)
    return cache | new


def positions(cache: dict[str, Array], slots: Slots) -> Array:
    """Of the key in each slot, [L]; negative where there is none yet."""
    if slots.of is not None:
        return cache["position"][0]
    t = cache["t"]
    return t - (t - jnp.arange(slots.count)) % slots.count


def attend_slots(
    q_B1NH: Float[Array, "B 1 N H"], cache: dict[str, Array], pattern: Pattern, slots: Slots, *, bias=None, scale: float | None = None
) -> tuple[Float[Array, "B 1 N H"], Float[Array, "B 1 N"]]:
    """(output, float32 logsumexp) of the query at position cache['t'] over the keys that it sees, as `blocked_attention` gives them.

    `bias`, where there is one, maps positions [L] to what is added to the scaled scores, [N, L]; -inf hides a key.
    """
    j_L = positions(cache, slots)
    seen_L = (j_L >= 0) & pattern.mask(cache["t"], jnp.maximum(j_L, 0))
    k_BLKH, v_BLKH = cache["k"], cache["v"]
    if 2 * slots.most <= slots.count:  # what the query does not see is not read
        index = jnp.nonzero(seen_L, size=slots.most, fill_value=slots.count)[0]
        seen_L, j_L = index < slots.count, j_L[index]
        k_BLKH, v_BLKH = k_BLKH[:, index], v_BLKH[:, index]
    B, _, N, H = q_B1NH.shape
    K, L = k_BLKH.shape[2], len(j_L)
    q_BKGH = q_B1NH.reshape(B, K, N // K, H)
    scores_BNL = jnp.einsum("BKGH,BLKH->BKGL", q_BKGH, k_BLKH, preferred_element_type=jnp.float32).reshape(B, N, L) * (H**-0.5 if scale is None else scale)
    if bias is not None:
        scores_BNL = scores_BNL + bias(j_L)
    return softmax_row(jnp.where(seen_L, scores_BNL, -jnp.inf), v_BLKH, q_B1NH.dtype)


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
