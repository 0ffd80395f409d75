"""Blocked softmax attention: one engine for every variant that scores pairs.

An online softmax (Milakov & Gimelshein 2018; Rabe & Staats 2021; Dao et al. 2022) over the blocks that a Pattern lists. The backward
pass recomputes scores block by block, so memory is linear in T whatever the pattern, and time follows the listed blocks.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from attn_zoo.ops.patterns import BlockMask, Pattern, block_mask
from attn_zoo.ops.rows import dot_rows

NEG = -1e30  # a masked score: finite, so that differences of masked scores are not NaN
TILE_BYTES = 2 * 2**20  # of the score tile [rows, G, q block, k block] that one step holds; about what stays in cache on a CPU core


@dataclasses.dataclass(frozen=True)
class ScoreMod:
    """A differentiable change of the scaled scores, and the per-head arrays it depends on.

    fn(scores, i, j, params) -> scores, with scores [..., q, k], i [q, 1], j [1, k] positions, and every leaf of params, given here
    with a leading head axis [N, ...], arriving with axes that broadcast against the scores. Must be elementwise in scores, i and j, since
    a backend may turn the tile: [k, q], with i [1, q] and j [k, 1].
    """

    fn: Callable[[Array, Array, Array, Any], Array]
    params: Any


def blocked_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    pattern: Pattern,
    valid_BS: Bool[Array, "B S"] | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    block: int | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Softmax attention over the pairs of `pattern`: (output in q's dtype, float32 logsumexp of each row's scores).

    Scores are scaled by `scale` (default H^-1/2), then changed by `score_mod`. Rows that see no key give zeros and -inf.
    Both results are differentiable, in q, k, v and in the parameters of score_mod. `block` sets both block sizes.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    scale = H**-0.5 if scale is None else scale
    q_block, k_block = block_sizes(pattern, T, S) if block is None else (min(block, _ceil(T, 16)), min(block, _ceil(S, 16)))
    mask = block_mask(pattern, T, S, q_block, k_block)
    head_bytes = G * q_block * k_block * 4
    heads = rows_per_step(K, head_bytes)
    rows = (rows_per_step(B, K * head_bytes) if heads == K else 1), heads

    pad = lambda x, length: jnp.pad(x, ((0, 0), (0, length - x.shape[1])) + ((0, 0),) * (x.ndim - 2))
    q, (k, v) = pad(q_BTNH, mask.num_q * q_block), (pad(x, mask.num_k * k_block) for x in (k_BSKH, v_BSKH))
    valid = None if valid_BS is None else pad(valid_BS, mask.num_k * k_block)
    fn, params = (score_mod.fn, score_mod.params) if score_mod else (lambda scores, i, j, params: scores, ())
    params = jax.tree.map(lambda x: x.reshape(K, G, 1, 1, *x.shape[1:]), params)
    o_BTNH, lse_BTN = _attend(pattern, mask, fn, scale, rows)(q, k, v, valid, params)
    return o_BTNH[:, :T], lse_BTN[:, :T]


def block_sizes(pattern: Pattern, T: int, S: int) -> tuple[int, int]:
    """(query block, key block) for the XLA backend: large where the pattern is dense, near the window where it is a band."""
    size = 512
    if pattern.native_block is not None:
        size = pattern.native_block if pattern.native_block >= 32 else _ceil(32, pattern.native_block)
        while size > 512 and size % 2 == 0:
            size //= 2
    elif pattern.width is not None and pattern.width < S:
        size = max(64, min(512, 2 ** round(math.log2(max(pattern.width, 1) / 8))))
    return min(size, _ceil(T, 16)), min(size, _ceil(S, 16))


def rows_per_step(R: int, row_bytes: int) -> int:
    """How many of R rows one step takes: the largest divisor of R whose score tile stays within TILE_BYTES."""
    return max(p for p in range(1, R + 1) if R % p == 0 and (p == 1 or p * row_bytes <= TILE_BYTES))


def _attend(pattern: Pattern, mask: BlockMask, fn, scale: float, rows: tuple[int, int]):
    """The engine for one block list: (q, k, v, valid, params) -> (o, lse), with its own backward pass.

    P = prod(rows) (sequence, key head) rows are computed together. Tiles of queries and results are read from and written to [B, T, N, H] where
    they stand, and keys and values copied a group at a time: with heads in front of everything beforehand it takes longer, and two to four times the memory.
    """
    bq, bk = mask.q_block, mask.k_block
    lists = (mask.full_start, np.append(mask.full_block, 0)), (mask.part_start, np.append(mask.part_block, 0))  # an empty list could not be indexed

    def groups(B, K):
        """(how many groups of rows there are, the first sequence and key head of group g)."""
        across = K // rows[1]
        return B // rows[0] * across, lambda g: (g // across * rows[0], g % across * rows[1])

    def take(x, corner, G, start, size):
        """Of x [B, L, K G, ...] a group's positions from `start` on, [P, G, size, ...]."""
        b, k = corner
        x = lax.dynamic_slice(x, (b, start, k * G) + (0,) * (x.ndim - 3), (rows[0], size, rows[1] * G, *x.shape[3:]))
        return jnp.moveaxis(x.reshape(rows[0], size, rows[1], G, *x.shape[3:]), 1, 3).reshape(-1, G, size, *x.shape[3:])

    def put(x, tile_PGT, corner, start):
        """x with a group's tile in its place: the inverse of `take`."""
        b, k = corner
        G, size, *rest = tile_PGT.shape[1:]
        tile = jnp.moveaxis(tile_PGT.reshape(*rows, G, size, *rest), 3, 1).reshape(rows[0], size, rows[1] * G, *rest)
        return lax.dynamic_update_slice(x, tile.astype(x.dtype), (b, start, k * G) + (0,) * len(rest))

    def of_group(corner, k, v, valid, params):
        """Keys and values [P, S, H], which are valid [P, S], and parameters [P, G, ...] of a group."""
        k, v = (take(x, corner, 1, 0, x.shape[1])[:, 0] for x in (k, v))
        valid = None if valid is None else jnp.repeat(lax.dynamic_slice_in_dim(valid, corner[0], rows[0]), rows[1], axis=0)
        return k, v, valid, jax.tree.map(lambda x: jnp.tile(lax.dynamic_slice_in_dim(x, corner[1], rows[1]), (rows[0],) + (1,) * (x.ndim - 1)), params)

    def over_blocks(c, body, carry):
        """Runs body(j0, partial, carry) over the key blocks of query block c: the full ones without a mask, then the partial ones."""
        for (start, block), partial in zip(lists, (False, True)):
            start, block = jnp.asarray(start), jnp.asarray(block)
            carry = lax.fori_loop(start[c], start[c + 1], lambda n, carry: body(block[n] * bk, partial, carry), carry)
        return carry

    def scores_of(q, k, i0, j0, partial, valid, params):
        """Scores [P, G, bq, bk] of one tile, NEG where hidden, and the pull-back to the raw products and params."""
        i, j = i0 + jnp.arange(bq)[:, None], j0 + jnp.arange(bk)[None, :]
        raw = scale * jnp.einsum("PGTH,PSH->PGTS", q, k, preferred_element_type=jnp.float32)
        scores, pull = jax.vjp(lambda raw, params: fn(raw, i, j, params), raw, params)
        if partial:
            scores = jnp.where(pattern.mask(i, j) & (j < mask.S), scores, NEG)
        if valid is not None:
            scores = jnp.where(valid[:, None, None, :], scores, NEG)
        return scores, pull

    def at(x, start, size):
        return None if x is None else lax.dynamic_slice_in_dim(x, start, size, 1)

    def forward_row(q_c, k, v, valid, params, c):
        """Query block c of one group: (o [P, G, bq, H], lse [P, G, bq])."""

        def body(j0, partial, carry):
            top, total, acc = carry
            scores, _ = scores_of(q_c, at(k, j0, bk), c * bq, j0, partial, at(valid, j0, bk), params)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            p = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            acc = acc * shrink[..., None] + jnp.einsum("PGTS,PSH->PGTH", p.astype(v.dtype), at(v, j0, bk), preferred_element_type=jnp.float32)
            return new_top, total * shrink + p.sum(axis=-1), acc

        # The running maximum starts far above NEG: hidden pairs get weight exp(NEG - NEG / 2) = 0 even in a row that sees nothing.
        tile = q_c.shape[:3]
        top, total, acc = over_blocks(c, body, (jnp.full(tile, NEG / 2), jnp.zeros(tile), jnp.zeros(q_c.shape)))
        seen = total > 0
        o = acc / jnp.where(seen, total, 1.0)[..., None]
        return o, jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)

    @jax.custom_vjp
    def attend(q, k, v, valid, params):
        B, K = q.shape[0], k.shape[2]
        G = q.shape[2] // K
        count, corner_of = groups(B, K)

        def group(g, out):
            corner = corner_of(g)
            args = of_group(corner, k, v, valid, params)

            def row(c, out):
                tiles = forward_row(take(q, corner, G, c * bq, bq), *args, c)
                return tuple(put(x, tile, corner, c * bq) for x, tile in zip(out, tiles))

            return lax.fori_loop(0, mask.num_q, row, out)

        return lax.fori_loop(0, count, group, (jnp.zeros_like(q), jnp.zeros(q.shape[:3])))

    def attend_fwd(q, k, v, valid, params):
        o, lse = attend(q, k, v, valid, params)
        return (o, lse), (q, k, v, valid, params, o, lse)

    def attend_bwd(residuals, cotangents):
        q, k, v, valid, params, o, lse = residuals
        do, dlse = cotangents
        B, K, H = q.shape[0], k.shape[2], q.shape[3]
        G = q.shape[2] // K
        count, corner_of = groups(B, K)
        # XLA's CPU backend has products of half-precision numbers in some layouts only, and chooses the layout of a transposed tile itself.
        factor = jnp.promote_types(q.dtype, jnp.float32) if jax.default_backend() == "cpu" else q.dtype

        def group(g, gradients):
            dq, dk, dv, dparams = gradients
            corner = corner_of(g)
            k_g, v_g, valid_g, params_g = of_group(corner, k, v, valid, params)
            k_g, v_g = k_g.astype(factor), v_g.astype(factor)
            # XLA's CPU product is three times slower when it contracts the leading axis of its left side, as p' do and ds' q would;
            # with q and do transposed beforehand, dk and dv come out transposed from plain products.
            flat = lambda x: x.reshape(len(x), G * bq, bk)
            columns = lambda x: jnp.moveaxis(x, 3, 1).reshape(len(x), H, G * bq)

            def row(c, carry):
                dq, *carry = carry
                q_c, do_c, o_c, lse_c, dlse_c = (take(x, corner, G, c * bq, bq) for x in (q, do, o, lse, dlse))
                q_c, do_c = q_c.astype(factor), do_c.astype(factor)
                q_tc, do_tc = columns(q_c), columns(do_c)
                seen = lse_c > -jnp.inf
                lse_c = jnp.where(seen, lse_c, 0.0)
                # d lse / d score = p and d o / d score = p (v - o): both fold into one number a row.
                delta_c = dot_rows(do_c, o_c) - jnp.where(seen, dlse_c, 0.0)

                def body(j0, partial, carry):
                    dq_c, dk_t, dv_t, dparams_g = carry
                    k_j, v_j = at(k_g, j0, bk), at(v_g, j0, bk)
                    scores, pull = scores_of(q_c, k_j, c * bq, j0, partial, at(valid_g, j0, bk), params_g)
                    p = jnp.exp(scores - lse_c[..., None])
                    dp = jnp.einsum("PGTH,PSH->PGTS", do_c, v_j, preferred_element_type=jnp.float32)
                    draw, dparams_j = pull(p * (dp - delta_c[..., None]))
                    draw = (scale * draw).astype(factor)
                    dv_t = _add_at(dv_t, jnp.einsum("PHR,PRS->PHS", do_tc, flat(p.astype(factor)), preferred_element_type=jnp.float32), j0)
                    dk_t = _add_at(dk_t, jnp.einsum("PHR,PRS->PHS", q_tc, flat(draw), preferred_element_type=jnp.float32), j0)
                    dq_c = dq_c + jnp.einsum("PGTS,PSH->PGTH", draw, k_j, preferred_element_type=jnp.float32)
                    return dq_c, dk_t, dv_t, jax.tree.map(jnp.add, dparams_g, dparams_j)

                dq_c, *carry = over_blocks(c, body, (jnp.zeros(q_c.shape), *carry))
                return put(dq, dq_c, corner, c * bq), *carry

            zeros_t = jnp.zeros((len(k_g), H, k.shape[1]))
            dq, dk_t, dv_t, dparams_g = lax.fori_loop(0, mask.num_q, row, (dq, zeros_t, zeros_t, jax.tree.map(jnp.zeros_like, params_g)))
            dk, dv = (put(x, x_t.swapaxes(1, 2)[:, None], corner, 0) for x, x_t in ((dk, dk_t), (dv, dv_t)))
            return dq, dk, dv, jax.tree.map(lambda x, x_g: _add_rows(x, x_g.reshape(*rows, *x_g.shape[1:]).sum(axis=0), corner[1]), dparams, dparams_g)

        dq, dk, dv, dparams = lax.fori_loop(0, count, group, jax.tree.map(jnp.zeros_like, (q, k, v, params)))
        return dq, dk, dv, None, dparams

    attend.defvjp(attend_fwd, attend_bwd)
    return attend


def _add_at(x, update, start):
    """x[..., start:start + n] += update, in place inside a loop."""
    old = lax.dynamic_slice_in_dim(x, start, update.shape[-1], 2)
    return lax.dynamic_update_slice_in_dim(x, old + update, start, 2)


def _add_rows(x, update, start):
    """x[start:start + n] += update."""
    return lax.dynamic_update_slice_in_dim(x, lax.dynamic_slice_in_dim(x, start, len(update)) + update, start, 0)


def _ceil(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
