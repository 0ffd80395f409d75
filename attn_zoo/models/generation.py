"""Generation from any model with `start` and `step`: greedy, by sampling, and beam search; batched, under jit, until all sequences have ended.

A model's `step(tokens_B, cache)` gives (logits_BV, cache); every array of a cache leads with its rows, except scalars. A cache made for so many steps and no more
holds a `room` for them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Key

from attn_zoo.spec import check, check_choice, check_int, check_number

Step = Callable[[Array, Any], tuple[Array, Any]]
NEG = -1e30  # log-probability of what cannot be: finite, so that sums of it can be compared


@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature: 0 is greedy; top_k: the k most probable tokens alone, 0 is all (Fan et al. 2018); top_p: the smallest set of tokens that holds
    this probability (nucleus sampling, Holtzman et al. 2020), of what top_k leaves."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        check_number("temperature", self.temperature, 0)
        check_int("top_k", self.top_k, 0)
        check_number("top_p", self.top_p, 0, 1)
        check(self.top_p > 0, "top_p", self.top_p, "must be above 0")


GREEDY = Sampling(temperature=0.0)


@dataclasses.dataclass(frozen=True)
class Beam:
    """width: hypotheses kept; penalty: how their summed log-probabilities are divided, so that short ones do not win by being short.

    'gnmt' divides by ((5 + length) / 6)^alpha (Wu et al. 2016, eq. 14; Vaswani et al. 2017 took alpha = 0.6 and width 4), 'power' by length^alpha.
    """

    width: int = 4
    alpha: float = 0.6
    penalty: str = "gnmt"

    def __post_init__(self):
        check_int("width", self.width, 1)
        check_number("alpha", self.alpha, 0)
        check_choice("penalty", self.penalty, ("gnmt", "power"))

    def normalize(self, log_prob: Array, length: Array | int) -> Array:
        """The score of a hypothesis of `length` generated tokens, its end included."""
        return log_prob / (((5 + length) / 6) ** self.alpha if self.penalty == "gnmt" else jnp.asarray(length, jnp.float32) ** self.alpha)


def room(B: int, steps: int) -> Array:
    """An array of no bytes, whose shape tells for how many steps of B sequences a cache was made."""
    return jnp.zeros((B, steps, 0))


def _check_room(cache: Any, max_len: int) -> None:
    if isinstance(cache, dict) and "room" in cache:  # the last token is written and not read
        steps = cache["room"].shape[1]
        check(max_len <= steps + 1, "max_len", max_len, f"must be at most {steps + 1}: the cache was made for {steps} steps, and the last token takes none")


def restrict(logits_BV: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits over the temperature, the greatest at 0, NEG where top_k or top_p leave a token out. The most probable token always stays."""
    # Below the greatest and no colder than float32 can divide by, so that nothing overflows.
    logits_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / max(sampling.temperature, 1e-30)
    order_BV = jnp.argsort(-logits_BV, axis=-1)  # equal ones by their ids
    rank_BV = jnp.argsort(order_BV, axis=-1)
    if sampling.top_k:
        logits_BV = jnp.where(rank_BV < sampling.top_k, logits_BV, NEG)
    if sampling.top_p < 1:
        p_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1))
        kept_BV = jnp.cumsum(p_BV, axis=-1) - p_BV < sampling.top_p  # while what stands before holds less
        logits_BV = jnp.where(jnp.take_along_axis(kept_BV, rank_BV, axis=-1), logits_BV, NEG)
    return logits_BV


def sample(
    step: Step,
    cache: Any,
    prompt_BP: Int[Array, "B P"],
    max_len: int,
    *,
    lengths_B: Int[Array, "B"] | None = None,
    end: int | None = None,
    pad: int = 0,
    sampling: Sampling = GREEDY,
    key: Key[Array, ""] | None = None,
) -> tuple[Int[Array, "B L"], Float[Array, "B"]]:
    """(tokens of prompt and continuation, [B, max_len], with `pad` behind `end`; log-probability of each continuation under the model).

    The cache is fresh, from the model's `start`. Prompts may differ in length: row b's is its first lengths[b] tokens, at least one. Greedy unless a temperature is given, which needs a `key`.
    """
    check(prompt_BP.shape[1] <= max_len, "max_len", max_len, f"must be at least the prompt's length, {prompt_BP.shape[1]}")
    _check_room(cache, max_len)
    check(sampling.temperature == 0 or key is not None, "key", key, "sampling with a temperature needs a random key")
    B, P = prompt_BP.shape
    lengths_B = jnp.full(B, P) if lengths_B is None else lengths_B
    tokens_BL = jnp.full((B, max_len), pad, jnp.int32).at[:, :P].set(prompt_BP)

    def more(state):
        t, _, _, ended_B, _ = state
        return (t < max_len - 1) & ~ended_B.all()

    def advance(state):
        t, tokens_BL, log_prob_B, ended_B, cache = state
        logits_BV, cache = step(lax.dynamic_slice_in_dim(tokens_BL, t, 1, 1)[:, 0], cache)
        if sampling.temperature == 0:
            drawn_B = logits_BV.argmax(axis=-1)
        else:
            drawn_B = jax.random.categorical(jax.random.fold_in(key, t), restrict(logits_BV, sampling))
        in_prompt_B = t + 1 < lengths_B
        given_B = lax.dynamic_slice_in_dim(tokens_BL, t + 1, 1, 1)[:, 0]
        next_B = jnp.where(in_prompt_B, given_B, jnp.where(ended_B, pad, drawn_B)).astype(jnp.int32)
        written_B = ~in_prompt_B & ~ended_B
        log_p_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BV), next_B[:, None], axis=-1)[:, 0]
        log_prob_B = log_prob_B + jnp.where(written_B, log_p_B, 0.0)
        ended_B = ended_B | (written_B & (next_B == end)) if end is not None else ended_B
        return t + 1, lax.dynamic_update_slice_in_dim(tokens_BL, next_B[:, None], t + 1, 1), log_prob_B, ended_B, cache

    # What stands behind a shorter prompt is not part of it.
    tokens_BL = jnp.where(jnp.arange(max_len) < lengths_B[:, None], tokens_BL, pad)
    start = (jnp.zeros((), jnp.int32), tokens_BL, jnp.zeros(B), jnp.zeros(B, bool), cache)
    _, tokens_BL, log_prob_B, _, _ = lax.while_loop(more, advance, start)
    return tokens_BL, log_prob_B


def write(model: nnx.Module, begin: int, end: int, T: int, *, source: Array, source_valid: Array | None = None) -> Int[Array, "B T"]:
    """What the model says of each source, greedily, up to T tokens: without `begin`, with `end`, zeros behind it."""
    prompt_B1 = jnp.full((len(source), 1), begin)
    cache = model.start(len(source), T, source=source, source_valid=source_valid)
    return sample(model.step, cache, prompt_B1, T + 1, end=end)[0][:, 1:]


def beam_search(
    step: Step, cache: Any, prompt_BP: Int[Array, "B P"], max_len: int, *, end: int, pad: int = 0, beam: Beam = Beam()
) -> tuple[Int[Array, "B W L"], Float[Array, "B W"]]:
    """(tokens of the best hypotheses, prompt included, best first [B, W, max_len]; their scores [B, W]), from a fresh cache of the model's `start`.

    At each step every hypothesis is continued by every token; those ended by `end` among the best W leave the beam with their score, the best W others go
    on. A row's search stops when no unfinished hypothesis, at its length now, scores above the worst of W finished ones, whatever the other rows do, or at
    max_len, where the unfinished count as they are.
    """
    (B, P), W = prompt_BP.shape, beam.width
    check(P < max_len, "max_len", max_len, f"must be more than the prompt's length, {P}")
    _check_room(cache, max_len)
    rows = lambda x, index_BW: jnp.take_along_axis(x, index_BW.reshape(B, -1, *(1,) * (x.ndim - 2)), axis=1)
    flat = lambda x: x.reshape(B * W, *x.shape[2:])

    read = lambda t, cache: step(lax.dynamic_index_in_dim(prompt_BP, t, 1, keepdims=False), cache)[1]
    cache = lax.fori_loop(0, P - 1, read, cache)  # the last token of the prompt opens the search
    cache = jax.tree.map(lambda x: jnp.repeat(x, W, axis=0) if x.ndim else x, cache)
    tokens = jnp.full((B, W, max_len), pad, jnp.int32).at[:, :, :P].set(prompt_BP[:, None])
    log_prob = jnp.where(jnp.arange(W) == 0, 0.0, NEG) * jnp.ones((B, 1))  # the copies of the prompt are one hypothesis
    finished = (jnp.full_like(tokens, pad).at[:, :, :P].set(prompt_BP[:, None]), jnp.full((B, W), NEG))

    def more(state):
        t, open_B, *_ = state
        return (t < max_len - 1) & open_B.any()

    def advance(state):
        t, open_B, tokens, log_prob, finished, cache = state
        logits, cache = step(flat(lax.dynamic_slice_in_dim(tokens, t, 1, 2))[:, 0], cache)
        V = logits.shape[-1]
        total = (log_prob[..., None] + jax.nn.log_softmax(logits).reshape(B, W, V)).reshape(B, W * V)
        best, index = lax.top_k(total, min(2 * W, W * V))
        parent, token = index // V, (index % V).astype(jnp.int32)
        longer = lax.dynamic_update_slice_in_dim(rows(tokens, parent), token[..., None], t + 1, 2)
        ended = token == end

        # Only an end among the best W is better than what goes on in its place.
        leaves = ended & (jnp.arange(best.shape[1]) < W) & open_B[:, None]
        ended_scores = jnp.where(leaves, beam.normalize(best, t + 2 - P), NEG)
        all_tokens, all_scores = (jnp.concatenate(pair, axis=1) for pair in zip(finished, (longer, ended_scores)))
        scores, chosen = lax.top_k(all_scores, W)
        going, chosen_going = lax.top_k(jnp.where(ended, NEG, best), W)
        origin = (jnp.arange(B)[:, None] * W + rows(parent, chosen_going)).reshape(-1)
        cache = jax.tree.map(lambda x: x[origin] if x.ndim else x, cache)
        worst_B = jnp.where(scores.min(axis=1) > NEG / 2, scores.min(axis=1), -jnp.inf)
        open_B = open_B & (beam.normalize(going.max(axis=1), t + 2 - P) > worst_B)
        return t + 1, open_B, rows(longer, chosen_going), going, (rows(all_tokens, chosen), scores), cache

    start = (jnp.asarray(P - 1), jnp.ones(B, bool), tokens, log_prob, finished, cache)
    t, open_B, tokens, log_prob, finished, _ = lax.while_loop(more, advance, start)
    open_scores = jnp.where(open_B[:, None] & (log_prob > NEG / 2), beam.normalize(log_prob, t + 1 - P), NEG)
    all_tokens, all_scores = (jnp.concatenate(pair, axis=1) for pair in zip(finished, (tokens, open_scores)))
    scores, chosen = lax.top_k(all_scores, W)
    return rows(all_tokens, chosen), scores
