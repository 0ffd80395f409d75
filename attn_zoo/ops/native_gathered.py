"""Attention of each query over its own list of keys in C++, for CPUs, and lists of the keys with the largest scores. See ops.gathered, ops.native."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from attn_zoo.ops import native
from attn_zoo.ops.native import whole

NOTHING = np.zeros((0, 0, 0, 0), np.float32)  # factors that are not
ALL_VALID = np.zeros((0, 0), bool)


def native_gathered(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    index_TR: Int[Array, "*batch T R"],
    seen_TR: Bool[Array, "*batch T R"],
    *,
    valid_BS: Bool[Array, "B S"] | None = None,
    scale: float | None = None,
    factor_TR: Float[Array, "*batch T R"] | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """As `gathered_attention`: (output in q's dtype, float32 logsumexp). Raises Unsupported, with the reason, for what native.serves refuses.

    Everything is computed in float32. The working memory is two arrays [S, H] for each core that it runs on, four in the backward pass: keys and values of a head
    are copied together first, however few of them are listed. A core takes a key head of a sequence at a time. An index that is no key's is not seen.
    """
    native.check(jnp.result_type(q_BTNH, k_BSKH, v_BSKH))
    (B, T, _, H), K, R = q_BTNH.shape, k_BSKH.shape[2], index_TR.shape[-1]
    index_BKTR, seen_BKTR = (x.reshape((1,) * (4 - x.ndim) + x.shape) for x in (index_TR.astype(jnp.int32), seen_TR))
    if index_BKTR.shape[:3] not in itertools.product((1, B), (1, K), (T,)):
        raise ValueError(f"lists of shape {index_TR.shape} must be [T, R] or [B, K, T, R], with B={B} or 1, K={K} or 1 and T={T}")
    factor_BKTR = NOTHING if factor_TR is None else jnp.broadcast_to(factor_TR.astype(jnp.float32), (B, K, T, R))
    lists = index_BKTR, seen_BKTR, ALL_VALID if valid_BS is None else valid_BS
    o_BTNH, lse_BTN = _attend(H**-0.5 if scale is None else scale, *(whole(x, 3) for x in (q_BTNH, k_BSKH, v_BSKH)), *lists, factor_BKTR)
    return o_BTNH[..., :H].astype(q_BTNH.dtype), lse_BTN


def native_best_keys(
    q_BTNH: Float[Array, "B T N H"], k_BSKH: Float[Array, "B S K H"], valid_BS: Bool[Array, "B S"] | None, k: int, causal: bool
) -> tuple[Int[Array, "B N T R"], Bool[Array, "B N T R"]]:
    """(index, seen): the min(k, S) keys of largest float32 q'k of each query, best first, equal ones by position; seen is False where it may see fewer.

    No scores are stored but those of a tile. Not differentiable. Errors as above.
    """
    native.check(jnp.result_type(q_BTNH, k_BSKH))
    q_BTNH, k_BSKH = (whole(jax.lax.stop_gradient(x), 3) for x in (q_BTNH, k_BSKH))
    B, T, N, H = q_BTNH.shape
    R = min(k, k_BSKH.shape[1])
    arguments = q_BTNH, k_BSKH, ALL_VALID if valid_BS is None else valid_BS
    (index_BNTR,) = native.call("best_keys", [(B, N, T, R)], arguments, tasks=B * N * T, room=(R, H), dtype=jnp.int32, causal=causal)
    return jnp.maximum(index_BNTR, 0), index_BNTR >= 0


def _call(name, scale, shapes, q, k, *more):
    B, S, K, H = k.shape
    return native.call(f"gathered_{name}", shapes, (q, k, *more), tasks=B * K, room=(S * H, more[1].shape[-1]), scale=np.float32(scale))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale, q, k, v, index, seen, valid, factor):
    """(o, lse) of float32 arrays in whole vectors; index and seen are [1 or B, 1 or K, T, R], `valid` [B, S] and `factor` [B, K, T, R] may be empty."""
    return tuple(_call("forward", scale, (q.shape, q.shape[:3]), q, k, v, index, seen, valid, factor))


def _attend_fwd(scale, *inputs):
    o, lse = _attend(scale, *inputs)
    return (o, lse), (*inputs, o)


def _attend_bwd(scale, residuals, cotangents):
    q, k, v, *_, factor = residuals[:7]
    dq, dk, dv, d_factor = _call("backward", scale, (q.shape, k.shape, v.shape, factor.shape), *residuals, *cotangents)
    return dq, dk, dv, None, None, None, d_factor


_attend.defvjp(_attend_fwd, _attend_bwd)
