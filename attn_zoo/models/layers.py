"""What stands around the attention: norms, position encodings, embedding, feed-forward, dropout.

Parameters are float32 throughout; a layer computes in the dtype it was built for. Dense layers have no biases, in the
attention, the feed-forward and the readout alike: PaLM (Chowdhery et al. 2022, sec. 2) and LLaMA found they do not
need them, and each projection is then one array, on which weight decay acts.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from attn_zoo.ops.angles import sines_and_cosines
from attn_zoo.spec import UserError

EMBEDDING_STD = 0.02


def normal(key: Array, shape: tuple[int, ...], std: float) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2)."""
    # Drawn flat: matrices of one size then share a compilation, which is most of what building a small model costs.
    flat = jax.random.normal(key, (math.prod(shape),), jnp.float32)
    return nnx.Param((std * flat).reshape(shape))


def dropout(x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None) -> Float[Array, "..."]:
    """Zeroes elements with probability `rate` and scales the rest by 1 / (1 - rate); the identity without a key.

    Srivastava et al. 2014, in the inverted form, so that evaluation needs no scaling.
    """
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def ties(tie_embeddings: bool, per_token: bool, num_outputs: int, inputs_vocab: int) -> bool:
    """Whether tokens are read out with the embeddings of the inputs. Raises UserError where these are too few."""
    tied = tie_embeddings and per_token
    if tied and num_outputs > inputs_vocab:
        raise UserError(f"tie_embeddings=True: {num_outputs} outputs cannot be read out with {inputs_vocab} input embeddings; use tie_embeddings=False")
    return tied


def read_out(features: Float[Array, "... D"], readout_VD: Float[Array, "V D"]) -> Float[Array, "... V"]:
    """Float32 logits."""
    return jnp.einsum("...D,VD->...V", features, readout_VD.astype(features.dtype), preferred_element_type=jnp.float32)


def check_source(source: Array | None, source_len: int, reads_picture: bool = False) -> None:
    """Raises UserError for a source that a model has no use for, or lacks, or that is longer than it was built for."""
    if (source is None) == (source_len > 0):
        raise UserError("this model reads a source, and was given none" if source_len else "a source was given to a model that reads none")
    if source is not None and not reads_picture and source.shape[1] > source_len:
        raise UserError(f"a source of {source.shape[1]} is over source_len={source_len} that this model was built for")


class LayerNorm(nnx.Module):
    """Layer normalization over D, computed in float32. Ba et al. 2016, sec. 3."""

    def __init__(self, D: int):
        self.scale = nnx.Param(jnp.ones(D))
        self.bias = nnx.Param(jnp.zeros(D))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        f32 = x.astype(jnp.float32)
        centred = f32 - f32.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + 1e-5) * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root mean square normalization over D, computed in float32. Zhang & Sennrich 2019, eq. 4."""

    def __init__(self, D: int):
        self.scale = nnx.Param(jnp.ones(D))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        f32 = x.astype(jnp.float32)
        mean_square = jnp.square(f32).mean(axis=-1, keepdims=True)
        return (f32 * jax.lax.rsqrt(mean_square + 1e-6) * self.scale[...]).astype(x.dtype)


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


def sinusoids(T: int, D: int, start: Int[Array, ""] | int = 0) -> Float[Array, "T D"]:
    """The sinusoidal position table from `start` on: sin(t / 10000^(2i/D)) in channel 2i, the cosine in 2i + 1. Vaswani et al. 2017, sec. 3.5."""
    sin, cos = sines_and_cosines(T, 10000.0 ** (-2 * np.arange((D + 1) // 2) / D), start)
    return jnp.stack([sin, cos], axis=-1).reshape(T, -1)[:, :D]


def rotate(x_BTNH: Float[Array, "B T N H"], start: Int[Array, ""] | int = 0) -> Float[Array, "B T N H"]:
    """Rotary positions from `start` on: turns channel pair i by the angle t 10000^(-2i/H), so that q.k depends on the distance alone.

    Su et al. 2021, eq. 34, with channel i paired with i + H/2 rather than 2i with 2i + 1: the same up to a fixed
    order of channels, which the projections learn anyway. Computed in float32; H is even.
    """
    T, H = x_BTNH.shape[1], x_BTNH.shape[-1]
    sin, cos = (x_TF[:, None] for x_TF in sines_and_cosines(T, 10000.0 ** (-2 * np.arange(H // 2) / H), start))
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).astype(x_BTNH.dtype)


class Embedding(nnx.Module):
    """Token embeddings with what the position encoding adds at the input.

    learned            a parameter [max_len, D], added (Gehring et al. 2017; Devlin et al. 2018)
    sinusoidal         the fixed table, added (Vaswani et al. 2017)
    sinusoidal_concat  the fixed table's D channels stand beside the token's D, and a learned [2D, D] matrix maps them back to D
    rotary, none       nothing; rotary positions act on queries and keys instead

    Parameters are N(0, 0.02^2): small, so that tied logits start near uniform. What is learned is scaled by sqrt(D) at the
    input (Vaswani et al. 2017, sec. 3.4), which brings it near the scale of the sinusoids and of what the blocks add.
    """

    def __init__(self, vocab: int, D: int, positions: str, max_len: int, dtype: Any, rngs: nnx.Rngs):
        self.kind = positions
        self.dtype = dtype
        token_key, position_key = jax.random.split(rngs.params())
        self.tokens = normal(token_key, (vocab, D), EMBEDDING_STD)
        if positions == "learned":
            self.positions = normal(position_key, (max_len, D), EMBEDDING_STD)
        if positions == "sinusoidal_concat":
            self.mix = normal(position_key, (2 * D, D), (2 * D) ** -0.5)

    def __call__(self, inputs_BT: Int[Array, "B T"], start: Int[Array, ""] | int = 0) -> Float[Array, "B T D"]:
        """Of tokens at positions from `start` on."""
        T, D = inputs_BT.shape[1], self.tokens.shape[1]
        x_BTD = self.tokens[...][inputs_BT] * math.sqrt(D)
        if self.kind == "learned":
            x_BTD += jax.lax.dynamic_slice_in_dim(self.positions[...], start, T) * math.sqrt(D)
        if self.kind == "sinusoidal":
            x_BTD += sinusoids(T, D, start)
        if self.kind == "sinusoidal_concat":
            both = jnp.concatenate([x_BTD, jnp.broadcast_to(sinusoids(T, D, start), x_BTD.shape)], axis=-1)
            return both.astype(self.dtype) @ self.mix[...].astype(self.dtype)
        return x_BTD.astype(self.dtype)


def default_ffn_dim(D: int, kind: str) -> int:
    """4 D; for swiglu, whose three matrices would cost half as much again, 8/3 D rounded up to a multiple of 8."""
    return 8 * math.ceil(D / 3) if kind == "swiglu" else 4 * D


class FeedForward(nnx.Module):
    """The position-wise network: relu (Vaswani et al. 2017, eq. 2), gelu (Hendrycks & Gimpel 2016, the tanh form), or swiglu.

    swiglu is (swish(x gate) * (x up)) down (Shazeer 2020, eq. 6).
    """

    def __init__(self, D: int, F: int, kind: str, dtype: Any, residual_scale: float, rngs: nnx.Rngs):
        self.kind = kind
        self.dtype = dtype
        up_key, gate_key, down_key = jax.random.split(rngs.params(), 3)
        self.up = normal(up_key, (D, F), D**-0.5)
        if kind == "swiglu":
            self.gate = normal(gate_key, (D, F), D**-0.5)
        self.down = normal(down_key, (F, D), residual_scale * F**-0.5)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        up_BTF = x_BTD @ self.up[...].astype(self.dtype)
        if self.kind == "swiglu":
            hidden_BTF = jax.nn.silu(x_BTD @ self.gate[...].astype(self.dtype)) * up_BTF
        else:
            hidden_BTF = {"relu": jax.nn.relu, "gelu": jax.nn.gelu}[self.kind](up_BTF)
        return hidden_BTF @ self.down[...].astype(self.dtype)
