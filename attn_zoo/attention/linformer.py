"""Linformer: keys and values projected along the sequence to `rank` slots, which every query then attends to.

softmax(q (E k)' / sqrt(H)) (F v) with E, F of shape [rank, max_len] (Wang et al. 2020, eq. 7). At a length below max_len the first columns
of the projections serve. Invalid keys and values enter the projection as zeros. A slot mixes all positions, so nothing can be causal.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from attn_zoo.attention.base import Attention, Paper, Variant, softmax_reference
from attn_zoo.attention.pattern import pair_flops
from attn_zoo.ops import backends
from attn_zoo.ops.patterns import FULL
from attn_zoo.spec import check_choice, check_int


@dataclasses.dataclass(frozen=True)
class Options:
    """rank: slots; share: which projections are one (paper, sec. 4); init: 'identity' (rank = max_len) makes it full attention.

    share='none': E and F for every head; 'heads': one E and one F for all heads; 'kv': E = F too; 'layers': one E = F for the whole model.
    """

    rank: int = 64
    share: str = "heads"
    init: str = "normal"

    def __post_init__(self):
        check_int("rank", self.rank, 1)
        check_choice("share", self.share, ("none", "heads", "kv", "layers"))
        check_choice("init", self.init, ("normal", "identity"))


class Linformer(Attention):
    """Attention to `rank` projected slots."""

    def __init__(self, options: Options, dims, *, shared: dict, rngs: nnx.Rngs):
        super().__init__(options, dims)
        heads = dims.num_kv_heads if options.share == "none" else 1

        def projection():
            shape = (heads, options.rank, dims.max_len)
            if options.init == "identity":
                return nnx.Param(jnp.broadcast_to(jnp.eye(options.rank, dims.max_len), shape))
            # Entries N(0, 1 / rank), as in the paper's proofs (theorem 2): lengths of projected vectors are kept in expectation.
            return nnx.Param(jax.random.normal(rngs.params(), shape) * options.rank**-0.5)

        if options.share == "layers":
            name = ("linformer", options.rank, options.init, dims.max_len)
            self.key_projection = shared[name] if name in shared else shared.setdefault(name, projection())
        else:
            self.key_projection = projection()
        self.value_projection = self.key_projection if options.share in ("kv", "layers") else projection()

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        return backends.attention(q_BTNH, *self.slots(k_BSKH, v_BSKH), pattern=FULL, backend=self.backend())

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        with jax.default_matmul_precision("highest"):
            k_BRKH, v_BRKH = self.slots(k_BSKH, v_BSKH)
        return softmax_reference(q_BTNH, k_BRKH, v_BRKH, jnp.ones((1, 1, 1, 1), bool))

    def slots(self, k_BSKH, v_BSKH):
        """(E k, F v), each [B, R, K, H]."""
        return _project(self.key_projection[...], k_BSKH), _project(self.value_projection[...], v_BSKH)

    def backend(self, masked=False):
        return backends.choose(self.dims.backend, FULL, self.dims.dtype, self.dims.head_dim)


def _project(projection, x_BSKH):
    _, S, K, _ = x_BSKH.shape
    weights_KRS = jnp.broadcast_to(projection[:, :, :S], (K, projection.shape[1], S)).astype(x_BSKH.dtype)
    return jnp.einsum("KRS,BSKH->BRKH", weights_KRS, x_BSKH, preferred_element_type=jnp.promote_types(x_BSKH.dtype, jnp.float32)).astype(x_BSKH.dtype)


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool) -> float:
    """Two projections and attention to R slots."""
    return pair_flops(S * options.rank, B, N, H) + pair_flops(T * options.rank, B, N, H)


LINFORMER = Variant(
    name="linformer",
    family="memory compression",
    options=Options,
    build=Linformer,
    paper=Paper(
        "wang2020linformer",
        "Linformer: Self-Attention with Linear Complexity",
        "Wang, Sinong and Li, Belinda Z. and Khabsa, Madian and Fang, Han and Ma, Hao",
        2020,
        "arXiv:2006.04768",
    ),
    complexity="(T + S) R",
    flops=flops,
    time_order=1.0,
    memory_order=1.0,
    exact_when=lambda T: {"rank": T, "init": "identity"},
    causal="its slots mix all positions, so every output would see the future",
)
