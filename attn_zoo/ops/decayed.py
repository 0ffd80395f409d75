"""Linear attention whose past fades: o_t = sum_{j <= t} exp(L_t - L_j) (q_t' k_j) v_j, with L the running sum of per-position log decays.

The chunked form of Sun et al. 2023 (RetNet, eq. 7) with a decay a position instead of one a head, as gated variants need
(Yang et al. 2024). Shared by retention and gated random features.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attn_zoo.ops.chunks import chunked, joined
from attn_zoo.ops.linear import SCANS, with_ones
from attn_zoo.ops.pallas_linear import pallas_normed_sums, serves_normed
from attn_zoo.ops.rows import dot_rows, scale_rows

CHUNK = 128  # positions per step of the scan
EPSILON = 1e-6  # of the group norm, as in the code of Sun et al.


def decayed_sums(
    q_BTNR: Float[Array, "B T N R"],
    k_BTKR: Float[Array, "B T K R"],
    v_BTKH: Float[Array, "B T K H"],
    log_decay_BTK: Float[Array, "B T K"],
    *,
    backend: str = "xla",
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """(`decayed_attention`, the same sum with 1 in the place of every value), float32; `backend` is "xla", "native" or "pallas" (see backends.choose_scan)."""
    if backend != "xla":
        return SCANS[backend](q_BTNR, k_BTKR, v_BTKH, log_decay_BTK)
    o_BTNH = decayed_attention(q_BTNR, k_BTKR, with_ones(v_BTKH), log_decay_BTK)
    return o_BTNH[..., :-1], o_BTNH[..., -1]


def normed_sums(
    q_BTNR: Float[Array, "B T N R"],
    k_BTKR: Float[Array, "B T K R"],
    v_BTKH: Float[Array, "B T K H"],
    log_decay_BTK: Float[Array, "B T K"],
    scale_TN: Float[Array, "T N"],
    *,
    epsilon: float = EPSILON,
    backend: str = "xla",
) -> Float[Array, "B T N H"]:
    """`group_norm` of `decayed_sums`, float32; decays and scale are constants to the gradient. On a GPU the kernel that has the sums may normalize them."""
    log_decay_BTK, scale_TN = lax.stop_gradient((log_decay_BTK, scale_TN))
    if backend == "pallas" and serves_normed(v_BTKH.dtype, v_BTKH.shape[3]):
        return pallas_normed_sums(q_BTNR, k_BTKR, v_BTKH, log_decay_BTK, scale_TN, epsilon=epsilon)
    return group_norm(*decayed_sums(q_BTNR, k_BTKR, v_BTKH, log_decay_BTK, backend=backend), scale_TN, epsilon)


def group_norm(
    o_BTNH: Float[Array, "B T N H"], scores_BTN: Float[Array, "B T N"], scale_TN: Float[Array, "*T N"] | float = 1.0, epsilon: float = EPSILON
) -> Float[Array, "B T N H"]:
    """Each head's output over max(|sum of its scores|, 1), a constant to the gradient, and then over its root mean square; scale: of both, to begin with.

    Sun et al. 2023, eq. 8 and "Score Normalization". What a row is multiplied by is found first, so that o itself is read and written once.
    """
    factor_BTN = scale_TN / jnp.maximum(abs(lax.stop_gradient(scores_BTN)) * scale_TN, 1)
    mean_square_BTN = dot_rows(o_BTNH, o_BTNH) / o_BTNH.shape[-1]
    return scale_rows(o_BTNH, factor_BTN * (mean_square_BTN * factor_BTN**2 + epsilon) ** -0.5)


def decayed_attention(
    q_BTNR: Float[Array, "B T N R"], k_BTKR: Float[Array, "B T K R"], v_BTKH: Float[Array, "B T K H"], log_decay_BTK: Float[Array, "B T K"]
) -> Float[Array, "B T N H"]:
    """The sum above, unnormalized, float32 at least. log_decay_BTK <= 0 is what position t multiplies the past by, before it adds itself.

    O(T) memory with gradients: one [R, H] state a chunk is kept, the rest recomputed.
    """
    B, T, N, R = q_BTNR.shape
    K, H = v_BTKH.shape[2:]
    wide = jnp.promote_types(v_BTKH.dtype, jnp.float32)
    c = min(CHUNK, T)
    seen_TS = jnp.tril(jnp.ones((c, c), bool))

    @jax.checkpoint
    def step(state_BKRH, chunk):
        q, k, v, decay = chunk
        total = jnp.cumsum(decay, axis=1)  # L within the chunk, [B, c, K]
        L_BKT = jnp.moveaxis(total, 1, 2)
        # Masked before the exponential: above the diagonal L_t - L_j is positive and could overflow.
        weights = jnp.exp(jnp.where(seen_TS, L_BKT[..., :, None] - L_BKT[..., None, :], -jnp.inf))
        scores = jnp.einsum("BTKGR,BSKR->BKGTS", q, k) * weights[:, :, None]
        o = jnp.einsum("BKGTS,BSKH->BTKGH", scores, v)
        o += jnp.einsum("BTKGR,BKRH->BTKGH", q * jnp.exp(total)[..., None, None], state_BKRH)
        left = jnp.exp(total[:, -1:] - total)  # how much of each key is left at the end of the chunk
        state_BKRH = state_BKRH * jnp.exp(total[:, -1])[..., None, None] + jnp.einsum("BSKR,BSKH->BKRH", k * left[..., None], v)
        return state_BKRH, o

    q_BTKGR = q_BTNR.reshape(B, T, K, N // K, R)
    _, o = lax.scan(step, jnp.zeros((B, K, R, H), wide), tuple(chunked(x.astype(wide), c) for x in (q_BTKGR, k_BTKR, v_BTKH, log_decay_BTK)))
    return joined(o, T).reshape(B, T, N, H)
