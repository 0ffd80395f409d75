"""Readers: which word of a document fills the blank of a query? They point at it, by an attention whose weights are the answer.

The document and the query are each read by recurrent networks of both directions, from one table of embeddings: d_i and q_t. `attention_over_attention`
(Cui et al. 2017, sec. 3.1): M_it = d_i . q_t (eq. 4); alpha(t) = softmax of M over the document (eq. 5), beta(i) = softmax of M over the query (eq. 7), beta its
mean over the document's words, and s = alpha beta (eq. 8 and 9). `attention_sum` (Kadlec et al. 2016, sec. 4) has one vector g of the query, its last states, and s =
softmax of d_i . g. In both P(w) is the sum of s over the places where w stands, and the loss -log P(answer). `none` does not look at the document: P(w) is a softmax
of e_w . g over embeddings e.

All choose among the candidates that the task offers, as the floors do: where others stand, s counts for nothing and P is of the rest. Departures: the cells
and sizes are the config's; the re-ranking of the n best by language models (Cui et al., sec. 3.2), a step after the network, is left out.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from attn_zoo import config
from attn_zoo.attention import VARIANTS
from attn_zoo.attention.base import Paper
from attn_zoo.models.layers import dropout
from attn_zoo.models.recurrent import NEG, NoOptions, RecurrentEncoder
from attn_zoo.models.transformer import split_key
from attn_zoo.spec import Spec, UserError, check

LEAST = 1e-9  # the probability of a word that is not there, so that its logarithm is finite


@dataclasses.dataclass(frozen=True)
class ReaderVariant:
    """How a reader finds its answer."""

    name: str
    paper: Paper
    family: str = "reader"
    options: type = NoOptions


_KADLEC = Paper(
    "kadlec2016text",
    "Text Understanding with the Attention Sum Reader Network",
    "Kadlec, Rudolf and Schmid, Martin and Bajgar, Ond{\\v{r}}ej and Kleindienst, Jan",
    2016,
    "Proceedings of the 54th Annual Meeting of the Association for Computational Linguistics",
)

READERS: dict[str, ReaderVariant] = {
    "none": ReaderVariant("none", _KADLEC),
    "attention_sum": ReaderVariant("attention_sum", _KADLEC),
    "attention_over_attention": ReaderVariant("attention_over_attention", VARIANTS["attention_over_attention"].paper),
}


class Reader(nnx.Module):
    """A query with a blank and its document, to logits of the vocabulary."""

    def __init__(self, model: config.Model, *, variant: Spec, vocab: int, max_len: int, document_len: int, rngs: nnx.Rngs):
        check(model.D % 2 == 0, "D", model.D, f"must be even, half for each direction of reading; nearest: {model.D + 1}")
        self.variant = READERS[variant.name]
        variant.resolve("reader", self.variant.options)
        self.config = model
        self.max_len, self.document_len, self.vocab = max_len, document_len, vocab
        self.per_token = False
        dtype = jnp.dtype(model.dtype)
        self.query = RecurrentEncoder(model, vocab=vocab, max_len=max_len, dtype=dtype, rngs=rngs)
        if self.looks:
            self.document = RecurrentEncoder(model, vocab=vocab, max_len=document_len, dtype=dtype, rngs=rngs)
            self.document.tokens = self.query.tokens

    @property
    def looks(self) -> bool:
        """Whether it reads the document at all."""
        return self.variant.name != "none"

    def __call__(
        self,
        inputs_BT: Int[Array, "B T"],
        *,
        source: Int[Array, "B S"],
        source_valid: Bool[Array, "B S"] | None = None,
        candidates: Bool[Array, "B S"] | None = None,
        valid_BT: Bool[Array, "B T"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B V"]:
        """Float32 logits, with which a softmax gives P; without `candidates`, every word of the document is one. `key` is this call's dropout."""
        valid_BS = jnp.ones(source.shape, bool) if source_valid is None else source_valid
        valid_BT = jnp.ones(inputs_BT.shape, bool) if valid_BT is None else valid_BT
        candidates_BS = valid_BS if candidates is None else candidates & valid_BS
        query_key, document_key, *out_keys = split_key(key, 4)
        q_BTD, g_BD = self.query(inputs_BT, valid_BS=valid_BT, key=query_key)
        q_BTD, g_BD = (dropout(x, self.config.dropout, out_keys[0]).astype(jnp.float32) for x in (q_BTD, g_BD))
        if not self.looks:
            offered_BV = jnp.zeros((len(source), self.vocab), bool).at[jnp.arange(len(source))[:, None], source].max(candidates_BS)
            return jnp.where(offered_BV, g_BD @ self.query.tokens[...].T, NEG)
        d_BSD, _ = self.document(source, valid_BS=valid_BS, key=document_key)
        d_BSD = dropout(d_BSD, self.config.dropout, out_keys[1]).astype(jnp.float32)
        s_BS = self.weights(q_BTD, g_BD, d_BSD, valid_BT, valid_BS)
        return jnp.log(sum_by_word(s_BS * candidates_BS, source, self.vocab) + LEAST)

    def weights(self, q_BTD: Array, g_BD: Array, d_BSD: Array, valid_BT: Array, valid_BS: Array) -> Float[Array, "B S"]:
        """s, the attention to each word of the document."""
        if self.variant.name == "attention_sum":
            return softmax(jnp.einsum("BSD,BD->BS", d_BSD, g_BD), valid_BS, axis=1)
        return attention_over_attention(q_BTD, d_BSD, valid_BT, valid_BS)

    def attentions(self, T: int) -> list:
        """None of the zoo's."""
        return []

    def attention_modules(self) -> list[nnx.Module]:
        """None: what attends has no parameters."""
        return []

    def flops_per_step(self, B: int, T: int) -> dict[str, float]:
        """Useful FLOPs of one training step, 3 times those of the forward pass: `attention`, scores and sums of them; `model`, everything."""
        D, S = self.config.D, self.document_len
        pairs = {"none": 0, "attention_sum": S, "attention_over_attention": S * T}[self.variant.name]
        attention = 6.0 * B * pairs * (D + (self.variant.name == "attention_over_attention"))
        other = self.document.multiply_adds() if self.looks else self.vocab * D
        return {"attention": attention, "model": attention + 6.0 * B * (self.query.multiply_adds() + other)}

    def activation_bytes(self, B: int, T: int) -> float:
        """An estimate of what a training step keeps: gates and states of both, the scores of every pair thrice, and the logits."""
        document = self.document.kept() + 3 * self.document_len * T if self.looks else 0
        return float(4 * B * (self.query.kept() + document + 2 * self.vocab))


def attention_over_attention(
    q_BTD: Float[Array, "B T D"], d_BSD: Float[Array, "B S D"], valid_BT: Bool[Array, "B T"], valid_BS: Bool[Array, "B S"]
) -> Float[Array, "B S"]:
    """s = alpha beta, a distribution over the document's words. Cui et al. 2017, eq. 4 to 9."""
    M_BST = jnp.einsum("BSD,BTD->BST", d_BSD, q_BTD)
    alpha_BST = softmax(M_BST, valid_BS[:, :, None], axis=1)
    beta_BST = softmax(M_BST, valid_BT[:, None], axis=2) * valid_BS[:, :, None]
    beta_BT = beta_BST.sum(axis=1) / jnp.maximum(valid_BS.sum(axis=1, keepdims=True), 1)
    return jnp.einsum("BST,BT->BS", alpha_BST, beta_BT)


def softmax(scores: Array, valid: Array, axis: int) -> Array:
    """Softmax over what is valid; zeros where nothing is."""
    return jnp.where(valid, jax.nn.softmax(jnp.where(valid, scores, NEG), axis=axis), 0.0)


def sum_by_word(s_BS: Float[Array, "B S"], words_BS: Int[Array, "B S"], vocab: int) -> Float[Array, "B V"]:
    """For each word of the vocabulary, the sum of s over the places where it stands. Kadlec et al. 2016, eq. 2."""
    return jnp.zeros((len(s_BS), vocab), s_BS.dtype).at[jnp.arange(len(s_BS))[:, None], words_BS].add(s_BS)
