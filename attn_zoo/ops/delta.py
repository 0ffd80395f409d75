"""The delta rule in chunks: a memory of values by key, corrected at every position towards the value that its key should give.

S_t = S_{t-1} + beta_t (v_t - S_{t-1} k_t) k_t', o_t = S_t q_t (Schlag et al. 2021, sec. 4.2). With u_t = beta_t (v_t - S_{t-1} k_t), the state is
S_0 + sum_j u_j k_j', so within a chunk the u solve a triangular system, (I + tril(diag(beta) K K', -1)) U = diag(beta) (V - K S_0'), and the
rest is linear attention with U for values: the WY form of Yang et al. 2024 (Parallelizing Linear Transformers with the Delta Rule).

The system is inverted by matrix products. XLA's own triangular solve, on a CPU a call to LAPACK inside the scan, leaves its thread pool waiting
for ever now and then (jaxlib 0.10.2), and on GPUs products are what is fast.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attn_zoo.ops.chunks import chunked, joined
from attn_zoo.ops.native_delta import native_delta_rule
from attn_zoo.ops.pallas_linear import corrected_sums
from attn_zoo.ops.pallas_wy import chunk_solutions
from attn_zoo.ops.tuning import fit

CHUNK = 64  # positions per step of the scan, a power of two


def delta_rule(
    q_BTNR: Float[Array, "B T N R"], k_BTKR: Float[Array, "B T K R"], v_BTKH: Float[Array, "B T K H"], beta_BTK: Float[Array, "B T K"], *, backend: str = "xla"
) -> Float[Array, "B T N H"]:
    """o_t above, float32 at least, from S = 0. beta = 0 leaves the memory as it is; it is stable where beta |k|^2 <= 2.

    O(T) memory with gradients: one [R, H] state a chunk is kept, the rest recomputed. `backend` is "xla", "native" or "pallas" (see backends.choose_scan): of
    Pallas kernels some solve all chunks' systems at once (ops.pallas_wy), and others run the recurrence between chunks (ops.pallas_linear), forwards and
    backwards, for which W and the u are kept too. There queries and keys are rounded to the values' dtype, in which the matrix units multiply; sums, and the
    systems, are float32.
    """
    if backend == "native":
        return native_delta_rule(q_BTNR, k_BTKR, v_BTKH, beta_BTK)
    B, T, N, R = q_BTNR.shape
    K, H = v_BTKH.shape[2:]
    wide = jnp.promote_types(v_BTKH.dtype, jnp.float32)
    if backend == "pallas":
        c, q, k = fit(CHUNK, T), q_BTNR.astype(v_BTKH.dtype), k_BTKR.astype(wide)
        w, u = chunk_solutions(k, v_BTKH, beta_BTK, chunk=c)
        return corrected_sums(q, k.astype(v_BTKH.dtype), w, u, chunk=c)  # which rounds k by itself, so that the sum of its two gradients is not rounded
    c = min(CHUNK, 1 << (T - 1).bit_length())
    seen_TS = jnp.tril(jnp.ones((c, c), bool))
    before_TS = jnp.tril(seen_TS, -1)

    @jax.checkpoint
    def step(state_BKRH, chunk):
        q_BKTGR, k, v, beta = chunk
        overlap_BKTS = jnp.where(before_TS, jnp.einsum("BKTR,BKSR->BKTS", k, k), 0.0) * beta[..., None]
        wanted_BKTH = beta[..., None] * (v - jnp.einsum("BKTR,BKRH->BKTH", k, state_BKRH))
        u_BKTH = jnp.einsum("BKTS,BKSH->BKTH", unit_lower_inverse(overlap_BKTS), wanted_BKTH)
        scores = jnp.where(seen_TS, jnp.einsum("BKTGR,BKSR->BKGTS", q_BKTGR, k), 0.0)
        o = jnp.einsum("BKGTS,BKSH->BKTGH", scores, u_BKTH) + jnp.einsum("BKTGR,BKRH->BKTGH", q_BKTGR, state_BKRH)
        return state_BKRH + jnp.einsum("BKSR,BKSH->BKRH", k, u_BKTH), o

    q_BTKGR = q_BTNR.reshape(B, T, K, N // K, R)
    _, o = lax.scan(step, jnp.zeros((B, K, R, H), wide), tuple(chunked(x.astype(wide), c).swapaxes(2, 3) for x in (q_BTKGR, k_BTKR, v_BTKH, beta_BTK)))
    return joined(o.swapaxes(2, 3), T).reshape(B, T, N, H)


def wy_form(
    k_BTKR: Float[Array, "B T K R"], v_BTKH: Float[Array, "B T K H"], beta_BTK: Float[Array, "B T K"], c: int
) -> tuple[Float[Array, "B T K R"], Float[Array, "B T K H"]]:
    """(W, U) of the system above, for all chunks of c: with S the state before a chunk, its u are U - W S. The slow reference of ops.pallas_wy."""
    T, R = k_BTKR.shape[1], k_BTKR.shape[3]
    k, kv, beta = (chunked(x, c).swapaxes(2, 3) for x in (k_BTKR, jnp.concatenate([k_BTKR, v_BTKH], axis=-1), beta_BTK[..., None]))  # [chunks, B, K, c, ...]
    overlap = jnp.tril(jnp.einsum("CBKTR,CBKSR->CBKTS", k, k, precision="highest"), -1) * beta
    wu_BTKX = joined(jnp.einsum("CBKTS,CBKSX->CBTKX", unit_lower_inverse(overlap), beta * kv, precision="highest"), T)
    return wu_BTKX[..., :R], wu_BTKX[..., R:]


@jax.custom_vjp
def unit_lower_inverse(lower_CC: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """The inverse of I + L, of L strictly lower triangular and C a power of two.

    Blocks on the diagonal are inverted, then pairs of them, inv [[A, 0], [X, B]] = [[inv A, 0], [-inv B X inv A, inv B]], from single numbers up:
    forward substitution by blocks, 2 log2(C) products.
    """
    *batch, C, _ = lower_CC.shape
    inverse = jnp.ones((*batch, C, 1, 1), lower_CC.dtype)  # of the blocks on the diagonal
    size = 1
    while size < C:
        pairs = C // (2 * size)
        blocks = lower_CC.reshape(*batch, pairs, 2, size, pairs, 2, size)
        below = jnp.moveaxis(jnp.diagonal(blocks[..., 1, :, :, 0, :], axis1=-4, axis2=-2), -1, -3)  # X of each pair
        a, b = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = -jnp.matmul(jnp.matmul(b, below, precision="highest"), a, precision="highest")
        inverse = jnp.concatenate([jnp.concatenate([a, jnp.zeros_like(a)], axis=-1), jnp.concatenate([corner, b], axis=-1)], axis=-2)
        size *= 2
    return inverse[..., 0, :, :]


def _inverse_fwd(lower_CC):
    inverse_CC = unit_lower_inverse(lower_CC)
    return inverse_CC, inverse_CC


def _inverse_bwd(inverse_CC, d_CC):
    """d inv(A) = -inv(A) dA inv(A), of the entries that are read."""
    turned_CC = inverse_CC.swapaxes(-1, -2)
    return (-jnp.tril(jnp.matmul(jnp.matmul(turned_CC, d_CC, precision="highest"), turned_CC, precision="highest"), -1),)


unit_lower_inverse.defvjp(_inverse_fwd, _inverse_bwd)
