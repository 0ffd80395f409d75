"""A stack of dilated convolutions over positions, which relates far positions without recurrence and without attention.

Dilations double from layer to layer and begin again after `cycle` layers, so that what an output sees grows exponentially with depth (van den Oord et al. 2016,
WaveNet, sec. 2.1; Kalchbrenner et al. 2016, ByteNet). A layer is a residual branch, x + W (tanh(A x) * sigmoid(G x)) with dilated convolutions A and G (WaveNet,
eq. 2); causal, tap m of position t reads t - m dilation, else the taps lie around t. Departures: a norm before each branch and one at the end, as in the Transformer that it
is compared with, and its embedding and readout.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from attn_zoo import config
from attn_zoo.attention.base import Paper
from attn_zoo.models.layers import EMBEDDING_STD, NORMS, Embedding, dropout, normal
from attn_zoo.models.transformer import pool, split_key
from attn_zoo.spec import Spec, Unsupported, UserError, check, check_int


@dataclasses.dataclass(frozen=True)
class Options:
    """kernel: taps of each convolution; cycle: layers until the dilation, which doubles from layer to layer, is 1 again."""

    kernel: int = 3
    cycle: int = 10

    def __post_init__(self):
        check_int("kernel", self.kernel, 2)
        check_int("cycle", self.cycle, 1)


@dataclasses.dataclass(frozen=True)
class Convolutions:
    """A registry entry."""

    name: str
    paper: Paper
    options: type = Options
    family: str = "convolution"


CONVOLUTIONS = {
    "dilated": Convolutions(
        "dilated",
        Paper(
            "oord2016wavenet",
            "{WaveNet}: A Generative Model for Raw Audio",
            "van den Oord, A{\\\"a}ron and Dieleman, Sander and Zen, Heiga and Simonyan, Karen and Vinyals, Oriol and Graves, Alex and Kalchbrenner, Nal and Senior, Andrew and Kavukcuoglu, Koray",
            2016,
            "arXiv:1609.03499",
        ),
    )
}


class DilatedLayer(nnx.Module):
    """One gated residual branch."""

    def __init__(self, D: int, kernel: int, dilation: int, causal: bool, norm: str, residual_scale: float, dtype, rngs: nnx.Rngs):
        self.dilation, self.causal, self.dtype = dilation, causal, dtype
        self.taps = kernel
        self.norm = NORMS[norm](D)
        self.filter = normal(rngs.params(), (kernel, D, 2 * D), (kernel * D) ** -0.5)  # A and G side by side
        self.out = normal(rngs.params(), (D, D), residual_scale * D**-0.5)

    @property
    def reach(self) -> int:
        """How far back its first tap reads."""
        return (self.taps - 1) * self.dilation

    def offsets(self) -> list[int]:
        """Where each tap reads, from the position that it is for."""
        ahead = 0 if self.causal else self.dilation * (self.taps // 2)
        return [m * self.dilation - self.reach + ahead for m in range(self.taps)]

    def __call__(self, x_BTD: Array, valid_BT: Array | None = None) -> Array:
        h_BTD = self.norm(x_BTD)
        if valid_BT is not None:
            h_BTD = jnp.where(valid_BT[:, :, None], h_BTD, 0)
        T, offsets = x_BTD.shape[1], self.offsets()
        padded = jnp.pad(h_BTD, ((0, 0), (-offsets[0], max(offsets[-1], 0)), (0, 0)))
        taps = [jax.lax.slice_in_dim(padded, offset - offsets[0], offset - offsets[0] + T, axis=1) for offset in offsets]
        return x_BTD + self.gate(taps)

    def gate(self, taps: list[Array]) -> Array:
        """The branch, from what its taps read."""
        both = sum(tap @ kernel.astype(self.dtype) for tap, kernel in zip(taps, self.filter[...]))
        a, g = jnp.split(both, 2, axis=-1)
        return (jnp.tanh(a) * jax.nn.sigmoid(g)) @ self.out[...].astype(self.dtype)

    def init_cache(self, B: int) -> Array:
        """The inputs that later positions still read, a ring of them."""
        return jnp.zeros((B, self.reach + 1, self.norm.scale.shape[0]), self.dtype)

    def step(self, x_BD: Array, ring_BLD: Array, t: Array) -> tuple[Array, Array]:
        """(its output at position t, the ring with this input in it)."""
        L = ring_BLD.shape[1]
        ring_BLD = jax.lax.dynamic_update_slice_in_dim(ring_BLD, self.norm(x_BD)[:, None], t % L, 1)
        taps = [jax.lax.dynamic_slice_in_dim(ring_BLD, (t + offset) % L, 1, 1)[:, 0] for offset in self.offsets()]
        return x_BD + self.gate(taps), ring_BLD  # what stands before the start is still zero


class ConvolutionStack(nnx.Module):
    """Tokens to logits; called and generating like a Transformer without a source."""

    def __init__(
        self, model: config.Model, *, convolutions: Spec, inputs_vocab: int, num_outputs: int, max_len: int, causal: bool, per_token: bool, rngs: nnx.Rngs
    ):
        options = convolutions.resolve("convolution", Options)
        check(causal or options.kernel % 2 == 1, "kernel", options.kernel, f"must be odd where positions on both sides are read; nearest: {options.kernel + 1}")
        self.tied = model.tie_embeddings and per_token
        if self.tied and num_outputs > inputs_vocab:
            raise UserError(f"tie_embeddings=True: {num_outputs} outputs cannot be read out with {inputs_vocab} input embeddings; use tie_embeddings=False")
        dtype = jnp.dtype(model.dtype)
        self.config, self.max_len, self.source_len = model, max_len, 0
        self.num_outputs, self.per_token, self.causal = num_outputs, per_token, causal
        self.embedding = Embedding(inputs_vocab, model.D, model.positions, max_len, dtype, rngs)
        dilations = [2 ** (layer % options.cycle) for layer in range(model.layers)]
        self.layers = nnx.List([DilatedLayer(model.D, options.kernel, d, causal, model.norm, model.layers**-0.5, dtype, rngs) for d in dilations])
        self.final_norm = NORMS[model.norm](model.D)
        if not self.tied:
            self.readout = normal(rngs.params(), (num_outputs, model.D), EMBEDDING_STD)

    @property
    def receptive_field(self) -> int:
        """How many positions an output sees, itself included."""
        return 1 + sum(layer.reach for layer in self.layers)

    def __call__(
        self, inputs_BT: Int[Array, "B T"], *, valid_BT: Bool[Array, "B T"] | None = None, key: Key[Array, ""] | None = None
    ) -> Float[Array, "B T V"] | Float[Array, "B C"]:
        """Float32 logits, [B, T, num_outputs] or pooled [B, num_outputs]. Positions that are not valid are read as zeros."""
        if inputs_BT.shape[1] > self.max_len:
            raise UserError(f"length {inputs_BT.shape[1]} is over max_len={self.max_len} that this model was built for")
        keys = split_key(key, 1 + len(self.layers))
        x_BTD = dropout(self.embedding(inputs_BT), self.config.dropout, keys[0])
        for layer, layer_key in zip(self.layers, keys[1:]):
            x_BTD = x_BTD + dropout(layer(x_BTD, valid_BT) - x_BTD, self.config.dropout, layer_key)
        x_BTD = self.final_norm(x_BTD)
        return self._read_out(x_BTD if self.per_token else pool(x_BTD, valid_BT, self.config.pool))

    def start(self, B: int, max_len: int) -> dict:
        """The state of generation before the first token, of one size whatever max_len. Raises Unsupported unless causal."""
        if not self.causal:
            raise Unsupported("these convolutions read ahead; a decoder generates with causal=True")
        return {str(n): layer.init_cache(B) for n, layer in enumerate(self.layers)} | {"t": jnp.zeros((), jnp.int32)}

    def step(self, tokens_B: Int[Array, "B"], cache: dict) -> tuple[Float[Array, "B V"], dict]:
        """(logits after one more token of each sequence, the state after it)."""
        t = cache["t"]
        x_BD, new = self.embedding(tokens_B[:, None], t)[:, 0], {"t": t + 1}
        for n, layer in enumerate(self.layers):
            x_BD, new[str(n)] = layer.step(x_BD, cache[str(n)], t)
        return self._read_out(self.final_norm(x_BD)), new

    def _read_out(self, features: Array) -> Array:
        readout_VD = self.embedding.tokens[: self.num_outputs] if self.tied else self.readout[...]
        return jnp.einsum("...D,VD->...V", features, readout_VD.astype(features.dtype), preferred_element_type=jnp.float32)

    def attentions(self, T: int) -> list:
        """None of the zoo's."""
        return []

    def attention_modules(self) -> list[nnx.Module]:
        """What of the model is attention: nothing."""
        return []

    def flops_per_step(self, B: int, T: int) -> dict[str, float]:
        """Useful FLOPs of one training step, 6 a parameter and token as of the Transformer; none of them is attention."""
        matrices = sum(layer.filter.size + layer.out.size for layer in self.layers)
        if self.config.positions == "sinusoidal_concat":
            matrices += 2 * self.config.D**2
        readout = self.num_outputs * self.config.D * (T if self.per_token else 1)
        return {"attention": 0.0, "model": 6.0 * B * (T * matrices + readout)}

    def activation_bytes(self, B: int, T: int) -> float:
        """An estimate of what a training step keeps: inputs, norms, gates and their product of every layer, and the logits twice."""
        c = self.config
        width = 2 if c.dtype == "bfloat16" else 4
        return float(B * (T * width * (c.layers * 7 + 3) * c.D + 2 * 4 * self.num_outputs * (T if self.per_token else 1)))
