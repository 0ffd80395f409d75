"""Memory-compressed attention: keys and values shortened by a strided convolution before every query attends to what is left.

k' = conv(k), v' = conv(v), with kernel 3 and stride 3 as in the paper (Liu et al. 2018, sec. 4.2.4), then softmax(q k'' / sqrt(H)) v'. As in the paper the
convolution acts on projected keys and values; here every head has its own, [kernel, H, H], and channels of different heads do not mix. Slot c holds
positions c stride .. c stride + kernel - 1, those beyond the end as zeros.

Causal, a query sees a slot whose last position is not after its own. What the paper leaves open follows the authors' tensor2tensor: the first position
stands uncompressed before the slots and every query sees it, so that the first queries have something to attend to (`first`). One difference: there
a slot is seen only from the position after its last, here from its last on, as ordinary causal attention sees itself. A slot of invalid positions alone is
not seen; where position 0 is invalid too, queries before the first whole slot see nothing and give zeros. The paper's model takes turns of this
layer and local attention (`[block_local, memory_compressed]`), without which a query does not see the few positions just before it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from attn_zoo.attention.base import Attention, Paper, Variant, softmax_reference
from attn_zoo.attention.pattern import dense_mask, pair_flops, pattern_plan
from attn_zoo.ops import backends
from attn_zoo.ops.block_mask import count_pairs
from attn_zoo.ops.patterns import FULL, Pattern
from attn_zoo.ops.slots import score_row, softmax_row
from attn_zoo.spec import check, check_choice, check_int


@dataclasses.dataclass(frozen=True)
class Options:
    """stride, kernel: of the convolution, in positions; first: whether the causal form keeps position 0 uncompressed, for all to see.

    init: 'normal', or 'mean', where slots start as the means of their positions (full attention at kernel = stride = 1, without `first`).
    """

    stride: int = 3
    kernel: int = 3
    first: bool = True
    init: str = "normal"

    def __post_init__(self):
        check_int("stride", self.stride, 1)
        check_int("kernel", self.kernel, 1)
        check(self.kernel >= self.stride, "kernel", self.kernel, f"must be at least stride={self.stride}, or positions would be left out")
        check_choice("first", self.first, (True, False))
        check_choice("init", self.init, ("normal", "mean"))


@dataclasses.dataclass(frozen=True)
class PastSlots(Pattern):
    """Query i sees slot c when c stride + kernel - 1 <= i. With `first`, slots are counted from one, and slot 0 is seen by all."""

    stride: int
    kernel: int
    first: bool

    def mask(self, i, j):
        c = j - self.first
        return (c * self.stride + self.kernel - 1 <= i) | (c < 0)

    def blocks(self, i0, i1, j0, j1):
        return self.mask(i1, j0), self.mask(i0, j1)  # more is seen from later queries, and of earlier slots

    @property
    def exact(self):
        return True


def pattern(options: Options, causal: bool) -> Pattern:
    """The slots that a query sees."""
    return PastSlots(options.stride, options.kernel, options.first) if causal else FULL


def num_slots(options: Options, S: int) -> int:
    """Slots that cover S positions."""
    return 1 + -(-max(0, S - options.kernel) // options.stride)


def missing(options: Options, S: int) -> int:
    """Positions beyond S that the last slot reads."""
    return (num_slots(options, S) - 1) * options.stride + options.kernel - S


def compress(x_BSKH, weights_PKHH, options: Options):
    """[B, C, K, H]: the strided convolution over P = kernel positions, one tap after the other, computed in float32."""
    x_BSKH = jnp.pad(x_BSKH, ((0, 0), (0, missing(options, x_BSKH.shape[1])), (0, 0), (0, 0)))
    last = x_BSKH.shape[1] - options.kernel  # where the last slot begins
    taps = (lax.slice_in_dim(x_BSKH, p, p + last + 1, options.stride, axis=1) for p in range(options.kernel))
    return sum(jnp.einsum("BCKH,KHI->BCKI", tap.astype(w.dtype), w) for tap, w in zip(taps, weights_PKHH)).astype(x_BSKH.dtype)


def compress_valid(valid_BS, options: Options):
    """A slot is valid when any of its positions is, [B, C]."""
    S = valid_BS.shape[1]
    return jnp.pad(valid_BS, ((0, 0), (0, missing(options, S))))[:, fields(options, S)].any(axis=-1)


def fields(options: Options, S: int):
    """The positions that each slot reads, [C, kernel]."""
    return options.stride * jnp.arange(num_slots(options, S))[:, None] + jnp.arange(options.kernel)


class MemoryCompressed(Attention):
    """Attention to convolved keys and values."""

    anywhere = True

    def __init__(self, options: Options, dims, *, shared: dict, rngs: nnx.Rngs):
        super().__init__(options, dims)
        shape = (options.kernel, dims.num_kv_heads, dims.head_dim, dims.head_dim)

        def kernel():
            if options.init == "mean":
                return nnx.Param(jnp.broadcast_to(jnp.eye(dims.head_dim) / options.kernel, shape))
            return nnx.Param(jax.random.normal(rngs.params(), shape) * (options.kernel * dims.head_dim) ** -0.5)  # keeps the scale of what it reads

        self.key_kernel, self.value_kernel = kernel(), kernel()

    def attend(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        k_BCKH, v_BCKH = (compress(x, kernel[...], self.options) for x, kernel in ((k_BSKH, self.key_kernel), (v_BSKH, self.value_kernel)))
        k_BCKH, v_BCKH, valid_BC = self.with_first(k_BSKH, v_BSKH, valid_BS, k_BCKH, v_BCKH)
        return backends.attention(q_BTNH, k_BCKH, v_BCKH, pattern=self.pattern(), valid_BS=valid_BC, backend=self.backend(valid_BS is not None))

    def attend_reference(self, q_BTNH, k_BSKH, v_BSKH, valid_BS, key):
        def convolve(x_BSKH, weights_PKHH):
            windows_BCPKH = jnp.take(x_BSKH, fields(self.options, x_BSKH.shape[1]), axis=1, mode="fill", fill_value=0)
            return jnp.einsum("BCPKH,PKHI->BCKI", windows_BCPKH, weights_PKHH, precision="highest")

        k_BCKH, v_BCKH = convolve(k_BSKH, self.key_kernel[...]), convolve(v_BSKH, self.value_kernel[...])
        k_BCKH, v_BCKH, valid_BC = self.with_first(k_BSKH, v_BSKH, valid_BS, k_BCKH, v_BCKH)
        return softmax_reference(q_BTNH, k_BCKH, v_BCKH, dense_mask(self.pattern(), q_BTNH.shape[1], k_BCKH.shape[1], valid_BC))

    def init_cache(self, B, max_len):
        """The slots so far (one more takes what is none), position 0 where it is kept, and the last `kernel` keys and values as they are."""
        self.check_decoding(max_len)
        K, H, kernel = self.dims.num_kv_heads, self.dims.head_dim, self.options.kernel
        C = num_slots(self.options, max_len) + self.keeps_first
        zeros = lambda n: jnp.zeros((B, n, K, H), self.dims.dtype)
        return {"t": jnp.zeros((), jnp.int32), "k": zeros(C + 1), "v": zeros(C + 1), "last_k": zeros(kernel), "last_v": zeros(kernel)}

    def step(self, q_B1NH, k_B1KH, v_B1KH, cache):
        t, C, o = cache["t"], cache["k"].shape[1] - 1, self.options
        started = t - (o.kernel - 1)  # where the slot begins that ends here, if one does
        ends = (started >= 0) & (started % o.stride == 0)
        new = {"t": t + 1}
        for name, x, weights in (("k", k_B1KH, self.key_kernel), ("v", v_B1KH, self.value_kernel)):
            new[f"last_{name}"] = jnp.concatenate([cache[f"last_{name}"][:, 1:], x.astype(self.dims.dtype)], axis=1)
            slot_B1KH = compress(new[f"last_{name}"], weights[...], o)
            slots = jax.lax.dynamic_update_slice_in_dim(cache[name], slot_B1KH, jnp.where(ends, started // o.stride + self.keeps_first, C), 1)
            new[name] = jnp.where(t == 0, slots.at[:, :1].set(x.astype(slots.dtype)), slots) if self.keeps_first else slots
        seen_L = self.pattern().mask(t, jnp.arange(C + 1)) & (jnp.arange(C + 1) < C)
        return softmax_row(jnp.where(seen_L, score_row(q_B1NH, new["k"]), -jnp.inf), new["v"], q_B1NH.dtype)[0], new

    def with_first(self, k_BSKH, v_BSKH, valid_BS, k_BCKH, v_BCKH):
        """(keys, values, validity or None) of the slots, behind position 0 itself where that is kept."""
        valid_BC = None if valid_BS is None else compress_valid(valid_BS, self.options)
        if self.keeps_first:
            k_BCKH, v_BCKH = (jnp.concatenate([x[:, :1], slots], axis=1) for x, slots in ((k_BSKH, k_BCKH), (v_BSKH, v_BCKH)))
            valid_BC = None if valid_BS is None else jnp.concatenate([valid_BS[:, :1], valid_BC], axis=1)
        return k_BCKH, v_BCKH, valid_BC

    @property
    def keeps_first(self) -> bool:
        return self.dims.causal and self.options.first

    def pattern(self) -> Pattern:
        """The slots that a query sees."""
        return pattern(self.options, self.dims.causal)

    def backend(self, masked=False):
        return backends.choose(self.dims.backend, self.pattern(), self.dims.dtype, self.dims.head_dim, masked=masked)

    def plan(self, T, S, masked=False):
        """Densities are of pairs of a query and a slot."""
        slots = num_slots(self.options, S) + self.keeps_first
        return pattern_plan(self.backend(masked), self.pattern(), T, slots, self.dims) | {"slots": slots}


def flops(options: Options, B: int, T: int, S: int, N: int, H: int, causal: bool) -> float:
    """Two convolutions, and the pairs of queries and slots."""
    C = num_slots(options, S)
    convolutions = 2 * 2.0 * B * N * C * options.kernel * H * H
    return convolutions + pair_flops(count_pairs(pattern(options, causal), T, C + (causal and options.first)), B, N, H)


MEMORY_COMPRESSED = Variant(
    name="memory_compressed",
    family="memory compression",
    options=Options,
    build=MemoryCompressed,
    paper=Paper(
        "liu2018generating",
        "Generating {W}ikipedia by Summarizing Long Sequences",
        "Liu, Peter J. and Saleh, Mohammad and Pot, Etienne and Goodrich, Ben and Sepassi, Ryan and Kaiser, {\\L}ukasz and Shazeer, Noam",
        2018,
        "International Conference on Learning Representations",
    ),
    complexity="T S / s",
    flops=flops,
    time_order=2.0,
    memory_order=1.0,
    exact_when=lambda T: {"stride": 1, "kernel": 1, "first": False, "init": "mean"},
    decode=True,
)
