"""Blocked softmax attention as Pallas kernels, for NVIDIA GPUs: what FlexAttention is to PyTorch, behind the signature of `blocked_attention`.

The kernels (see pallas_kernels) run over the same block lists as the XLA engine, each with a tiling of its own: the forward pass, the one for
dq, and the one for dk and dv, which takes the transposed list. They are compiled by Pallas' Triton backend, which JAX deprecates from 0.11 on
in favour of Mosaic GPU: what belongs to it stands in `Run.call` alone.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.extend.core import Literal, jaxprs_in_params
from jaxtyping import Array, Bool, Float

from attn_zoo.ops import pallas_kernels
from attn_zoo.ops.block_mask import BlockMask, block_mask
from attn_zoo.ops.blocked import ScoreMod
from attn_zoo.ops.chunks import pad
from attn_zoo.ops.pallas_kernels import NEVER, Scoring, dkv_kernel, dq_kernel, forward_kernel, replace_tables, tables_of
from attn_zoo.ops.patterns import FULL, Pattern, table_rows
from attn_zoo.ops.tuning import KERNELS, LEAST, MOST_HEAD_DIM, Tile, power_of_two, tile
from attn_zoo.spec import Unsupported

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def serves(pattern: Pattern, dtype, head_dim: int, score_mod: ScoreMod | None = None) -> bool | str:
    """Whether the kernels can compute this, whatever the device; else the reason why not."""
    if jnp.dtype(dtype) not in DTYPES:
        return f"it takes bfloat16, float16 or float32, not {jnp.dtype(dtype).name}"
    if head_dim > MOST_HEAD_DIM:
        return f"the head dim must be at most {MOST_HEAD_DIM}, not {head_dim}"
    obstacle = mask_obstacle(pattern)
    if obstacle:
        return f"the pattern's mask {obstacle}; a kernel knows elementwise functions of indices, and BlockTable"
    if score_mod is None:
        return True
    if not all(x.ndim == 1 and jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(score_mod.params)):
        return "every parameter of its score modification must be one float a head"
    obstacle = _obstacle(_with_gradient(score_mod.fn), _SCORES, *_INDICES, jax.tree.map(lambda x: _SCORES, score_mod.params))
    return f"its score modification {obstacle}; a kernel knows elementwise functions of scores, indices and parameters" if obstacle else True


def pallas_attention(
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
    """As `blocked_attention`: (output in q's dtype, float32 logsumexp), both differentiable. Raises Unsupported, with the reason, for what `serves` refuses.

    `block`, a power of two of at least 16, sets all block sizes; by default they are those of the tuning table.
    """
    (T, H), S = (q_BTNH.shape[1], q_BTNH.shape[3]), k_BSKH.shape[1]
    dtype = jnp.result_type(q_BTNH, k_BSKH, v_BSKH)
    reason = serves(pattern, dtype, H, score_mod)
    if reason is not True:
        raise Unsupported(f"the Pallas kernels cannot serve here: {reason}")
    fn, params = (None, ()) if score_mod is None else (score_mod.fn, score_mod.params)
    tiles = [tile(kernel, pattern, T, S, dtype, H, block=block) for kernel in KERNELS]
    valid = None if valid_BS is None else valid_BS.astype(jnp.int8)
    attend = _attend(pattern, fn, H**-0.5 if scale is None else scale, tiles)
    o_BTNH, lse_BNT = attend(*(x.astype(dtype) for x in (q_BTNH, k_BSKH, v_BSKH)), valid, params)
    return o_BTNH.astype(q_BTNH.dtype), lse_BNT.swapaxes(1, 2)


def differentiable(forward, pattern: Pattern, scale: float, q, k, v):
    """(o [B, T, N, H], lse [B, N, T]) by forward(q, k, v), which another kernel computes, with the backward pass of these."""
    tiles = [tile(kernel, pattern, q.shape[1], k.shape[1], q.dtype, q.shape[3]) for kernel in KERNELS]
    return _attend(pattern, None, scale, tiles, lambda q, k, v, valid, params: forward(q, k, v))(q, k, v, None, ())


def _attend(pattern: Pattern, fn, scale: float, tiles: list[Tile], forward=None):
    """(q, k, v, valid, params) -> (o [B, T, N, H], lse [B, N, T]), with its own backward pass; `forward` is in the place of the first of KERNELS."""

    def runs(q, k):
        return [Run(pattern, fn, scale, tile, q.shape, k.shape) for tile in tiles]

    @jax.custom_vjp
    def attend(q, k, v, valid, params):
        return (forward or runs(q, k)[0].forward)(q, k, v, valid, params)

    def attend_fwd(q, k, v, valid, params):
        o, lse = attend(q, k, v, valid, params)
        return (o, lse), (q, k, v, valid, params, o, lse)

    def attend_bwd(residuals, cotangents):
        *inputs, o, lse = residuals
        do, dlse = cotangents
        seen = lse > -jnp.inf
        # d lse / d score = p and d o / d score = p (v - o): both fold into one number a row.
        delta = (do.astype(jnp.float32) * o.astype(jnp.float32)).sum(axis=-1).swapaxes(1, 2) - jnp.where(seen, dlse, 0.0)
        rows = do, jnp.where(seen, lse, NEVER), delta
        _, for_dq, for_dkv = runs(*inputs[:2])
        dq, dparams = for_dq.dq(*inputs, *rows)
        dk, dv = for_dkv.dkv(*inputs, *rows)
        return dq, dk, dv, None, dparams

    attend.defvjp(attend_fwd, attend_bwd)
    return attend


class Run:
    """One kernel over one problem: its block lists, its arrays in whole blocks, and which part of them each program gets.

    A program of `forward` and `dq` is (query block, head, sequence), one of `dkv` (key block, key head, sequence). A GPU starts them in their order: of a head
    those with long lists come first, so that none of these is begun when the others are done. The head dim is padded to a power of two. Queries beyond T are
    zeros with a logsumexp of NEVER, so that they weigh nothing.
    """

    def __init__(self, pattern, fn, scale, tile, q_shape, k_shape):
        self.B, self.T, self.N, self.H = q_shape
        self.S, self.K = k_shape[1:3]
        self.tile, self.pattern = tile, pattern
        self.scoring = Scoring(pattern, fn, scale, self.S, tile.q_block, tile.k_block, pallas_kernels.INTERPRET)
        self.mask = block_mask(pattern, self.T, self.S, tile.q_block, tile.k_block)
        self.rows, self.columns = self.mask.num_q * tile.q_block, self.mask.num_k * tile.k_block
        self.wide = max(LEAST, power_of_two(self.H))

    def forward(self, q, k, v, valid, params):
        own, own_row = self._own_queries()
        outputs = (own, self._shape(self.rows, self.N, q.dtype)), (own_row, self._row_shape())
        o, lse = self.call(forward_kernel, self.mask, self.N, params, [(self._queries(q), own), *self._all_keys(k, v, valid)], outputs)
        return o[:, : self.T, :, : self.H], lse[..., : self.T]

    def dq(self, q, k, v, valid, params, do, lse, delta):
        """(dq, gradients of params)."""
        own, own_row = self._own_queries()
        inputs = [(self._queries(q), own), *self._all_keys(k, v, valid), (self._queries(do), own), *((x, own_row) for x in self._of_rows(lse, delta))]
        leaves, tree = jax.tree.flatten(params)
        outputs = (own, self._shape(self.rows, self.N, q.dtype)), [(own_row, self._row_shape()) for _ in leaves]
        dq, dparams = self.call(dq_kernel, self.mask, self.N, params, inputs, outputs)
        dparams = [d[..., : self.T].sum(axis=(0, 2)).astype(x.dtype) for d, x in zip(dparams, leaves)]
        return dq[:, : self.T, :, : self.H], jax.tree.unflatten(tree, dparams)

    def dkv(self, q, k, v, valid, params, do, lse, delta):
        """(dk, dv)."""
        mask = self.mask.transpose()
        own = pl.BlockSpec((None, self.tile.k_block, None, self.wide), lambda p, n, b: (b, mask.longest_first(p), n, 0))
        own_valid = pl.BlockSpec((None, self.tile.k_block), lambda p, n, b: (b, mask.longest_first(p)))
        group = pl.BlockSpec((None, self.rows, self.N // self.K, self.wide), lambda p, n, b: (b, 0, n, 0))
        group_row = pl.BlockSpec((None, self.N // self.K, self.rows), lambda p, n, b: (b, n, 0))
        inputs = [(self._queries(q), group), (self._keys(k), own), (self._keys(v), own), (self._valid(valid), own_valid)]
        inputs += [(self._queries(do), group), *((x, group_row) for x in self._of_rows(lse, delta))]
        outputs = tuple((own, self._shape(self.columns, self.K, x.dtype)) for x in (k, v))
        dk, dv = self.call(dkv_kernel, mask, self.K, params, inputs, outputs)
        return dk[:, : self.S, :, : self.H], dv[:, : self.S, :, : self.H]

    def call(self, kernel, mask: BlockMask, heads: int, params, inputs, outputs):
        """Runs `kernel` for every row of `mask`, head and sequence. Its block lists, tables and params are whole to every program."""
        from jax.experimental.pallas import triton  # here, so that machines that never run it need not have it

        listed = (mask.full_start, mask.full_block), (mask.part_start, mask.part_block)
        blocks = tuple((start, block) if len(block) else None for start, block in listed)
        whole = blocks, [table_rows(table).reshape(-1) for table in tables_of(self.pattern)], params
        is_output = lambda x: isinstance(x, tuple) and isinstance(x[0], pl.BlockSpec)
        return pl.pallas_call(
            functools.partial(kernel, scoring=self.scoring, row=mask.longest_first),
            grid=(mask.num_q, heads, self.B),
            in_specs=[*jax.tree.map(lambda _: pl.BlockSpec(), whole), *(None if x is None else spec for x, spec in inputs)],
            out_specs=jax.tree.map(lambda x: x[0], outputs, is_leaf=is_output),
            out_shape=jax.tree.map(lambda x: x[1], outputs, is_leaf=is_output),
            compiler_params=triton.CompilerParams(num_warps=self.tile.num_warps, num_stages=self.tile.num_stages),
            interpret=self.scoring.interpret,
            name=kernel.__name__,
        )(*whole, *(x for x, _ in inputs))

    def _own_queries(self):
        """A program's block of queries, and of numbers a query."""
        row = self.mask.longest_first
        own = pl.BlockSpec((None, self.tile.q_block, None, self.wide), lambda p, n, b: (b, row(p), n, 0))
        return own, pl.BlockSpec((None, None, self.tile.q_block), lambda p, n, b: (b, n, row(p)))

    def _all_keys(self, k, v, valid):
        """Keys, values and validity with what a program of one query head gets of them: all that its key head has."""
        head = pl.BlockSpec((None, self.columns, None, self.wide), lambda p, n, b: (b, 0, n // (self.N // self.K), 0))
        return (self._keys(k), head), (self._keys(v), head), (self._valid(valid), pl.BlockSpec((None, self.columns), lambda p, n, b: (b, 0)))

    def _queries(self, x):
        return pad(x, {1: self.rows, 3: self.wide})

    def _keys(self, x):
        return pad(x, {1: self.columns, 3: self.wide})

    def _valid(self, x):
        return None if x is None else pad(x, {1: self.columns})

    def _of_rows(self, lse, delta):
        return pad(lse, {2: self.rows}, NEVER), pad(delta, {2: self.rows})

    def _shape(self, length, heads, dtype):
        return jax.ShapeDtypeStruct((self.B, length, heads, self.wide), dtype)

    def _row_shape(self):
        return jax.ShapeDtypeStruct((self.B, self.N, self.rows), jnp.float32)


_SCORES = jax.ShapeDtypeStruct((LEAST, LEAST), jnp.float32)
_INDICES = jax.ShapeDtypeStruct((LEAST, 1), jnp.int32), jax.ShapeDtypeStruct((1, LEAST), jnp.int32)


# What the kernels' compiler knows, of what an elementwise function traces to.
_ELEMENTWISE = frozenset(
    """abs add add_any and broadcast_in_dim ceil clamp closed_call convert_element_type cos custom_jvp_call div eq exp exp2 expm1 floor ge gt
    integer_pow iota is_finite jit log log1p logistic le lt max min mul ne neg not one_minus_square or pjit pow rem reshape rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sign sin sqrt square squeeze stop_gradient sub tanh xor""".split()
)


@functools.lru_cache(maxsize=256)
def mask_obstacle(pattern: Pattern) -> str | None:
    """What keeps a pattern's mask, its tables aside, out of a kernel; None if it is an elementwise function of indices."""
    return _obstacle(replace_tables(pattern, lambda table: FULL).mask, *_INDICES)


def _with_gradient(fn):
    def both(scores, i, j, params):
        modified, pull = jax.vjp(lambda scores, params: fn(scores, i, j, params), scores, params)
        return modified, pull(modified)

    return both


def _obstacle(f, *args) -> str | None:
    """What keeps `f` out of a kernel: an array that it closes over, or an operation that is not elementwise."""
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):  # under a caller's mesh JAX would add to gradients where they should lie
        traced = jax.make_jaxpr(f)(*args)
    equations = list(_equations(traced.jaxpr))
    if traced.consts or any(isinstance(x, Literal) and np.ndim(x.val) for equation in equations for x in equation.invars):
        return "reads an array that it closes over"
    unknown = {equation.primitive.name for equation in equations} - _ELEMENTWISE
    return f"uses {', '.join(sorted(unknown))}" if unknown else None


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)
