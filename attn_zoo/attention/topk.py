"""Top-k attention: every query attends to the `k` keys it scores highest, found exactly, some queries at a time.

Gupta et al. 2021 (blocked exact selection); Zhao et al. 2019 (explicit sparse transformer). All scores are computed, so time stays quadratic;
what is saved is memory, and that gradients reach the chosen keys alone. Ties are broken towards the earlier key.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

from attn_zoo.attention.base import Paper, Variant, repeat_kv, softmax_reference
from attn_zoo.attention.pattern import SlotDecoding, pair_flops
from attn_zoo.ops import backends
from attn_zoo.ops.block_mask import count_pairs
from attn_zoo.ops.gathered import gathered_attention
from attn_zoo.ops.native_gathered import native_best_keys
from attn_zoo.ops.patterns import CAUSAL, FULL
from attn_zoo.ops.slots import put, score_row, softmax_row
from attn_zoo.spec import check_int

SCORE_BYTES = 4 * 2**20  # of the scores that are compared at once


@dataclasses.dataclass(frozen=True)
class Options:
    """k: keys a query attends to."""

    k: int = 32

    def __post_init__(self):
        check_int("k", self.k, 1)


class TopK(SlotDecoding):
    """The largest scores."""

    anywhere = True

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        k_BSNH, v_BSNH = (repeat_kv(x, self.dims.num_heads) for x in (k_BSKH, v_BSKH))  # heads that share keys choose apart
        index, seen = self.select(q_BTNH, k_BSNH, valid_BS)
        return gathered_attention(q_BTNH, k_BSNH, v_BSNH, index, seen, backend=self.backend())[0]

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        """Dense softmax over the same choice: between scores that differ by rounding alone, either would be right."""
        N, S = self.dims.num_heads, k_BSKH.shape[1]
        index, seen = self.select(q_BTNH, repeat_kv(k_BSKH, N), valid_BS)
        chosen_BNTS = jnp.put_along_axis(jnp.zeros((*index.shape[:3], S + 1), bool), jnp.where(seen, index, S), True, axis=-1, inplace=False)[..., :S]
        return softmax_reference(q_BTNH, k_BSKH, v_BSKH, chosen_BNTS)

    def select(self, q_BTNH, k_BSNH, valid_BS):
        """(index, seen), each [B, N, T, min(k, S)]: the best keys of each query, best first; seen is False where it may see fewer."""
        choose = native_best_keys if self.backend() == "native" else best_keys
        return choose(q_BTNH, k_BSNH, valid_BS, self.options.k, self.dims.causal)

    def backend(self, masked=False):
        return backends.choose_lists(self.dims.backend, self.dims.dtype)

    def seen(self):
        return CAUSAL

    def step(self, q_B1NH, k_B1KH, v_B1KH, cache):
        L, t = cache["k"].shape[1], cache["t"]
        cache = put(k_B1KH, v_B1KH, cache, self.slots().within(L))
        scores_BNL = score_row(q_B1NH.astype(jnp.float32), cache["k"].astype(jnp.float32), 1.0, "highest")
        scores_BNL = jnp.where(jnp.arange(L) <= t, scores_BNL, -jnp.inf)
        index = lax.top_k(scores_BNL, min(self.options.k, L))[1]
        chosen_BNL = jnp.put_along_axis(jnp.zeros(scores_BNL.shape, bool), index, True, axis=-1, inplace=False)
        o_B1NH, _ = softmax_row(jnp.where(chosen_BNL, scores_BNL * self.dims.head_dim**-0.5, -jnp.inf), cache["v"], q_B1NH.dtype)
        return o_B1NH, cache | {"t": t + 1}


def best_keys(q_BTNH, k_BSNH, valid_BS, k: int, causal: bool):
    """What TopK.select says, in XLA. Scores are float32 whatever the inputs. Equal ones are ranked by position."""
    (B, T, N, H), S = q_BTNH.shape, k_BSNH.shape[1]
    step = max(1, min(T, SCORE_BYTES // (4 * B * N * S)))
    steps = -(-T // step)
    q_BTNH, k_BSNH = (lax.stop_gradient(x).astype(jnp.float32) for x in (q_BTNH, k_BSNH))
    q = jnp.pad(q_BTNH, ((0, 0), (0, steps * step - T), (0, 0), (0, 0))).reshape(B, steps, step, N, H).swapaxes(0, 1)

    def best(args):
        q, start = args
        scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q, k_BSNH, precision="highest")
        if causal:
            scores_BNTS = jnp.where(jnp.arange(S) <= start + jnp.arange(step)[:, None], scores_BNTS, -jnp.inf)
        if valid_BS is not None:
            scores_BNTS = jnp.where(valid_BS[:, None, None, :], scores_BNTS, -jnp.inf)
        values, index = lax.top_k(scores_BNTS, min(k, S))
        return index, values != -jnp.inf  # a NaN is seen

    chosen = lax.map(best, (q, jnp.arange(steps) * step))
    return tuple(jnp.moveaxis(x, 0, 2).reshape(B, N, steps * step, -1)[:, :, :T] for x in chosen)


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool) -> float:
    """Scores of all visible pairs, and the attention of the chosen ones."""
    return 0.5 * pair_flops(count_pairs(CAUSAL if causal else FULL, T, S), B, N, H) + pair_flops(T * min(options.k, S), B, N, H)


TOPK = Variant(
    name="topk",
    family="content-based sparse",
    options=Options,
    build=lambda options, dims, *, shared, rngs: TopK(options, dims),
    paper=Paper(
        "gupta2021memory",
        "Memory-efficient Transformers via Top-k Attention",
        "Gupta, Ankit and Dar, Guy and Goodman, Shaya and Ciprut, David and Berant, Jonathan",
        2021,
        "Proceedings of the Second Workshop on Simple and Efficient Natural Language Processing",
    ),
    complexity="T S scores, T k kept",
    flops=flops,
    time_order=2.0,
    memory_order=1.0,
    exact_when=lambda T: {"k": T},
    decode=True,
)
