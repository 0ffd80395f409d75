"""Pictures: convolutional networks that attention stands in, or reads from.

Letters beside those of attention/base.py: h, w, c of a picture or of a grid of features; S = h w cells, row by row.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from attn_zoo.attention import make_attention
from attn_zoo.attention.base import Statistic, leave
from attn_zoo.models.layers import EMBEDDING_STD, normal
from attn_zoo.models.multi_head import MultiHeadAttention
from attn_zoo.spec import Spec, check, check_int

CHANNELS = (32, 64, 64)  # of the stages: the first at the size of the picture, each of the others at half the size of the one before


class Convolution(nnx.Module):
    """A convolution without bias, zero-padded so that a stride divides height and width, rounded up."""

    def __init__(self, in_channels: int, out_channels: int, size: int = 3, stride: int = 1, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        fan_in = size * size * in_channels
        self.kernel = normal(rngs.params(), (size, size, in_channels, out_channels), (2 / fan_in) ** 0.5)  # He et al. 2015, eq. 10
        self.stride = stride
        self.dtype = dtype

    def __call__(self, x_Bhwc: Float[Array, "B h w c"]) -> Float[Array, "B h2 w2 d"]:
        kernel = self.kernel[...].astype(self.dtype)
        strides = (self.stride, self.stride)
        return jax.lax.conv_general_dilated(x_Bhwc.astype(self.dtype), kernel, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


class GroupNorm(nnx.Module):
    """Normalization over all cells and the channels of a group, computed in float32. Wu & He 2018, sec. 3.1; at most 8 groups, all of one size."""

    def __init__(self, channels: int):
        self.groups = math.gcd(channels, 8)
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x_Bhwc: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        B, h, w, c = x_Bhwc.shape
        f32 = x_Bhwc.astype(jnp.float32).reshape(B, h, w, self.groups, c // self.groups)
        centred = f32 - f32.mean(axis=(1, 2, 4), keepdims=True)
        variance = jnp.square(centred).mean(axis=(1, 2, 4), keepdims=True)
        normed_Bhwc = (centred * jax.lax.rsqrt(variance + 1e-5)).reshape(B, h, w, c)
        return (normed_Bhwc * self.scale[...] + self.bias[...]).astype(x_Bhwc.dtype)


class SelfAttention2D(nnx.Module):
    """Self-attention in a convolutional network: x + gate * attention(x), with a learned gate that starts at 0.

    Zhang et al. 2019 (SAGAN), eq. 1-3; Wang et al. 2018 (non-local), eq. 6. Queries, keys, values and the output are 1 x 1 convolutions, that is
    one matrix for all cells, as a MultiHeadAttention has them. Any variant attends, over the cells row by row (`axial(width=w)` along rows and
    columns of the grid). Departures: N heads instead of one, scores scaled by 1 / sqrt(H), and queries, keys and values all of N H = c / 2
    channels (non-local), where SAGAN takes c / 8.
    """

    def __init__(
        self,
        channels: int,
        grid: tuple[int, int],
        *,
        variant: str | Spec = "full",
        N: int = 1,
        H: int | None = None,
        dtype: Any = jnp.float32,
        backend: str = "auto",
        rngs: nnx.Rngs,
    ):
        check_int("N", N, 1)
        check_int("H", H, 1, optional=True)
        check(H is not None or channels % (2 * N) == 0, "channels", channels, f"must be a multiple of 2 N = {2 * N}, unless H is given")
        # A stream of its own: what a variant draws must not shift the draws of the layers after it.
        attention_rngs = nnx.Rngs(rngs.params())
        max_len = grid[0] * grid[1]
        head_dim = H or channels // (2 * N)
        attention = make_attention(variant, num_heads=N, head_dim=head_dim, max_len=max_len, dtype=dtype, backend=backend, rngs=attention_rngs)
        self.mixer = MultiHeadAttention(attention, D=channels, rngs=rngs)
        self.gate = nnx.Param(jnp.zeros(()))
        self.learned_gate = Statistic(jnp.zeros(()))

    def __call__(self, x_Bhwc: Float[Array, "B h w c"], *, key: Key[Array, ""] | None = None) -> Float[Array, "B h w c"]:
        """`key` is the variant's random key. Raises UserError for a grid larger than the one it was built for."""
        B, h, w, c = x_Bhwc.shape
        leave(self, "learned_gate", jax.lax.stop_gradient(self.gate[...]))
        o_BSD = self.mixer(x_Bhwc.reshape(B, h * w, c), key=key)
        return x_Bhwc + self.gate[...].astype(x_Bhwc.dtype) * o_BSD.reshape(B, h, w, c)


class Stage(nnx.Module):
    """Two 3 x 3 convolutions, each normalized and rectified: one to a new size and number of channels, one in a residual branch."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Callable[[int], nnx.Module], dtype: Any, rngs: nnx.Rngs):
        self.into = Convolution(in_channels, channels, stride=stride, dtype=dtype, rngs=rngs)
        self.into_norm = norm(channels)
        self.branch = Convolution(channels, channels, dtype=dtype, rngs=rngs)
        self.branch_norm = norm(channels)

    def __call__(self, x_Bhwc: Array) -> Array:
        x_Bhwc = jax.nn.relu(self.into_norm(self.into(x_Bhwc)))
        return x_Bhwc + jax.nn.relu(self.branch_norm(self.branch(x_Bhwc)))


class ConvolutionNet(nnx.Module):
    """A picture to a grid of features, through stages of which each but the first halves height and width; with `attention`, such a layer after one of them.

    `attention` is the spec of a variant, or None; `attention_after` counts stages from 0, or from -1, the last. An early one sees a longer
    sequence: of a picture of 32 x 32, stage 0 has 1024 cells, stage 2 has 64.

    `norm` is made for so many channels. A GroupNorm goes over all cells, and so tells each of them something of all others; the norms of models.layers are of one
    cell alone (as in Liu et al. 2022, ConvNeXt), and then a cell learns of what its windows do not see through attention only.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        channels: Sequence[int] = CHANNELS,
        attention: str | Spec | None = None,
        attention_after: int = -1,
        N: int = 1,
        H: int | None = None,
        norm: Callable[[int], nnx.Module] = GroupNorm,
        dtype: Any = jnp.float32,
        backend: str = "auto",
        rngs: nnx.Rngs,
    ):
        stages = len(channels)
        check(stages > 0, "channels", tuple(channels), "must list at least one stage")
        for c in channels:
            check_int("channels", c, 1)
        check(-stages <= attention_after < stages, "attention_after", attention_after, f"must be a stage, 0 to {stages - 1} or -1 to {-stages}")
        h, w, in_channels = image_shape
        self.image_shape = tuple(image_shape)
        self.attention_after = attention_after % stages
        self.stages = nnx.List([])
        for i, c in enumerate(channels):
            stride = 2 if i else 1
            h, w = -(-h // stride), -(-w // stride)
            self.stages.append(Stage(in_channels, c, stride, norm, dtype, rngs))
            in_channels = c
        self.grid = (h, w)
        layer = None
        if attention is not None:  # drawn last, so that the stages start the same without it
            like = dict(variant=attention, N=N, H=H, dtype=dtype, backend=backend)
            layer = SelfAttention2D(channels[self.attention_after], self.sizes()[self.attention_after], **like, rngs=rngs)
        self.attention = layer

    def __call__(self, picture_Bhwc: Float[Array, "B h w c"], *, key: Key[Array, ""] | None = None) -> Float[Array, "B h2 w2 d"]:
        """Channels in [0, 1]; they are centred here. Raises UserError for another size of picture than it was built for."""
        shape = picture_Bhwc.shape[1:]
        check(shape == self.image_shape, "picture", shape, f"must have the shape {self.image_shape} that this network was built for")
        x_Bhwc = 2 * picture_Bhwc - 1
        for i, stage in enumerate(self.stages):
            x_Bhwc = stage(x_Bhwc)
            if self.attention is not None and i == self.attention_after:
                x_Bhwc = self.attention(x_Bhwc, key=key)
        return x_Bhwc

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of what each stage makes."""
        grids = [self.image_shape[:2]]
        for stage in self.stages:
            grids.append(tuple(-(-n // stage.into.stride) for n in grids[-1]))
        return grids[1:]

    def multiply_adds(self) -> int:
        """Of one picture: every kernel at every cell of what it makes, and the projections around an attention layer."""
        total = sum(h * w * (stage.into.kernel.size + stage.branch.kernel.size) for (h, w), stage in zip(self.sizes(), self.stages))
        if self.attention is not None:
            h, w = self.sizes()[self.attention_after]
            mixer = self.attention.mixer
            keys = 0 if mixer.shares_query_key else mixer.key.size
            total += h * w * (mixer.query.size + keys + mixer.value.size + mixer.out.size)
        return total

    def kept(self) -> int:
        """About how many numbers the backward pass needs of one picture: the inputs of every convolution, norm and rectifier."""
        return sum(7 * h * w * stage.branch.kernel.shape[-1] for (h, w), stage in zip(self.sizes(), self.stages))


def cells_of(image_shape: tuple[int, int, int], channels: Sequence[int] = CHANNELS) -> int:
    """S, how many cells a picture of this shape has at the end of a ConvolutionNet."""
    h, w, _ = image_shape
    for _ in channels[1:]:
        h, w = -(-h // 2), -(-w // 2)
    return h * w


class ConvolutionEncoder(nnx.Module):
    """A picture to a sequence of features that a decoder attends to, as in Xu et al. 2015, sec. 3.1.1: one for each cell of the last grid, S = h w.

    Each cell gets what is learned of its row and of its column added (Carion et al. 2020, sec. A.4), since attention to a set of cells could hardly tell above
    from below otherwise. Keywords are those of ConvolutionNet.
    """

    def __init__(self, image_shape: tuple[int, int, int], D: int, *, channels: Sequence[int] = CHANNELS, dtype: Any = jnp.float32, rngs: nnx.Rngs, **net: Any):
        check_int("D", D, 1)
        self.net = ConvolutionNet(image_shape, channels=channels, dtype=dtype, rngs=rngs, **net)
        h, w = self.net.grid
        self.source_len = h * w
        self.out = normal(rngs.params(), (channels[-1], D), channels[-1] ** -0.5)
        self.rows = normal(rngs.params(), (h, D), EMBEDDING_STD)
        self.columns = normal(rngs.params(), (w, D), EMBEDDING_STD)
        self.dtype = dtype

    def __call__(self, picture_Bhwc: Float[Array, "B h w c"], *, key: Key[Array, ""] | None = None) -> Float[Array, "B S D"]:
        """Channels in [0, 1]; `key` is the random key of the attention layer."""
        x_Bhwc = self.net(picture_Bhwc, key=key)
        D = self.out.shape[1]
        # As with token embeddings, what is learned of a place is scaled by sqrt(D) to the size of what it is added to.
        place_hwD = math.sqrt(D) * (self.rows[...][:, None] + self.columns[...])
        x_BhwD = jnp.einsum("Bhwc,cD->BhwD", x_Bhwc, self.out[...].astype(self.dtype)) + place_hwD.astype(self.dtype)
        return x_BhwD.reshape(len(x_BhwD), self.source_len, D)

    def multiply_adds(self) -> int:
        """Of one picture, outside an attention variant."""
        return self.net.multiply_adds() + self.source_len * self.out.size

    def kept(self) -> int:
        """About how many numbers the backward pass needs of one picture."""
        return self.net.kept() + 2 * self.source_len * self.out.shape[1]
