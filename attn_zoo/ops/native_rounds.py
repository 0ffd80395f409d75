"""Attention among positions that meet in rounds of sorting in C++, for CPUs. See attention.lsh, ops.native."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from attn_zoo.ops import native
from attn_zoo.ops.native import whole

ALL_VALID = np.zeros((0, 0), bool)


def native_rounds(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    order_RBKT: Int[Array, "R B K T"],
    place_RBKT: Int[Array, "R B K T"],
    *,
    window: int,
    valid_BT: Bool[Array, "B T"] | None = None,
    causal: bool = False,
    itself: bool = True,
    scale: float | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attention over the pairs that met in some of R rounds: (output in q's dtype, float32 logsumexp). A row that sees nothing gives zeros and -inf.

    In a round the positions of a key head stand in an order, cut into chunks of `window`; there query and key met if place(query) - place(key) is 0 or 1, which
    must hold only within a chunk and from one chunk to the one before. place[t] is of position t, order[n] the position that stands n-th. A pair that met in
    several rounds is seen once. itself: whether a query sees its own position.

    Everything is computed in float32. The working memory is two arrays [T, H] for each core that it runs on, four in the backward pass. A core takes a key head
    of a sequence at a time. Raises Unsupported, with the reason, for what native.serves refuses.
    """
    native.check(jnp.result_type(q_BTNH, k_BTKH, v_BTKH))
    H = q_BTNH.shape[-1]
    options = {"window": np.int64(window), "causal": causal, "itself": itself, "scale": np.float32(H**-0.5 if scale is None else scale)}
    sorting = order_RBKT.astype(jnp.int32), place_RBKT.astype(jnp.int32), ALL_VALID if valid_BT is None else valid_BT
    o_BTNH, lse_BTN = _attend(tuple(options.items()), *(whole(x, 3) for x in (q_BTNH, k_BTKH, v_BTKH)), *sorting)
    return o_BTNH[..., :H].astype(q_BTNH.dtype), lse_BTN


def native_buckets(
    k_BTKH: Float[Array, "B T K H"], rotations_RKHC: Float[Array, "R K H C"], factors: tuple[int, ...]
) -> Int[Array, "R B K T"]:
    """As `hash_buckets`, in float32, for one or two factors. Not differentiable. Errors as above."""
    native.check(k_BTKH.dtype)
    (B, T, K, _), R = k_BTKH.shape, len(rotations_RKHC)
    first, second = (factor // 2 for factor in (*factors, 0)[:2])
    k_BTKH, rotations_RKHC = (jax.lax.stop_gradient(x) for x in (whole(k_BTKH, 3), rotations_RKHC.astype(jnp.float32)))
    arguments = {"tasks": B * K * T, "room": (k_BTKH.shape[3], max(first, second)), "dtype": jnp.int32}
    return native.call("buckets", [(R, B, K, T)], (k_BTKH, rotations_RKHC), **arguments, first=np.int64(first), second=np.int64(second))[0]


def _call(name, options, shapes, q, k, v, order, *more):
    (B, T, N, H), K = q.shape, k.shape[2]
    return native.call(f"rounds_{name}", shapes, (q, k, v, order, *more), tasks=B * K, room=(T, H, len(order), N // K), **dict(options))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, order, place, valid):
    """(o, lse) of float32 arrays in whole vectors; `valid` may be empty."""
    return tuple(_call("forward", options, (q.shape, q.shape[:3]), q, k, v, order, place, valid))


def _attend_fwd(options, *inputs):
    o, lse = _attend(options, *inputs)
    return (o, lse), (*inputs, o, lse)


def _attend_bwd(options, residuals, cotangents):
    shapes = [x.shape for x in residuals[:3]]
    return *_call("backward", options, shapes, *residuals, *cotangents), None, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)
