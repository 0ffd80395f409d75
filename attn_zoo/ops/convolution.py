"""A convolution along the sequence with one filter a head, shared by its channels: the residual of Nyströmformer's values."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attn_zoo.ops.native_convolution import native_convolve

CHUNK = 64  # positions that XLA takes at once, at least


def convolve(v_BSKH: Float[Array, "B S K H"], taps_NW: Float[Array, "N W"], *, backend: str = "xla") -> Float[Array, "B S N H"]:
    """sum over w of taps_nw v[s + w - W // 2], zeros beyond the ends, in float32 at least. W is odd; N heads share K heads of values.

    A value that is no number may reach more positions than the filter does. `backend` is "xla" or "native". In XLA, chunks of positions times the filter's band matrix: on a CPU five times faster, with gradients, than its
    grouped convolution.
    """
    (B, S, K, H), (N, W) = v_BSKH.shape, taps_NW.shape
    if W % 2 == 0 or N % K:
        raise ValueError(f"filters of shape {taps_NW.shape} for {K} heads of values: W must be odd, and N a multiple of the heads")
    if backend == "native":
        return native_convolve(v_BSKH, taps_NW)
    v_BSNH = jnp.repeat(v_BSKH, N // K, axis=2).astype(jnp.promote_types(v_BSKH.dtype, jnp.float32))
    c = max(CHUNK, W - 1)
    chunks = -(-S // c)
    padded = jnp.pad(v_BSNH, ((0, 0), (W // 2, (chunks + 1) * c - S - W // 2), (0, 0), (0, 0))).reshape(B, chunks + 1, c, N, H)
    wide_BCJNH = jnp.concatenate([padded[:, :-1], padded[:, 1:, : W - 1]], axis=2)
    tap_IJ = np.arange(c + W - 1) - np.arange(c)[:, None]
    band_NIJ = jnp.where((tap_IJ >= 0) & (tap_IJ < W), taps_NW[:, np.clip(tap_IJ, 0, W - 1)], 0.0)
    return jnp.einsum("NIJ,BCJNH->BCINH", band_NIJ, wide_BCJNH, precision="highest").reshape(B, chunks * c, N, H)[:, :S]
