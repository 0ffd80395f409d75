"""Softmax-weighted means over a sequence whose scores do not depend on the query, at all positions or up to each, in linear time."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from attn_zoo.ops.chunks import chunked, joined
from attn_zoo.ops.native_linear import native_sums

CHUNK = 128  # positions per step of the running form


def softmax_mean(
    score_BSN: Float[Array, "B S N"], x_BSNR: Float[Array, "B S N R"], *, causal: bool, backend: str = "xla"
) -> tuple[Float[Array, "B T N R"], Bool[Array, "B T N"]]:
    """(sum_j exp(score_j) x_j / sum_j exp(score_j), whether there was any j), over all j (T = 1), or over j <= i for every i (T = S).

    A score of -inf leaves its position out; a mean over none is zero. O(S) memory with gradients. `backend`, of the running form, is "xla" or "native".
    """
    if causal:
        return _fading(score_BSN, x_BSNR) if backend == "native" else _running(score_BSN, x_BSNR)
    weight_BSN = jnp.exp(score_BSN - _finite(lax.stop_gradient(score_BSN.max(axis=1, keepdims=True))))
    return _divide(jnp.einsum("BSN,BSNR->BNR", weight_BSN, x_BSNR, precision="highest")[:, None], weight_BSN.sum(axis=1, keepdims=True))


def _fading(score_BSN, x_BSNR):
    """As the decayed sums that there are kernels for: with m_i the largest score up to i, exp(s_j - m_i) = exp(s_j - m_j) exp(m_j - m_i).

    The kernels sum logarithms of what fades: where scores rise by 1000 within some positions, weights after that are exact to 1e-4 only.
    """
    top_BSN = lax.cummax(lax.stop_gradient(score_BSN), axis=1)
    before_BSN = jnp.pad(top_BSN[:, :-1], ((0, 0), (1, 0), (0, 0)), constant_values=-jnp.inf)
    log_decay_BSN = jnp.where(before_BSN > -jnp.inf, before_BSN - _finite(top_BSN), 0.0)  # what fades where nothing was seen is nothing
    weight_BSN1 = jnp.exp(score_BSN - _finite(top_BSN))[..., None]
    return _divide(*native_sums(jnp.ones_like(weight_BSN1), weight_BSN1, x_BSNR, log_decay_BSN))


def _running(score_BSN, x_BSNR):
    """In chunks: what comes before one is carried along as its (maximum, sum of weights, weighted sum)."""
    B, S, N, R = x_BSNR.shape
    c = min(CHUNK, S)
    seen_TS1 = jnp.tril(jnp.ones((c, c), bool))[:, :, None]

    @jax.checkpoint
    def step(carry, chunk):
        top_BN, total_BN, sum_BNR = carry
        score, x = chunk
        # Each position's own maximum of what it sees, so that none of its weights exceeds 1 and one of them is 1.
        top = jnp.maximum(lax.cummax(lax.stop_gradient(score), axis=1), top_BN[:, None])
        safe = _finite(top)
        weight_BTSN = jnp.exp(jnp.where(seen_TS1, score[:, None] - safe[:, :, None], -jnp.inf))
        before_BTN = jnp.exp(top_BN[:, None] - safe)
        total = weight_BTSN.sum(axis=2) + before_BTN * total_BN[:, None]
        sums = jnp.einsum("BTSN,BSNR->BTNR", weight_BTSN, x, precision="highest") + before_BTN[..., None] * sum_BNR[:, None]
        return (top[:, -1], total[:, -1], sums[:, -1]), _divide(sums, total)

    start = jnp.full((B, N), -jnp.inf, score_BSN.dtype), jnp.zeros((B, N), score_BSN.dtype), jnp.zeros((B, N, R), x_BSNR.dtype)
    _, results = lax.scan(step, start, (chunked(score_BSN, c, -jnp.inf), chunked(x_BSNR, c)))
    mean, seen = (joined(x, S) for x in results)
    return mean, seen


def _finite(top):
    """-inf, the maximum of nothing, as 0: then exp(-inf - top) is 0 and not NaN."""
    return jnp.where(top > -jnp.inf, top, 0.0)


def _divide(sums, total):
    seen = total > 0
    return jnp.where(seen[..., None], sums / jnp.where(seen, total, 1.0)[..., None], 0.0), seen
