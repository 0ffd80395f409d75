"""The Transformer that every variant is put into: decoder or encoder, one model with two settings.

Initialization: matrices are N(0, 1 / fan-in), so activations keep their scale at any width (GPT-2's fixed 0.02 is that
value at D = 2,500, and starves the narrow models of a sweep on small machines); the projections that end a residual
branch are scaled by 1 / sqrt(branches), 2 a layer or 1 without feed-forward, as in GPT-2 (Radford et al. 2019, sec. 2.3),
so the sum of all branches does too. With one seed, everything outside the attention starts bit for bit the same whatever the variant.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from attn_zoo import config
from attn_zoo.attention import make_attention
from attn_zoo.attention.base import Attention
from attn_zoo.models.layers import EMBEDDING_STD, NORMS, Embedding, FeedForward, default_ffn_dim, dropout, normal
from attn_zoo.models.multi_head import MultiHeadAttention
from attn_zoo.models.remat import rematerialized
from attn_zoo.spec import Spec, UserError


class Block(nnx.Module):
    """Attention and feed-forward, each in a residual branch with its norm before (pre) or after the sum (post).

    With ffn='none' there is the attention branch alone (Sukhbaatar et al. 2019b).
    """

    def __init__(self, model: config.Model, attention: Attention, *, rngs: nnx.Rngs):
        self.has_ffn = model.ffn != "none"
        residual_scale = ((2 if self.has_ffn else 1) * model.layers) ** -0.5
        self.pre = model.norm_position == "pre"
        self.dropout = model.dropout
        self.attention_norm = NORMS[model.norm](model.D)
        rotary = model.positions == "rotary"
        self.mixer = MultiHeadAttention(attention, D=model.D, rotary=rotary, residual_scale=residual_scale, rngs=rngs)
        if self.has_ffn:
            F = model.F or default_ffn_dim(model.D, model.ffn)
            self.ffn_norm = NORMS[model.norm](model.D)
            self.ffn = FeedForward(model.D, F, model.ffn, attention.dims.dtype, residual_scale, rngs)

    def __call__(self, x_BTD: Array, valid_BT: Array | None = None, key: Array | None = None) -> Array:
        attention_key, attention_dropout_key, ffn_dropout_key = split_key(key, 3)
        attend = partial(self.mixer, valid_BS=valid_BT, key=attention_key)
        x_BTD = self._residual(x_BTD, attend, self.attention_norm, attention_dropout_key)
        return self._residual(x_BTD, self.ffn, self.ffn_norm, ffn_dropout_key) if self.has_ffn else x_BTD

    def _residual(self, x_BTD, branch, norm, key):
        if self.pre:  # Xiong et al. 2020; the sum itself is normalized once, at the end of the model
            return x_BTD + dropout(branch(norm(x_BTD)), self.dropout, key)
        return norm(x_BTD + dropout(branch(x_BTD), self.dropout, key))


class Transformer(nnx.Module):
    """Tokens to logits through blocks whose attention is any variant, or several cycled over the layers.

    `causal` makes it a decoder, else it is an encoder. With `per_token` every position gets logits, read out with the
    input embeddings if these are tied; without, positions are pooled into one vector with a head of its own, and
    `tie_embeddings` has no meaning. The residual stream runs in model.dtype, norms and logits in float32.
    """

    def __init__(
        self,
        model: config.Model,
        *,
        variant: Sequence[Spec],
        attention: config.Attention = config.Attention(),
        inputs_vocab: int,
        num_outputs: int,
        max_len: int,
        causal: bool,
        per_token: bool,
        rngs: nnx.Rngs,
    ):
        self.tied = model.tie_embeddings and per_token
        if self.tied and num_outputs > inputs_vocab:
            raise UserError(
                f"tie_embeddings=True: {num_outputs} outputs cannot be read out with {inputs_vocab} input embeddings; use tie_embeddings=False"
            )
        if len(variant) > model.layers:
            raise UserError(f"[{', '.join(map(str, variant))}] lists {len(variant)} layers, but layers={model.layers}; list at most {model.layers}")
        dtype = jnp.dtype(model.dtype)
        self.config = model
        self.max_len = max_len
        self.num_outputs = num_outputs
        self.per_token = per_token
        self.embedding = Embedding(inputs_vocab, model.D, model.positions, max_len, dtype, rngs)
        # A stream of its own: what a variant draws must not shift the draws of the layers after it.
        attention_rngs = nnx.Rngs(rngs.params())
        shared: dict = {}
        self.blocks = nnx.List([])
        for layer in range(model.layers):
            layer_attention = make_attention(
                variant[layer % len(variant)],
                num_heads=model.N,
                num_kv_heads=model.num_kv_heads,
                head_dim=model.head_dim,
                max_len=max_len,
                causal=causal,
                dtype=dtype,
                backend=attention.backend,
                shared=shared,
                rngs=attention_rngs,
            )
            self.blocks.append(Block(model, layer_attention, rngs=rngs))
        if model.norm_position == "pre":
            self.final_norm = NORMS[model.norm](model.D)
        if not self.tied:
            self.readout = normal(rngs.params(), (num_outputs, model.D), EMBEDDING_STD)

    def __call__(
        self,
        inputs_BT: Int[Array, "B T"],
        *,
        valid_BT: Bool[Array, "B T"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T V"] | Float[Array, "B C"]:
        """Float32 logits, [B, T, num_outputs] or pooled [B, num_outputs].

        Positions that are not valid are seen by no other. `key` is this call's randomness (dropout, hashing, sampling);
        None means deterministic evaluation. Raises UserError for T > max_len.
        """
        if inputs_BT.shape[1] > self.max_len:
            raise UserError(f"length {inputs_BT.shape[1]} is over max_len={self.max_len} that this model was built for")
        embedding_key, *block_keys = split_key(key, 1 + len(self.blocks))
        x_BTD = dropout(self.embedding(inputs_BT), self.config.dropout, embedding_key)
        for block, block_key in zip(self.blocks, block_keys):
            x_BTD = rematerialized(block, x_BTD, valid_BT, block_key) if self.config.remat else block(x_BTD, valid_BT, block_key)
        if self.config.norm_position == "pre":
            x_BTD = self.final_norm(x_BTD)
        features = x_BTD if self.per_token else pool(x_BTD, valid_BT, self.config.pool)
        readout_VD = self.embedding.tokens[: self.num_outputs] if self.tied else self.readout[...]
        return jnp.einsum("...D,VD->...V", features, readout_VD.astype(features.dtype), preferred_element_type=jnp.float32)


def pool(x_BTD: Float[Array, "B T D"], valid_BT: Bool[Array, "B T"] | None, kind: str) -> Float[Array, "B D"]:
    """One vector a sequence: the mean over its valid positions (taken in float32; zeros if there is none), or the first of them."""
    valid_BT = jnp.ones(x_BTD.shape[:2], bool) if valid_BT is None else valid_BT
    if kind == "first":
        return jnp.take_along_axis(x_BTD, jnp.argmax(valid_BT, axis=1)[:, None, None], axis=1)[:, 0]
    total_BD = jnp.where(valid_BT[:, :, None], x_BTD, 0).sum(axis=1, dtype=jnp.float32)
    return (total_BD / jnp.maximum(valid_BT.sum(axis=1), 1)[:, None]).astype(x_BTD.dtype)


def split_key(key: Array | None, n: int) -> list[Array | None]:
    """n independent keys, or n times None."""
    return [None] * n if key is None else list(jax.random.split(key, n))


def param_counts(model: Transformer) -> dict[str, int]:
    """Trained numbers in the whole model (`total`) and inside its attention variants (`attention`), shared ones counted once."""
    return {"total": _count(model), "attention": _count(_attentions(model))}


def flops_per_step(model: Transformer, B: int, T: int) -> dict[str, float]:
    """Useful FLOPs of one training step, forward and backward: of the `attention` variants alone, and of the whole `model`.

    Every matrix costs 2 FLOPs a parameter and token forward and twice that backward (Kaplan et al. 2020, sec. 2.1): 6 in
    all. Embedding look-ups, norms and what remat recomputes count nothing. `model` may be abstract (nnx.eval_shape).
    """
    c = model.config
    attention = 3 * sum(block.mixer.attention.flops(B, T, T) for block in model.blocks)
    matrices = _count(model.blocks, min_ndim=2) - _count(_attentions(model), min_ndim=2)
    if c.positions == "sinusoidal_concat":
        matrices += 2 * c.D * c.D
    readout = model.num_outputs * c.D * (T if model.per_token else 1)
    return {"attention": float(attention), "model": float(attention + 6 * B * (T * matrices + readout))}


def _attentions(model: Transformer) -> nnx.Module:
    return nnx.List([block.mixer.attention for block in model.blocks])


def _count(module: nnx.Module, min_ndim: int = 0) -> int:
    return sum(p.size for p in jax.tree.leaves(nnx.state(module, nnx.Param)) if p.ndim >= min_ndim)


def activation_bytes(model: Transformer, B: int, T: int) -> float:
    """An estimate of what a training step keeps for its backward pass: the inputs of every product, norm and nonlinearity, and the logits twice.

    What attention keeps beyond its inputs and outputs is O(T) in every variant and not counted. `model` may be abstract.
    """
    c = model.config
    heads = 2 * (c.N + c.num_kv_heads) * c.head_dim  # queries, keys, values and the output
    block = 2 * c.D + heads  # a norm and a residual sum, attention
    if c.ffn != "none":
        block += 2 * c.D + (4 if c.ffn == "swiglu" else 2) * (c.F or default_ffn_dim(c.D, c.ffn))
    kept = c.D if c.remat else block
    width = 2 if c.dtype == "bfloat16" else 4
    live = block if c.remat else 0  # the one block that is being recomputed
    logits = 2 * 4 * model.num_outputs * (T if model.per_token else 1)
    return float(B * (T * width * (c.layers * kept + live + 3 * c.D) + logits))
