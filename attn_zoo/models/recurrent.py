"""What came before the Transformer: a recurrent encoder and decoder, and the alignments by which the decoder reads the encoder's states.

The encoder reads the source in both directions (Bahdanau et al. 2015, sec. 3.2): memory_j = [forward_j, backward_j]. The decoder starts from tanh(W [last
forward, first backward]). Of a picture, the memory is a grid of convolutional features, and the decoder starts from tanh(W mean) (Xu et al. 2015, sec. 3.1).
Where the alignment stands differs between its authors, and each of `ALIGNMENTS` says which it follows: 'before', a context c_t found by the state s_{t-1}
enters the cell with the last token, and what is read out is tanh(W [s_t, c_t, token]) (Bahdanau et al. 2015, with tanh in the place of maxout; Xu et al. 2015);
'after', c_t is found by the new state h_t, what is read out is h~_t = tanh(W [c_t, h_t]), and h~_{t-1} enters the cell with the token, input feeding (Luong et
al. 2015, eq. 5 and sec. 3.3).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from attn_zoo import config
from attn_zoo.attention import VARIANTS
from attn_zoo.attention.base import Loss, Paper, ScoreFunction, Statistic, leave
from attn_zoo.attention.hard import Options as HardOptions
from attn_zoo.models.layers import EMBEDDING_STD, check_source, dropout, normal, read_out
from attn_zoo.models.pictures import ConvolutionEncoder, cells_of
from attn_zoo.models.transformer import split_key
from attn_zoo.ops.block_mask import count_pairs
from attn_zoo.ops.patterns import Band
from attn_zoo.spec import Spec, UserError, check, check_int

NEG = -1e30  # a score that is not seen: finite, so that differences of such are not NaN
State = tuple[Array, ...]  # (h,) of a GRU, (h, c) of an LSTM


def gru(projected_BG: Array, state: State, kernel_DG: Array) -> State:
    """One step of a gated recurrent unit from W x + b, with gates z, r and the candidate side by side. Cho et al. 2014, eq. 5 to 8: r before the product with U."""
    (h,) = state
    D = h.shape[-1]
    z, r = jnp.split(jax.nn.sigmoid(projected_BG[..., : 2 * D] + h @ kernel_DG[:, : 2 * D]), 2, axis=-1)
    candidate = jnp.tanh(projected_BG[..., 2 * D :] + (r * h) @ kernel_DG[:, 2 * D :])
    return (z * h + (1 - z) * candidate,)


def lstm(projected_BG: Array, state: State, kernel_DG: Array) -> State:
    """One step of a long short-term memory from W x + b, with gates i, f, the candidate and o side by side. Hochreiter & Schmidhuber 1997; Gers et al. 2000."""
    h, c = state
    i, f, candidate, o = jnp.split(projected_BG + h @ kernel_DG, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(candidate)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


CELLS: dict[str, tuple[Callable, int]] = {"gru": (gru, 3), "lstm": (lstm, 4)}  # the step, and how many [D] it takes


class Cell(nnx.Module):
    """The parameters of a recurrent cell; an LSTM's forget gate starts with a bias of 1 (Gers et al. 2000)."""

    def __init__(self, kind: str, inputs: int, D: int, dtype: Any, rngs: nnx.Rngs):
        self.kind = kind
        self.D = D
        self.dtype = dtype
        _, gates = CELLS[kind]
        self.input_kernel = normal(rngs.params(), (inputs, gates * D), inputs**-0.5)
        self.state_kernel = normal(rngs.params(), (D, gates * D), D**-0.5)
        bias = jnp.zeros(gates * D)
        self.bias = nnx.Param(bias.at[D : 2 * D].set(1.0) if kind == "lstm" else bias)

    def project(self, x: Array) -> Array:
        """W x + b, which does not wait for the state before."""
        return x @ self.input_kernel[...].astype(self.dtype) + self.bias[...].astype(self.dtype)

    def start(self, h_BD: Array) -> State:
        """The state that begins with output h; an LSTM's memory begins empty."""
        return (h_BD,) if self.kind == "gru" else (h_BD, jnp.zeros_like(h_BD))

    def advance(self, projected_BG: Array, state: State) -> State:
        return CELLS[self.kind][0](projected_BG, state, self.state_kernel[...].astype(self.dtype))

    def read(self, x_BSI: Array, valid_BS: Array | None, reverse: bool) -> tuple[Array, Array]:
        """(outputs [B, S, D], the last of them [B, D]); at an invalid position the state stays as it is, and the output is zero."""
        B, S = x_BSI.shape[:2]
        valid_BS = jnp.ones((B, S), bool) if valid_BS is None else valid_BS

        def step(state, inputs):
            projected_BG, valid_B = inputs
            state = tuple(jnp.where(valid_B[:, None], new, old) for new, old in zip(self.advance(projected_BG, state), state))
            return state, jnp.where(valid_B[:, None], state[0], 0)

        state, outputs = jax.lax.scan(step, self.start(jnp.zeros((B, self.D), self.dtype)), (self.project(x_BSI).swapaxes(0, 1), valid_BS.T), reverse=reverse)
        return outputs.swapaxes(0, 1), state[0]


class RecurrentEncoder(nnx.Module):
    """Source tokens to memory [B, S, D], half of it read forwards and half backwards, and a summary [B, D]: the last state of each direction."""

    def __init__(self, model: config.Model, *, vocab: int, max_len: int, dtype: Any, rngs: nnx.Rngs):
        self.dropout = model.dropout
        self.max_len = max_len
        self.dtype = dtype
        self.tokens = normal(rngs.params(), (vocab, model.D), model.D**-0.5)
        self.forwards = nnx.List([Cell(model.cell, model.D, model.D // 2, dtype, rngs) for _ in range(model.encoder_layers or model.layers)])
        self.backwards = nnx.List([Cell(model.cell, model.D, model.D // 2, dtype, rngs) for _ in range(model.encoder_layers or model.layers)])

    def __call__(self, source_BS: Int[Array, "B S"], *, valid_BS: Bool[Array, "B S"] | None = None, key: Key[Array, ""] | None = None) -> tuple[Array, Array]:
        x_BSD = embed(self.tokens, source_BS, self.dtype)
        for forward, backward, layer_key in zip(self.forwards, self.backwards, split_key(key, len(self.forwards))):
            x_BSD = dropout(x_BSD, self.dropout, layer_key)
            (ahead, last), (back, first) = forward.read(x_BSD, valid_BS, False), backward.read(x_BSD, valid_BS, True)
            x_BSD = jnp.concatenate([ahead, back], axis=-1)
        return x_BSD, jnp.concatenate([last, first], axis=-1)

    def multiply_adds(self) -> int:
        """Of one source of full length."""
        return self.max_len * _matrices(self.forwards, self.backwards)

    def kept(self) -> int:
        """About how many numbers the backward pass needs of one source of full length."""
        return self.max_len * (len(self.forwards) * (CELLS[self.forwards[0].kind][1] + 2) + 3) * self.tokens.shape[1]


def embed(tokens: nnx.Param, ids: Array, dtype: Any) -> Array:
    """Token embeddings at unit scale."""
    return (tokens[...][ids] * tokens.shape[1] ** 0.5).astype(dtype)


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """It takes no options."""


@dataclasses.dataclass(frozen=True)
class WindowOptions:
    """window: D, positions on each side of the place that is aligned to."""

    window: int = 10

    def __post_init__(self):
        check_int("window", self.window, 1)


@dataclasses.dataclass(frozen=True)
class Alignment:
    """How a decoder finds its context: `score` of state and memory ('none', 'dot', 'general', 'additive'), where it stands, what it does with the scores."""

    name: str
    paper: Paper
    score: str
    stands: str = "after"
    place: str = ""  # the middle of a window: 'monotonic' or 'predictive'
    hard: bool = False
    options: type = NoOptions
    family: str = "alignment"


_BAHDANAU, _LUONG, _XU = (VARIANTS[name].paper for name in ("additive", "luong_local", "hard"))
_CHO = Paper(
    "cho2014learning",
    "Learning Phrase Representations using {RNN} Encoder-Decoder for Statistical Machine Translation",
    "Cho, Kyunghyun and van Merri{\\\"e}nboer, Bart and Gulcehre, Caglar and Bahdanau, Dzmitry and Bougares, Fethi and Schwenk, Holger and Bengio, Yoshua",
    2014,
    "Proceedings of the 2014 Conference on Empirical Methods in Natural Language Processing",
)

# The alignments by the name that a spec gives. Scores of state s and memory m: dot s'm, general s'W m, additive v' tanh(W s + U m) (Luong's concat is the same).
ALIGNMENTS: dict[str, Alignment] = {
    "none": Alignment("none", _CHO, "none", "before"),  # one fixed context, the summary of the source
    "additive": Alignment("additive", _BAHDANAU, "additive", "before"),
    "dot": Alignment("dot", _LUONG, "dot"),
    "general": Alignment("general", _LUONG, "general"),
    "concat": Alignment("concat", _LUONG, "additive"),
    "local_m": Alignment("local_m", _LUONG, "general", place="monotonic", options=WindowOptions),
    "local_p": Alignment("local_p", _LUONG, "general", place="predictive", options=WindowOptions),
    "hard": Alignment("hard", _XU, "additive", "before", hard=True, options=HardOptions),
}


class Aligner(nnx.Module):
    """The parameters of an alignment, and one step of it."""

    def __init__(self, alignment: Alignment, options: Any, D: int, rngs: nnx.Rngs):
        self.alignment = alignment
        self.options = options
        if alignment.score == "general":
            self.general = normal(rngs.params(), (D, D), D**-0.5)
        if alignment.score == "additive":
            self.query = normal(rngs.params(), (D, D), D**-0.5)
            self.key = normal(rngs.params(), (D, D), D**-0.5)
            self.weight = normal(rngs.params(), (D,), D**-0.5)
        if alignment.place == "predictive":
            self.place_hidden = normal(rngs.params(), (D, D), D**-0.5)
            self.place_weight = normal(rngs.params(), (D,), D**-0.5)

    def pairs(self, T: int, S: int) -> int:
        """How many of T S pairs are weighed; where the window's middle is predicted, as if none were cut at the ends."""
        if not self.alignment.place:
            return T * S
        window = self.options.window
        return count_pairs(Band(window, window), T, S) if self.alignment.place == "monotonic" else T * min(2 * window + 1, S)

    def multiply_adds(self, T: int, S: int) -> int:
        """Of the matrices: some turn every state of the decoder, some every place of the memory."""
        of_states, of_memory = ([name for name in names if hasattr(self, name)] for names in (("query", "place_hidden"), ("key", "general")))
        size = lambda names: sum(getattr(self, name).size for name in names)
        return T * size(of_states) + S * size(of_memory)

    def keys(self, memory_BSD: Array) -> Array:
        """What of the scores depends on the memory alone, made once for all steps; float32."""
        memory_BSD = memory_BSD.astype(jnp.float32)
        kernel = {"general": "general", "additive": "key"}.get(self.alignment.score)
        return memory_BSD if kernel is None else memory_BSD @ getattr(self, kernel)[...]

    def weights(self, query_BD: Array, keys_BSD: Array, valid_BS: Array, t: Array) -> tuple[Array, Array]:
        """(what the memory is weighted by, the logarithm of the softmax it comes from), float32 [B, S]; zero and -inf where nothing may be seen."""
        query_BD, S = query_BD.astype(jnp.float32), keys_BSD.shape[1]
        if self.alignment.score == "additive":
            scores_BS = jnp.tanh((query_BD @ self.query[...])[:, None] + keys_BSD) @ self.weight[...]
        else:
            scores_BS = jnp.einsum("BD,BSD->BS", query_BD, keys_BSD)
        seen_BS, factor_BS = valid_BS, 1.0
        if self.alignment.place:
            place_B1 = jnp.broadcast_to(t, (len(query_BD), 1)).astype(jnp.float32)
            if self.alignment.place == "predictive":
                length_B1 = jnp.max(jnp.where(valid_BS, jnp.arange(1, S + 1), 0), axis=1, keepdims=True)
                place_B1 = length_B1 * jax.nn.sigmoid(jnp.tanh(query_BD @ self.place_hidden[...]) @ self.place_weight[...])[:, None]
                factor_BS = jnp.exp(-2 * ((jnp.arange(S) - place_B1) / self.options.window) ** 2)  # a Gaussian, sigma = D / 2. Luong et al. 2015, eq. 10
            seen_BS = seen_BS & (abs(jnp.arange(S) - place_B1) <= self.options.window)
        log_p_BS = jnp.where(seen_BS, jax.nn.log_softmax(jnp.where(seen_BS, scores_BS, NEG)), -jnp.inf)
        return jnp.exp(log_p_BS) * factor_BS, log_p_BS


def look(options: HardOptions, log_p_BS: Array, key: Array | None, average_B: Array | None) -> tuple[Array, tuple[Array, Array]]:
    """What a hard alignment weighs the memory by, [B, S], and (log p of the place it looks at, the entropy of the choice), [B] each. Xu et al. 2015, sec. 4.1.

    With a key the place is drawn, as the largest of log p + Gumbel noise, and learned by one of the estimators of attn_zoo.attention.hard; without, it is the
    likeliest. Examples of which average_B is true take the softmax itself.
    """
    seen_BS = log_p_BS > -jnp.inf
    noisy_BS = jnp.where(seen_BS, log_p_BS if key is None else log_p_BS + jax.random.gumbel(key, log_p_BS.shape), NEG)
    chosen_BS = jax.nn.one_hot(noisy_BS.argmax(axis=-1), log_p_BS.shape[-1]) * seen_BS
    softmax_BS, finite_BS = jnp.exp(log_p_BS), jnp.where(seen_BS, log_p_BS, 0.0)
    said = (chosen_BS * finite_BS).sum(axis=-1), -(softmax_BS * finite_BS).sum(axis=-1)
    if key is None:
        return chosen_BS, said
    if options.estimator == "straight_through":
        relaxed_BS = jax.nn.softmax(noisy_BS / options.temperature) * seen_BS
        return chosen_BS + (relaxed_BS - jax.lax.stop_gradient(relaxed_BS)), said
    return jnp.where(average_B[:, None], softmax_BS, chosen_BS), said


class Recurrent(nnx.Module):
    """Tokens to logits by a recurrent decoder that reads a source through an alignment.

    Called like a Transformer with a source, and generates like it (`start`, `step`). The encoder may be any that gives (memory, summary).
    """

    def __init__(
        self,
        model: config.Model,
        *,
        alignment: Spec,
        inputs_vocab: int,
        num_outputs: int,
        max_len: int,
        source_vocab: int,
        source_len: int,
        image_shape: tuple[int, int, int] | None = None,
        rngs: nnx.Rngs,
    ):
        check(model.D % 2 == 0, "D", model.D, f"must be even, half for each direction of the encoder; nearest: {model.D + 1}")
        self.reads_picture = image_shape is not None
        source_len = cells_of(image_shape) if self.reads_picture else source_len
        if not source_len:
            raise UserError("a recurrent model reads a source: use a task of pairs, such as dates or reverse, or of pictures")
        D, dtype = model.D, jnp.dtype(model.dtype)
        entry = ALIGNMENTS[alignment.name]
        self.config = model
        self.max_len, self.source_len, self.num_outputs = max_len, source_len, num_outputs
        self.per_token = True
        self.dtype = dtype
        self.stands = entry.stands
        self.tokens = normal(rngs.params(), (inputs_vocab, D), D**-0.5)
        if self.reads_picture:
            self.encoder = ConvolutionEncoder(image_shape, D, dtype=dtype, rngs=rngs)
        else:
            self.encoder = RecurrentEncoder(model, vocab=source_vocab, max_len=source_len, dtype=dtype, rngs=rngs)
        self.cells = nnx.List([Cell(model.cell, D if layer else 2 * D, D, dtype, rngs) for layer in range(model.layers)])
        self.first = nnx.List([normal(rngs.params(), (D, D), D**-0.5) for _ in range(model.layers)])
        self.combine = normal(rngs.params(), ((3 if entry.stands == "before" else 2) * D, D), (2 * D) ** -0.5)
        self.readout = normal(rngs.params(), (num_outputs, D), EMBEDDING_STD)
        self.aligner = Aligner(entry, alignment.resolve("alignment", entry.options), D, rngs)
        if self.scores_draws:
            self.log_prob, self.bonus, self.entropy = ScoreFunction(jnp.zeros(())), Loss(jnp.zeros(())), Statistic(jnp.zeros(()))

    @property
    def scores_draws(self) -> bool:
        """Whether a hard alignment learns by the score of what it draws (REINFORCE)."""
        return self.aligner.alignment.hard and self.aligner.options.estimator == "score"

    def __call__(
        self,
        inputs_BT: Int[Array, "B T"],
        *,
        source: Int[Array, "B S"] | Float[Array, "B h w c"],
        source_valid: Bool[Array, "B S"] | None = None,
        valid_BT: Bool[Array, "B T"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T V"]:
        """Float32 logits of every position, given the tokens before. `key` is this call's randomness (dropout, samples); None means evaluation."""
        return self._teach(inputs_BT, source, source_valid, valid_BT, key)[0]

    def alignments(self, inputs_BT: Array, *, source: Array, source_valid: Array | None = None) -> Float[Array, "B T S"]:
        """What each position of the target weighs the memory by."""
        return self._teach(inputs_BT, source, source_valid, None, None)[1]

    def _teach(self, inputs_BT, source, source_valid, valid_BT, key):
        (B, T), (start_key, token_key, read_key, hard_key, average_key) = inputs_BT.shape, split_key(key, 5)
        cache = self.start(B, T, source=source, source_valid=source_valid, key=start_key)
        x_BTD = dropout(embed(self.tokens, inputs_BT, self.dtype), self.config.dropout, token_key)
        hard = self.aligner.alignment.hard and key is not None
        average_B = None  # which examples take the average, all along
        if hard and self.scores_draws:
            average_B = jax.random.bernoulli(average_key, float(self.aligner.options.expected), (B,))

        def step(cache, inputs):
            x_BD, step_key = inputs
            features_BD, weights_BS, said, cache = self._advance(x_BD, cache, step_key if hard else None, average_B)
            return cache, (features_BD, weights_BS, said)

        keys = jax.random.split(hard_key, T) if hard else jnp.zeros((T, 0))
        _, (features, weights, said) = jax.lax.scan(step, cache, (x_BTD.swapaxes(0, 1), keys))
        if average_B is not None:
            valid_BT = jnp.ones((B, T), bool) if valid_BT is None else valid_BT
            self._leave(*(x.T for x in said), valid_BT, average_B)
        elif self.scores_draws:
            self._put(log_prob=jnp.zeros(()), bonus=jnp.zeros(()))
        features_BTD = dropout(features.swapaxes(0, 1), self.config.dropout, read_key)
        return self._read_out(features_BTD), weights.swapaxes(0, 1)

    def encode(self, source: Array, source_valid: Array | None = None, key: Array | None = None) -> tuple[Float[Array, "B S D"], Float[Array, "B D"]]:
        """(the memory that the decoder reads, the summary that it starts from)."""
        check_source(source, self.source_len, self.reads_picture)
        if self.reads_picture:
            memory_BSD = self.encoder(source, key=key)
            return memory_BSD, memory_BSD.mean(axis=1)
        return self.encoder(source, valid_BS=source_valid, key=key)

    def start(self, B: int, max_len: int, *, source: Array, source_valid: Array | None = None, key: Array | None = None) -> dict[str, Any]:
        """The state before the first token; its size does not depend on max_len."""
        memory_BSD, summary_BD = self.encode(source, source_valid, key)
        layers = {str(n): cell.start(jnp.tanh(summary_BD @ first[...].astype(self.dtype))) for n, (cell, first) in enumerate(zip(self.cells, self.first))}
        cache = {"t": jnp.zeros((), jnp.int32), "layers": layers}
        if self.aligner.alignment.score == "none":
            return cache | {"context": summary_BD}
        valid_BS = jnp.ones(memory_BSD.shape[:2], bool) if source_valid is None else source_valid
        cache |= {"memory": memory_BSD, "keys": self.aligner.keys(memory_BSD), "valid": valid_BS}
        return cache if self.stands == "before" else cache | {"fed": jnp.zeros_like(summary_BD)}

    def step(self, tokens_B: Int[Array, "B"], cache: dict[str, Any]) -> tuple[Float[Array, "B V"], dict[str, Any]]:
        """(logits after one more token of each sequence, the state after it)."""
        features_BD, _, _, cache = self._advance(embed(self.tokens, tokens_B, self.dtype), cache, None, None)
        return self._read_out(features_BD), cache

    def _advance(self, x_BD, cache, key, average_B):
        """(what is read out [B, D], weights [B, S], (log p, entropy) of a hard alignment's draw [B] each, the state after the token)."""
        top = str(len(self.cells) - 1)
        if self.stands == "before":
            context_BD, weights_BS, said = self._context(cache["layers"][top][0], cache, key, average_B)
            layers = self._cells(jnp.concatenate([x_BD, context_BD], axis=-1), cache["layers"])
            combined = [layers[top][0], context_BD, x_BD]
        else:
            layers = self._cells(jnp.concatenate([x_BD, cache["fed"]], axis=-1), cache["layers"])
            context_BD, weights_BS, said = self._context(layers[top][0], cache, key, average_B)
            combined = [context_BD, layers[top][0]]
        features_BD = jnp.tanh(jnp.concatenate(combined, axis=-1) @ self.combine[...].astype(self.dtype))
        new = cache | {"t": cache["t"] + 1, "layers": layers}
        return features_BD, weights_BS, said, new if self.stands == "before" else new | {"fed": features_BD}

    def _cells(self, x_BI, layers):
        new = {}
        for n, cell in enumerate(self.cells):
            new[str(n)] = cell.advance(cell.project(x_BI), layers[str(n)])
            x_BI = new[str(n)][0]
        return new

    def _context(self, query_BD, cache, key, average_B):
        zeros_B = jnp.zeros(len(query_BD))
        if "context" in cache:
            return cache["context"], jnp.zeros((len(query_BD), self.source_len)), (zeros_B, zeros_B)
        weights_BS, log_p_BS = self.aligner.weights(query_BD, cache["keys"], cache["valid"], cache["t"])
        said = (zeros_B, zeros_B)
        if self.aligner.alignment.hard:
            weights_BS, said = look(self.aligner.options, log_p_BS, key, average_B)
        return jnp.einsum("BS,BSD->BD", weights_BS.astype(self.dtype), cache["memory"]), weights_BS, said

    def _leave(self, log_p_BT, entropy_BT, valid_BT, average_B):
        """log p of the samples of each example, the entropy bonus and the mean entropy in nats. Xu et al. 2015, eq. 11 and 12."""
        options = self.aligner.options
        log_prob_B = jnp.where(average_B, 0.0, (log_p_BT * valid_BT).sum(axis=1))
        entropy = (entropy_BT * valid_BT).sum() / jnp.maximum(valid_BT.sum(), 1)
        self._put(log_prob=options.score_weight * log_prob_B, bonus=-options.entropy_weight * entropy, entropy=jax.lax.stop_gradient(entropy))

    def _put(self, **values):
        for name, value in values.items():
            leave(self, name, value)

    def _read_out(self, features):
        return read_out(features, self.readout[...])

    def attentions(self, T: int) -> list:
        """None of the zoo's."""
        return []

    def attention_modules(self) -> list[nnx.Module]:
        """What of the model is attention."""
        return [self.aligner]

    def flops_per_step(self, B: int, T: int) -> dict[str, float]:
        """Useful FLOPs of one training step: `attention`, the alignment at all steps; `model`, everything. 6 a parameter and token, as of the Transformer."""
        D, S = self.config.D, self.source_len
        per_pair = {"none": 0, "additive": 2 * D + 2 * D + 2 * D}.get(self.aligner.alignment.score, 4 * D)
        attention = 3.0 * B * self.aligner.pairs(T, S) * per_pair + 6.0 * B * self.aligner.multiply_adds(T, S)
        decoder = _matrices(self.cells) + self.combine.size + self.readout.size
        return {"attention": attention, "model": attention + 6.0 * B * (T * decoder + self.encoder.multiply_adds())}

    def activation_bytes(self, B: int, T: int) -> float:
        """An estimate of what a training step keeps: gates and states of every position, weights of every pair, and the logits twice."""
        D, S, c = self.config.D, self.source_len, self.config
        decoder = T * (c.layers * (CELLS[c.cell][1] + 2) + 6) * D
        return float(4 * B * (decoder + self.encoder.kept() + T * S * 4 + 2 * T * self.num_outputs))


def _matrices(*modules: nnx.Module) -> int:
    """How many numbers stand in the matrices of these modules."""
    return sum(p.size for module in modules for p in jax.tree.leaves(nnx.state(module, nnx.Param)) if p.ndim >= 2)
