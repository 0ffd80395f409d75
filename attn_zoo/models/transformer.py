"""The Transformer that every variant is put into: decoder, encoder, or both, one model with three settings.

Initialization: matrices are N(0, 1 / fan-in), so activations keep their scale at any width (GPT-2's fixed 0.02 is that
value at D = 2,500, and starves the narrow models of a sweep on small machines); the projections that end a residual
branch are scaled by 1 / sqrt(branches), 2 a layer or 1 without feed-forward, as in GPT-2 (Radford et al. 2019, sec. 2.3),
so the sum of all branches does too. With one seed, everything outside the attention starts bit for bit the same whatever the variant.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from attn_zoo import config
from attn_zoo.attention import make_attention, parse_variant
from attn_zoo.attention.base import Attention, Cache
from attn_zoo.models.generation import room
from attn_zoo.models.layers import EMBEDDING_STD, NORMS, Embedding, FeedForward, check_source, default_ffn_dim, dropout, normal, read_out, ties
from attn_zoo.models.multi_head import MultiHeadAttention
from attn_zoo.models.pictures import ConvolutionEncoder, cells_of
from attn_zoo.models.remat import rematerialized
from attn_zoo.spec import Spec, UserError


class Block(nnx.Module):
    """Attention, cross-attention where there is a memory to read, and feed-forward, each in a residual branch with its norm before (pre) or after the sum (post).

    With ffn='none' there is no feed-forward branch (Sukhbaatar et al. 2019b).
    """

    def __init__(self, model: config.Model, attention: Attention, cross: Attention | None = None, *, rngs: nnx.Rngs):
        self.has_ffn = model.ffn != "none"
        self.has_cross = cross is not None
        residual_scale = ((1 + self.has_ffn + self.has_cross) * model.layers) ** -0.5
        self.pre = model.norm_position == "pre"
        self.dropout = model.dropout
        self.attention_norm = NORMS[model.norm](model.D)
        rotary = model.positions == "rotary"
        self.mixer = MultiHeadAttention(attention, D=model.D, rotary=rotary, residual_scale=residual_scale, rngs=rngs)
        if cross is not None:
            self.cross_norm = NORMS[model.norm](model.D)
            self.cross = MultiHeadAttention(cross, D=model.D, residual_scale=residual_scale, rngs=rngs)
        if self.has_ffn:
            F = model.F or default_ffn_dim(model.D, model.ffn)
            self.ffn_norm = NORMS[model.norm](model.D)
            self.ffn = FeedForward(model.D, F, model.ffn, attention.dims.dtype, residual_scale, rngs)

    @property
    def attentions(self) -> list[Attention]:
        return [self.mixer.attention, self.cross.attention] if self.has_cross else [self.mixer.attention]

    def __call__(self, x_BTD: Array, valid_BT: Array | None = None, key: Array | None = None, memory_BSD: Array | None = None, memory_valid: Array | None = None) -> Array:
        attention_key, attention_dropout_key, ffn_dropout_key, *cross_keys = split_key(key, 5 if self.has_cross else 3)
        attend = partial(self.mixer, valid_BS=valid_BT, key=attention_key)
        x_BTD = self._residual(x_BTD, attend, self.attention_norm, attention_dropout_key)
        if self.has_cross:
            cross_key, cross_dropout_key = cross_keys
            read = partial(self.cross, memory_BSD=memory_BSD, valid_BS=memory_valid, valid_BT=valid_BT, key=cross_key)
            x_BTD = self._residual(x_BTD, read, self.cross_norm, cross_dropout_key)
        return self._residual(x_BTD, self.ffn, self.ffn_norm, ffn_dropout_key) if self.has_ffn else x_BTD

    def init_cache(self, B: int, max_len: int, memory_BSD: Array | None = None, memory_valid: Array | None = None) -> Cache:
        """The state before the first of at most `max_len` positions."""
        cache = {"self": self.mixer.init_cache(B, max_len)}
        return cache | {"cross": self.cross.init_cross_cache(memory_BSD, max_len, valid_BS=memory_valid)} if self.has_cross else cache

    def step(self, x_B1D: Array, cache: Cache) -> tuple[Array, Cache]:
        """One more position: (its output, the state after it)."""
        new = {}

        def stateful(step, name):
            def run(x_B1D):
                o_B1D, new[name] = step(x_B1D, cache[name])
                return o_B1D

            return run

        x_B1D = self._residual(x_B1D, stateful(self.mixer.step, "self"), self.attention_norm, None)
        if self.has_cross:
            x_B1D = self._residual(x_B1D, stateful(self.cross.cross_step, "cross"), self.cross_norm, None)
        return self._residual(x_B1D, self.ffn, self.ffn_norm, None) if self.has_ffn else x_B1D, new

    def _residual(self, x_BTD, branch, norm, key):
        if self.pre:  # Xiong et al. 2020; the sum itself is normalized once, at the end of the model
            return x_BTD + dropout(branch(norm(x_BTD)), self.dropout, key)
        return norm(x_BTD + dropout(branch(x_BTD), self.dropout, key))


class Encoder(nnx.Module):
    """Source tokens to the memory that a decoder reads: embedding and blocks of its own."""

    def __init__(self, model: config.Model, attentions: Sequence[Attention], *, vocab: int, max_len: int, rngs: nnx.Rngs):
        self.config = model
        self.max_len = max_len
        self.embedding = Embedding(vocab, model.D, model.positions, max_len, attentions[0].dims.dtype, rngs)
        self.blocks = nnx.List([Block(dataclasses.replace(model, layers=len(attentions)), attention, rngs=rngs) for attention in attentions])
        if model.norm_position == "pre":
            self.final_norm = NORMS[model.norm](model.D)

    def __call__(self, source_BS: Int[Array, "B S"], *, valid_BS: Bool[Array, "B S"] | None = None, key: Key[Array, ""] | None = None) -> Float[Array, "B S D"]:
        return run_blocks(self, self.embedding(source_BS), valid_BS, key)


    def multiply_adds(self) -> int:
        """Of one source of full length, outside its attention variants."""
        mix = 2 * self.config.D**2 if self.config.positions == "sinusoidal_concat" else 0
        return self.max_len * (_matrices(self.blocks) + mix)

    def kept(self) -> int:
        """About how many numbers the backward pass needs of one source of full length."""
        return self.max_len * kept_by_blocks(self.config, len(self.blocks), cross=False)


def kept_by_blocks(c: config.Model, layers: int, cross: bool) -> int:
    """About how many numbers a position of these blocks keeps for the backward pass."""
    heads = 2 * (c.N + c.num_kv_heads) * c.head_dim  # queries, keys, values and the output
    block = (1 + cross) * (2 * c.D + heads)  # each a norm and a residual sum, attention
    if c.ffn != "none":
        block += 2 * c.D + (4 if c.ffn == "swiglu" else 2) * (c.F or default_ffn_dim(c.D, c.ffn))
    return layers * (c.D if c.remat else block) + (block if c.remat else 0) + 3 * c.D  # with remat, one block that is being recomputed


def run_blocks(stack: nnx.Module, x_BTD: Array, valid_BT: Array | None, key: Array | None, *memory: Array | None) -> Array:
    """What embedding dropout, the blocks and the last norm of a `stack` (an encoder or a decoder) make of embedded tokens."""
    embedding_key, *block_keys = split_key(key, 1 + len(stack.blocks))
    x_BTD = dropout(x_BTD, stack.config.dropout, embedding_key)
    for block, block_key in zip(stack.blocks, block_keys):
        arguments = (x_BTD, valid_BT, block_key, *memory)
        x_BTD = rematerialized(block, *arguments) if stack.config.remat else block(*arguments)
    return stack.final_norm(x_BTD) if stack.config.norm_position == "pre" else x_BTD


class Transformer(nnx.Module):
    """Tokens to logits through blocks whose attention is any variant, or several cycled over the layers.

    One model with three settings (Vaswani et al. 2017; Lin et al. 2022, sec. 2.3): `causal` makes it a decoder, else it is an encoder; with a source (`source_vocab`,
    `source_len`) it is a decoder that reads an encoder by cross-attention. `model.where` says in which of the three places the swept variant stands.

    With `per_token` every position gets logits, read out with the input embeddings if these are tied; without, positions are
    pooled into one vector with a head of its own, and `tie_embeddings` has no meaning. The residual stream runs in model.dtype,
    norms and logits in float32.
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
        source_vocab: int = 0,
        source_len: int = 0,
        image_shape: tuple[int, int, int] | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = model
        self.max_len = max_len
        self.per_token = per_token
        self.num_outputs = num_outputs
        self.tied = ties(model.tie_embeddings, per_token, num_outputs, inputs_vocab)
        self.reads_picture = image_shape is not None
        self.source_len = source_len = cells_of(image_shape) if self.reads_picture else source_len
        reads = source_len > 0
        if reads and not causal:
            raise UserError("what reads a source is a decoder; causal=False with a source has no meaning")
        if reads and model.share_embeddings and source_vocab > inputs_vocab:
            raise UserError(f"share_embeddings=True: {source_vocab} source tokens do not fit {inputs_vocab} target embeddings; use share_embeddings=False")
        if self.reads_picture and model.share_embeddings:
            raise UserError("share_embeddings=True: a picture has no token embeddings to share; use share_embeddings=False")
        specs = specs_by_place(model, variant, reads, self.reads_picture)

        dtype = jnp.dtype(model.dtype)
        self.embedding = Embedding(inputs_vocab, model.D, model.positions, max_len, dtype, rngs)
        # A stream of its own: what a variant draws must not shift the draws of the layers after it.
        attention_rngs = nnx.Rngs(rngs.params())
        shared: dict[str, dict] = {place: {} for place in specs}

        def make(place, layer, max_len, causal):
            spec = specs[place][layer % len(specs[place])]
            heads = dict(num_heads=model.N, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim)
            like = dict(max_len=max_len, causal=causal, dtype=dtype, backend=attention.backend, padding="end")
            return make_attention(spec, **heads, **like, shared=shared[place], rngs=attention_rngs)

        self.blocks = nnx.List([])
        for layer in range(model.layers):
            own = make("decoder", layer, max_len, causal)
            cross = make("cross", layer, max(max_len, source_len), False) if reads else None
            if cross is not None:
                cross.check_cross()
            self.blocks.append(Block(model, own, cross, rngs=rngs))
        if model.norm_position == "pre":
            self.final_norm = NORMS[model.norm](model.D)
        if not self.tied:
            self.readout = normal(rngs.params(), (num_outputs, model.D), EMBEDDING_STD)
        if self.reads_picture:
            # The swept variant has no place in it; what attends to the grid of features is the decoder.
            self.encoder = ConvolutionEncoder(image_shape, model.D, dtype=dtype, backend=attention.backend, rngs=rngs)
        elif reads:
            attentions = [make("encoder", layer, source_len, False) for layer in range(model.encoder_layers or model.layers)]
            self.encoder = Encoder(model, attentions, vocab=source_vocab, max_len=source_len, rngs=rngs)
            if model.share_embeddings:
                self.encoder.embedding.tokens = self.embedding.tokens

    def attentions(self, T: int) -> list[tuple[Attention, int, int]]:
        """(attention, queries, keys) of every layer of the model, for T positions and a source of full length."""
        S = self.source_len
        found = [(attention, T, S if n else T) for block in self.blocks for n, attention in enumerate(block.attentions)]
        return found + [(block.mixer.attention, S, S) for block in (self.encoder.blocks if S and not self.reads_picture else ())]

    def __call__(
        self,
        inputs_BT: Int[Array, "B T"],
        *,
        source: Int[Array, "B S"] | Float[Array, "B h w c"] | None = None,
        source_valid: Bool[Array, "B S"] | None = None,
        valid_BT: Bool[Array, "B T"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T V"] | Float[Array, "B C"]:
        """Float32 logits, [B, T, num_outputs] or pooled [B, num_outputs].

        Positions that are not valid, which stand behind all others, are seen by none. `key` is this call's randomness (dropout, hashing, sampling);
        None means deterministic evaluation. Raises UserError for T > max_len.
        """
        if inputs_BT.shape[1] > self.max_len:
            raise UserError(f"length {inputs_BT.shape[1]} is over max_len={self.max_len} that this model was built for")
        check_source(source, self.source_len, self.reads_picture)
        memory: tuple = ()
        if self.source_len:
            key, encoder_key = split_key(key, 2)
            memory = (self.encode(source, source_valid, encoder_key), source_valid)
        x_BTD = run_blocks(self, self.embedding(inputs_BT), valid_BT, key, *memory)
        return self._read_out(x_BTD if self.per_token else pool(x_BTD, valid_BT, self.config.pool))

    def encode(self, source: Array, source_valid: Array | None = None, key: Array | None = None) -> Float[Array, "B S D"]:
        """The memory that the decoder reads."""
        if self.reads_picture:
            return self.encoder(source, key=key)
        return self.encoder(source, valid_BS=source_valid, key=key)

    def start(self, B: int, max_len: int, *, source: Array | None = None, source_valid: Array | None = None) -> Cache:
        """The state of generation before the first of at most `max_len` tokens. Raises Unsupported unless the model is a decoder, UserError for more than it has positions."""
        check_source(source, self.source_len, self.reads_picture)
        memory = (self.encode(source, source_valid), source_valid) if self.source_len else ()
        return {str(n): block.init_cache(B, max_len, *memory) for n, block in enumerate(self.blocks)} | {"t": jnp.zeros((), jnp.int32), "room": room(B, max_len)}

    def step(self, tokens_B: Int[Array, "B"], cache: Cache) -> tuple[Float[Array, "B V"], Cache]:
        """(logits after one more token of each sequence, the state after it): what the parallel form gives at position cache['t'], in evaluation."""
        t = cache["t"]
        x_B1D = self.embedding(tokens_B[:, None], t)
        new = {"t": t + 1, "room": cache["room"]}
        for n, block in enumerate(self.blocks):
            x_B1D, new[str(n)] = block.step(x_B1D, cache[str(n)])
        if self.config.norm_position == "pre":
            x_B1D = self.final_norm(x_B1D)
        return self._read_out(x_B1D[:, 0]), new

    def attention_modules(self) -> list[Attention]:
        """What of the model is attention."""
        return [attention for attention, _, _ in self.attentions(self.max_len)]

    def flops_per_step(self, B: int, T: int) -> dict[str, float]:
        """Useful FLOPs of one training step, forward and backward: of the `attention` variants alone, and of the whole `model`.

        Every matrix costs 2 FLOPs a parameter and token forward and twice that backward (Kaplan et al. 2020, sec. 2.1): 6 in
        all. Embedding look-ups, norms and what remat recomputes count nothing. A source counts at its full length. The model may be abstract (nnx.eval_shape).
        """
        c, S = self.config, self.source_len
        attention = 3 * sum(layer.flops(B, queries, keys) for layer, queries, keys in self.attentions(T))
        tokens = T * _matrices(self.blocks) + self.num_outputs * c.D * (T if self.per_token else 1)
        if S:
            # Keys and values of cross-attention are of the source's tokens, the rest of a decoder block of the target's.
            of_memory = sum(p.size for block in self.blocks for p in (block.cross.value, *(() if block.cross.shares_query_key else (block.cross.key,))))
            tokens += self.encoder.multiply_adds() + (S - T) * of_memory
        if c.positions == "sinusoidal_concat":
            tokens += 2 * c.D * c.D * T
        return {"attention": float(attention), "model": float(attention + 6 * B * tokens)}

    def activation_bytes(self, B: int, T: int) -> float:
        """An estimate of what a training step keeps for its backward pass: the inputs of every product, norm and nonlinearity, and the logits twice.

        What attention keeps beyond its inputs and outputs is O(T) in every variant and not counted. The model may be abstract.
        """
        c = self.config
        width = 2 if c.dtype == "bfloat16" else 4
        logits = 2 * 4 * self.num_outputs * (T if self.per_token else 1)
        encoder = self.encoder.kept() if self.source_len else 0
        return float(B * (width * (T * kept_by_blocks(c, c.layers, cross=self.source_len > 0) + encoder) + logits))

    def _read_out(self, features: Array) -> Array:
        return read_out(features, self.embedding.tokens[: self.num_outputs] if self.tied else self.readout[...])


def specs_by_place(model: config.Model, variant: Sequence[Spec], reads: bool, reads_picture: bool) -> dict[str, Sequence[Spec]]:
    """The variants of the layers in each place that a model has, which reads a source (a picture) or not: what is swept, where model.where says so.

    Elsewhere it is `full`, and in cross-attention model.cross. A model that reads nothing has one stack, whatever it is called. Raises UserError.
    """
    places = ("encoder", "decoder", "cross") if reads and not reads_picture else ("decoder", "cross") if reads else ("encoder", "decoder")
    swept = set(model.where) & set(places)
    if not swept:
        raise UserError(f"where={','.join(model.where)}: this model has no such place for the variant; it has {' and '.join(places)}")
    _check_listed(model, variant, swept if reads else {"decoder"})
    if not reads:
        return {"decoder": variant}
    others = {place: parse_variant(model.cross if place == "cross" else "full") for place in places if place not in swept}
    if "cross" in others:
        _check_listed(model, others["cross"], {"cross"}, f"model.cross={model.cross}: ")
    return others | {place: variant for place in swept}


def _check_listed(model: config.Model, specs: Sequence[Spec], places: set[str], whose: str = "") -> None:
    """Raises UserError for a list over layers that is longer than the deepest of the stacks it stands in, by the setting that says how deep."""
    of = {"encoder": "encoder_layers" if model.encoder_layers else "layers"}
    setting, layers = max(((name, getattr(model, name)) for name in (of.get(place, "layers") for place in sorted(places))), key=lambda depth: depth[1])
    if len(specs) > layers:
        raise UserError(f"{whose}a list of {len(specs)} variants, where {setting}={layers}; list at most {layers}")


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


def param_counts(model: nnx.Module) -> dict[str, int]:
    """Trained numbers in the whole model (`total`) and inside its attention variants (`attention`), shared ones counted once."""
    return {"total": _count(model), "attention": _count(nnx.List(model.attention_modules()))}


def _matrices(blocks: nnx.Module) -> int:
    """Numbers in the matrices of blocks, without what is inside their attention variants."""
    inside = nnx.List([attention for block in blocks for attention in block.attentions])
    return _count(blocks, min_ndim=2) - _count(inside, min_ndim=2)


def _count(module: nnx.Module, min_ndim: int = 0) -> int:
    return sum(p.size for p in jax.tree.leaves(nnx.state(module, nnx.Param)) if p.ndim >= min_ndim)
