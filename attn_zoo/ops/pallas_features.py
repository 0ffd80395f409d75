"""The random features of performer and of rfa as Pallas kernels, for NVIDIA GPUs: vectors are read once, in their own dtype, and features are written once.

One program has some positions of one head and multiplies them by all directions, on the matrix units; what becomes of the products (maxima, exponentials, sines)
stays in registers. Backwards the same is computed again from the vectors, which takes less memory traffic than to read the features where there are more of them
than channels, and nothing is kept but the inputs (sines of many directions and channels need an array of the vectors' size for each tile of directions). Compiled by Pallas' Triton backend, like the scans of pallas_linear, whose factors the features are.

bfloat16 vectors are exact factors. Directions are float32, and so are taken apart into two bfloat16 numbers each, which leaves 2^-18 of them: an error of at most
2^-17 sum_h |w_h x_h| in a product. All else is float32, and the features are rounded to bfloat16 in the end, as the products of the scan want them: 2^-9 of each.
Of float32 and float16 vectors all is float32, products as in precision_of_float32.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from attn_zoo.ops import pallas_linear
from attn_zoo.ops.angles import sine_and_cosine
from attn_zoo.ops.pallas_kernels import precision_of_float32
from attn_zoo.ops.pallas_linear_kernels import factor_of, over_tiles, zeros
from attn_zoo.ops.tuning import LEAST, fit, power_of_two

# What a program multiplies at once, by the size of a factor: (positions, positions x directions, directions x channels), which registers and shared memory hold;
# warps, and stages of its loads. They compile with next to no spills (tests/ahead); none has been timed on a GPU.
FORWARD = {2: (128, 16384, 16384), 4: (64, 4096, 4096)}
GRADIENT = {2: (128, 16384, 8192), 4: (32, 2048, 2048)}
SINES_GRADIENT = {2: (64, 8192, 8192), 4: (16, 1024, 2048)}
MOST = 128  # channels of which registers hold what the kernels need; the features of wider heads are left to XLA
NUM_WARPS, NUM_STAGES = 8, 1
BLOCKS = 8  # blocks of positions of a program that adds up the gradient of its directions, of which each program writes one
TINY = 1e-6  # of a squared length: smooth at zero, where invalid keys are


def positive_features(
    x_BTNH: Float[Array, "B T N H"], w_RH: Float[Array, "R H"], valid_BT: Bool[Array, "B T"] | None = None, *, largest: float | None = None, wide: bool = False
) -> Float[Array, "B T N R"]:
    """exp(w'x - |x|^2 / 2 - c) of x scaled by H^-1/4: with `largest` for keys, c = 0 and no exponent is larger; without for queries, c is a position's largest exponent.

    bfloat16 if x is, and not `wide`, else float32; zeros where not valid. Constants to the gradient: the directions, and c. Of bfloat16 x an exponent is within
    2^-17 H^-1/4 sum_h |w_h x_h| + 2^-22 |x|^2 / sqrt(H) of the exact one. Choromanski et al. 2021, lemma 1.
    """
    H = x_BTNH.shape[-1]
    return _positive(largest, wide, x_BTNH, lax.stop_gradient(w_RH)[None] * H**-0.25, valid_BT)


def sine_features(
    x_BTNH: Float[Array, "B T N H"], w_KRH: Float[Array, "K R H"], valid_BT: Bool[Array, "B T"] | None = None, *, wide: bool = False
) -> Float[Array, "B T N R2"]:
    """sqrt(1/R) [sin(w'x), cos(w'x)] of x over its length, with the directions of each of K heads, shared by N / K heads of x in a row.

    bfloat16 if x is, and not `wide`, else float32; zeros where not valid. Differentiable in x and in w. Of bfloat16 x an angle is within
    2^-17 sum_h |w_h x_h| / |x| of the exact one. Peng et al. 2021, sec. 2.2 and 3.1.
    """
    return _sines(wide, x_BTNH, w_KRH, valid_BT).reshape(*x_BTNH.shape[:3], -1)


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

    @classmethod
    def of(cls, x_BTNH, w, sizes) -> "Form":
        (B, T, _, H), R = x_BTNH.shape, w.shape[-2]
        rows, products, directions = sizes[jnp.dtype(factor_of(x_BTNH.dtype)).itemsize]
        tile = fit(directions // power_of_two(H), R)
        return cls(B * T, R, H, fit(min(rows, products // tile), B * T), tile, jnp.dtype(x_BTNH.dtype), pallas_linear.INTERPRET)

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
        axes = ((a_axis,), (b_axis,)), ((), ())
        return lax.dot_general(a.astype(self.factor), b.astype(self.factor), axes, precision=precision, preferred_element_type=jnp.float32)

    def products(self, x, w_ref):
        """tile -> [rows, tile] products of x with the directions of a tile; those of the only one are computed once."""
        product = lambda tile: sum(self.dot(x, w_ref[part, tile, :], 1, 1) for part in range(w_ref.shape[0]))
        if self.tiles > 1:
            return product
        only = product(pl.ds(0, self.tile))
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
    x = _read(x_ref.at[...], seen, form.columns(0, form.channels, form.H))
    products = form.products(x, w_ref)
    shift = _shift(products, x, form, largest)

    def write(tile, _):
        phi = jnp.exp(_at_most(products(tile) - shift[:, None], largest))
        _write(phi_ref.at[:, tile], _only(phi, seen), inside, form.columns(tile.start, form.tile, form.R))

    over_tiles(form.tiles * form.tile, form.tile, write, None)


def positive_gradient_kernel(x_ref, w_ref, valid_ref, dphi_ref, dx_ref, *, form: Form, largest: float | None):
    """dx [c, H] of one block of vectors, from the gradient of their features, [c, R]: dx = W'dE - x sum_r dE_r, with dE = phi dphi, and x scaled."""
    inside, seen = _rows(valid_ref, form, pl.program_id(1))
    channels = form.columns(0, form.channels, form.H)
    x = _read(x_ref.at[...], seen, channels)
    products = form.products(x, w_ref)
    shift = _shift(products, x, form, largest)

    def add(tile, carry):
        dx, total = carry
        dphi = _read(dphi_ref.at[:, tile], seen, form.columns(tile.start, form.tile, form.R)).astype(jnp.float32)
        E = products(tile) - shift[:, None]
        dE = jnp.exp(jnp.minimum(E, 0.0 if largest is None else largest)) * dphi  # a query's are at most 0, but for directions that are padding
        if largest is not None:
            dE = jnp.where(E < largest, dE, 0.0)
        return dx + form.dot(dE, w_ref[0, tile, :], 1, 0), total + jnp.sum(dE, axis=1)

    dx, total = over_tiles(form.tiles * form.tile, form.tile, add, (zeros(*x.shape), zeros(form.rows)))
    dx -= x.astype(jnp.float32) * (total * form.H**-0.5)[:, None]
    _write(dx_ref.at[...], dx, inside, channels)


def sines_kernel(x_ref, w_ref, valid_ref, phi_ref, *, form: Form):
    """The sines and the cosines, [c, 2, R], of one block of vectors [c, H]."""
    inside, seen = _rows(valid_ref, form, pl.program_id(1))
    x = _read(x_ref.at[...], seen, form.columns(0, form.channels, form.H))
    unit, scale, _ = _over_length(x, form)
    products = form.products(unit, w_ref)

    def write(tile, _):
        for n, phi in enumerate(sine_and_cosine(products(tile) * scale)):
            _write(phi_ref.at[:, jnp.int32(n), tile], _only(phi * form.R**-0.5, seen), inside, form.columns(tile.start, form.tile, form.R))

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
        x = _read(x_ref.at[rows, :], seen, channels)
        unit, scale, inverse = _over_length(x, form)
        sin, cos = sine_and_cosine(sum(form.dot(unit, w_ref[part], 1, 1) for part in range(w_ref.shape[0])) * scale)
        dsin, dcos = (_read(dphi_ref.at[rows, jnp.int32(part), :], seen, features).astype(jnp.float32) for part in (0, 1))
        dproducts = (dsin * cos - dcos * sin) * (inverse * form.R**-0.5)[:, None]
        y, x_ = form.dot(dproducts, w_ref[0], 1, 0), x.astype(jnp.float32)
        dx = y - x_ * (jnp.sum(x_ * y, axis=1) * inverse * inverse)[:, None]
        _write(dx_ref.at[rows, :], dx, inside, channels)
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
    return inside, inside if valid_ref is None else _read(valid_ref, inside) != 0


def _read(ref, rows, columns=None):
    """Zero outside of these rows and columns, whose memory is not touched."""
    from jax.experimental.pallas import triton  # here, so that machines that never run it need not have it

    mask = _mask(rows, columns, len(ref.shape))
    return triton.load(ref) if mask is None else triton.load(ref, mask=jnp.broadcast_to(mask, ref.shape), other=jnp.zeros(ref.shape, ref.dtype))


def _write(ref, x, rows, columns):
    """Of these rows and columns only."""
    from jax.experimental.pallas import triton

    mask = _mask(rows, columns, len(ref.shape))
    triton.store(ref, x.astype(ref.dtype), mask=None if mask is None else jnp.broadcast_to(mask, ref.shape))


def _mask(rows, columns, axes: int):
    rows = rows[:, None] if axes == 2 and rows is not None else rows
    return rows if columns is None else columns[None, :] if rows is None else rows & columns[None, :]


def _only(x, rows):
    return x if rows is None else jnp.where(rows[:, None], x, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _positive(largest: float | None, wide: bool, x_BTNH, w_KRH, valid_BT):
    form = Form.of(x_BTNH, w_KRH, FORWARD)
    [phi] = _call(form, positive_kernel, (x_BTNH, w_KRH, valid_BT), [("features", jnp.float32 if wide else form.factor)], largest=largest)
    return phi.reshape(*x_BTNH.shape[:3], form.R)


def _positive_fwd(largest, wide, *inputs):
    return _positive(largest, wide, *inputs), inputs


def _positive_bwd(largest, wide, inputs, dphi_BTNR):
    form = Form.of(*inputs[:2], GRADIENT)
    [dx] = _call(form, positive_gradient_kernel, inputs, [("vectors", form.dtype)], given=("features", dphi_BTNR), largest=largest)
    return dx.reshape(inputs[0].shape), None, None


_positive.defvjp(_positive_fwd, _positive_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sines(wide: bool, x_BTNH, w_KRH, valid_BT):
    """[B, T, N, 2, R]."""
    form = Form.of(x_BTNH, w_KRH, FORWARD)
    [phi] = _call(form, sines_kernel, (x_BTNH, w_KRH, valid_BT), [("pairs", jnp.float32 if wide else form.factor)])
    return phi.reshape(*x_BTNH.shape[:3], 2, form.R)


def _sines_fwd(wide, *inputs):
    return _sines(wide, *inputs), inputs


def _sines_bwd(wide, inputs, dphi_BTN2R):
    x_BTNH, w_KRH, _ = inputs
    form = Form.of(x_BTNH, w_KRH, SINES_GRADIENT)
    outputs = [("shares", form.dtype if form.tiles == 1 else jnp.float32), ("directions", jnp.float32)]
    dx, dw = _call(form, sines_gradient_kernel, inputs, outputs, given=("pairs", dphi_BTN2R), blocks=min(BLOCKS, form.blocks), spread=True)
    dw_KHR = dw[:, :, : form.H, : form.R].reshape(len(dw), len(w_KRH), -1, form.H, form.R).sum(axis=(0, 2))
    return dx.sum(axis=0).astype(x_BTNH.dtype).reshape(x_BTNH.shape), dw_KHR.swapaxes(1, 2).astype(w_KRH.dtype), None


_sines.defvjp(_sines_fwd, _sines_bwd)


def _call(form: Form, kernel, inputs, outputs, *, given=None, blocks: int = 1, spread: bool = False, **static):
    """Runs `kernel`, a program of which has `blocks` blocks of positions of one head, and all directions, or with `spread` one tile of them.

    Outputs are (name, dtype), `given` is (name, array), by the names of what is below.
    """
    from jax.experimental.pallas import triton

    x_BTNH, w_KRH, valid_BT = inputs
    N, M, rows = x_BTNH.shape[2], form.positions, blocks * form.rows
    group, programs, whole = N // len(w_KRH), -(-form.blocks // blocks), form.tiles * form.tile
    width = form.tile if spread else whole
    # Name: (shape, the part of one program, which part that is). A share is what one tile of directions adds to the vectors.
    places = {
        "vectors": ((M, N, form.H), (rows, None, form.channels), lambda n, i, r: (i, n, 0)),
        "shares": ((form.tiles, M, N, form.H), (None, rows, None, form.channels), lambda n, i, r: (r, i, n, 0)),
        "features": ((M, N, form.R), (rows, None, width), lambda n, i, r: (i, n, r)),
        "pairs": ((M, N, 2, form.R), (rows, None, 2, width), lambda n, i, r: (i, n, 0, r)),
        "directions": ((programs, N, form.channels, whole), (None, None, form.channels, width), lambda n, i, r: (i, n, 0, r)),
        "valid": ((M,), (rows,), lambda n, i, r: (i,)),
    }
    w = _parts(jnp.pad(w_KRH, ((0, 0), (0, whole - form.R), (0, form.channels - form.H))), form)
    arrays = [("vectors", x_BTNH), ("valid", None if valid_BT is None else valid_BT.astype(jnp.int8))] + ([] if given is None else [given])
    arrays = [(None if x is None else x.reshape(places[name][0]), None if x is None else pl.BlockSpec(*places[name][1:])) for name, x in arrays]
    arrays.insert(1, (w, pl.BlockSpec((len(w), None, width, form.channels), lambda n, i, r: (0, n // group, r, 0))))
    return pl.pallas_call(
        functools.partial(kernel, form=form, **static),
        grid=(N, programs, form.tiles if spread else 1),
        in_specs=[spec for _, spec in arrays],
        out_specs=tuple(pl.BlockSpec(*places[name][1:]) for name, _ in outputs),
        out_shape=tuple(jax.ShapeDtypeStruct(places[name][0], dtype) for name, dtype in outputs),
        compiler_params=triton.CompilerParams(num_warps=NUM_WARPS, num_stages=NUM_STAGES),
        interpret=form.interpret,
        name=kernel.__name__,
    )(*(x for x, _ in arrays))


def _parts(w, form: Form):
    """[parts, ...]: numbers that add up to w, factors of products."""
    if form.factor == jnp.float32:
        return w[None].astype(jnp.float32)
    first = lax.reduce_precision(w, exponent_bits=8, mantissa_bits=7)  # of a cast to bfloat16 and back XLA may make nothing
    return jnp.stack([first, w - first]).astype(form.factor)
