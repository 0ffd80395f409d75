"""Linformer: keys and values projected along the sequence to `rank` slots, which every query then attends to.

softmax(q (E k)' / sqrt(H)) (F v) with E, F of shape [rank, max_len] (Wang et al. 2020, eq. 7). At a length below max_len the first columns
of the projections serve. Invalid keys and values enter the projection as zeros. A slot mixes all positions, so nothing can be causal.

Of the "general projections" of sec. 4, projection='conv' is a convolution along the sequence, of kernel and stride n = ceil(max_len / rank), one filter
for all channels; and 'pool' the mean over n valid positions, without parameters. Their slots are local, and one without a valid position is masked.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from attn_zoo.attention.base import Attention, Paper, Variant, softmax_reference
from attn_zoo.attention.pattern import pair_flops
from attn_zoo.ops import backends
from attn_zoo.ops.chunks import pad
from attn_zoo.ops.patterns import FULL
from attn_zoo.spec import check, check_choice, check_int


@dataclasses.dataclass(frozen=True)
class Options:
    """rank: slots; share: which projections are one (paper, sec. 4); init: 'identity' (rank = max_len) makes it full attention.

    share='none': E and F for every head; 'heads': one E and one F for all heads; 'kv': E = F too; 'layers': one E = F for the whole model.
    projection: 'linear', 'conv' or 'pool'.
    """

    rank: int = 64
    share: str = "heads"
    init: str = "normal"
    projection: str = "linear"

    def __post_init__(self):
        check_int("rank", self.rank, 1)
        check_choice("share", self.share, ("none", "heads", "kv", "layers"))
        check_choice("init", self.init, ("normal", "identity"))
        check_choice("projection", self.projection, ("linear", "conv", "pool"))
        check(self.init == "normal" or self.projection == "linear", "init", self.init, f"belongs to projection='linear', not to {self.projection!r}")


def taps(options: Options, max_len: int) -> int:
    """Positions n that a slot of a local projection is made of."""
    return -(-max_len // options.rank)


class Linformer(Attention):
    """Attention to `rank` projected slots."""

    anywhere = True

    def __init__(self, options: Options, dims, *, shared: dict, rngs: nnx.Rngs):
        super().__init__(options, dims)
        if options.projection == "pool":
            return
        heads = dims.num_kv_heads if options.share == "none" else 1

        def projection():
            if options.projection == "conv":
                n = taps(options, dims.max_len)
                return nnx.Param(jax.random.normal(rngs.params(), (heads, n)) * n**-0.5)
            shape = (heads, options.rank, dims.max_len)
            if options.init == "identity":
                return nnx.Param(jnp.broadcast_to(jnp.eye(options.rank, dims.max_len), shape))
            # Entries N(0, 1 / rank), as in the paper's proofs (theorem 2): lengths of projected vectors are kept in expectation.
            return nnx.Param(jax.random.normal(rngs.params(), shape) * options.rank**-0.5)

        if options.share == "layers":
            name = ("linformer", options.rank, options.init, options.projection, dims.max_len)
            self.key_projection = shared[name] if name in shared else shared.setdefault(name, projection())
        else:
            self.key_projection = projection()
        self.value_projection = self.key_projection if options.share in ("kv", "layers") else projection()

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        k_BRKH, v_BRKH, valid_BR = self.slots(k_BSKH, v_BSKH, valid_BS)
        return backends.attention(q_BTNH, k_BRKH, v_BRKH, pattern=FULL, valid_BS=valid_BR, backend=self.backend(valid_BS is not None))

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        with jax.default_matmul_precision("highest"):
            k_BRKH, v_BRKH, valid_BR = self.slots(k_BSKH, v_BSKH, valid_BS)
        return softmax_reference(q_BTNH, k_BRKH, v_BRKH, jnp.ones((1, 1, 1, 1), bool) if valid_BR is None else valid_BR[:, None, None, :])

    def slots(self, k_BSKH, v_BSKH, valid_BS):
        """(E k, F v), each [B, R, K, H], and which slots are valid, or None for all."""
        if self.options.projection == "linear":
            return _project(self.key_projection[...], k_BSKH), _project(self.value_projection[...], v_BSKH), None
        n = taps(self.options, self.dims.max_len)
        valid_BRn = None if valid_BS is None else _windows(valid_BS, n)
        if self.options.projection == "pool":
            count_BR = (_windows(jnp.ones(k_BSKH.shape[:2], bool), n) if valid_BRn is None else valid_BRn).sum(axis=2)
            pool = lambda x: (_windows(x, n).sum(axis=2, dtype=jnp.float32) / jnp.maximum(count_BR, 1)[:, :, None, None]).astype(x.dtype)
            k_BRKH, v_BRKH = pool(k_BSKH), pool(v_BSKH)
        else:
            k_BRKH, v_BRKH = _convolve(self.key_projection[...], k_BSKH), _convolve(self.value_projection[...], v_BSKH)
        return k_BRKH, v_BRKH, None if valid_BRn is None else valid_BRn.any(axis=2)

    def backend(self, masked=False):
        return backends.choose(self.dims.backend, FULL, self.dims.dtype, self.dims.head_dim, masked=masked and self.options.projection != "linear")

    def flops(self, B, T, S):
        d = self.dims
        return flops(self.options, B, T, S, d.num_heads, d.head_dim, d.causal, K=d.num_kv_heads, max_len=d.max_len)


def _project(projection, x_BSKH):
    """`projection` [1 or K, R, max_len]; one for all heads is one product, not one a head with a copy of it."""
    B, S, K, H = x_BSKH.shape
    weights = projection[:, :, :S].astype(x_BSKH.dtype)
    wide = jnp.promote_types(x_BSKH.dtype, jnp.float32)
    if len(weights) == 1:  # an einsum would have x on the left, for which XLA turns x and the result
        return jnp.matmul(weights, x_BSKH.reshape(B, S, K * H), preferred_element_type=wide).reshape(B, -1, K, H).astype(x_BSKH.dtype)
    return jnp.einsum("KRS,BSKH->BRKH", weights, x_BSKH, preferred_element_type=wide).astype(x_BSKH.dtype)


def _windows(x_BS, n):
    """[B, S, ...] -> [B, ceil(S / n), n, ...], zeros (False) at the end."""
    B, S, *rest = x_BS.shape
    R = -(-S // n)
    return pad(x_BS, {1: R * n}).reshape(B, R, n, *rest)


def _convolve(filters, x_BSKH):
    """Kernel and stride n; `filters` [1 or K, n]."""
    weights_Kn = jnp.broadcast_to(filters, (x_BSKH.shape[2], filters.shape[1]))
    wide_BSKH = x_BSKH.astype(jnp.promote_types(x_BSKH.dtype, weights_Kn.dtype))
    return jnp.einsum("Kn,BRnKH->BRKH", weights_Kn, _windows(wide_BSKH, filters.shape[1])).astype(x_BSKH.dtype)


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool, K: int | None = None, max_len: int | None = None) -> float:
    """Two projections of K key/value heads (N by default), and attention to the slots; local projections touch each position once."""
    if options.projection == "linear":
        return pair_flops(S * options.rank, B, K or N, H) + pair_flops(T * options.rank, B, N, H)
    slots = -(-S // taps(options, max_len or max(T, S)))
    return pair_flops(S, B, K or N, H) + pair_flops(T * slots, B, N, H)


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
