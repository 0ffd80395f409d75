"""Readers: which word of a document fills the blank of a query? They point at it, by an attention whose weights are the answer.

The document and the query are each read by recurrent networks of both directions, from one table of embeddings: d_i and q_t. `attention_over_attention`
(Cui et al. 2017, sec. 3.1): M_it = d_i . q_t (eq. 5); alpha(t) = softmax of M over the document (eq. 6), beta(i) = softmax of M over the query (eq. 8), beta its
mean over the document's words (eq. 9), and s = alpha beta (eq. 10). `attention_sum` (Kadlec et al. 2016, sec. 4) has one vector g of the query, its last states, and s =
softmax of d_i . g. In both P(w) is the sum of s over the places where w stands, and the loss -log P(answer). `none` does not look at the document, as the
query-only model of Hill et al. 2016: P(w) is a softmax of e_w . g over embeddings e.

All choose among the candidates that the task offers, as its floors do: where others stand, s counts for nothing and P is of the rest. Departures: the cells
and sizes are the config's; the re-ranking of the n best by language models (Cui et al., sec. 3.2), a step after the network, is left out.
"""

import dataclasses

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
from attn_zoo.spec import Spec, check

ABSENT = -1e4  # log P of a word that may not be the answer: zero as a float32 probability, and finite in a loss


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
_HILL = Paper(
    "hill2016goldilocks",
    "The {G}oldilocks Principle: Reading Children's Books with Explicit Memory Representations",
    "Hill, Felix and Bordes, Antoine and Chopra, Sumit and Weston, Jason",
    2016,
    "International Conference on Learning Representations",
)

READERS: dict[str, ReaderVariant] = {
    "none": ReaderVariant("none", _HILL),
    "attention_sum": ReaderVariant("attention_sum", _KADLEC),
    "attention_over_attention": ReaderVariant("attention_over_attention", VARIANTS["attention_over_attention"].paper),
}


class Reader(nnx.Module):
    """A query with a blank and its document, to log P of the words of the vocabulary."""

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
        """log P, float32; without `candidates`, every word of the document is one. `key` is this call's dropout."""
        valid_BS = jnp.ones(source.shape, bool) if source_valid is None else source_valid
        valid_BT = jnp.ones(inputs_BT.shape, bool) if valid_BT is None else valid_BT
        candidates_BS = valid_BS if candidates is None else candidates & valid_BS
        query_key, document_key, *out_keys = split_key(key, 4)
        q_BTD, g_BD = self.query(inputs_BT, valid_BS=valid_BT, key=query_key)
        q_BTD, g_BD = (dropout(x, self.config.dropout, out_keys[0]).astype(jnp.float32) for x in (q_BTD, g_BD))
        if not self.looks:
            offered_BV = jnp.zeros((len(source), self.vocab), bool).at[jnp.arange(len(source))[:, None], source].max(candidates_BS)
            return log_softmax_among(g_BD @ self.query.tokens[...].T, offered_BV)
        d_BSD, _ = self.document(source, valid_BS=valid_BS, key=document_key)
        d_BSD = dropout(d_BSD, self.config.dropout, out_keys[1]).astype(jnp.float32)
        if self.variant.name == "attention_sum":
            q_BTD, valid_BT = g_BD[:, None], jnp.ones((len(g_BD), 1), bool)
        return log_sum_by_word(log_attended(q_BTD, d_BSD, valid_BT, valid_BS), source, candidates_BS, self.vocab)

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


def log_attended(
    q_BTD: Float[Array, "B T D"], d_BSD: Float[Array, "B S D"], valid_BT: Bool[Array, "B T"], valid_BS: Bool[Array, "B S"]
) -> Float[Array, "B S"]:
    """log s of attention over attention, s a distribution over the document's words. Cui et al. 2017, eq. 5 to 10.

    Of a query of one vector beta is 1, and s the softmax of its scores. In logarithms, so that a place that is far from likely still learns.
    """
    M_BST = jnp.einsum("BSD,BTD->BST", d_BSD, q_BTD)
    log_alpha_BST = jax.nn.log_softmax(jnp.where(valid_BS[:, :, None], M_BST, NEG), axis=1)
    log_beta_BST = jax.nn.log_softmax(jnp.where(valid_BT[:, None], M_BST, NEG), axis=2)
    log_n_B1 = jnp.log(jnp.maximum(valid_BS.sum(axis=1, keepdims=True), 1))
    log_beta_BT = jax.nn.logsumexp(jnp.where(valid_BS[:, :, None], log_beta_BST, NEG), axis=1) - log_n_B1
    return jax.nn.logsumexp(log_alpha_BST + log_beta_BT[:, None], axis=2)


def log_sum_by_word(log_s_BS: Float[Array, "B S"], words_BS: Int[Array, "B S"], places_BS: Bool[Array, "B S"], vocab: int) -> Float[Array, "B V"]:
    """For each word the logarithm of the sum of s over those of `places` where it stands, as a share of that over all of them, or ABSENT. Cui et al. 2017, eq. 11."""
    rows_B1 = jnp.arange(len(words_BS))[:, None]
    log_s_BS = jnp.where(places_BS, log_s_BS, NEG)
    greatest_BV = jnp.full((len(words_BS), vocab), NEG).at[rows_B1, words_BS].max(jax.lax.stop_gradient(log_s_BS))
    shares_BS = jnp.where(places_BS, jnp.exp(log_s_BS - greatest_BV[rows_B1, words_BS]), 0.0)
    sums_BV = jnp.zeros_like(greatest_BV).at[rows_B1, words_BS].add(shares_BS)
    present_BV = sums_BV > 0  # then at least 1, the share of the greatest
    return log_softmax_among(greatest_BV + jnp.log(jnp.where(present_BV, sums_BV, 1.0)), present_BV)


def log_softmax_among(scores_BV: Float[Array, "B V"], offered_BV: Bool[Array, "B V"]) -> Float[Array, "B V"]:
    """log P of the words offered, and ABSENT of the others. Normalized here, since label smoothing would else push down all that is offered."""
    scores_BV = jnp.where(offered_BV, scores_BV, NEG)
    return jnp.where(offered_BV, scores_BV - jax.nn.logsumexp(scores_BV, axis=1, keepdims=True), ABSENT)
