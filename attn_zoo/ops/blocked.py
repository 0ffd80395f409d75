"""Blocked softmax attention: one engine for every variant that scores pairs.

An online softmax (Milakov & Gimelshein 2018; Rabe & Staats 2021; Dao et al. 2022) over the blocks that a Pattern lists. The backward
pass recomputes scores block by block, so memory is linear in T whatever the pattern, and time follows the listed blocks.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from attn_zoo.ops.block_mask import BlockMask, block_mask
from attn_zoo.ops.chunks import pad, round_up
from attn_zoo.ops.patterns import Pattern
from attn_zoo.ops.rows import dot_rows

NEG = -1e30  # a masked score: finite, so that differences of masked scores are not NaN
TILE_BYTES = 2 * 2**20  # of the score tile [rows, G, q block, k block] that one step holds; about what stays in cache on a CPU core


@dataclasses.dataclass(frozen=True)
class ScoreMod:
    """A differentiable change of the scaled scores, and the per-head arrays it depends on.

    fn(scores, i, j, params) -> scores, with scores [..., q, k], i [q, 1], j [1, k] positions, and every leaf of params, given here
    with a leading head axis [N, ...], arriving with axes that broadcast against the scores. Must be elementwise in scores, i and j, since
    a backend may turn the tile: [k, q], with i [1, q] and j [k, 1]. by_distance promises that it adds to the scores what depends on i - j and on
    params alone, which are one number a head.
    """

    fn: Callable[[Array, Array, Array, Any], Array]
    params: Any
    by_distance: bool = False


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
    q_block, k_block = block_sizes(pattern, T, S) if block is None else (min(block, round_up(T, 16)), min(block, round_up(S, 16)))
    mask = block_mask(pattern, T, S, q_block, k_block)
    head_bytes = G * q_block * k_block * 4
    heads = rows_per_step(K, head_bytes)
    rows = (rows_per_step(B, K * head_bytes) if heads == K else 1), heads

    q, (k, v) = pad(q_BTNH, {1: mask.num_q * q_block}), (pad(x, {1: mask.num_k * k_block}) for x in (k_BSKH, v_BSKH))
    valid = None if valid_BS is None else pad(valid_BS, {1: mask.num_k * k_block})
    fn, params = (score_mod.fn, score_mod.params) if score_mod else (lambda scores, i, j, params: scores, ())
    params = jax.tree.map(lambda x: x.reshape(K, G, 1, 1, *x.shape[1:]), params)
    o_BTNH, lse_BTN = _differentiable(_Engine(pattern, mask, fn, scale, rows))(q, k, v, valid, params)
    return o_BTNH[:, :T], lse_BTN[:, :T]


def block_sizes(pattern: Pattern, T: int, S: int) -> tuple[int, int]:
    """(query block, key block) for the XLA backend: large where the pattern is dense, near the window where it is a band."""
    size = 512
    if pattern.native_block is not None:
        size = pattern.native_block if pattern.native_block >= 32 else round_up(32, pattern.native_block)
        while size > 512 and size % 2 == 0:
            size //= 2
    elif pattern.width is not None and pattern.width < S:
        size = max(64, min(512, 2 ** round(math.log2(max(pattern.width, 1) / 8))))
    return min(size, round_up(T, 16)), min(size, round_up(S, 16))


def rows_per_step(R: int, row_bytes: int) -> int:
    """How many of R rows one step takes: the largest divisor of R whose score tile stays within TILE_BYTES."""
    return max(p for p in range(1, R + 1) if R % p == 0 and (p == 1 or p * row_bytes <= TILE_BYTES))


Corner = tuple[Array, Array]  # the first sequence and the first key head of a group


@dataclasses.dataclass(frozen=True)
class _Engine:
    """The engine for one block list: `forward`, and `backward`, which recomputes the scores.

    A group of P = prod(rows) (sequence, key head) pairs is computed together. Tiles of queries and results are read from and written to [B, T, N, H] where they
    stand, and keys and values copied a group at a time: with heads in front of everything beforehand it takes longer, and two to four times the memory.
    """

    pattern: Pattern
    mask: BlockMask
    fn: Callable  # of a ScoreMod
    scale: float
    rows: tuple[int, int]  # sequences and key heads in a group

    def forward(self, q: Array, k: Array, v: Array, valid: Array | None, params: Any) -> tuple[Array, Array]:
        """(o, lse) of arrays whose lengths are whole numbers of blocks."""
        G, bq = q.shape[2] // k.shape[2], self.mask.q_block

        def group(corner, out):
            args = self.of_group(corner, k, v, valid, params)

            def row(c, out):
                tiles = self.forward_tile(self.take(q, corner, G, c * bq, bq), *args, c)
                return tuple(self.put(x, tile, corner, c * bq) for x, tile in zip(out, tiles))

            return lax.fori_loop(0, self.mask.num_q, row, out)

        return self.over_groups(q.shape[0], k.shape[2], group, (jnp.zeros_like(q), jnp.zeros(q.shape[:3])))

    def forward_tile(self, q_c: Array, k: Array, v: Array, valid: Array | None, params: Any, c: Array) -> tuple[Array, Array]:
        """Query block c of one group: (o [P, G, bq, H], lse [P, G, bq])."""
        bq, bk = self.mask.q_block, self.mask.k_block

        def body(j0, partial, carry):
            top, total, acc = carry
            scores, _ = self.scores(q_c, _at(k, j0, bk), c * bq, j0, partial, _at(valid, j0, bk), params)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            p = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            acc = acc * shrink[..., None] + jnp.einsum("PGTS,PSH->PGTH", p.astype(v.dtype), _at(v, j0, bk), preferred_element_type=jnp.float32)
            return new_top, total * shrink + p.sum(axis=-1), acc

        # The running maximum starts far above NEG: hidden pairs get weight exp(NEG - NEG / 2) = 0 even in a row that sees nothing.
        tile = q_c.shape[:3]
        top, total, acc = self.over_blocks(c, body, (jnp.full(tile, NEG / 2), jnp.zeros(tile), jnp.zeros(q_c.shape)))
        seen = total > 0
        o = acc / jnp.where(seen, total, 1.0)[..., None]
        return o, jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)

    def backward(self, residuals: tuple, cotangents: tuple[Array, Array]) -> tuple:
        """Gradients of q, k, v, valid (none) and params, from (q, k, v, valid, params, o, lse) and (do, dlse)."""
        q, k, v, valid, params, o, lse = residuals
        do, dlse = cotangents
        H, G, bq = q.shape[3], q.shape[2] // k.shape[2], self.mask.q_block
        # XLA's CPU backend has products of half-precision numbers in some layouts only, and chooses the layout of a transposed tile itself.
        factor = jnp.promote_types(q.dtype, jnp.float32) if jax.default_backend() == "cpu" else q.dtype

        def group(corner, gradients):
            dq, dk, dv, dparams = gradients
            k_g, v_g, valid_g, params_g = self.of_group(corner, k, v, valid, params)
            keys = k_g.astype(factor), v_g.astype(factor), valid_g, params_g

            def row(c, carry):
                dq, *carry = carry
                tiles = (self.take(x, corner, G, c * bq, bq) for x in (q, do, o, lse, dlse))
                dq_c, *carry = self.backward_tile(tiles, keys, c, factor, carry)
                return self.put(dq, dq_c, corner, c * bq), *carry

            zeros_t = jnp.zeros((len(k_g), H, k.shape[1]))
            dq, dk_t, dv_t, dparams_g = lax.fori_loop(0, self.mask.num_q, row, (dq, zeros_t, zeros_t, jax.tree.map(jnp.zeros_like, params_g)))
            dk, dv = (self.put(x, x_t.swapaxes(1, 2)[:, None], corner, 0) for x, x_t in ((dk, dk_t), (dv, dv_t)))
            of_heads = lambda x: x.reshape(*self.rows, *x.shape[1:]).sum(axis=0)
            return dq, dk, dv, jax.tree.map(lambda x, x_g: _add_rows(x, of_heads(x_g), corner[1]), dparams, dparams_g)

        dq, dk, dv, dparams = self.over_groups(q.shape[0], k.shape[2], group, jax.tree.map(jnp.zeros_like, (q, k, v, params)))
        return dq, dk, dv, None, dparams

    def backward_tile(self, tiles: Iterable[Array], keys: tuple, c: Array, factor: Any, carry: list) -> tuple:
        """Query block c of one group: (dq of it [P, G, bq, H], and what is added up over query blocks: dk and dv [P, H, S], dparams).

        `tiles` are the block's q, do, o, lse and dlse, `keys` what `of_group` gives, in the dtype `factor` that products are taken in.
        """
        q_c, do_c, o_c, lse_c, dlse_c = tiles
        k, v, valid, params = keys
        bq, bk = self.mask.q_block, self.mask.k_block
        P, G, _, H = q_c.shape
        # XLA's CPU product is three times slower when it contracts the leading axis of its left side, as p' do and ds' q would;
        # with q and do transposed beforehand, dk and dv come out transposed from plain products.
        flat = lambda x: x.reshape(P, G * bq, bk)
        columns = lambda x: jnp.moveaxis(x, 3, 1).reshape(P, H, G * bq)
        q_c, do_c = q_c.astype(factor), do_c.astype(factor)
        q_tc, do_tc = columns(q_c), columns(do_c)
        seen = lse_c > -jnp.inf
        lse_c = jnp.where(seen, lse_c, 0.0)
        # d lse / d score = p and d o / d score = p (v - o): both fold into one number a row.
        delta_c = dot_rows(do_c, o_c) - jnp.where(seen, dlse_c, 0.0)

        def body(j0, partial, carry):
            dq_c, dk_t, dv_t, dparams = carry
            k_j, v_j = _at(k, j0, bk), _at(v, j0, bk)
            scores, pull = self.scores(q_c, k_j, c * bq, j0, partial, _at(valid, j0, bk), params)
            p = jnp.exp(scores - lse_c[..., None])
            dp = jnp.einsum("PGTH,PSH->PGTS", do_c, v_j, preferred_element_type=jnp.float32)
            draw, dparams_j = pull(p * (dp - delta_c[..., None]))
            draw = (self.scale * draw).astype(factor)
            dv_t = _add_at(dv_t, jnp.einsum("PHR,PRS->PHS", do_tc, flat(p.astype(factor)), preferred_element_type=jnp.float32), j0)
            dk_t = _add_at(dk_t, jnp.einsum("PHR,PRS->PHS", q_tc, flat(draw), preferred_element_type=jnp.float32), j0)
            dq_c = dq_c + jnp.einsum("PGTS,PSH->PGTH", draw, k_j, preferred_element_type=jnp.float32)
            return dq_c, dk_t, dv_t, jax.tree.map(jnp.add, dparams, dparams_j)

        return self.over_blocks(c, body, (jnp.zeros(q_c.shape), *carry))

    def scores(self, q: Array, k: Array, i0: Array, j0: Array, partial: bool, valid: Array | None, params: Any) -> tuple[Array, Callable]:
        """Scores [P, G, bq, bk] of one tile, NEG where hidden, and the pull-back to the raw products and params."""
        i, j = i0 + jnp.arange(self.mask.q_block)[:, None], j0 + jnp.arange(self.mask.k_block)[None, :]
        raw = self.scale * jnp.einsum("PGTH,PSH->PGTS", q, k, preferred_element_type=jnp.float32)
        scores, pull = jax.vjp(lambda raw, params: self.fn(raw, i, j, params), raw, params)
        if partial:
            scores = jnp.where(self.pattern.mask(i, j) & (j < self.mask.S), scores, NEG)
        if valid is not None:
            scores = jnp.where(valid[:, None, None, :], scores, NEG)
        return scores, pull

    def over_groups(self, B: int, K: int, body: Callable[[Corner, Any], Any], carry: Any) -> Any:
        """Runs body(corner, carry) over all groups."""
        sequences, heads = self.rows
        across = K // heads
        return lax.fori_loop(0, B // sequences * across, lambda g, carry: body((g // across * sequences, g % across * heads), carry), carry)

    def over_blocks(self, c: Array, body: Callable[[Array, bool, Any], Any], carry: Any) -> Any:
        """Runs body(j0, partial, carry) over the key blocks of query block c: the full ones without a mask, then the partial ones."""
        mask = self.mask
        for start, block, partial in ((mask.full_start, mask.full_block, False), (mask.part_start, mask.part_block, True)):
            start, block = jnp.asarray(start), jnp.asarray(np.append(block, 0))  # an empty list could not be indexed
            carry = lax.fori_loop(start[c], start[c + 1], lambda n, carry: body(block[n] * mask.k_block, partial, carry), carry)
        return carry

    def take(self, x: Array, corner: Corner, G: int, start: Array | int, size: int) -> Array:
        """Of x [B, L, K G, ...] a group's positions from `start` on, [P, G, size, ...]."""
        (sequences, heads), (b, k) = self.rows, corner
        x = lax.dynamic_slice(x, (b, start, k * G) + (0,) * (x.ndim - 3), (sequences, size, heads * G, *x.shape[3:]))
        return jnp.moveaxis(x.reshape(sequences, size, heads, G, *x.shape[3:]), 1, 3).reshape(-1, G, size, *x.shape[3:])

    def put(self, x: Array, tile_PGT: Array, corner: Corner, start: Array | int) -> Array:
        """x with a group's tile in its place: the inverse of `take`."""
        (sequences, heads), (b, k) = self.rows, corner
        G, size, *rest = tile_PGT.shape[1:]
        tile = jnp.moveaxis(tile_PGT.reshape(sequences, heads, G, size, *rest), 3, 1).reshape(sequences, size, heads * G, *rest)
        return lax.dynamic_update_slice(x, tile.astype(x.dtype), (b, start, k * G) + (0,) * len(rest))

    def of_group(self, corner: Corner, k: Array, v: Array, valid: Array | None, params: Any) -> tuple:
        """Keys and values [P, S, H], which are valid [P, S], and parameters [P, G, ...] of a group."""
        sequences, heads = self.rows
        k, v = (self.take(x, corner, 1, 0, x.shape[1])[:, 0] for x in (k, v))
        valid = None if valid is None else jnp.repeat(lax.dynamic_slice_in_dim(valid, corner[0], sequences), heads, axis=0)
        return k, v, valid, jax.tree.map(lambda x: jnp.tile(lax.dynamic_slice_in_dim(x, corner[1], heads), (sequences,) + (1,) * (x.ndim - 1)), params)


def _differentiable(engine: _Engine) -> Callable:
    """(q, k, v, valid, params) -> (o, lse), with the engine's own backward pass."""

    @jax.custom_vjp
    def attend(q, k, v, valid, params):
        return engine.forward(q, k, v, valid, params)

    def forward(*arguments):
        results = attend(*arguments)
        return results, (*arguments, *results)

    attend.defvjp(forward, engine.backward)
    return attend


def _at(x, start, size):
    """x[:, start:start + size], of an x that may be None."""
    return None if x is None else lax.dynamic_slice_in_dim(x, start, size, 1)


def _add_at(x, update, start):
    """x[..., start:start + n] += update, in place inside a loop."""
    old = lax.dynamic_slice_in_dim(x, start, update.shape[-1], 2)
    return lax.dynamic_update_slice_in_dim(x, old + update, start, 2)


def _add_rows(x, update, start):
    """x[start:start + n] += update."""
    return lax.dynamic_update_slice_in_dim(x, lax.dynamic_slice_in_dim(x, start, len(update)) + update, start, 0)
