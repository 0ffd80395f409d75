"""The random features of performer and of rfa as Pallas kernels, for NVIDIA GPUs: vectors are read once, in their own dtype, and features are written once.

One program has some positions of one head and multiplies them by all directions, on the matrix units; what becomes of the products (maxima, exponentials, sines)
stays in registers. Backwards the same is computed again from the vectors, which takes less memory traffic than to read the features where there are more of them
than channels, and nothing is kept but the inputs (sines of many directions and channels need an array of the vectors' size for each tile of directions meanwhile).
Compiled by Pallas' Triton backend, like the scans of pallas_linear, whose factors the features are. See pallas_feature_kernels.

bfloat16 vectors are exact factors. Directions are float32, and so are taken apart into two bfloat16 numbers each, which leaves 2^-18 of them: an error of at most
2^-17 sum_h |w_h x_h| in a product. All else is float32, and the features are rounded to bfloat16 in the end, as the products of the scan want them: 2^-9 of each.
Of float32 and float16 vectors all is float32, products as in precision_of_float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from attn_zoo.ops import pallas_kernels
from attn_zoo.ops.pallas_feature_kernels import Form, positive_gradient_kernel, positive_kernel, sines_gradient_kernel, sines_kernel
from attn_zoo.ops.tuning import FeatureTile, feature_tile, fit

MOST = 128  # channels of which registers hold what the kernels need; the features of wider heads are left to XLA
BLOCKS = 8  # blocks of positions of a program that adds up the gradient of its directions, of which each program writes one


def serves(H: int) -> bool:
    """Whether registers hold what the kernels need of vectors of this size."""
    return H <= MOST


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


class Run:
    """The kernels of these vectors [B, T, N, H], directions [K, R, H], and validity [B, T] or None, in tiles of one size."""

    def __init__(self, tile: FeatureTile, x_BTNH, w_KRH, valid_BT=None):
        self.tile, self.inputs = tile, (x_BTNH, w_KRH, valid_BT)
        (B, T, _, H), R = x_BTNH.shape, w_KRH.shape[-2]
        self.form = Form(B * T, R, H, fit(tile.positions, B * T), fit(tile.directions, R), jnp.dtype(x_BTNH.dtype), pallas_kernels.INTERPRET)

    @classmethod
    def tuned(cls, kernel: str, x_BTNH, w_KRH, valid_BT) -> "Run":
        """In the tiles of one of FEATURES."""
        return cls(feature_tile(kernel, x_BTNH.dtype, x_BTNH.shape[-1]), x_BTNH, w_KRH, valid_BT)

    def positive(self, largest: float | None = None, wide: bool = False):
        """[B, T, N, R]; see `positive_features`."""
        [phi] = self._call(positive_kernel, [("features", jnp.float32 if wide else self.form.factor)], largest=largest)
        return phi.reshape(*self.inputs[0].shape[:3], self.form.R)

    def positive_gradient(self, dphi_BTNR, largest: float | None = None):
        """[B, T, N, H], of vectors."""
        [dx] = self._call(positive_gradient_kernel, [("vectors", self.form.dtype)], given=("features", dphi_BTNR), largest=largest)
        return dx.reshape(self.inputs[0].shape)

    def sines(self, wide: bool = False):
        """[B, T, N, 2, R]; see `sine_features`."""
        [phi] = self._call(sines_kernel, [("pairs", jnp.float32 if wide else self.form.factor)])
        return phi.reshape(*self.inputs[0].shape[:3], 2, self.form.R)

    def sines_gradient(self, dphi_BTN2R):
        """(of vectors [B, T, N, H], of directions [K, R, H])."""
        form, (x_BTNH, w_KRH, _) = self.form, self.inputs
        outputs = [("shares", form.dtype if form.tiles == 1 else jnp.float32), ("directions", jnp.float32)]
        dx, dw = self._call(sines_gradient_kernel, outputs, given=("pairs", dphi_BTN2R), blocks=min(BLOCKS, form.blocks), spread=True)
        dw_KHR = dw[:, :, : form.H, : form.R].reshape(len(dw), len(w_KRH), -1, form.H, form.R).sum(axis=(0, 2))
        return dx.sum(axis=0).astype(x_BTNH.dtype).reshape(x_BTNH.shape), dw_KHR.swapaxes(1, 2).astype(w_KRH.dtype)

    def _call(self, kernel, outputs, *, given=None, blocks: int = 1, spread: bool = False, **static):
        """Runs `kernel`, a program of which has `blocks` blocks of positions of one head, and all directions, or with `spread` one tile of them.

        Outputs are (name, dtype), `given` is (name, array), by the names of what is below.
        """
        from jax.experimental.pallas import triton

        form, (x_BTNH, w_KRH, valid_BT) = self.form, self.inputs
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
            compiler_params=triton.CompilerParams(num_warps=self.tile.num_warps, num_stages=self.tile.num_stages),
            interpret=form.interpret,
            name=kernel.__name__,
        )(*(x for x, _ in arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _positive(largest: float | None, wide: bool, *inputs):
    return Run.tuned("random", *inputs).positive(largest, wide)


def _positive_fwd(largest, wide, *inputs):
    return _positive(largest, wide, *inputs), inputs


def _positive_bwd(largest, wide, inputs, dphi_BTNR):
    return Run.tuned("positive_gradient", *inputs).positive_gradient(dphi_BTNR, largest), None, None


_positive.defvjp(_positive_fwd, _positive_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sines(wide: bool, *inputs):
    return Run.tuned("random", *inputs).sines(wide)


def _sines_fwd(wide, *inputs):
    return _sines(wide, *inputs), inputs


def _sines_bwd(wide, inputs, dphi_BTN2R):
    return *Run.tuned("sines_gradient", *inputs).sines_gradient(dphi_BTN2R), None


_sines.defvjp(_sines_fwd, _sines_bwd)


def _parts(w, form: Form):
    """[parts, ...]: numbers that add up to w, factors of products."""
    if form.factor == jnp.float32:
        return w[None].astype(jnp.float32)
    first = lax.reduce_precision(w, exponent_bits=8, mantissa_bits=7)  # of a cast to bfloat16 and back XLA may make nothing
    return jnp.stack([first, w - first]).astype(form.factor)
