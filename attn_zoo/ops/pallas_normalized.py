"""Features over their sum as Pallas kernels, for NVIDIA GPUs: those of the delta rule, elu + 1 or DPFP (see attention.linear), from vectors that are read once.

DPFP multiplies r = relu([x, -x]) by itself, turned by one place (Schlag et al. 2021, sec. 5.3, nu = 1). With f the features, t their sum and d the gradient of f / t,
that of f is (d - sum d f / t) / t, and r_i gets (that of r_i r_{i-1}) r_{i-1} + (that of r_{i+1} r_i) r_{i+1}. All is computed in float32, and again backwards;
nothing is kept but the vectors.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from attn_zoo.ops import pallas_kernels
from attn_zoo.ops.pallas_feature_kernels import masked_load, masked_store
from attn_zoo.ops.pallas_kernels import precision_of_float32, product
from attn_zoo.ops.pallas_linear_kernels import factor_of
from attn_zoo.ops.tuning import LEAST, FeatureTile, feature_tile, fit, power_of_two


def serves(dtype, H: int, dpfp: bool) -> bool:
    """Whether registers hold what the kernels need: in float32 they do not hold the three products that turn a vector."""
    return H <= 128 and (not dpfp or jnp.dtype(dtype) == jnp.bfloat16)


def normalized_features(x_BTNH: Float[Array, "B T N H"], *, dpfp: bool) -> Float[Array, "B T N R"]:
    """phi(x) over the sum of its features, or zeros where that is zero: DPFP with nu = 1, R = 2 H, or elu + 1, R = H. bfloat16 if x is, else float32."""
    return _normalized(dpfp, x_BTNH)


@dataclasses.dataclass(frozen=True)
class Form:
    """What a kernel knows at compile time: all positions (of all sequences), channels, which features, the positions of a program, the dtype, who runs it."""

    positions: int
    H: int
    dpfp: bool
    rows: int
    dtype: Any
    interpret: bool

    @property
    def channels(self) -> int:
        """H, as the arrays in registers have it."""
        return max(LEAST, power_of_two(self.H))

    @property
    def parts(self) -> int:
        """Of features, H each."""
        return 2 if self.dpfp else 1

    def inside(self):
        """Which rows are positions and which columns are channels; None if all are."""
        rows = pl.program_id(1) * self.rows + lax.iota(jnp.int32, self.rows) < self.positions
        columns = lax.iota(jnp.int32, self.channels) < self.H
        return None if self.positions % self.rows == 0 else rows, None if self.channels == self.H else columns


def features_kernel(x_ref, phi_ref, *, form: Form):
    """The features [c, parts, H] of vectors [c, H]."""
    inside = form.inside()
    features, inverse = _features(masked_load(x_ref.at[...], *inside), form, inside)
    for part, f in enumerate(features):
        masked_store(phi_ref.at[:, jnp.int32(part), :], f * inverse[:, None], *inside)


def features_gradient_kernel(x_ref, dphi_ref, dx_ref, *, form: Form):
    """dx [c, H], of vectors [c, H] and the gradient of their features, [c, parts, H]."""
    inside = form.inside()
    x, dphi = masked_load(x_ref.at[...], *inside), [masked_load(dphi_ref.at[:, jnp.int32(part), :], *inside) for part in range(form.parts)]
    features, inverse = _features(x, form, inside)
    mean = inverse * sum(jnp.sum(d.astype(jnp.float32) * f, axis=1) for d, f in zip(dphi, features))
    df = lambda dphi: (dphi.astype(jnp.float32) - mean[:, None]) * inverse[:, None]
    if form.dpfp:
        before, after, df_after = _neighbours(x, -1, form), _neighbours(x, 1, form), _across([_turned(d, 1, form) for d in dphi], 1, form)
        dr = [df(dphi[half]) * before[half] + df(df_after[half]) * after[half] for half in (0, 1)]
        dx = jnp.where(x > 0, dr[0], 0.0) - jnp.where(x < 0, dr[1], 0.0)
    else:
        dx = df(dphi[0]) * jnp.where(x > 0, 1.0, jnp.exp(jnp.minimum(x.astype(jnp.float32), 0.0)))
    masked_store(dx_ref.at[...], dx, *inside)


def _features(x, form: Form, inside):
    """(parts of the features, [c, H] each, zeros outside; 1 / their sum, or 1 where that is zero, [c])."""
    x32 = x.astype(jnp.float32)
    if form.dpfp:
        features = [r * before for r, before in zip((jnp.maximum(x32, 0.0), jnp.maximum(-x32, 0.0)), _neighbours(x, -1, form))]
    else:
        phi = jnp.where(x32 > 0, x32 + 1, jnp.exp(jnp.minimum(x32, 0.0)))
        features = [phi if inside[1] is None else jnp.where(inside[1][None, :], phi, 0.0)]
    total = sum(jnp.sum(f, axis=1) for f in features)
    return features, 1 / jnp.where(total == 0, 1.0, total)


def _neighbours(x, step: int, form: Form):
    """r_{i + step}, step 1 or -1, of either half of r = relu([x, -x]), in a circle of 2 H, [c, H] each."""
    turned = _turned(x, step, form)
    return _across([jnp.maximum(turned, 0.0), jnp.maximum(-turned, 0.0)], step, form)


def _across(halves, step: int, form: Form):
    """Two halves that have been turned each by itself, as if they were one circle: what comes round the end of one is the other's."""
    end = lax.broadcasted_iota(jnp.int32, (1, form.channels), 1) == (form.H - 1 if step > 0 else 0)
    return [jnp.where(end, halves[1 - half], halves[half]) for half in (0, 1)]


def _turned(x, step: int, form: Form):
    """x_{j + step}, in a circle of H, [c, channels], float32: a product with zeros and ones, exact, as registers have no other way to a neighbour."""
    k, j = (lax.broadcasted_iota(jnp.int32, (form.channels, form.channels), axis) for axis in (0, 1))
    turn = ((k == (j + step % form.H) % form.H) & (j < form.H)).astype(factor_of(form.dtype))
    precision = precision_of_float32(form.interpret) if turn.dtype == jnp.float32 else None
    return product(x.astype(turn.dtype), turn, 1, 0, precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalized(dpfp: bool, x_BTNH):
    return features(feature_tile("normalized", x_BTNH.dtype, x_BTNH.shape[-1]), dpfp, x_BTNH)


def _normalized_fwd(dpfp, x_BTNH):
    return _normalized(dpfp, x_BTNH), x_BTNH


def _normalized_bwd(dpfp, x_BTNH, dphi_BTNR):
    return (features_gradient(feature_tile("normalized_gradient", x_BTNH.dtype, x_BTNH.shape[-1]), dpfp, x_BTNH, dphi_BTNR),)


_normalized.defvjp(_normalized_fwd, _normalized_bwd)


def features(tile: FeatureTile, dpfp: bool, x_BTNH):
    """[B, T, N, R], in tiles of this size."""
    form = _form(tile, dpfp, x_BTNH)
    return _call(tile, form, features_kernel, [x_BTNH], (form.parts, factor_of(form.dtype))).reshape(*x_BTNH.shape[:3], -1)


def features_gradient(tile: FeatureTile, dpfp: bool, x_BTNH, dphi_BTNR):
    """[B, T, N, H], of vectors."""
    form = _form(tile, dpfp, x_BTNH)
    return _call(tile, form, features_gradient_kernel, [x_BTNH, dphi_BTNR], (None, form.dtype)).reshape(x_BTNH.shape)


def _form(tile: FeatureTile, dpfp: bool, x_BTNH) -> Form:
    B, T, _, H = x_BTNH.shape
    return Form(B * T, H, dpfp, fit(tile.positions, B * T), jnp.dtype(x_BTNH.dtype), pallas_kernels.INTERPRET)


def _call(tile: FeatureTile, form: Form, kernel, arrays, output):
    """Runs `kernel` for all positions and heads; the output has (parts or None, dtype)."""
    from jax.experimental.pallas import triton  # here, so that machines that never run it need not have it

    N = arrays[0].shape[2]

    def place(parts):
        shape, block = ((form.positions, N, form.H), (form.rows, None, form.channels)) if parts is None else ((form.positions, N, parts, form.H), (form.rows, None, parts, form.channels))
        return shape, pl.BlockSpec(block, lambda n, i: (i, n, 0) if parts is None else (i, n, 0, 0))

    inputs = [(x, *place(parts)) for x, parts in zip(arrays, (None, form.parts))]
    shape, spec = place(output[0])
    return pl.pallas_call(
        functools.partial(kernel, form=form),
        grid=(N, -(-form.positions // form.rows)),
        in_specs=[spec for _, _, spec in inputs],
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct(shape, output[1]),
        compiler_params=triton.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=form.interpret,
        name=kernel.__name__,
    )(*(x.reshape(shape) for x, shape, _ in inputs))
