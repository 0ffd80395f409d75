"""Additive attention in C++, for CPUs: a reciprocal a pair and hidden unit, and no tanh. See ops.additive, ops.native."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from attn_zoo.ops import native
from attn_zoo.ops.native import whole


def native_additive(
    q_BTNR: Float[Array, "B T N R"],
    k_BSKR: Float[Array, "B S K R"],
    weight_NR: Float[Array, "N R"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    causal: bool,
    valid_BS: Bool[Array, "B S"] | None = None,
) -> Float[Array, "B T N H"]:
    """As `additive_attention`, in float32 throughout (of tanh to 2e-7), the result in v's dtype. Working memory is of a tile for each core; gradients take a key head a core. Raises Unsupported, with the reason, for what native.serves refuses."""
    native.check(jnp.result_type(q_BTNR, k_BSKR, v_BSKH))
    arguments = whole(q_BTNR, 3), whole(k_BSKR, 3), whole(weight_NR, 1), whole(v_BSKH, 3), np.zeros((0, 0), bool) if valid_BS is None else valid_BS
    return _attend(causal, *arguments)[0][..., : v_BSKH.shape[3]].astype(v_BSKH.dtype)


def _call(name, causal, shapes, tasks, q, k, weight, v, *more):
    return native.call(f"additive_{name}", shapes, (q, k, weight, v, *more), tasks=tasks, room=(q.shape[3], v.shape[3]), causal=causal)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(causal, q, k, weight, v, valid):
    """(o, logsumexp, which has no gradient) of float32 arrays in whole vectors; `valid` [B, S] may be empty."""
    (B, T, N, _), H = q.shape, v.shape[3]
    return tuple(_call("forward", causal, ((B, T, N, H), (B, T, N)), B * N * T, q, k, weight, v, valid))


def _attend_fwd(causal, *inputs):
    o, lse = _attend(causal, *inputs)
    return (o, lse), (*inputs, o, lse)


def _attend_bwd(causal, residuals, cotangents):
    q, k, weight, v = residuals[:4]
    shapes = q.shape, k.shape, (len(q), *weight.shape), v.shape
    dq, dk, dweight, dv = _call("backward", causal, shapes, v.shape[0] * v.shape[2], *residuals, cotangents[0])
    return dq, dk, dweight.sum(axis=0), dv, None


_attend.defvjp(_attend_fwd, _attend_bwd)
