"""Set Transformer's induced attention: a few learned vectors read the context, and every query reads what they have read.

h = softmax(I k' / sqrt(H)) v with R inducing points I a head, o = softmax(q (h W_k)' / sqrt(H)) (h W_v) (Lee et al. 2019, sec. 3.1: ISAB(X) =
MAB(X, MAB(I, X)), eq. 9 to 11). The second MAB projects h anew, which here are maps of each key/value head, H x H, that start at the identity.
Left to the model around it, or out: what a MAB adds to its attention, that is the sum with its queries, layer norm and the row-wise
feed-forward layer. The inducing points are the layer's own queries, already projected.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from attn_zoo.attention.base import Attention, Bound, Paper, Variant, softmax_reference
from attn_zoo.attention.pattern import pair_flops
from attn_zoo.ops import backends
from attn_zoo.ops.patterns import FULL
from attn_zoo.spec import check_int


@dataclasses.dataclass(frozen=True)
class Options:
    """inducing: learned points R of each head that the context passes through."""

    inducing: int = 32

    def __post_init__(self):
        check_int("inducing", self.inducing, 1)


class Set(Attention):
    """Attention through inducing points."""

    anywhere = True

    def __init__(self, options: Options, dims, *, shared: dict, rngs: nnx.Rngs):
        super().__init__(options, dims)
        K, H = dims.num_kv_heads, dims.head_dim
        self.points = nnx.Param(jax.random.normal(rngs.params(), (options.inducing, K, H)))  # of unit scale, as projected queries are
        identity = lambda: nnx.Param(jnp.broadcast_to(jnp.eye(H), (K, H, H)))
        self.key_map, self.value_map = identity(), identity()

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        first, second = self.backends(valid_BS is not None)
        h_BRKH = backends.attention(self.queries(k_BSKH), k_BSKH, v_BSKH, pattern=FULL, valid_BS=valid_BS, padding=self.dims.padding, backend=first)
        return backends.attention(q_BTNH, *self.project(h_BRKH), pattern=FULL, backend=second)

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        every = jnp.ones((1, 1, 1, 1), bool)
        h_BRKH = softmax_reference(self.queries(k_BSKH), k_BSKH, v_BSKH, every if valid_BS is None else valid_BS[:, None, None, :])
        return softmax_reference(q_BTNH, *self.project(h_BRKH), every)

    def queries(self, k_BSKH):
        """The inducing points for every example, [B, R, K, H]."""
        return jnp.broadcast_to(self.points[...].astype(k_BSKH.dtype), (k_BSKH.shape[0], *self.points.shape))

    def project(self, h_BRKH):
        """(keys, values) of what the points have read, each [B, R, K, H]."""
        turn = lambda m: jnp.einsum("BRKH,KHI->BRKI", h_BRKH, m[...].astype(h_BRKH.dtype), precision="highest")
        return turn(self.key_map), turn(self.value_map)

    def backends(self, masked):
        """Of the two steps; the points that the second reads are all valid."""
        return [backends.choose(self.dims.backend, FULL, self.dims.dtype, self.dims.head_dim, masked=m) for m in (masked and self.dims.padding, False)]

    def backend(self, masked=False):
        return " + ".join(dict.fromkeys(self.backends(masked)))

    def flops(self, B, T, S):
        d = self.dims
        return flops(self.options, B, T, S, d.num_heads, d.head_dim, d.causal, K=d.num_kv_heads)


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool, K: int | None = None) -> float:
    """R S pairs of points and context and two maps of R points, for K key/value heads (N by default); T R pairs of queries and points."""
    K, R = K or N, options.inducing
    return pair_flops(R * S, B, K, H) + 4.0 * B * K * R * H * H + pair_flops(T * R, B, N, H)


SET = Variant(
    name="set",
    family="memory compression",
    options=Options,
    build=Set,
    paper=Paper(
        "lee2019set",
        "Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks",
        "Lee, Juho and Lee, Yoonho and Kim, Jungtaek and Kosiorek, Adam R. and Choi, Seungjin and Teh, Yee Whye",
        2019,
        "Proceedings of the 36th International Conference on Machine Learning",
    ),
    complexity="(T + S) R",
    flops=flops,
    time_order=1.0,
    memory_order=1.0,
    exact_when=lambda T: None,
    bound=Bound("what the points read, and full attention, both tend to the mean of the values as keys tend to 0", scale=0.01, error=0.05),
    causal="an inducing point mixes all positions, so every output would see the future",
)
