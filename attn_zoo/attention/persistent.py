"""All-attention: keys and values that are parameters stand beside those of the context, in one softmax.

softmax([q'k_1 .. q'k_S, q'm_1 .. q'm_R] / sqrt(H)) over the values [v_1 .. v_S, u_1 .. u_R], with persistent keys m and values u of every
query head (Sukhbaatar et al. 2019b, sec. 4.2). They do what the feed-forward layer did: with model.ffn='none' a block is this layer
alone, and slots = F gives it as many parameters as the network it replaces. Stored with deviations 1 / sqrt(H) and 1 / sqrt(R), and multiplied by
sqrt(H) and sqrt(R) at use, as in the authors' code, so that both are of the context's unit scale and yet learn at its learning rates.

Departures: no relative positions and no adaptive span, which the paper's models have besides. A row whose context is empty gives zeros, which is
the rule of this zoo, although it could still see the slots. Context and slots are attended to apart and merged by their logsumexp.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from attn_zoo.attention.base import Paper, Variant, repeat_kv, softmax_reference
from attn_zoo.attention.pattern import MergedAttention, dense_mask, pair_flops
from attn_zoo.ops import backends
from attn_zoo.ops.block_mask import count_pairs
from attn_zoo.ops.merge import merge
from attn_zoo.ops.patterns import CAUSAL, FULL
from attn_zoo.spec import check_int


@dataclasses.dataclass(frozen=True)
class Options:
    """slots: persistent vectors of each head; 0 is full attention."""

    slots: int = 256

    def __post_init__(self):
        check_int("slots", self.slots, 0)


def persistent_attention(q_BTNH, k_BSKH, v_BSKH, m_NRH, u_NRH, *, valid_BS=None, causal: bool, part=backends.attention_and_logsumexp):
    """Attention over the context and the slots (m, u) of each head, [B, T, N, H]."""
    context = part(q_BTNH, k_BSKH, v_BSKH, pattern=CAUSAL if causal else FULL, valid_BS=valid_BS)
    return with_slots(q_BTNH, context, m_NRH, u_NRH, part)


def with_slots(q_BTNH, context, m_NRH, u_NRH, part=backends.attention_and_logsumexp):
    """Attention to the context, (output, logsumexp), merged with that to the slots; zeros where there is no context."""
    o_BTNH, lse_BTN = context
    # The slots are the same for every sequence, so a batch is one long sequence to them: [1, B T, N, H] over [1, R, N, H].
    B, T, N, H = q_BTNH.shape
    m_1RNH, u_1RNH = (x.swapaxes(0, 1)[None].astype(q_BTNH.dtype) for x in (m_NRH, u_NRH))
    slots, slots_lse = part(q_BTNH.reshape(1, B * T, N, H), m_1RNH, u_1RNH, pattern=FULL)
    both_BTNH, _ = merge((o_BTNH, lse_BTN), (slots.reshape(B, T, N, H), slots_lse.reshape(B, T, N)))
    return jnp.where(lse_BTN[..., None] > -jnp.inf, both_BTNH, 0)


class Persistent(MergedAttention):
    """Context and persistent memory in one softmax."""

    anywhere = True

    def __init__(self, options: Options, dims, *, shared: dict, rngs: nnx.Rngs):
        super().__init__(options, dims)
        if options.slots:
            shape = (dims.num_heads, options.slots, dims.head_dim)
            self.keys = nnx.Param(jax.random.normal(rngs.params(), shape) * dims.head_dim**-0.5)
            self.values = nnx.Param(jax.random.normal(rngs.params(), shape) * options.slots**-0.5)

    def memory(self):
        """(keys, values) at the scale they are used at, each [N, R, H]."""
        return self.keys[...] * self.dims.head_dim**0.5, self.values[...] * self.options.slots**0.5

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        if not self.options.slots:
            return self.part(q_BTNH, k_BSKH, v_BSKH, pattern=CAUSAL if self.dims.causal else FULL, valid_BS=valid_BS)[0]
        return persistent_attention(q_BTNH, k_BSKH, v_BSKH, *self.memory(), valid_BS=valid_BS, causal=self.dims.causal, part=self.part)

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        B, T, N, _ = q_BTNH.shape
        k, v, mask = repeat_kv(k_BSKH, N), repeat_kv(v_BSKH, N), dense_mask(CAUSAL if self.dims.causal else FULL, T, k_BSKH.shape[1], valid_BS)
        if self.options.slots:
            m, u = (jnp.broadcast_to(x.swapaxes(0, 1), (B, self.options.slots, *x.shape[::2])) for x in self.memory())
            k, v = jnp.concatenate([k, m], axis=1), jnp.concatenate([v, u], axis=1)
            any_context = jnp.any(mask, axis=-1, keepdims=True)
            mask = jnp.concatenate([mask, jnp.broadcast_to(any_context, (*mask.shape[:-1], self.options.slots))], axis=-1)
        return softmax_reference(q_BTNH, k, v, mask)

    def seen(self):
        return CAUSAL

    def step(self, q_B1NH, k_B1KH, v_B1KH, cache):
        o_B1NH, lse_B1N, cache = self.slot_step(q_B1NH, k_B1KH, v_B1KH, cache)
        if self.options.slots:
            o_B1NH = with_slots(q_B1NH, (o_B1NH, lse_B1N), *self.memory(), self.part)
        return o_B1NH.astype(q_B1NH.dtype), cache | {"t": cache["t"] + 1}


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool) -> float:
    """The pairs of the context, and T R with the slots."""
    return pair_flops(count_pairs(CAUSAL if causal else FULL, T, S) + T * options.slots, B, N, H)


PERSISTENT = Variant(
    name="persistent",
    family="dense",
    options=Options,
    build=Persistent,
    paper=Paper(
        "sukhbaatar2019augmenting",
        "Augmenting Self-attention with Persistent Memory",
        "Sukhbaatar, Sainbayar and Grave, Edouard and Lample, Guillaume and Jegou, Herve and Joulin, Armand",
        2019,
        "arXiv:1907.01470",
    ),
    complexity="T (S + R)",
    flops=flops,
    time_order=2.0,
    memory_order=1.0,
    exact_when=lambda T: {"slots": 0},
    decode=True,
)
