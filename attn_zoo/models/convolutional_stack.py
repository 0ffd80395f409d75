"""A stack of dilated convolutions over positions, which relates far positions without recurrence and without attention.

Dilations double from layer to layer and begin again after `cycle` layers, so that what an output sees grows exponentially with depth (van den Oord et al. 2016,
WaveNet, sec. 2.1; Kalchbrenner et al. 2016, ByteNet). A layer is a residual branch, x + W (tanh(A x) * sigmoid(G x)) with dilated convolutions A and G (WaveNet,
eq. 2); causal, tap m of position t reads t - m dilation, else the taps lie around t. Departures: a norm before each branch and one at the end, as in the Transformer
that it is compared with, and its embedding and readout.

Where there is a source, such a stack reads it to both sides, and the decoder stands on that (ByteNet, sec. 3.1, with a representation as long as the source: a = 1
and b = 0, sec. 3.2): what enters at position t is the target's embedding plus W times the encoder's output at position t, zero where the source has ended. What
stands further on in the source is seen as far as the encoder's taps reach. ByteNet's layers are other residual branches, with ReLU.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from attn_zoo import config
from attn_zoo.attention.base import Paper
from attn_zoo.models.generation import room
from attn_zoo.models.layers import EMBEDDING_STD, NORMS, Embedding, check_source, dropout, normal, read_out, ties
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


class SourceStack(nnx.Module):
    """Source tokens to [B, S, D], each position read by taps on both sides."""

    def __init__(self, model: config.Model, options: Options, *, vocab: int, max_len: int, dtype: Any, rngs: nnx.Rngs):
        self.config, self.max_len = model, max_len
        self.embedding = Embedding(vocab, model.D, model.positions, max_len, dtype, rngs)
        self.layers = _layers(model, options, model.encoder_layers or model.layers, False, dtype, rngs)
        self.final_norm = NORMS[model.norm](model.D)

    def __call__(self, source_BS: Int[Array, "B S"], *, valid_BS: Bool[Array, "B S"] | None = None, key: Key[Array, ""] | None = None) -> Float[Array, "B S D"]:
        """Zeros where the source is not valid."""
        x_BSD = self.final_norm(_run(self.layers, self.embedding(source_BS), valid_BS, self.config.dropout, key))
        return x_BSD if valid_BS is None else jnp.where(valid_BS[:, :, None], x_BSD, 0)

    def multiply_adds(self) -> int:
        """Of one source of full length."""
        return self.max_len * _matrices(self.layers, self.config)


class ConvolutionStack(nnx.Module):
    """Tokens to logits; called and generating like a Transformer, with a source of tokens or without."""

    def __init__(
        self,
        model: config.Model,
        *,
        convolutions: Spec,
        inputs_vocab: int,
        num_outputs: int,
        max_len: int,
        causal: bool,
        per_token: bool,
        source_vocab: int = 0,
        source_len: int = 0,
        rngs: nnx.Rngs,
    ):
        options = convolutions.resolve("convolution", Options)
        self.tied = ties(model.tie_embeddings, per_token, num_outputs, inputs_vocab)
        dtype = jnp.dtype(model.dtype)
        self.config, self.max_len, self.source_len = model, max_len, source_len
        self.num_outputs, self.per_token, self.causal = num_outputs, per_token, causal
        self.embedding = Embedding(inputs_vocab, model.D, model.positions, max_len, dtype, rngs)
        self.layers = _layers(model, options, model.layers, causal, dtype, rngs)
        self.final_norm = NORMS[model.norm](model.D)
        if not self.tied:
            self.readout = normal(rngs.params(), (num_outputs, model.D), EMBEDDING_STD)
        if source_len:
            self.encoder = SourceStack(model, options, vocab=source_vocab, max_len=source_len, dtype=dtype, rngs=rngs)
            self.bridge = normal(rngs.params(), (model.D, model.D), model.D**-0.5)

    @property
    def receptive_field(self) -> int:
        """How many positions of its input an output sees, itself included."""
        return 1 + sum(layer.reach for layer in self.layers)

    def __call__(
        self,
        inputs_BT: Int[Array, "B T"],
        *,
        source: Int[Array, "B S"] | None = None,
        source_valid: Bool[Array, "B S"] | None = None,
        valid_BT: Bool[Array, "B T"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T V"] | Float[Array, "B C"]:
        """Float32 logits, [B, T, num_outputs] or pooled [B, num_outputs]. Positions that are not valid are read as zeros."""
        if inputs_BT.shape[1] > self.max_len:
            raise UserError(f"length {inputs_BT.shape[1]} is over max_len={self.max_len} that this model was built for")
        check_source(source, self.source_len)
        x_BTD = self.embedding(inputs_BT)
        if self.source_len:
            key, source_key = split_key(key, 2)
            x_BTD = x_BTD + self.encode(source, source_valid, x_BTD.shape[1], source_key)
        x_BTD = self.final_norm(_run(self.layers, x_BTD, valid_BT, self.config.dropout, key))
        return self._read_out(x_BTD if self.per_token else pool(x_BTD, valid_BT, self.config.pool))

    def encode(self, source: Array, source_valid: Array | None, T: int, key: Array | None = None) -> Float[Array, "B T D"]:
        """What of the source enters at each of T positions of the target."""
        memory_BSD = self.encoder(source, valid_BS=source_valid, key=key)[:, :T] @ self.bridge[...].astype(self.embedding.dtype)
        return jnp.pad(memory_BSD, ((0, 0), (0, T - memory_BSD.shape[1]), (0, 0)))

    def start(self, B: int, max_len: int, *, source: Array | None = None, source_valid: Array | None = None) -> dict:
        """The state of generation before the first of at most `max_len` tokens; without a source, of one size whatever that is. Raises Unsupported unless causal."""
        if not self.causal:
            raise Unsupported("these convolutions read ahead; a decoder generates with causal=True")
        check(max_len <= self.max_len, "max_len", max_len, f"is over the max_len={self.max_len} that this model was built for")
        check_source(source, self.source_len)
        memory = {"source": self.encode(source, source_valid, max_len)} if self.source_len else {}
        return {str(n): layer.init_cache(B) for n, layer in enumerate(self.layers)} | {"t": jnp.zeros((), jnp.int32), "room": room(B, max_len)} | memory

    def step(self, tokens_B: Int[Array, "B"], cache: dict) -> tuple[Float[Array, "B V"], dict]:
        """(logits after one more token of each sequence, the state after it)."""
        t = cache["t"]
        x_BD, new = self.embedding(tokens_B[:, None], t)[:, 0], cache | {"t": t + 1}
        if self.source_len:
            x_BD = x_BD + jax.lax.dynamic_index_in_dim(cache["source"], t, axis=1, keepdims=False)
        for n, layer in enumerate(self.layers):
            x_BD, new[str(n)] = layer.step(x_BD, cache[str(n)], t)
        return self._read_out(self.final_norm(x_BD)), new

    def _read_out(self, features: Array) -> Array:
        return read_out(features, self.embedding.tokens[: self.num_outputs] if self.tied else self.readout[...])

    def attentions(self, T: int) -> list:
        """None of the zoo's."""
        return []

    def attention_modules(self) -> list[nnx.Module]:
        """What of the model is attention: nothing."""
        return []

    def flops_per_step(self, B: int, T: int) -> dict[str, float]:
        """Useful FLOPs of one training step, 6 a parameter and token as of the Transformer; none of them is attention."""
        source = self.encoder.multiply_adds() + min(T, self.source_len) * self.bridge.size if self.source_len else 0
        readout = self.num_outputs * self.config.D * (T if self.per_token else 1)
        return {"attention": 0.0, "model": 6.0 * B * (T * _matrices(self.layers, self.config) + source + readout)}

    def activation_bytes(self, B: int, T: int) -> float:
        """An estimate of what a training step keeps: inputs, norms, gates and their product of every layer, and the logits twice."""
        c = self.config
        width = 2 if c.dtype == "bfloat16" else 4
        kept = T * (c.layers * 7 + 3) + self.source_len * ((c.encoder_layers or c.layers) * 7 + 4)
        return float(B * (width * kept * c.D + 2 * 4 * self.num_outputs * (T if self.per_token else 1)))


def _layers(model: config.Model, options: Options, layers: int, causal: bool, dtype: Any, rngs: nnx.Rngs):
    rule = f"must be odd where positions on both sides are read; nearest: {options.kernel + 1}"
    check(causal or options.kernel % 2 == 1, "kernel", options.kernel, rule)
    dilations = [2 ** (layer % options.cycle) for layer in range(layers)]
    return nnx.List([DilatedLayer(model.D, options.kernel, d, causal, model.norm, layers**-0.5, dtype, rngs) for d in dilations])


def _run(layers: Sequence[nnx.Module], x_BTD: Array, valid_BT: Array | None, rate: float, key: Array | None) -> Array:
    """What dropout and the layers make of embedded tokens."""
    keys = split_key(key, 1 + len(layers))
    x_BTD = dropout(x_BTD, rate, keys[0])
    for layer, layer_key in zip(layers, keys[1:]):
        x_BTD = x_BTD + dropout(layer(x_BTD, valid_BT) - x_BTD, rate, layer_key)
    return x_BTD


def _matrices(layers: Sequence[nnx.Module], model: config.Model) -> int:
    """Multiply-adds of a position: of the layers, and of positions that are mixed in."""
    return sum(layer.filter.size + layer.out.size for layer in layers) + (2 * model.D**2 if model.positions == "sinusoidal_concat" else 0)
