"""Attention over disjoint key sets, combined exactly from (output, logsumexp) pairs."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from attn_zoo.ops.rows import scale_rows


def merge(*parts: tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """(output, logsumexp) of softmax attention over the union of disjoint key sets, from those of each set.

    o = sum_p exp(lse_p) o_p / sum_p exp(lse_p). A set without keys has lse = -inf; a row without any keys stays zero.
    """
    lses_PBTN = jnp.stack([lse for _, lse in parts])
    seen_PBTN = lses_PBTN > -jnp.inf
    finite_PBTN = jnp.where(seen_PBTN, lses_PBTN, -1e30)  # -inf would turn gradients into NaN even where it is masked
    top_BTN = finite_PBTN.max(axis=0)
    weights_PBTN = jnp.where(seen_PBTN, jnp.exp(finite_PBTN - top_BTN), 0.0)
    total_BTN = weights_PBTN.sum(axis=0)
    empty_BTN = total_BTN == 0
    safe_BTN = jnp.where(empty_BTN, 1.0, total_BTN)
    o_BTNH = sum(scale_rows(o.astype(w.dtype), w) for w, (o, _) in zip(weights_PBTN / safe_BTN, parts))
    return o_BTNH.astype(parts[0][0].dtype), jnp.where(empty_BTN, -jnp.inf, top_BTN + jnp.log(safe_BTN))
