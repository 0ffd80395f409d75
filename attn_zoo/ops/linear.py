"""Linearized attention: feature-mapped keys and values summed once, or scanned in chunks when causal. Shared by all kernel variants."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from attn_zoo.ops.chunks import chunked, joined, pad
from attn_zoo.ops.native_linear import native_sums
from attn_zoo.ops.pallas_linear import pallas_kernel_attention, pallas_sums
from attn_zoo.ops.rows import scale_rows

CHUNK = 128  # positions per step of the causal scan
SCANS = {"native": native_sums, "pallas": pallas_sums}
FEATURES_CHUNK = 256  # positions whose features are made at once


def linear_attention(
    phi_q_BTNR: Float[Array, "B T N R"],
    phi_k_BSKR: Float[Array, "B S K R"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    causal: bool,
    backend: str = "xla",
    phi: Callable[[Array], Array] | None = None,
    least_BTK: Float[Array, "B T K"] | None = None,
) -> Float[Array, "B T N H"]:
    """o_i = phi(q_i)' sum_j phi(k_j) v_j' / phi(q_i)' sum_j phi(k_j), over all j or j <= i. Katharopoulos et al. 2020, eq. 5 and 9.

    Denominators must not be negative, unless `least` is positive; invalid keys are given as phi(k) = 0. A row whose denominator is zero, or subnormal, gives zeros.
    phi: None, or a function of single numbers that makes features of the first two arguments; Pallas' kernels apply it where they read them. They have one length
    for queries and keys: without a causal order, the shorter are padded to the longer. least: what the denominator is held at, or above, a constant to the gradient.
    """
    T, S = phi_q_BTNR.shape[1], phi_k_BSKR.shape[1]
    least_BTK = None if least_BTK is None else lax.stop_gradient(least_BTK)
    if backend == "pallas" and (phi is None or T == S):
        length = T if causal else max(T, S)
        q, k, v, least = (None if x is None else _as_long(x, length) for x in (phi_q_BTNR, phi_k_BSKR, v_BSKH, least_BTK))
        return pallas_kernel_attention(q, k, v, causal=causal, phi=phi, least_BTK=least)[:, :T]
    if phi is not None:
        phi_q_BTNR, phi_k_BSKR = phi(phi_q_BTNR), phi(phi_k_BSKR)
        return linear_attention(phi_q_BTNR, phi_k_BSKR, v_BSKH, causal=causal, backend=backend, least_BTK=least_BTK)
    o_BTNH, norm_BTN = kernel_sums(phi_q_BTNR, phi_k_BSKR, v_BSKH, causal=causal, backend=backend)
    if least_BTK is not None:
        norm_BTN = jnp.maximum(norm_BTN, jnp.repeat(least_BTK, norm_BTN.shape[2] // least_BTK.shape[2], axis=2))
    return divided(o_BTNH, norm_BTN)


def kernel_sums(
    phi_q_BTNR: Float[Array, "B T N R"], phi_k_BSKR: Float[Array, "B S K R"], v_BSKH: Float[Array, "B S K H"], *, causal: bool, backend: str = "xla"
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """The two sums above: (phi(q_i)' sum_j phi(k_j) v_j', phi(q_i)' sum_j phi(k_j)).

    Accumulates in float32 at least. Causal memory is O(T) with gradients: the scan keeps one [R, H] state a chunk and recomputes the rest. `backend` is "xla",
    "native" or "pallas", which of bfloat16 values rounds the features to bfloat16 too (see backends.choose_scan).
    """
    B, T, N, R = phi_q_BTNR.shape
    S, K, H = v_BSKH.shape[1:]
    if causal and backend != "xla":
        return SCANS[backend](phi_q_BTNR, *(_as_long(x, T) for x in (phi_k_BSKR, v_BSKH)))
    if backend == "native":
        return native_sums(phi_q_BTNR, phi_k_BSKR, v_BSKH, causal=False)
    if backend == "pallas":
        return tuple(x[:, :T] for x in pallas_sums(*(_as_long(x, max(T, S)) for x in (phi_q_BTNR, phi_k_BSKR, v_BSKH)), causal=False))
    wide = jnp.promote_types(v_BSKH.dtype, jnp.float32)
    q_BTKGR = phi_q_BTNR.reshape(B, T, K, N // K, R).astype(wide)
    k_BSKR, v_BSKH = phi_k_BSKR.astype(wide), v_BSKH.astype(wide)
    if causal:
        o_BTKGH, norm_BTKG = _scan(q_BTKGR, k_BSKR, v_BSKH)
        return o_BTKGH.reshape(B, T, N, H), norm_BTKG.reshape(B, T, N)
    state_BKRH = jnp.einsum("BSKR,BSKH->BKRH", k_BSKR, v_BSKH)
    total_BKR = k_BSKR.sum(axis=1)
    o_BTKGH = jnp.einsum("BTKGR,BKRH->BTKGH", q_BTKGR, state_BKRH)
    return o_BTKGH.reshape(B, T, N, H), jnp.einsum("BTKGR,BKR->BTKG", q_BTKGR, total_BKR).reshape(B, T, N)


def linear_attention_by_chunks(
    phi_q: Callable[[Array], Array],
    phi_k: Callable[[Array], Array],
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    valid_BS: Bool[Array, "B S"] | None,
) -> Float[Array, "B T N H"]:
    """linear_attention over all keys, for many features: made a chunk of positions at a time, and again in the backward pass, they need no memory that grows with T.

    phi_q and phi_k map [B, heads, positions, H] to [B, heads, positions, R], float32 at least. Keys that are not valid count nothing.
    """
    (B, T, N, _), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    c = min(FEATURES_CHUNK, max(T, S))
    valid_BS = jnp.ones((B, S), bool) if valid_BS is None else valid_BS

    @jax.checkpoint
    def add(state_BKRH, chunk):
        k, v, valid = chunk
        phi_BKSR = jnp.where(valid[:, None, :, None], phi_k(k.swapaxes(1, 2)), 0)
        return state_BKRH + jnp.einsum("BKSR,BKSH->BKRH", phi_BKSR, with_ones(v.swapaxes(1, 2))), None

    @jax.checkpoint
    def read(q):
        phi_BNTR = phi_q(q.swapaxes(1, 2))
        sums_BKGTH = jnp.einsum("BKGTR,BKRH->BKGTH", phi_BNTR.reshape(B, K, N // K, c, -1), state_BKRH)
        sums_BTNH = sums_BKGTH.reshape(B, N, c, -1).swapaxes(1, 2)
        return divided(sums_BTNH[..., :-1], sums_BTNH[..., -1])

    keys = [chunked(x, c) for x in (k_BSKH, v_BSKH, valid_BS)]  # what is added at the end is not valid
    start = jax.eval_shape(lambda k, v: jnp.einsum("BKSR,BKSH->BKRH", phi_k(k.swapaxes(1, 2)), with_ones(v.swapaxes(1, 2))), keys[0][0], keys[1][0])
    state_BKRH, _ = lax.scan(add, jnp.zeros(start.shape, start.dtype), keys)
    return joined(lax.map(read, chunked(q_BTNH, c)), T)


def divided(o_BTNH: Float[Array, "B T N H"], norm_BTN: Float[Array, "B T N"]) -> Float[Array, "B T N H"]:
    """o / norm; zeros where the norm is zero or subnormal, whose inverse would not be finite."""
    none_BTN = norm_BTN < jnp.finfo(norm_BTN.dtype).tiny
    return scale_rows(o_BTNH, jnp.where(none_BTN, 0.0, 1 / jnp.where(none_BTN, 1.0, norm_BTN)))


def init_state(B: int, K: int, R: int, H: int) -> dict[str, Array]:
    """What `state_step` adds to, before the first step."""
    return {"state": jnp.zeros((B, K, R, H)), "t": jnp.zeros((), jnp.int32)}


def state_step(
    phi_q_B1NR: Float[Array, "B 1 N R"], phi_k_B1KR: Float[Array, "B 1 K R"], v_B1KH: Float[Array, "B 1 K H"], state_BKRH: Float[Array, "B K R H"], log_decay_BK: Array | None = None
) -> tuple[Float[Array, "B 1 N H"], Float[Array, "B K R H"]]:
    """(phi(q)' S, S) after S = exp(log_decay) S + phi(k) v': one step of the causal sums above, or of ops.decayed; float32."""
    k, v = (x[:, 0].astype(state_BKRH.dtype) for x in (phi_k_B1KR, v_B1KH))
    if log_decay_BK is not None:
        state_BKRH = state_BKRH * jnp.exp(log_decay_BK)[..., None, None]
    state_BKRH = state_BKRH + k[..., :, None] * v[..., None, :]
    return read_state(phi_q_B1NR, state_BKRH), state_BKRH


def read_state(phi_q_B1NR: Float[Array, "B 1 N R"], state_BKRH: Float[Array, "B K R H"]) -> Float[Array, "B 1 N H"]:
    """phi(q)' S."""
    B, _, N, R = phi_q_B1NR.shape
    K, H = state_BKRH.shape[1], state_BKRH.shape[3]
    q_BKGR = phi_q_B1NR.reshape(B, K, N // K, R).astype(state_BKRH.dtype)
    return jnp.einsum("BKGR,BKRH->BKGH", q_BKGR, state_BKRH).reshape(B, 1, N, H)


def with_ones(v_BSKH: Array) -> Array:
    """Values with a last one that is 1, float32 at least: its weighted sum is the sum of the weights."""
    wide = jnp.promote_types(v_BSKH.dtype, jnp.float32)
    return jnp.concatenate([v_BSKH.astype(wide), jnp.ones((*v_BSKH.shape[:3], 1), wide)], axis=-1)


def _as_long(x_BSKX, T: int):
    """T positions: keys beyond the last query are never seen by causal ones, and missing keys are zeros, which add nothing."""
    return pad(x_BSKX[:, :T], {1: T})


def _scan(q_BTKGR, k_BSKR, v_BSKH):
    """Causal form: within a chunk by its masked square, across chunks by the running state."""
    B, T, K, G, R = q_BTKGR.shape
    H = v_BSKH.shape[-1]
    c = min(CHUNK, max(T, 1))
    seen_TS = jnp.tril(jnp.ones((c, c), bool))

    @jax.checkpoint
    def step(carry, chunk):
        state_BKRH, total_BKR = carry
        q, k, v = chunk
        scores = jnp.where(seen_TS, jnp.einsum("BTKGR,BSKR->BKGTS", q, k), 0.0)
        o = jnp.einsum("BKGTS,BSKH->BTKGH", scores, v) + jnp.einsum("BTKGR,BKRH->BTKGH", q, state_BKRH)
        norm = jnp.moveaxis(scores.sum(axis=-1), 3, 1) + jnp.einsum("BTKGR,BKR->BTKG", q, total_BKR)
        carry = state_BKRH + jnp.einsum("BSKR,BSKH->BKRH", k, v), total_BKR + k.sum(axis=1)
        return carry, (o, norm)

    start = (jnp.zeros((B, K, R, H), q_BTKGR.dtype), jnp.zeros((B, K, R), q_BTKGR.dtype))
    _, sums = lax.scan(step, start, tuple(chunked(x, c) for x in (q_BTKGR, _as_long(k_BSKR, T), _as_long(v_BSKH, T))))
    return tuple(joined(x, T) for x in sums)
