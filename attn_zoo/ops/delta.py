"""The delta rule in chunks: a memory of values by key, corrected at every position towards the value that its key should give.

S_t = S_{t-1} + beta_t (v_t - S_{t-1} k_t) k_t', o_t = S_t q_t (Schlag et al. 2021, sec. 4.2). With u_t = beta_t (v_t - S_{t-1} k_t), the state is
S_0 + sum_j u_j k_j', so within a chunk the u solve a triangular system, (I + tril(diag(beta) K K', -1)) U = diag(beta) (V - K S_0'), and the
rest is linear attention with U for values: the WY form of Yang et al. 2024 (Parallelizing Linear Transformers with the Delta Rule).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

CHUNK = 64  # positions per step of the scan


def delta_rule(
    q_BTNR: Float[Array, "B T N R"], k_BTKR: Float[Array, "B T K R"], v_BTKH: Float[Array, "B T K H"], beta_BTK: Float[Array, "B T K"]
) -> Float[Array, "B T N H"]:
    """o_t above, float32 at least, from S = 0. beta = 0 leaves the memory as it is; it is stable where beta |k|^2 <= 2.

    O(T) memory with gradients: one [R, H] state a chunk is kept, the rest recomputed.
    """
    B, T, N, R = q_BTNR.shape
    K, H = v_BTKH.shape[2:]
    wide = jnp.promote_types(v_BTKH.dtype, jnp.float32)
    c = min(CHUNK, T)
    chunks = -(-T // c)

    def chunked(x):  # [B, T, K, ...] -> [chunks, B, K, c, ...]
        x = jnp.pad(x.astype(wide), [(0, 0), (0, chunks * c - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, chunks, c, *x.shape[2:]), (1, 3), (0, 2))

    seen_TS = jnp.tril(jnp.ones((c, c), bool))
    before_TS = jnp.tril(seen_TS, -1)

    @jax.checkpoint
    def step(state_BKRH, chunk):
        q_BKTGR, k, v, beta = chunk
        overlap_BKTS = jnp.where(before_TS, jnp.einsum("BKTR,BKSR->BKTS", k, k), 0.0) * beta[..., None]
        wanted_BKTH = beta[..., None] * (v - jnp.einsum("BKTR,BKRH->BKTH", k, state_BKRH))
        u_BKTH = lax.linalg.triangular_solve(overlap_BKTS, wanted_BKTH, left_side=True, lower=True, unit_diagonal=True)  # takes the diagonal for ones
        scores = jnp.where(seen_TS, jnp.einsum("BKTGR,BKSR->BKGTS", q_BKTGR, k), 0.0)
        o = jnp.einsum("BKGTS,BKSH->BKTGH", scores, u_BKTH) + jnp.einsum("BKTGR,BKRH->BKTGH", q_BKTGR, state_BKRH)
        return state_BKRH + jnp.einsum("BKSR,BKSH->BKRH", k, u_BKTH), o

    q_BTKGR = q_BTNR.reshape(B, T, K, N // K, R)
    _, o = lax.scan(step, jnp.zeros((B, K, R, H), wide), tuple(map(chunked, (q_BTKGR, k_BTKR, v_BTKH, beta_BTK))))
    return jnp.moveaxis(o, (0, 2), (1, 3)).reshape(B, chunks * c, N, H)[:, :T]
