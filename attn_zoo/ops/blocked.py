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
    G, R = N // K, B * K
    scale = H**-0.5 if scale is None else scale
    q_block, k_block = block_sizes(pattern, T, S) if block is None else (min(block, _ceil(T, 16)), min(block, _ceil(S, 16)))
    mask = block_mask(pattern, T, S, q_block, k_block)
    P = rows_per_step(R, G * q_block * k_block * 4)

    # [B, T, N, H] -> [groups, P, G, T, H]: heads that share keys side by side, P (batch, key head) rows computed together.
    pad_q, pad_k = mask.num_q * q_block - T, mask.num_k * k_block - S
    q = jnp.pad(q_BTNH, ((0, 0), (0, pad_q), (0, 0), (0, 0))).reshape(B, T + pad_q, K, G, H)
    q = q.transpose(0, 2, 3, 1, 4).reshape(R // P, P, G, T + pad_q, H)
    k, v = (jnp.pad(x, ((0, 0), (0, pad_k), (0, 0), (0, 0))).transpose(0, 2, 1, 3).reshape(R // P, P, S + pad_k, H) for x in (k_BSKH, v_BSKH))
    valid = None
    if valid_BS is not None:
        valid = jnp.repeat(jnp.pad(valid_BS, ((0, 0), (0, pad_k))), K, axis=0).reshape(R // P, P, S + pad_k)
    fn, params = (score_mod.fn, score_mod.params) if score_mod else (lambda scores, i, j, params: scores, ())
    params = jax.tree.map(lambda x: _per_row(x, B, K, G, P), params)

    o, lse = _attend(pattern, mask, fn, scale)(q, k, v, valid, params)
    o_BTNH = o.reshape(B, K, G, T + pad_q, H).transpose(0, 3, 1, 2, 4).reshape(B, T + pad_q, N, H)[:, :T]
    lse_BTN = lse.reshape(B, K, G, T + pad_q).transpose(0, 3, 1, 2).reshape(B, T + pad_q, N)[:, :T]
    return o_BTNH.astype(q_BTNH.dtype), lse_BTN


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
    """How many of R (batch, key head) rows one step takes: the largest divisor of R whose score tile stays within TILE_BYTES."""
    return max(p for p in range(1, R + 1) if R % p == 0 and (p == 1 or p * row_bytes <= TILE_BYTES))


def _attend(pattern: Pattern, mask: BlockMask, fn, scale: float):
    """The engine for one block list: (q, k, v, valid, params) -> (o, lse), with its own backward pass."""
    bq, bk = mask.q_block, mask.k_block
    lists = (mask.full_start, np.append(mask.full_block, 0)), (mask.part_start, np.append(mask.part_block, 0))  # an empty list could not be indexed

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

    def at(x, start, size, axis=1):
        return None if x is None else lax.dynamic_slice_in_dim(x, start, size, axis)

    def forward_row(q, k, v, valid, params, c):
        """One query block of one group: (o [P, G, bq, H], lse [P, G, bq])."""
        q_c = at(q, c * bq, bq, 2)

        def body(j0, partial, carry):
            top, total, acc = carry
            scores, _ = scores_of(q_c, at(k, j0, bk), c * bq, j0, partial, at(valid, j0, bk), params)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            p = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            acc = acc * shrink[..., None] + jnp.einsum("PGTS,PSH->PGTH", p.astype(v.dtype), at(v, j0, bk), preferred_element_type=jnp.float32)
            return new_top, total * shrink + p.sum(axis=-1), acc

        # The running maximum starts far above NEG: hidden pairs get weight exp(NEG - NEG / 2) = 0 even in a row that sees nothing.
        rows = q_c.shape[:3]
        top, total, acc = over_blocks(c, body, (jnp.full(rows, NEG / 2), jnp.zeros(rows), jnp.zeros(q_c.shape)))
        seen = total > 0
        o = acc / jnp.where(seen, total, 1.0)[..., None]
        return o, jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)

    def group_forward(args):
        q, k, v, valid, params = args
        o, lse = lax.map(lambda c: forward_row(q, k, v, valid, params, c), jnp.arange(mask.num_q))  # [C, P, G, bq, ...]
        return jnp.moveaxis(o, 0, 2).reshape(q.shape).astype(q.dtype), jnp.moveaxis(lse, 0, 2).reshape(q.shape[:3])

    def group_backward(args):
        q, k, v, valid, params, lse, do, delta = args
        P, G, H = q.shape[0], q.shape[1], q.shape[3]
        safe_lse = jnp.where(lse == -jnp.inf, 0.0, lse)
        # XLA's CPU product is three times slower when it contracts the leading axis of its left side, as p' do and ds' q would;
        # with q and do transposed beforehand, dk and dv come out transposed from plain products.
        q_t, do_t = q.swapaxes(2, 3), do.swapaxes(2, 3)
        rows = lambda x: x.reshape(P, G * bq, bk)
        columns = lambda x: jnp.moveaxis(x, 1, 2).reshape(P, H, G * bq)

        def row(carry, c):
            q_c, do_c, lse_c, delta_c = (at(x, c * bq, bq, 2) for x in (q, do, safe_lse, delta))
            q_tc, do_tc = (columns(at(x, c * bq, bq, 3)) for x in (q_t, do_t))

            def body(j0, partial, carry):
                dq_c, dk_t, dv_t, dparams = carry
                k_j, v_j = at(k, j0, bk), at(v, j0, bk)
                scores, pull = scores_of(q_c, k_j, c * bq, j0, partial, at(valid, j0, bk), params)
                p = jnp.exp(scores - lse_c[..., None])
                dp = jnp.einsum("PGTH,PSH->PGTS", do_c, v_j, preferred_element_type=jnp.float32)
                draw, dparams_j = pull(p * (dp - delta_c[..., None]))
                draw = (scale * draw).astype(q.dtype)
                dv_t = _add_at(dv_t, jnp.einsum("PHR,PRS->PHS", do_tc, rows(p.astype(q.dtype)), preferred_element_type=jnp.float32), j0)
                dk_t = _add_at(dk_t, jnp.einsum("PHR,PRS->PHS", q_tc, rows(draw), preferred_element_type=jnp.float32), j0)
                dq_c = dq_c + jnp.einsum("PGTS,PSH->PGTH", draw, k_j, preferred_element_type=jnp.float32)
                return dq_c, dk_t, dv_t, jax.tree.map(jnp.add, dparams, dparams_j)

            dq_c, *carry = over_blocks(c, body, (jnp.zeros(q_c.shape), *carry))
            return tuple(carry), dq_c.astype(q.dtype)

        zeros_t = jnp.zeros((P, H, k.shape[1]))
        (dk_t, dv_t, dparams), dq = lax.scan(row, (zeros_t, zeros_t, jax.tree.map(jnp.zeros_like, params)), jnp.arange(mask.num_q))
        dk, dv = dk_t.swapaxes(1, 2).astype(k.dtype), dv_t.swapaxes(1, 2).astype(v.dtype)
        return jnp.moveaxis(dq, 0, 2).reshape(q.shape), dk, dv, dparams

    @jax.custom_vjp
    def attend(q, k, v, valid, params):
        return lax.map(group_forward, (q, k, v, valid, params))

    def attend_fwd(q, k, v, valid, params):
        o, lse = attend(q, k, v, valid, params)
        return (o, lse), (q, k, v, valid, params, o, lse)

    def attend_bwd(residuals, cotangents):
        q, k, v, valid, params, o, lse = residuals
        do, dlse = cotangents
        # d lse / d score = p and d o / d score = p (v - o): both fold into one number a row.
        delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1) - jnp.where(lse == -jnp.inf, 0.0, dlse)
        dq, dk, dv, dparams = lax.map(group_backward, (q, k, v, valid, params, lse, do, delta))
        return dq, dk, dv, None, dparams

    attend.defvjp(attend_fwd, attend_bwd)
    return attend


def _add_at(x, update, start):
    """x[..., start:start + n] += update, in place inside a loop."""
    old = lax.dynamic_slice_in_dim(x, start, update.shape[-1], 2)
    return lax.dynamic_update_slice_in_dim(x, old + update, start, 2)


def _per_row(x, B, K, G, P):
    """[N, ...] per-head values as [groups, P, G, 1, 1, ...]: one value a row of heads, to broadcast against scores."""
    x = jnp.broadcast_to(x.reshape(1, K, G, *x.shape[1:]), (B, K, G, *x.shape[1:]))
    return x.reshape(B * K // P, P, G, 1, 1, *x.shape[3:])


def _ceil(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
