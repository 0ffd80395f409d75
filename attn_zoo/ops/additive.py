"""Additive attention, tile by tile: the tanh of every (query, key, hidden unit) exists for one tile of pairs at a time, forward and backward.

An online softmax over key tiles, as in ops.blocked, whose scores are no product of queries and keys. Memory is linear in T.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from attn_zoo.ops.blocked import NEG, rows_per_step
from attn_zoo.ops.native_additive import native_additive
from attn_zoo.ops.rows import dot_rows

BLOCK = 64  # queries, and keys, of a tile: with 64 hidden units its tanh is 1 MiB


def additive_attention(
    q_BTNR: Float[Array, "B T N R"],
    k_BSKR: Float[Array, "B S K R"],
    weight_NR: Float[Array, "N R"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    causal: bool,
    valid_BS: Bool[Array, "B S"] | None = None,
    block: int = BLOCK,
    backend: str = "xla",
) -> Float[Array, "B T N H"]:
    """softmax_s(weight . tanh(q_t + k_s)) v over all valid keys, or those with s <= t; a row that sees no key gives zeros.

    Queries and keys arrive projected to R hidden units (Bahdanau et al. 2015, appendix A.1.2). XLA computes in the dtype it is given, `block` by `block`.
    `backend` is "xla" or "native" (see backends.choose_additive).
    """
    if backend == "native":
        return native_additive(q_BTNR, k_BSKR, weight_NR, v_BSKH, causal=causal, valid_BS=valid_BS)
    B, T, N, R = q_BTNR.shape
    S, K, H = v_BSKH.shape[1:]
    G = N // K
    bq, bk = (min(block, -(-length // 16) * 16) for length in (T, S))
    P = rows_per_step(B * K, G * bq * bk * R * 4)
    pad_q, pad_k = -T % bq, -S % bk

    # [B, T, N, R] -> [groups, P, G, T, R]: heads that share keys side by side, P (batch, key head) rows computed together.
    q = jnp.pad(q_BTNR, ((0, 0), (0, pad_q), (0, 0), (0, 0))).reshape(B, T + pad_q, K, G, R).transpose(0, 2, 3, 1, 4)
    k, v = (jnp.pad(x, ((0, 0), (0, pad_k), (0, 0), (0, 0))).swapaxes(1, 2) for x in (k_BSKR, v_BSKH))
    weight = jnp.broadcast_to(weight_NR.reshape(K, G, R), (B, K, G, R))
    valid_BS = jnp.ones((B, S), bool) if valid_BS is None else valid_BS
    valid = jnp.repeat(jnp.pad(valid_BS, ((0, 0), (0, pad_k))), K, axis=0)
    rows = lambda x: x.reshape(B * K // P, P, *x.shape[-3:])
    args = rows(q), k.reshape(-1, P, S + pad_k, R), weight.reshape(-1, P, G, R), v.reshape(-1, P, S + pad_k, H), valid.reshape(-1, P, S + pad_k)
    o = lax.map(lambda row: _attend(*row, causal, bq, bk)[0], args)
    return o.reshape(B, K, G, T + pad_q, H).transpose(0, 3, 1, 2, 4).reshape(B, T + pad_q, N, H)[:, :T]


def _at(x, start, size, axis):
    return lax.dynamic_slice_in_dim(x, start, size, axis)


def _add_at(x, update, start):
    """x[:, start:start + n] += update, in place inside a loop."""
    return lax.dynamic_update_slice_in_dim(x, _at(x, start, update.shape[1], 1) + update, start, 1)


def _scores(q, k, weight):
    """[P, G, q, k] of one tile, and no array of its hidden units that outlives it."""
    return jnp.einsum("PGTSR,PGR->PGTS", jnp.tanh(q[:, :, :, None] + k[:, None, None]), weight)


def _tiles(k, causal, bq, bk):
    """How many key tiles query tile c needs, as a function of c."""
    count = k.shape[1] // bk
    return lambda c: jnp.minimum(count, ((c + 1) * bq - 1) // bk + 1) if causal else count


def _seen(valid_j, c, n, causal, bq, bk):
    """The visible pairs of tile (c, n), against scores [P, G, q, k]."""
    seen = valid_j[:, None, None]
    return seen & (n * bk + jnp.arange(bk) <= c * bq + jnp.arange(bq)[:, None]) if causal else seen


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(q, k, weight, v, valid, causal, bq, bk):
    """q [P, G, T, R], k [P, S, R], weight [P, G, R], v [P, S, H], valid [P, S] -> o [P, G, T, H], logsumexp [P, G, T]."""
    P, G, T, _ = q.shape
    tiles = _tiles(k, causal, bq, bk)

    def query_tile(c):
        q_c = _at(q, c * bq, bq, 2)

        def body(n, carry):
            top, total, acc = carry
            scores = jnp.where(_seen(_at(valid, n * bk, bk, 1), c, n, causal, bq, bk), _scores(q_c, _at(k, n * bk, bk, 1), weight), NEG)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            p, shrink = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
            acc = acc * shrink[..., None] + jnp.einsum("PGTS,PSH->PGTH", p, _at(v, n * bk, bk, 1))
            return new_top, total * shrink + p.sum(axis=-1), acc

        # The running maximum starts far above NEG: hidden pairs get weight 0 even in a row that sees nothing.
        start = jnp.full((P, G, bq), NEG / 2, q.dtype), jnp.zeros((P, G, bq), q.dtype), jnp.zeros((P, G, bq, v.shape[-1]), q.dtype)
        top, total, acc = lax.fori_loop(0, tiles(c), body, start)
        safe = jnp.where(total > 0, total, 1.0)
        return acc / safe[..., None], jnp.where(total > 0, top + jnp.log(safe), -jnp.inf)

    o, lse = lax.map(query_tile, jnp.arange(T // bq))
    return jnp.moveaxis(o, 0, 2).reshape(P, G, T, -1), jnp.moveaxis(lse, 0, 2).reshape(P, G, T)


def _attend_fwd(q, k, weight, v, valid, causal, bq, bk):
    o, lse = _attend(q, k, weight, v, valid, causal, bq, bk)
    return (o, lse), (q, k, weight, v, valid, o, lse)


def _attend_bwd(causal, bq, bk, residuals, cotangents):
    q, k, weight, v, valid, o, lse = residuals
    do, dlse = cotangents
    # As in ops.blocked: d o / d score = p (v - o) and d lse / d score = p, so one number a row holds what is not do . v.
    delta = dot_rows(do, o) - jnp.where(lse == -jnp.inf, 0.0, dlse)
    safe_lse = jnp.where(lse == -jnp.inf, 0.0, lse)
    tiles = _tiles(k, causal, bq, bk)

    def query_tile(carry, c):
        q_c, do_c, lse_c, delta_c = (_at(x, c * bq, bq, 2) for x in (q, do, safe_lse, delta))

        def body(n, carry):
            dq_c, dk, dweight, dv = carry
            scores, pull = jax.vjp(_scores, q_c, _at(k, n * bk, bk, 1), weight)
            seen = _seen(_at(valid, n * bk, bk, 1), c, n, causal, bq, bk)
            p = jnp.where(seen, jnp.exp(jnp.where(seen, scores, NEG) - lse_c[..., None]), 0.0)
            dp = jnp.einsum("PGTH,PSH->PGTS", do_c, _at(v, n * bk, bk, 1))
            dq_n, dk_n, dweight_n = pull(p * (dp - delta_c[..., None]))
            dv = _add_at(dv, jnp.einsum("PGTS,PGTH->PSH", p, do_c), n * bk)
            return dq_c + dq_n, _add_at(dk, dk_n, n * bk), dweight + dweight_n, dv

        dq_c, *carry = lax.fori_loop(0, tiles(c), body, (jnp.zeros_like(q_c), *carry))
        return tuple(carry), dq_c

    (dk, dweight, dv), dq = lax.scan(query_tile, tuple(map(jnp.zeros_like, (k, weight, v))), jnp.arange(q.shape[2] // bq))
    return jnp.moveaxis(dq, 0, 2).reshape(q.shape), dk, dweight, dv, None


_attend.defvjp(_attend_fwd, _attend_bwd)
