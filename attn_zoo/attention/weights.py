"""What an attention weighs, whatever the variant: how its outputs change with its values.

Softmax attention is o_t = sum_s w_ts v_s, so w_ts = d o_t / d v_s; and so for every variant whose outputs are linear in the values, each channel by itself,
however it finds the weights, and whether or not it ever makes them: the derivative is taken of the fast form, at the actual values. Where a variant adds
what is not of these values (persistent), its weights sum to less than one. Where channels mix (memory_compressed, whose compression is a convolution) it is
the change of the mean channel of the output as all channels of a value grow alike. Where outputs are not linear in the values (retention, whose norm divides
by them; set, which scores what its points have read) it is a derivative and no weight: it may be negative, and with the values it does not make the output.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attn_zoo.attention.base import Attention

ROWS_AT_ONCE = 16  # rows of weights that one backward pass makes


def attention_weights(
    attention: Attention,
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    valid_BS: Bool[Array, "B S"] | None = None,
    valid_BT: Bool[Array, "B T"] | None = None,
    rows: int | None = None,
) -> Float[Array, "B N R S"]:
    """d o[b, t, n] / d v[b, s, k] for the first `rows` queries t (None: all) and every head n, k being the key head that n reads; in evaluation."""
    (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
    G, R = N // K, T if rows is None else min(rows, T)
    # Backwards, one output at a time, since the engines define their own gradients, which JAX cannot push forward.
    o_BTNH, pull = jax.vjp(lambda v_BSKH: attention(q_BTNH, k_BSKH, v_BSKH, valid_BS=valid_BS, valid_BT=valid_BT), v_BSKH)

    def row(t, g):
        one_BTKGH = jnp.zeros((B, T, K, G, H), o_BTNH.dtype).at[:, t, :, g].set(1)  # heads that read different values may be asked together
        (change_BSKH,) = pull(one_BTKGH.reshape(B, T, N, H))
        return change_BSKH.mean(axis=-1, dtype=jnp.float32)

    t, g = jnp.divmod(jnp.arange(R * G), G)
    weights_RGBSK = jax.lax.map(lambda at: row(*at), (t, g), batch_size=min(ROWS_AT_ONCE, R * G)).reshape(R, G, B, -1, K)
    return jnp.einsum("RGBSK->BKGRS", weights_RGBSK).reshape(B, N, R, -1)
