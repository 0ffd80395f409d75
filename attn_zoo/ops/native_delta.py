"""The delta rule in C++, for CPUs: chunk by chunk, with the memory of a head in cache. See ops.native."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attn_zoo.ops import native
from attn_zoo.ops.native import whole


def native_delta_rule(
    q_BTNR: Float[Array, "B T N R"], k_BTKR: Float[Array, "B T K R"], v_BTKH: Float[Array, "B T K H"], beta_BTK: Float[Array, "B T K"]
) -> Float[Array, "B T N H"]:
    """As `ops.delta.delta_rule`, float32. Keeps the corrections u [B, T, K, H] for the backward pass.

    Raises Unsupported, with the reason, for what native.serves refuses.
    """
    native.check(jnp.result_type(q_BTNR, k_BTKR, v_BTKH))
    return _rule(*(whole(x, 3) for x in (q_BTNR, k_BTKR, v_BTKH)), beta_BTK.astype(jnp.float32))[0][..., : v_BTKH.shape[3]]


def _call(name, shapes, q, k, v, *more):
    return native.call(f"delta_{name}", shapes, (q, k, v, *more), tasks=v.shape[0] * v.shape[2], room=(q.shape[3], v.shape[3]))


@jax.custom_vjp
def _rule(q, k, v, beta):
    """(o, u) of float32 arrays with whole vectors of features and channels. u is for the backward pass alone: it has no gradient."""
    return tuple(_call("forward", ((*q.shape[:3], v.shape[3]), v.shape), q, k, v, beta))


def _rule_fwd(q, k, v, beta):
    o, u = _rule(q, k, v, beta)
    return (o, u), (q, k, v, beta, u)


def _rule_bwd(residuals, cotangents):
    q, k, v, beta, u = residuals
    return tuple(_call("backward", (q.shape, k.shape, v.shape, beta.shape), q, k, v, beta, u, cotangents[0]))


_rule.defvjp(_rule_fwd, _rule_bwd)
