"""Linearized attention: exp(q'k) replaced by phi(q)'phi(k), so that keys and values are summed once for all queries.

Katharopoulos et al. 2020, eq. 5 (bidirectional) and 9 (causal, here as a chunked scan instead of one position at a time). No 1/sqrt(H).
"""

import dataclasses

import jax
import jax.numpy as jnp

from attn_zoo.attention.base import Attention, Bound, Paper, Variant, repeat_kv
from attn_zoo.ops.linear import linear_attention
from attn_zoo.spec import check_choice

FEATURE_MAPS = {
    "elu": lambda x: jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0))),  # elu(x) + 1, without cancellation. Katharopoulos et al. 2020, eq. 7
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """feature_map: phi, elementwise."""

    feature_map: str = "elu"

    def __post_init__(self):
        check_choice("feature_map", self.feature_map, FEATURE_MAPS)


class Linear(Attention):
    """Kernel attention with an elementwise feature map (R = H)."""

    def features(self, q_BTNH, k_BSKH, valid_BS):
        """(phi(q), phi(k)), with zeros for invalid keys."""
        phi = FEATURE_MAPS[self.options.feature_map]
        phi_k = phi(k_BSKH)
        return phi(q_BTNH), phi_k if valid_BS is None else jnp.where(valid_BS[:, :, None, None], phi_k, 0)

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        return linear_attention(*self.features(q_BTNH, k_BSKH, valid_BS), v_BSKH, causal=self.dims.causal)

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        phi_q, phi_k = self.features(q_BTNH, k_BSKH, valid_BS)
        weights_BNTS = jnp.einsum("BTNR,BSNR->BNTS", phi_q, repeat_kv(phi_k, self.dims.num_heads), precision="highest")
        if self.dims.causal:
            weights_BNTS = jnp.tril(weights_BNTS)
        total = weights_BNTS.sum(axis=-1, keepdims=True)
        weights_BNTS = weights_BNTS / jnp.where(total == 0, 1, total)
        return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, repeat_kv(v_BSKH, self.dims.num_heads), precision="highest")


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool) -> float:
    """The state update of every key and the read-out of every query, R H multiply-adds and R for the denominator each."""
    return 2.0 * B * N * (T + S) * (H * H + H)


LINEAR = Variant(
    name="linear",
    family="linearized",
    options=Options,
    build=lambda options, dims, *, shared, rngs: Linear(options, dims),
    paper=Paper(
        "katharopoulos2020transformers",
        "Transformers are {RNNs}: Fast Autoregressive Transformers with Linear Attention",
        "Katharopoulos, Angelos and Vyas, Apoorv and Pappas, Nikolaos and Fleuret, Fran{\\c{c}}ois",
        2020,
        "Proceedings of the 37th International Conference on Machine Learning",
    ),
    complexity="T H",
    flops=flops,
    time_order=1.0,
    memory_order=1.0,
    exact_when=lambda T: None,
    bound=Bound("both tend to the mean of the visible values as keys tend to 0", scale=0.01, error=0.05),
)
