"""Attention of each query over its own short list of keys, for variants whose pairs fill no blocks (random keys, trees, largest scores).

Keys and values are gathered some queries at a time and gathered again in the backward pass, so memory is O(T H), not O(T R H). On a CPU the native kernels
gather nothing (ops.native_gathered).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attn_zoo.ops.native_gathered import native_gathered

GATHER_BYTES = 4 * 2**20  # of the keys that one step holds


def gathered_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    index_TR: Int[Array, "*batch T R"],
    seen_TR: Bool[Array, "*batch T R"],
    *,
    valid_BS: Bool[Array, "B S"] | None = None,
    scale: float | None = None,
    factor_TR: Float[Array, "*batch T R"] | None = None,
    backend: str = "xla",
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Softmax attention of query t over keys index[t, r] where seen[t, r]: (output, float32 logsumexp).

    `index` and `seen` are [T, R], the same for all heads, or [B, K, T, R]. No key may be listed twice in a row. Rows that see nothing give zeros, -inf.
    `factor`, like them and differentiable, multiplies the weights after the softmax: they no longer sum to one, and the logsumexp does not know of it.
    `backend` is "xla" or "native" (see backends.choose_lists).
    """
    if backend == "native":
        return native_gathered(q_BTNH, k_BSKH, v_BSKH, index_TR, seen_TR, valid_BS=valid_BS, scale=scale, factor_TR=factor_TR)
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    R, G = index_TR.shape[-1], N // K
    scale = H**-0.5 if scale is None else scale
    step = max(1, min(T, GATHER_BYTES // max(1, 4 * B * K * R * H)))
    steps = -(-T // step)

    # Float32 before gathering: the gradient of a key sums over all queries that list it, in the dtype that was gathered.
    wide_dtype = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    k_BKSH, v_BKSH = (x.swapaxes(1, 2).astype(wide_dtype) for x in (k_BSKH, v_BSKH))
    valid_BKS = None if valid_BS is None else jnp.broadcast_to(valid_BS[:, None], (B, K, S))
    q_BKGTH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)
    index, seen = (jnp.broadcast_to(x, (B, K, T, R)) if x.ndim == 4 else x[None, None] for x in (index_TR, seen_TR))
    factor = None if factor_TR is None else jnp.broadcast_to(factor_TR, index.shape)

    def chunks(x, axis):
        x = jnp.pad(x, [(0, steps * step - T if a == axis else 0) for a in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], steps, step, *x.shape[axis + 1 :]), axis, 0)

    @jax.checkpoint
    def attend(args):
        q, index, seen, factor = args
        wide = jnp.broadcast_to(index, (B, K, *index.shape[2:])).reshape(B, K, -1)
        take = lambda x: jnp.take_along_axis(x, wide[..., None], axis=2).reshape(B, K, step, R, H)
        scores = scale * jnp.einsum("BKGTH,BKTRH->BKGTR", q.astype(wide_dtype), take(k_BKSH))
        if valid_BKS is not None:
            seen = seen & jnp.take_along_axis(valid_BKS, wide, axis=2).reshape(B, K, step, R)
        seen = seen[:, :, None]
        scores = jnp.where(seen, scores, -1e30)
        top = lax.stop_gradient(scores.max(axis=-1, keepdims=True))
        p = jnp.where(seen, jnp.exp(scores - top), 0.0)
        total = p.sum(axis=-1)
        any_seen = total > 0
        safe = jnp.where(any_seen, total, 1.0)
        weights = p / safe[..., None] if factor is None else p / safe[..., None] * factor[:, :, None]
        o = jnp.einsum("BKGTR,BKTRH->BKGTH", weights, take(v_BKSH))
        return o.astype(q.dtype), jnp.where(any_seen, top[..., 0] + jnp.log(safe), -jnp.inf)

    o, lse = lax.map(attend, (chunks(q_BKGTH, 3), chunks(index, 2), chunks(seen, 2), None if factor is None else chunks(factor, 2)))
    o = jnp.moveaxis(o, 0, 3).reshape(B, K, G, steps * step, H)[:, :, :, :T].transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    lse = jnp.moveaxis(lse, 0, 3).reshape(B, K, G, steps * step)[..., :T].transpose(0, 3, 1, 2).reshape(B, T, N)
    return o, lse


def listed_mask(index_TR: np.ndarray, seen_TR: np.ndarray, S: int) -> np.ndarray:
    """The pairs that such lists mean, as a [T, S] array, for references."""
    mask = np.zeros((len(index_TR), S), bool)
    row, place = np.nonzero(seen_TR)
    mask[row, index_TR[row, place]] = True
    return mask
