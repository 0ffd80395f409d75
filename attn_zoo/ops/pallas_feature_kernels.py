"""The bodies of the Pallas kernels of random features: what one program does with some positions of one head. See pallas_features.

Arrays are not padded: what lies outside of them, in positions, directions or channels, is masked where it is read and written. In registers it is zero.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from attn_zoo.ops.angles import sine_and_cosine
from attn_zoo.ops.pallas_kernels import precision_of_float32, product
from attn_zoo.ops.pallas_linear_kernels import factor_of, over_tiles, zeros
from attn_zoo.ops.tuning import LEAST, power_of_two

TINY = 1e-6  # of a squared length: smooth at zero, where invalid keys are


@dataclasses.dataclass(frozen=True)
class Form:
    """What a kernel knows at compile time: all positions (of all sequences), directions and channels, its part of the first two, the dtype, who runs it."""

    positions: int
    R: int
    H: int
    rows: int
    tile: int
    dtype: Any
    interpret: bool

    @property
    def factor(self):
        return factor_of(self.dtype)

    @property
    def tiles(self) -> int:
        return -(-self.R // self.tile)

    @property
    def channels(self) -> int:
        """H, as the arrays in registers have it."""
        return max(LEAST, power_of_two(self.H))

    @property
    def blocks(self) -> int:
        return -(-self.positions // self.rows)

    def dot(self, a, b, a_axis: int, b_axis: int):
        """The product of two matrices over these axes, in float32."""
        precision = precision_of_float32(self.interpret) if self.factor == jnp.float32 else None
        return product(a.astype(self.factor), b.astype(self.factor), a_axis, b_axis, precision)

    def products(self, x, w_ref):
        """tile -> [rows, tile] products of x with the directions of a tile; those of the only one are computed once."""
        of_tile = lambda tile: sum(self.dot(x, w_ref[part, tile, :], 1, 1) for part in range(w_ref.shape[0]))
        if self.tiles > 1:
            return of_tile
        only = of_tile(pl.ds(0, self.tile))
        return lambda tile: only

    def inside(self, block):
        """Which rows of a block are positions, [rows]; None if all are."""
        return None if self.positions % self.rows == 0 else block * self.rows + lax.iota(jnp.int32, self.rows) < self.positions

    def columns(self, start, size: int, of: int):
        """Which columns from `start` on are some `of` these, [size]; None if all are."""
        return None if of % size == 0 else start + lax.iota(jnp.int32, size) < of


def positive_kernel(x_ref, w_ref, valid_ref, phi_ref, *, form: Form, largest: float | None):
    """The features [c, R] of one block of vectors [c, H]."""
    inside, seen = _rows(valid_ref, form, pl.program_id(1))
    x = masked_load(x_ref.at[...], seen, form.columns(0, form.channels, form.H))
    products = form.products(x, w_ref)
    shift = _shift(products, x, form, largest)

    def write(tile, _):
        phi = jnp.exp(_at_most(products(tile) - shift[:, None], largest))
        masked_store(phi_ref.at[:, tile], _only(phi, seen), inside, form.columns(tile.start, form.tile, form.R))

    over_tiles(form.tiles * form.tile, form.tile, write, None)


def positive_gradient_kernel(x_ref, w_ref, valid_ref, dphi_ref, dx_ref, *, form: Form, largest: float | None):
    """dx [c, H] of one block of vectors, from the gradient of their features, [c, R]: dx = W'dE - x sum_r dE_r, with dE = phi dphi, and x scaled."""
    inside, seen = _rows(valid_ref, form, pl.program_id(1))
    channels = form.columns(0, form.channels, form.H)
    x = masked_load(x_ref.at[...], seen, channels)
    products = form.products(x, w_ref)
    shift = _shift(products, x, form, largest)

    def add(tile, carry):
        dx, total = carry
        dphi = masked_load(dphi_ref.at[:, tile], seen, form.columns(tile.start, form.tile, form.R)).astype(jnp.float32)
        E = products(tile) - shift[:, None]
        dE = jnp.exp(jnp.minimum(E, 0.0 if largest is None else largest)) * dphi  # a query's are at most 0, but for directions that are padding
        if largest is not None:
            dE = jnp.where(E < largest, dE, 0.0)
        return dx + form.dot(dE, w_ref[0, tile, :], 1, 0), total + jnp.sum(dE, axis=1)

    dx, total = over_tiles(form.tiles * form.tile, form.tile, add, (zeros(*x.shape), zeros(form.rows)))
    dx -= x.astype(jnp.float32) * (total * form.H**-0.5)[:, None]
    masked_store(dx_ref.at[...], dx, inside, channels)


def sines_kernel(x_ref, w_ref, valid_ref, phi_ref, *, form: Form):
    """The sines and the cosines, [c, 2, R], of one block of vectors [c, H]."""
    inside, seen = _rows(valid_ref, form, pl.program_id(1))
    x = masked_load(x_ref.at[...], seen, form.columns(0, form.channels, form.H))
    unit, scale, _ = _over_length(x, form)
    products = form.products(unit, w_ref)

    def write(tile, _):
        for n, phi in enumerate(sine_and_cosine(products(tile) * scale)):
            masked_store(phi_ref.at[:, jnp.int32(n), tile], _only(phi * form.R**-0.5, seen), inside, form.columns(tile.start, form.tile, form.R))

    over_tiles(form.tiles * form.tile, form.tile, write, None)


def sines_gradient_kernel(x_ref, w_ref, valid_ref, dphi_ref, dx_ref, dw_ref, *, form: Form):
    """The part of one tile of directions in dx [n c, H], and of n blocks of vectors in its dw, [H, r], from the gradient of sines and cosines, [n c, 2, r].

    With l = |x|, a the angles W x / l, and y = W'da / l: dx = y - x (x'y) / l^2 and dw' = x da' / l. The products come first: fewer registers are full while they last.
    """
    channels, features = form.columns(0, form.channels, form.H), form.columns(pl.program_id(2) * form.tile, form.tile, form.R)
    count = x_ref.shape[0] // form.rows
    first = pl.program_id(1) * count

    def block(n, dw):
        rows = pl.ds(n * form.rows, form.rows)
        inside, seen = _rows(None if valid_ref is None else valid_ref.at[rows], form, first + n)
        x = masked_load(x_ref.at[rows, :], seen, channels)
        unit, scale, inverse = _over_length(x, form)
        sin, cos = sine_and_cosine(sum(form.dot(unit, w_ref[part], 1, 1) for part in range(w_ref.shape[0])) * scale)
        dsin, dcos = (masked_load(dphi_ref.at[rows, jnp.int32(part), :], seen, features).astype(jnp.float32) for part in (0, 1))
        dproducts = (dsin * cos - dcos * sin) * (inverse * form.R**-0.5)[:, None]
        y, x_ = form.dot(dproducts, w_ref[0], 1, 0), x.astype(jnp.float32)
        dx = y - x_ * (jnp.sum(x_ * y, axis=1) * inverse * inverse)[:, None]
        masked_store(dx_ref.at[rows, :], dx, inside, channels)
        return dw + form.dot(x, dproducts, 0, 0)

    left = jnp.minimum(count, form.blocks - first)  # beyond the last block is the memory of others
    dw_ref[...] = lax.fori_loop(0, left, block, zeros(form.channels, form.tile))


def _shift(products, x, form: Form, largest: float | None):
    """What all exponents of a vector are less by than its products, [rows]."""
    if largest is not None:
        return 0.5 * form.H**-0.5 * _square(x)

    def top(tile, most):
        real = form.columns(tile.start, form.tile, form.R)
        return jnp.maximum(most, jnp.max(products(tile) if real is None else jnp.where(real[None, :], products(tile), -jnp.inf), axis=1))

    return over_tiles(form.tiles * form.tile, form.tile, top, jnp.full((form.rows,), -jnp.inf, jnp.float32))


def _at_most(E, largest: float | None):
    return E if largest is None else jnp.minimum(E, largest)


def _square(x):
    x = x.astype(jnp.float32)
    return jnp.sum(x * x, axis=1)


def _over_length(x, form: Form):
    """(u, s, 1 / |x|) with u s = x / |x|: bfloat16 is left to be an exact factor of products, float32 is divided before them, as XLA's features are."""
    inverse = lax.rsqrt(_square(x) + TINY)
    return (x, inverse[:, None], inverse) if form.factor == jnp.bfloat16 else (x.astype(jnp.float32) * inverse[:, None], 1.0, inverse)


def _rows(valid_ref, form: Form, block):
    """(which rows are positions, which are valid ones): [rows], or None if all are."""
    inside = form.inside(block)
    return inside, inside if valid_ref is None else masked_load(valid_ref, inside) != 0


def masked_load(ref, rows, columns=None):
    """Zero outside of these rows and columns, whose memory is not touched."""
    from jax.experimental.pallas import triton  # here, so that machines that never run it need not have it

    mask = _mask(rows, columns, len(ref.shape))
    return triton.load(ref) if mask is None else triton.load(ref, mask=jnp.broadcast_to(mask, ref.shape), other=jnp.zeros(ref.shape, ref.dtype))


def masked_store(ref, x, rows, columns):
    """Of these rows and columns only."""
    from jax.experimental.pallas import triton

    mask = _mask(rows, columns, len(ref.shape))
    triton.store(ref, x.astype(ref.dtype), mask=None if mask is None else jnp.broadcast_to(mask, ref.shape))


def _mask(rows, columns, axes: int):
    rows = rows[:, None] if axes == 2 and rows is not None else rows
    return rows if columns is None else columns[None, :] if rows is None else rows & columns[None, :]


def _only(x, rows):
    return x if rows is None else jnp.where(rows[:, None], x, 0.0)
