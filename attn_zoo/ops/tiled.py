"""Softmax attention inside each of many small tiles, for variants that first bring together what attends (hash buckets, clusters)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attn_zoo.ops.blocked import NEG, TILE_BYTES, rows_per_step
from attn_zoo.ops.native_attention import native_tiles


def tiled_attention(
    q_MGTH: Float[Array, "M G T H"],
    k_MSH: Float[Array, "M S H"],
    v_MSH: Float[Array, "M S H"],
    pairs: Callable[[Any], tuple[Array, Array | float]],
    about: Any,
    *,
    scale: float | None = None,
    backend: str = "xla",
    added_bytes: int = TILE_BYTES,
) -> tuple[Float[Array, "M G T H"], Float[Array, "M G T"]]:
    """Attention of the T queries over the S keys of each of M tiles: (output, logsumexp). A row that sees nothing gives zeros and -inf.

    `about` is a tree of arrays [M, ...]; pairs(its slice for one tile) -> (seen [T, S], bias [T, S] added to the scaled scores), without gradients and
    closing over nothing that is traced. Some tiles are computed at a time and computed again in the backward pass, so the memory for scores does not
    grow with M. `backend` is "xla" or "native" (see backends.choose_tiles), which gets up to `added_bytes` of what is added to scores at a time.
    """
    M, G, T, H = q_MGTH.shape
    S = k_MSH.shape[1]
    scale = H**-0.5 if scale is None else scale
    if backend == "native":
        return _native(q_MGTH, k_MSH, v_MSH, pairs, about, scale, added_bytes)

    @jax.checkpoint
    def attend(tile):
        q_GTH, k_SH, v_SH, about = tile
        seen_TS, bias_TS = pairs(about)
        scores_GTS = jnp.where(seen_TS, scale * jnp.einsum("GTH,SH->GTS", q_GTH, k_SH) + bias_TS, NEG)
        top_GT1 = lax.stop_gradient(scores_GTS.max(axis=-1, keepdims=True))
        weights_GTS = jnp.where(seen_TS, jnp.exp(scores_GTS - top_GT1), 0.0)
        total_GT = weights_GTS.sum(axis=-1)
        empty_GT = total_GT == 0
        safe_GT = jnp.where(empty_GT, 1.0, total_GT)
        o_GTH = jnp.einsum("GTS,SH->GTH", weights_GTS / safe_GT[..., None], v_SH)
        return o_GTH, jnp.where(empty_GT, -jnp.inf, top_GT1[..., 0] + jnp.log(safe_GT))

    return lax.map(attend, (q_MGTH, k_MSH, v_MSH, about), batch_size=rows_per_step(M, 4 * G * T * S))


def _native(q_MGTH, k_MSH, v_MSH, pairs, about, scale, added_bytes):
    """As many tiles at a time as have no more to be added to their scores."""
    (M, _, T, _), S = q_MGTH.shape, k_MSH.shape[1]
    step = max(p for p in range(1, M + 1) if M % p == 0 and (p == 1 or 4 * T * S * p <= added_bytes))

    def added(tile):
        seen_TS, bias_TS = pairs(tile)
        return jnp.where(seen_TS, bias_TS, NEG).astype(jnp.float32)

    attend = lambda tiles: native_tiles(*tiles[:3], jax.vmap(added), tiles[3], scale=scale)
    if step == M:
        o_MTGH, lse_MTG = attend((q_MGTH.swapaxes(1, 2), k_MSH, v_MSH, about))
        return o_MTGH.swapaxes(1, 2), lse_MTG.swapaxes(1, 2)
    split, join = lambda x: x.reshape(M // step, step, *x.shape[1:]), lambda x: x.reshape(M, *x.shape[2:])
    o_MTGH, lse_MTG = jax.tree.map(join, lax.map(attend, jax.tree.map(split, (q_MGTH.swapaxes(1, 2), k_MSH, v_MSH, about))))
    return o_MTGH.swapaxes(1, 2), lse_MTG.swapaxes(1, 2)
