"""The bodies of the Pallas kernels of blocked attention: what one program does with one block of queries, or of keys.

Flash attention (Dao et al. 2022; Dao 2023) over the blocks that a BlockMask lists, as FlexAttention (Dong et al. 2024) has it: full blocks
skip the mask, partial ones evaluate the pattern from indices, others are never visited. The backward pass recomputes the scores, with one
kernel that owns queries (dq) and one that owns keys (dk, dv), so that nothing is added atomically. Scores are kept in units of log2(e),
since exp2 is what the hardware has.

Bodies use references, loops and products alone, which Pallas' compilers for NVIDIA GPUs share. row(n) is the block that program n of a head has.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from attn_zoo.ops.blocked import NEG
from attn_zoo.ops.patterns import BlockTable, Pattern, table_rows

INTERPRET = False  # tests set it: all kernels for NVIDIA GPUs by Triton then run on any device, slowly
NEVER = 1e30  # the logsumexp, in the backward pass, of a row that sees nothing: all its weights are zero
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What a kernel knows at compile time: who sees whom, how scores change, and its blocks. `fn` is that of a ScoreMod, or None."""

    pattern: Pattern
    fn: Callable[[Any, Any, Any, Any], Any] | None
    scale: float
    S: int
    q_block: int
    k_block: int
    interpret: bool

    def dot(self, a, b, a_axis: int, b_axis: int):
        """The product of two matrices over these axes, in float32."""
        precision = precision_of_float32(self.interpret) if a.dtype == jnp.float32 else None
        return product(a, b, a_axis, b_axis, precision)

    def scores(self, products, i, j, partial, valid, params, tables):
        """(log2(e) times the scores of one tile, NEG where hidden; the pull-back of the unscaled-by-log2(e) scores to scale * products and params).

        The tile may be [q, k] or [k, q]: all is elementwise, and i, j and valid broadcast against it. Parameters arrive as numbers.
        """
        if self.fn is None:
            scores, pull = self.scale * LOG2E * products, lambda d: (d, ())
        else:
            # Spread over the tile, so that their gradients come back a number a pair, and the kernel sums what it needs.
            params = jax.tree.map(lambda x: jnp.broadcast_to(x, products.shape), params)
            scores, pull = jax.vjp(lambda raw, params: self.fn(raw, i, j, params), self.scale * products, params)
            scores = LOG2E * scores
        if partial:
            seen = on_device(self.pattern, tables).mask(i, j)
            scores = jnp.where(seen if self.S % self.k_block == 0 else seen & (j < self.S), scores, NEG)
        return scores if valid is None else jnp.where(valid, scores, NEG), pull


def forward_kernel(blocks, tables, params, q_ref, k_ref, v_ref, valid_ref, o_ref, lse_ref, *, scoring: Scoring, row: Callable):
    """One block of queries of one head: o [q, H] and the logsumexp [q] of its scores."""
    c, n, bq, bk = row(pl.program_id(0)), pl.program_id(1), scoring.q_block, scoring.k_block
    q, i, params = q_ref[...], c * bq + _column(bq), _of_head(params, n)

    def body(block, partial, carry):
        top, total, acc = carry
        rows = pl.ds(block * bk, bk)
        valid = None if valid_ref is None else valid_ref[rows][None, :] != 0
        scores, _ = scoring.scores(scoring.dot(q, k_ref[rows, :], 1, 1), i, block * bk + _row(bk), partial, valid, params, tables)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        p, shrink = jnp.exp2(scores - new_top[:, None]), jnp.exp2(top - new_top)
        acc = acc * shrink[:, None] + scoring.dot(p.astype(v_ref.dtype), v_ref[rows, :], 1, 0)
        return new_top, total * shrink + jnp.sum(p, axis=1), acc

    # The running maximum starts far above NEG: hidden pairs get weight exp2(NEG - NEG / 2) = 0 even in a row that sees nothing.
    start = jnp.full((bq,), NEG / 2, jnp.float32), jnp.zeros((bq,), jnp.float32), jnp.zeros(q.shape, jnp.float32)
    top, total, acc = _over_blocks(blocks, c, body, start)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    o_ref[...] = (acc / total[:, None]).astype(o_ref.dtype)
    lse_ref[...] = jnp.where(seen, top / LOG2E + jnp.log(total), -jnp.inf)


def dq_kernel(blocks, tables, params, q_ref, k_ref, v_ref, valid_ref, do_ref, lse_ref, delta_ref, dq_ref, dparam_refs, *, scoring: Scoring, row: Callable):
    """One block of queries of one head: dq [q, H], and of every parameter its gradient by these rows, [q]."""
    c, n, bq, bk = row(pl.program_id(0)), pl.program_id(1), scoring.q_block, scoring.k_block
    q, do, i, params = q_ref[...], do_ref[...], c * bq + _column(bq), _of_head(params, n)
    lse, delta = LOG2E * lse_ref[...][:, None], delta_ref[...][:, None]

    def body(block, partial, carry):
        dq, dparams = carry
        rows = pl.ds(block * bk, bk)
        k = k_ref[rows, :]
        valid = None if valid_ref is None else valid_ref[rows][None, :] != 0
        scores, pull = scoring.scores(scoring.dot(q, k, 1, 1), i, block * bk + _row(bk), partial, valid, params, tables)
        draw, dparams_here = pull(jnp.exp2(scores - lse) * (scoring.dot(do, v_ref[rows, :], 1, 1) - delta))
        dparams = [sum_ + jnp.sum(x, axis=1) for sum_, x in zip(dparams, jax.tree.leaves(dparams_here))]
        return dq + scoring.dot(draw.astype(k.dtype), k, 1, 0), dparams

    start = jnp.zeros(q.shape, jnp.float32), [jnp.zeros((bq,), jnp.float32) for _ in dparam_refs]
    dq, dparams = _over_blocks(blocks, c, body, start)
    dq_ref[...] = (scoring.scale * dq).astype(dq_ref.dtype)
    for ref, x in zip(dparam_refs, dparams):
        ref[...] = x


def dkv_kernel(blocks, tables, params, q_ref, k_ref, v_ref, valid_ref, do_ref, lse_ref, delta_ref, dk_ref, dv_ref, *, scoring: Scoring, row: Callable):
    """One block of keys of one key head: dk, dv [k, H], summed over the G query heads that share it. `blocks` lists query blocks by key block."""
    c, n, bq, bk, G = row(pl.program_id(0)), pl.program_id(1), scoring.q_block, scoring.k_block, q_ref.shape[1]
    k, v, j = k_ref[...], v_ref[...], c * bk + _column(bk)
    valid = None if valid_ref is None else valid_ref[...][:, None] != 0

    def head(g, carry):
        here = _of_head(params, n * G + g)

        def body(block, partial, carry):
            dk, dv = carry
            rows = pl.ds(block * bq, bq)
            q, do = q_ref[rows, g, :], do_ref[rows, g, :]
            scores, pull = scoring.scores(scoring.dot(k, q, 1, 1), block * bq + _row(bq), j, partial, valid, here, tables)
            p = jnp.exp2(scores - LOG2E * lse_ref[g, rows][None, :])
            draw, _ = pull(p * (scoring.dot(v, do, 1, 1) - delta_ref[g, rows][None, :]))
            return dk + scoring.dot(draw.astype(q.dtype), q, 1, 0), dv + scoring.dot(p.astype(do.dtype), do, 1, 0)

        return _over_blocks(blocks, c, body, carry)

    start = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dk, dv = head(0, start) if G == 1 else lax.fori_loop(0, G, head, start)
    dk_ref[...] = (scoring.scale * dk).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def product(a, b, a_axis: int, b_axis: int, precision=None):
    """The product of two matrices over these axes, in float32."""
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def precision_of_float32(interpret: bool):
    """Of products of float32 factors: three of TF32 on the matrix units, which together round some four times as coarsely as float32.

    JAX's default on these GPUs is one of TF32, of three digits. Float32 itself, on the units for single numbers, where that is asked for by
    `jax.default_matmul_precision("highest")`, and interpreted, since a CPU has no TF32.
    """
    exact = interpret or jax.config.jax_default_matmul_precision in ("highest", "float32")
    return lax.Precision.HIGHEST if exact else lax.DotAlgorithmPreset.TF32_TF32_F32_X3


def tables_of(pattern: Pattern) -> list[BlockTable]:
    """The tables that a pattern is composed of: a kernel gets their rows as inputs, since it cannot hold arrays of its own."""
    found = []
    replace_tables(pattern, lambda table: found.append(table) or table)
    return found


def replace_tables(pattern: Pattern, by: Callable[[BlockTable], Pattern]) -> Pattern:
    """The pattern with `by(table)` in the place of every BlockTable that it is composed of."""
    if isinstance(pattern, BlockTable):
        return by(pattern)
    parts = {f.name: getattr(pattern, f.name) for f in dataclasses.fields(pattern)}
    parts = {name: replace_tables(part, by) for name, part in parts.items() if isinstance(part, Pattern)}
    return dataclasses.replace(pattern, **parts) if parts else pattern


def on_device(pattern: Pattern, tables) -> Pattern:
    """The pattern whose tables are read from these references, in the order of `tables_of`."""
    refs = iter(tables)
    return replace_tables(pattern, lambda table: _TableInMemory(table.block, *table_rows(table).shape, next(refs)))


@dataclasses.dataclass(frozen=True, eq=False)
class _TableInMemory(Pattern):
    """A BlockTable whose rows, padded to one width, stand one after the other in the memory behind `ref`."""

    block: int
    num_rows: int
    row_length: int
    ref: Any

    def mask(self, i, j):
        first, J = jnp.minimum(i // self.block, self.num_rows - 1) * self.row_length, j // self.block
        none = jnp.zeros(jnp.broadcast_shapes(i.shape, j.shape), bool)
        return lax.fori_loop(0, self.row_length, lambda r, hits: hits | (self.ref[first + r] == J), none)


def _over_blocks(blocks, c, body, carry):
    """Runs body(block, partial, carry) over the blocks listed for block c: the full ones without a mask, then the partial ones."""
    for listed, partial in zip(blocks, (False, True)):
        if listed is not None:
            start, block = listed
            carry = lax.fori_loop(start[c], start[c + 1], lambda n, carry: body(block[n], partial, carry), carry)
    return carry


def _of_head(params, n):
    return jax.tree.map(lambda ref: ref[n].astype(jnp.float32), params)


def _column(size: int):
    return lax.broadcasted_iota(jnp.int32, (size, 1), 0)


def _row(size: int):
    return lax.broadcasted_iota(jnp.int32, (1, size), 1)
