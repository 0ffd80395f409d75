"""Blocked softmax attention by splash attention, the block-sparse flash attention in Pallas for TPUs that comes with JAX, behind the signature of
`blocked_attention`.

A Pattern becomes a splash Mask, whose blocks are judged by its BlockMask: a row of the grid is as long as the longest list of blocks, and what is beyond
the end of a list is skipped. In partial blocks a pattern that is an elementwise function of indices is evaluated inside the kernel (and then, as
splash has it, in full ones too); of any other (BlockTable) the distinct partial blocks are stored, one byte a pair.

Splash walks over all blocks of a mask in Python, six times, and asks each for its elements. Absent and full blocks answer with one element that stands
for all, and so do partial ones unless they are stored: the walk takes some 20 us a block, whatever its area, which at T = S = 65,536 is 0.4 s in blocks of
512, and 5 s in blocks of 128.

JAX's gradient knows no cotangent of the logsumexp, so the backward kernels are called from here. They are private to JAX, the same in 0.10.2 and 0.12.0;
where a version has changed what they take, `serves` says so. All has been compiled for a TPU v5e, and not yet run on one.
"""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, Mask, MultiHeadMask, SegmentIds, make_splash_mha
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jaxtyping import Array, Bool, Float

from attn_zoo.ops import blocked
from attn_zoo.ops.block_mask import block_mask
from attn_zoo.ops.blocked import ScoreMod
from attn_zoo.ops.chunks import pad, round_up
from attn_zoo.ops.pallas_attention import mask_obstacle
from attn_zoo.ops.pallas_kernels import tables_of
from attn_zoo.ops.patterns import Pattern
from attn_zoo.spec import Unsupported

INTERPRET = False  # tests set it: the kernels then run on any device, slowly
LANES = 128  # the width of a TPU's vector registers, which blocks are multiples of
MOST_HEAD_DIM = 256
SCALAR_BYTES = 7 * 2**17  # for the list of blocks, of the 1 MiB of scalar memory that a TPU core has from v4 on
DTYPES = (jnp.bfloat16, jnp.float32)
# The score of a value of zeros that every row sees besides its keys. Beside any key it weighs nothing; in a row that sees none it takes all the weight,
# where splash would divide zero by zero, or average the keys that are masked.
SINK = -1e30
ABSENT, PARTIAL, FULL = range(3)  # states of a block
STANDS_FOR = np.array([[False]]), np.array([[True, False]]), np.array([[True]])


def serves(dtype, head_dim: int, modified: bool = False) -> bool | str:
    """Whether the kernels can compute this, whatever the device and the pattern; else the reason why not."""
    if jnp.dtype(dtype) not in DTYPES:
        return f"it takes bfloat16 or float32, not {jnp.dtype(dtype).name}"
    if head_dim > MOST_HEAD_DIM:
        return f"the head dim must be at most {MOST_HEAD_DIM}, not {head_dim}"
    if modified:
        return "it cannot modify scores"
    return True if backward_is_known() else f"its backward pass in jax {jax.__version__} is not the one known here"


def splash_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    pattern: Pattern,
    valid_BS: Bool[Array, "B S"] | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    block: int | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """As `blocked_attention`: (output in q's dtype, float32 logsumexp), both differentiable. Raises Unsupported, with the reason, for what `serves` refuses.

    The scale multiplies the queries beforehand, in float32, and rounds them to their dtype once more; float32 products have the precision that is JAX's
    default on a TPU. `block`, a multiple of 128, sets both block sizes.
    """
    (B, T, N, H), S = q_BTNH.shape, k_BSKH.shape[1]
    dtype = jnp.result_type(q_BTNH, k_BSKH, v_BSKH)
    reason = serves(dtype, H, modified=score_mod is not None)
    if reason is not True:
        raise Unsupported(f"splash attention cannot serve here: {reason}")
    mask = mask_of(pattern, T, S, *(block_sizes(pattern, T, S) if block is None else (block, block)))
    if not mask.states.any():  # no grid at all
        return jnp.zeros_like(q_BTNH), jnp.full((B, T, N), -jnp.inf)
    rows, columns = mask.shape
    scaled_BTNH = q_BTNH.astype(jnp.float32) * (H**-0.5 if scale is None else scale)
    q, k, v = (pad(x.astype(dtype), {1: length}).swapaxes(1, 2) for x, length in ((scaled_BTNH, rows), (k_BSKH, columns), (v_BSKH, columns)))
    segments = None if valid_BS is None else SegmentIds(jnp.ones(rows, jnp.int32), pad(valid_BS.astype(jnp.int32), {1: columns}))
    o_BNTH, lse_BNT = jax.vmap(_attend(mask), (0, 0, 0, None if segments is None else SegmentIds(None, 0)))(q, k, v, segments)
    lse_BTN = lse_BNT[:, :, :T].swapaxes(1, 2)
    return o_BNTH[:, :, :T].swapaxes(1, 2).astype(q_BTNH.dtype), jnp.where(lse_BTN > SINK, lse_BTN, -jnp.inf)


def block_sizes(pattern: Pattern, T: int, S: int) -> tuple[int, int]:
    """(query block, key block) of all three kernels: those of the XLA engine in whole lanes, larger where the list of blocks would not fit a TPU's scalar
    memory. They have not been timed on a TPU.
    """
    q_block, k_block = (round_up(size, LANES) for size in blocked.block_sizes(pattern, T, S))
    while mask_of(pattern, T, S, q_block, k_block).scalar_bytes > SCALAR_BYTES:
        q_block, k_block = 2 * q_block, 2 * k_block
    return q_block, k_block


@functools.lru_cache(maxsize=16)
def mask_of(pattern: Pattern, T: int, S: int, q_block: int, k_block: int) -> "PatternMask":
    """The pattern over T queries and S keys, padded to whole blocks. Splash evaluates what has a `mask_function` inside the kernel."""
    mask = PatternMask(pattern, T, S, q_block, k_block)
    elementwise = not tables_of(pattern) and mask_obstacle(pattern) is None
    return ComputedMask(pattern, T, S, q_block, k_block) if elementwise and (mask.states == PARTIAL).any() else mask


@dataclasses.dataclass(frozen=True)
class PatternMask(Mask):
    """A pattern whose partial blocks are stored."""

    pattern: Pattern
    T: int
    S: int
    q_block: int
    k_block: int

    @property
    def shape(self):
        return round_up(self.T, self.q_block), round_up(self.S, self.k_block)

    def __getitem__(self, index):
        """The elements of one block, or one element, or two that differ, that stand for all of it: what splash looks at is whether any and all are seen."""
        c, d = index[0].start // self.q_block, index[1].start // self.k_block
        stored = self.stored.get((c, d))
        return STANDS_FOR[self.states[c, d]] if stored is None else stored

    @functools.cached_property
    def states(self) -> np.ndarray:
        """[query blocks, key blocks]: ABSENT, PARTIAL or FULL."""
        mask = block_mask(self.pattern, self.T, self.S, self.q_block, self.k_block)
        states = np.full((mask.num_q, mask.num_k), ABSENT, np.int8)
        for start, block, state in ((mask.full_start, mask.full_block, FULL), (mask.part_start, mask.part_block, PARTIAL)):
            states[np.repeat(np.arange(mask.num_q), np.diff(start)), block] = state
        return states

    @property
    def scalar_bytes(self) -> int:
        """Of a TPU's scalar memory that the longer list takes, by key or by query block: a state, a place, and which of the stored blocks it is."""
        listed = self.states != ABSENT
        places = max(len(listed) * listed.sum(axis=1).max(), listed.shape[1] * listed.sum(axis=0).max())
        return int(places) * (3 if isinstance(self, ComputedMask) else 7)

    @functools.cached_property
    def stored(self) -> dict[tuple[int, int], np.ndarray]:
        """The elements of the partial blocks; where they are equal, they are one array."""
        distinct, found = {}, {}
        for c, d in np.argwhere(self.states == PARTIAL).tolist():
            i, j = c * self.q_block + np.arange(self.q_block)[:, None], d * self.k_block + np.arange(self.k_block)[None]
            seen = np.broadcast_to(self.pattern.mask(i, j) & (j < self.S), (self.q_block, self.k_block))
            found[c, d] = distinct.setdefault(seen.tobytes(), seen)
        return found


@dataclasses.dataclass(frozen=True)
class ComputedMask(PatternMask):
    """A pattern that is evaluated inside the kernel."""

    stored = {}

    @property
    def q_sequence(self) -> np.ndarray:
        return np.arange(self.shape[0], dtype=np.int32)

    @property
    def mask_function(self) -> "Sees":
        return Sees(self.pattern, self.S if self.S % self.k_block else None)


@dataclasses.dataclass(frozen=True)
class Sees:
    """mask(i, j), and j < S where the last key block is not full. Equal ones are equal to JAX's caches."""

    pattern: Pattern
    S: int | None

    def __call__(self, i, j):
        seen = self.pattern.mask(i, j)
        return seen if self.S is None else seen & (j < self.S)


def _attend(mask: PatternMask):
    """(q [N, T, H], k, v [K, S, H], segments) -> (o, lse [N, T], SINK where nothing is seen), with a backward pass for both."""
    sizes = {"block_q": mask.q_block, "block_kv": mask.k_block, "block_q_dq": mask.q_block, "block_kv_dq": mask.k_block}
    sizes = BlockSizes(**sizes, block_q_dkv=mask.q_block, block_kv_dkv=mask.k_block)

    def kernel(N):
        masks = MultiHeadMask([mask] * N)
        return make_splash_mha(masks, block_sizes=sizes, head_shards=1, q_seq_shards=1, save_residuals=True, interpret=INTERPRET)

    @jax.custom_vjp
    def attend(q, k, v, segments):
        o, (lse,) = kernel(len(q))(q, k, v, segments, jnp.full(len(q), SINK))
        return o, lse

    def attend_fwd(q, k, v, segments):
        o, lse = attend(q, k, v, segments)
        return (o, lse), (q, k, v, segments, o, lse)

    def attend_bwd(residuals, cotangents):
        q, k, v, segments, o, lse = residuals
        do, dlse = cotangents
        # d lse / d score = p and d o / d score = p (v - o): both fold into one number a row.
        delta = (do.astype(jnp.float32) * o.astype(jnp.float32)).sum(axis=-1) - dlse
        inputs = q, k, v, segments, None, lse, do, delta
        layouts = {"q_layout": sizes.q_layout, "k_layout": sizes.k_layout, "v_layout": sizes.v_layout}
        both = layouts | {"bq": mask.q_block, "bkv": mask.k_block, "is_mqa": False, "mask_value": kernels.DEFAULT_MASK_VALUE, "attn_logits_soft_cap": None}
        both |= {"mask_function": getattr(mask, "mask_function", None), "interpret": INTERPRET}
        infos = kernel(len(q))
        dq = kernels._splash_attention_bwd_dq(*inputs, mask_info=infos.dq_mask_info, **both)
        of_keys = {"bkv_compute": mask.k_block, "use_fused_bwd_kernel": False}
        _, dk, dv = kernels._splash_attention_bwd_dkv(*inputs, mask_info=infos.dkv_mask_info, **both, **of_keys)
        return dq, dk, dv, None

    attend.defvjp(attend_fwd, attend_bwd)
    return attend


@functools.cache
def backward_is_known() -> bool:
    """Whether JAX's backward kernels take what is passed to them above."""
    both = {"q", "k", "v", "segment_ids", "sinks", "logsumexp", "do", "di", "bq", "bkv", "is_mqa", "mask_info", "mask_value", "attn_logits_soft_cap"}
    both |= {"q_layout", "k_layout", "v_layout", "mask_function", "interpret"}
    takes = {"_splash_attention_bwd_dq": both, "_splash_attention_bwd_dkv": both | {"bkv_compute", "use_fused_bwd_kernel"}}
    return all(hasattr(kernels, name) and set(inspect.signature(getattr(kernels, name)).parameters) == known for name, known in takes.items())
