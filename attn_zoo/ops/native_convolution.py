"""A convolution along the sequence in C++, for CPUs: one filter a head. See ops.convolution, ops.native."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attn_zoo.ops import native
from attn_zoo.ops.native import whole

BLOCK = 64  # positions of a chunk


def native_convolve(v_BSKH: Float[Array, "B S K H"], taps_NW: Float[Array, "N W"]) -> Float[Array, "B S N H"]:
    """As `convolve`, in float32. Working memory is W + 64 positions of a head for each core. Raises Unsupported, with the reason, for what native.serves refuses."""
    native.check(jnp.result_type(v_BSKH, taps_NW))
    return _convolve(whole(v_BSKH, 3), taps_NW.astype(jnp.float32))[..., : v_BSKH.shape[3]]


def _chunks(v):
    return -(-v.shape[1] // BLOCK)


def _call(name, shapes, v, taps, *more):
    return native.call(f"convolution_{name}", shapes, (v, taps, *more), tasks=v.shape[0] * _chunks(v), room=(taps.shape[1], v.shape[3]))


@jax.custom_vjp
def _convolve(v, taps):
    """Of float32 arrays with whole vectors of channels."""
    (B, S, _, H), N = v.shape, len(taps)
    return _call("forward", [(B, S, N, H)], v, taps)[0]


def _convolve_fwd(v, taps):
    return _convolve(v, taps), (v, taps)


def _convolve_bwd(residuals, cotangent):
    v, taps = residuals
    dv, d_taps = _call("backward", (v.shape, (len(v), _chunks(v), *taps.shape)), v, taps, cotangent)
    return dv, d_taps.sum(axis=(0, 1))


_convolve.defvjp(_convolve_fwd, _convolve_bwd)
