"""The sums of linearized attention in C++, for CPUs: causal ones chunk by chunk, with the state of a head in cache. See ops.native."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from attn_zoo.ops import native
from attn_zoo.ops.native import whole

NOTHING = np.zeros((0, 0, 0), np.float32)  # decays that are not


class _Form(NamedTuple):
    """causal; how many features are made of q and k, and how: with what factor, and up to which exponent."""

    causal: bool
    features: int = 0
    scale: float = 1.0
    largest: float = 0.0


def native_sums(
    q_BTNR: Float[Array, "B T N R"],
    k_BSKR: Float[Array, "B S K R"],
    v_BSKH: Float[Array, "B S K H"],
    log_decay_BTK: Float[Array, "B T K"] | None = None,
    *,
    causal: bool = True,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """(sum_j a_tj v_j, sum_j a_tj) over j <= t, float32, a_tj = exp(L_t - L_j) q_t'k_j; L is the running sum of the log decays, or 0. See ops.linear, ops.decayed.

    Unless causal, over all keys, and without decay; else T = S. Keeps nothing for the backward pass but its arguments, and computes the states again. Raises
    Unsupported, with the reason, for what native.serves refuses.
    """
    decay = NOTHING if log_decay_BTK is None else log_decay_BTK.astype(jnp.float32)
    return _run(_Form(causal), q_BTNR, k_BSKR, v_BSKH, decay, np.zeros(0, bool), np.zeros((0, 0), np.float32))


def native_random_feature_sums(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    w_RH: Float[Array, "R H"],
    valid_BS: Bool[Array, "B S"] | None = None,
    *,
    causal: bool,
    largest: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """The sums above of positive random features phi(x) = exp(w'x - |x|^2 / 2), x scaled by H^-1/4 (Choromanski et al. 2021, lemma 1).

    Those of a query are divided by their largest; exponents of keys are at most `largest`, and keys that are not valid count nothing. Features are made a chunk
    at a time, again in the backward pass, and never stored. Nothing is differentiated by w, nor by what divides. Errors as above.
    """
    (B, T), S = q_BTNH.shape[:2], k_BSKH.shape[1]
    valid_BS = jnp.ones((B, S), bool) if valid_BS is None else valid_BS
    if causal:  # keys beyond the last query are never seen; missing ones are not valid
        k_BSKH, v_BSKH, valid_BS = (jnp.pad(x[:, :T], [(0, 0), (0, T - min(T, S))] + [(0, 0)] * (x.ndim - 2)) for x in (k_BSKH, v_BSKH, valid_BS))
    form = _Form(causal, len(w_RH), q_BTNH.shape[3] ** -0.25, largest)
    w_RH = whole(whole(jax.lax.stop_gradient(w_RH), 1).T, 1).T
    return _run(form, q_BTNH, k_BSKH, v_BSKH, NOTHING, valid_BS, w_RH)


def _run(form, q, k, v, decay, valid, w):
    native.check(jnp.result_type(q, k, v))
    o_BTNH, norm_BTN = _sums(form, *(whole(x, 3) for x in (q, k, v)), decay, valid, w)
    return o_BTNH[..., : v.shape[3]], norm_BTN


def _call(name, form, shapes, q, k, v, decay, valid, w, *more):
    room = len(w) or q.shape[3], v.shape[3]
    attributes = {"causal": form.causal, "features": np.int64(form.features), "scale": np.float32(form.scale), "largest": np.float32(form.largest)}
    return native.call(f"linear_{name}", shapes, (q, k, v, decay, valid, w, w.T, *more), tasks=v.shape[0] * v.shape[2], room=room, **attributes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(form, q, k, v, decay, valid, w):
    """(o, norm) of float32 arrays in whole vectors; `decay` [B, T, K], `valid` [B, S] and the directions w [R, H] may be empty."""
    return tuple(_call("forward", form, ((*q.shape[:3], v.shape[3]), q.shape[:3]), q, k, v, decay, valid, w))


def _sums_fwd(form, *inputs):
    return _sums(form, *inputs), inputs


def _sums_bwd(form, inputs, cotangents):
    q, k, v, decay, _, w = inputs
    dq, dk, dv = _call("backward", form, (q.shape, k.shape, v.shape), *inputs, *cotangents)
    if decay.size == 0:
        return dq, dk, dv, None, None, jnp.zeros_like(w)
    # A weight exp(L_i - L_j) q_i'k_j has the same derivative by L_i as by the length of q_i, and by -L_j as by that of k_j. What should cancel in the running sum
    # leaves the rounding of dq and dk: at T = 4096 some 3e-6 of the largest gradient, and up to 2e-4 of the sum of all, itself mostly cancelled.
    (B, T, K), R = decay.shape, q.shape[3]
    dL_BTK = jnp.einsum("BTKGR,BTKGR->BTK", q.reshape(B, T, K, -1, R), dq.reshape(B, T, K, -1, R)) - jnp.einsum("BTKR,BTKR->BTK", k, dk)
    return dq, dk, dv, jnp.flip(jnp.cumsum(jnp.flip(dL_BTK, axis=1), axis=1), axis=1), None, jnp.zeros_like(w)


_sums.defvjp(_sums_fwd, _sums_bwd)
