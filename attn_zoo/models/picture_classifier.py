"""Pictures to classes by a convolutional network with one layer of self-attention in it, of any variant or none."""

import collections
import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from attn_zoo import config
from attn_zoo.attention import VARIANTS, Attention
from attn_zoo.attention.base import Paper
from attn_zoo.models.layers import NORMS, normal
from attn_zoo.models.pictures import ConvolutionNet, cells_of
from attn_zoo.spec import Spec, check, check_int


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """It takes no options."""


@dataclasses.dataclass(frozen=True)
class WithoutAttention:
    """The registry entry of the network alone."""

    name: str
    paper: Paper
    options: type = NoOptions
    family: str = "convolution"


NONE = WithoutAttention(
    "none",
    Paper(
        "he2016deep",
        "Deep Residual Learning for Image Recognition",
        "He, Kaiming and Zhang, Xiangyu and Ren, Shaoqing and Sun, Jian",
        2016,
        "IEEE Conference on Computer Vision and Pattern Recognition",
    ),
)
LAYERS = collections.ChainMap({"none": NONE}, VARIANTS)  # a view, so that a variant added to the zoo is here too


class PictureClassifier(nnx.Module):
    """A picture to logits of classes: the stages of a ConvolutionNet, and the mean over the cells of the last.

    There are `model.layers` stages of model.D channels, the first of half. Self-attention (`SelfAttention2D`) of N heads, of H channels each, or of half the
    channels in all, stands after the stage whose grid has max_len cells: of a picture of 32 x 32 the first has 1024, the second 256.
    """

    def __init__(
        self,
        model: config.Model,
        *,
        variant: Spec,
        attention: config.Attention = config.Attention(),
        image_shape: tuple[int, int, int],
        num_outputs: int,
        max_len: int,
        rngs: nnx.Rngs,
    ):
        check(model.D % 2 == 0, "D", model.D, f"must be even, twice the channels of the first stage; nearest: {model.D + 1}")
        check_int("num_outputs", num_outputs, 2)
        channels = (model.D // 2, *[model.D] * (model.layers - 1))
        cells = [cells_of(image_shape, channels[: n + 1]) for n in range(model.layers)]
        rule = f"must be the cells of a grid that the network has with layers={model.layers}: {', '.join(map(str, cells))}"
        check(max_len in cells, "seq_len", max_len, rule)
        self.config, self.max_len, self.num_outputs = model, max_len, num_outputs
        self.per_token = False
        # The readout first, so that it and the stages start the same whatever the variant.
        self.readout = normal(rngs.params(), (channels[-1], num_outputs), channels[-1] ** -0.5)
        self.net = ConvolutionNet(
            image_shape,
            channels=channels,
            attention=None if variant.name == NONE.name else variant,
            attention_after=cells.index(max_len),
            N=model.N,
            H=model.H,
            norm=NORMS[model.norm],  # of a cell alone: whatever else a cell knows of others, it saw in its windows or attended to
            dtype=jnp.dtype(model.dtype),
            backend=attention.backend,
            rngs=rngs,
        )

    def __call__(self, picture_Bhwc: Float[Array, "B h w c"], *, valid_BT: None = None, key: Key[Array, ""] | None = None) -> Float[Array, "B C"]:
        """Float32 logits, of channels in [0, 1]; `key` is the random key of the attention layer. All of a picture is valid."""
        mean_Bc = self.net(picture_Bhwc, key=key).mean(axis=(1, 2), dtype=jnp.float32)
        return mean_Bc @ self.readout[...]

    def attentions(self, T: int) -> list[tuple[Attention, int, int]]:
        """(attention, queries, keys) of the one layer, if there is one."""
        return [] if self.net.attention is None else [(self.net.attention.mixer.attention, T, T)]

    def attention_modules(self) -> list[Attention]:
        """What of the model is attention."""
        return [attention for attention, _, _ in self.attentions(self.max_len)]

    def flops_per_step(self, B: int, T: int) -> dict[str, float]:
        """Useful FLOPs of one training step, three times those of the forward pass: of the `attention` variant alone, and of the whole `model`."""
        attention = 3 * sum(layer.flops(B, queries, keys) for layer, queries, keys in self.attentions(T))
        return {"attention": float(attention), "model": float(attention + 6 * B * (self.net.multiply_adds() + self.readout.size))}

    def activation_bytes(self, B: int, T: int) -> float:
        """An estimate of what a training step keeps for its backward pass; what attention keeps beyond its inputs and outputs is not counted."""
        width = 2 if self.config.dtype == "bfloat16" else 4
        heads = sum(4 * T * layer.dims.num_heads * layer.dims.head_dim for layer, _, _ in self.attentions(T))  # queries, keys, values and the output
        return float(B * (width * (self.net.kept() + heads) + 2 * 4 * self.num_outputs))
