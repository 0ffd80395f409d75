"""Attention over disjoint key sets, combined exactly from (output, logsumexp) pairs."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from attn_zoo.ops.rows import scale_rows


def merge(*parts: tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """(output, logsumexp) of softmax attention over the union of disjoint key sets, from those of each set.

    o = sum_p exp(lse_p) o_p / sum_p exp(lse_p). A set without keys has lse = -inf; a row without any keys stays zero.
    """
    # Part by part: over an axis of parts XLA's maxima and sums take thirty times as long on a CPU.
    seen = [lse_BTN > -jnp.inf for _, lse_BTN in parts]
    finite = [jnp.where(seen_BTN, lse_BTN, -1e30) for seen_BTN, (_, lse_BTN) in zip(seen, parts)]  # -inf would turn gradients into NaN even where it is masked
    top_BTN = functools.reduce(jnp.maximum, finite)
    weights = [jnp.where(seen_BTN, jnp.exp(lse_BTN - top_BTN), 0.0) for seen_BTN, lse_BTN in zip(seen, finite)]
    total_BTN = sum(weights)
    empty_BTN = total_BTN == 0
    safe_BTN = jnp.where(empty_BTN, 1.0, total_BTN)
    o_BTNH = sum(scale_rows(o_BTNH.astype(w_BTN.dtype), w_BTN / safe_BTN) for w_BTN, (o_BTNH, _) in zip(weights, parts))
    return o_BTNH.astype(parts[0][0].dtype), jnp.where(empty_BTN, -jnp.inf, top_BTN + jnp.log(safe_BTN))
