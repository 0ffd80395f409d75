"""Blocked softmax attention on Hopper GPUs: the forward pass as a Pallas kernel in Mosaic GPU, the backward pass by the kernels of pallas_attention.

The same block lists as everywhere. A program has 128 queries of one head: two warpgroups compute 64 of them each, while a third streams the listed key blocks
through shared memory (warp specialization), and the two take turns, so that the softmax of the one runs beside the products of the other (ping-pong); both
after Shah et al. 2024, FlashAttention-3, sec. 3.1. JAX deprecates Pallas' Triton form, of pallas_attention, in favour of this one.

It has not been timed on a GPU yet, and `auto` does not choose it; attention.backend=mosaic does. The tests interpret it on the CPU, barriers and copies included.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from attn_zoo.ops import pallas_attention
from attn_zoo.ops.block_mask import BlockMask, block_mask
from attn_zoo.ops.blocked import NEG, ScoreMod
from attn_zoo.ops.chunks import pad
from attn_zoo.ops.pallas_kernels import LOG2E, tables_of
from attn_zoo.ops.patterns import Pattern
from attn_zoo.ops.tuning import power_of_two
from attn_zoo.spec import Unsupported

INTERPRET = False  # tests set it: the kernel then runs on the CPU, slowly
WARPGROUPS, ROWS = 2, 64  # that compute, and the queries of each: one tile of a Hopper's matrix units
STAGES = 2  # key blocks in shared memory at a time
DTYPES = (jnp.bfloat16, jnp.float16)


def serves(pattern: Pattern, dtype, head_dim: int, masked: bool | str = False, modified: bool = False) -> bool | str:
    """Whether the kernel can compute this, whatever the device; else the reason why not."""
    if jnp.dtype(dtype) not in DTYPES:
        return f"it takes bfloat16 or float16, not {jnp.dtype(dtype).name}"
    if masked:
        return "it does not know which keys are valid"
    if modified:
        return "it does not modify scores"
    if tables_of(pattern):
        return "it does not read tables of blocks"
    return pallas_attention.serves(pattern, dtype, head_dim)


def mosaic_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    pattern: Pattern,
    valid_BS: Bool[Array, "B S"] | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """As `blocked_attention`: (output in q's dtype, float32 logsumexp), both differentiable. Raises Unsupported, with the reason, for what `serves` refuses."""
    dtype = jnp.result_type(q_BTNH, k_BSKH, v_BSKH)
    reason = serves(pattern, dtype, q_BTNH.shape[3], valid_BS is not None, score_mod is not None)
    if reason is not True:
        raise Unsupported(f"the Mosaic kernel cannot serve here: {reason}")
    scale = q_BTNH.shape[3] ** -0.5 if scale is None else scale
    o_BTNH, lse_BNT = pallas_attention.differentiable(functools.partial(_forward, pattern, scale), pattern, scale, *(x.astype(dtype) for x in (q_BTNH, k_BSKH, v_BSKH)))
    return o_BTNH.astype(q_BTNH.dtype), lse_BNT.swapaxes(1, 2)


def block_sizes(head_dim: int) -> tuple[int, int]:
    """(queries of a program, keys of a step): what fits into shared memory and registers."""
    return WARPGROUPS * ROWS, 128 if head_dim <= 128 else 64


def _forward(pattern: Pattern, scale: float, q_BTNH, k_BSKH, v_BSKH):
    """(o [B, T, N, H], lse [B, N, T])."""
    from jax.experimental.pallas import mosaic_gpu as mg  # here, so that machines that never run it need not have it

    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    (bq, bk), wide, dtype = block_sizes(H), max(64, power_of_two(H)), q_BTNH.dtype
    mask = block_mask(pattern, T, S, bq, bk)
    q, k, v = (pad(x, {1: length, 3: wide}) for x, length in ((q_BTNH, mask.num_q * bq), (k_BSKH, mask.num_k * bk), (v_BSKH, mask.num_k * bk)))
    tiles = lambda *shape: mg.SMEM(shape, dtype, transforms=(mg.TilingTransform((8, 64)), mg.SwizzleTransform(128)))
    once, each = mg.Barrier(num_barriers=WARPGROUPS), mg.Barrier(num_barriers=STAGES)
    free = mg.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES)
    with _interpreted():
        o, lse = mg.kernel(
            functools.partial(_kernel, mg=mg, pattern=pattern, scale=scale, S=S, bk=bk, group=N // K, row=mask.longest_first),
            out_type=(jax.ShapeDtypeStruct(q.shape, dtype), jax.ShapeDtypeStruct((B, N, q.shape[1]), jnp.float32)),
            grid=(B, N, mask.num_q),  # the last varies fastest: programs beside each other share keys and values
            grid_names=("sequence", "head", "block"),
            num_threads=WARPGROUPS + 1,
            thread_name="warpgroup",
            scratch_types=dict(
                q_tile=tiles(WARPGROUPS, ROWS, wide),
                k_tile=tiles(STAGES, bk, wide),
                v_tile=tiles(STAGES, bk, wide),
                lse_tile=mg.SMEM((WARPGROUPS, ROWS), jnp.float32),
                q_here=once,
                k_here=each,
                v_here=each,
                k_free=free,
                v_free=free,
                turn=mg.Barrier(num_arrivals=WARPGROUPS),
            ),
            compiler_params=mg.CompilerParams(approx_math=True),
        )(*lists(mask), q, k, v)
    return o[:, :T, :, :H], lse[..., :T]


def lists(mask: BlockMask) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(start [C + 1], full [C], block): the key blocks of query block c are block[start[c]:start[c + 1]], of which the first full[c] need no mask."""
    counts = [np.diff(start) for start in (mask.full_start, mask.part_start)]
    rows = np.concatenate([np.repeat(np.arange(mask.num_q), count) for count in counts])
    order = np.argsort(rows, kind="stable")  # the full ones stand first
    block = np.concatenate([mask.full_block, mask.part_block])[order]
    start = np.concatenate([[0], np.cumsum(sum(counts))])
    return start.astype(np.int32), counts[0].astype(np.int32), np.append(block, 0).astype(np.int32)  # an empty list could not be indexed


def _kernel(
    start_ref, full_ref, block_ref, q_ref, k_ref, v_ref, o_ref, lse_ref, *, q_tile, k_tile, v_tile, lse_tile, q_here, k_here, v_here, k_free, v_free, turn,
    mg, pattern, scale, S, bk, group, row,
):  # fmt: skip
    """128 queries of one head: o and the logsumexp of their scores. What is `here` has been copied, what is `free` may be overwritten."""
    b, n, c, me = (lax.axis_index(name) for name in ("sequence", "head", "block", "warpgroup"))
    c = row(c)
    first = start_ref[c]
    count = start_ref[c + 1] - first

    @pl.when(me == WARPGROUPS)
    def stream():
        mg.set_max_registers(40, action="decrease")
        head = lax.div(n, jnp.array(group, n.dtype))

        @pl.loop(0, count + STAGES)  # the last turns wait for the blocks that are still read
        def _(step):
            slot = lax.rem(step, jnp.array(STAGES, step.dtype))
            for ref, tile, here, free in ((k_ref, k_tile, k_here, k_free), (v_ref, v_tile, v_here, v_free)):  # keys are free before values are

                @pl.when(step >= STAGES)
                def _():
                    mg.barrier_wait(free.at[slot])

                @pl.when(step < count)
                def _():
                    rows = b, pl.ds(block_ref[first + step] * bk, bk), head
                    mg.copy_gmem_to_smem(ref.at[rows], tile.at[slot], here.at[slot])

    @pl.when(me < WARPGROUPS)
    def compute():
        mg.set_max_registers(232, action="increase")
        own = pl.ds((c * WARPGROUPS + me) * ROWS, ROWS)
        q = q_tile.at[me]
        mg.copy_gmem_to_smem(q_ref.at[b, own, n], q, q_here.at[me])
        mg.barrier_wait(q_here.at[me])
        number = mg.Layout.WGMMA.reduce(1)  # how the warpgroup holds one number a query

        def swap():
            """Both have come here, and one goes on behind the other."""
            mg.barrier_arrive(turn)
            mg.barrier_wait(turn)

        def body(step, carry, partial):
            acc, top, total = carry
            slot = lax.rem(step, jnp.array(STAGES, step.dtype))
            mg.barrier_wait(k_here.at[slot])

            scores = (scale * LOG2E) * _products(mg, q, k_tile.at[slot], then=swap)
            mg.barrier_arrive(k_free.at[slot])
            if partial:
                i, j = (_laid_out(mg, lax.broadcasted_iota(jnp.int32, (ROWS, bk), axis), mg.Layout.WGMMA) for axis in (0, 1))
                i, j = (c * WARPGROUPS + me) * ROWS + i, block_ref[first + step] * bk + j
                seen = pattern.mask(i, j)
                scores = jnp.where(seen if S % bk == 0 else seen & (j < S), scores, NEG)
            new_top = jnp.maximum(top, scores.max(axis=1))
            shrink = jnp.exp2(top - new_top)
            p = jnp.exp2(scores - lax.broadcast_in_dim(new_top, scores.shape, [0]))
            total = total * shrink + p.sum(axis=1)
            acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
            acc, total, new_top, p = lax.optimization_barrier((acc, total, new_top, p.astype(v_tile.dtype)))  # all of it before the turn
            mg.barrier_arrive(turn)
            mg.barrier_wait(v_here.at[slot])
            mg.barrier_wait(turn)
            acc = _add_product(mg, acc, p, v_tile.at[slot])
            mg.barrier_arrive(v_free.at[slot])
            return acc, new_top, total

        # The running maximum starts far above NEG: hidden pairs get weight exp2(NEG - NEG / 2) = 0 even in a row that sees nothing.
        constant = lambda shape, value, layout: _laid_out(mg, jnp.full(shape, value, jnp.float32), layout)
        carry = constant(q.shape, 0, mg.Layout.WGMMA), constant((ROWS,), NEG / 2, number), constant((ROWS,), 0, number)
        pl.when(me == 1)(swap)
        full = full_ref[c]
        carry = lax.fori_loop(0, full, functools.partial(body, partial=False), carry)
        acc, top, total = lax.fori_loop(full, count, functools.partial(body, partial=True), carry)
        pl.when(me == 0)(swap)
        whole = jnp.where(total > 0, total, 1.0)
        q[...] = (acc / lax.broadcast_in_dim(whole, acc.shape, [0])).astype(q.dtype)
        lse_tile.at[me][...] = jnp.where(total > 0, top / LOG2E + jnp.log(whole), -jnp.inf)
        mg.commit_smem()
        mg.copy_smem_to_gmem(q, o_ref.at[b, own, n])
        mg.copy_smem_to_gmem(lse_tile.at[me], lse_ref.at[b, n, own])
        mg.wait_smem_to_gmem(0)


# What only a GPU has: where the kernel is interpreted, products are those of arrays, and no threads hold parts of them.


def _products(mg, q, k, then):
    """q k', float32; `then` is called when the matrix units have it to do."""
    if INTERPRET:
        then()
        return lax.dot_general(q[...], k[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    def into(ref):
        mg.wgmma(ref, q, mg.transpose_ref(k, (1, 0)))
        then()
        return ref[...]

    return pl.run_scoped(into, mg.ACC((q.shape[0], k.shape[0]), jnp.float32))


def _add_product(mg, acc, p, v):
    """acc + p v, in the registers of acc."""
    if INTERPRET:
        return acc + jnp.dot(p, v[...], preferred_element_type=jnp.float32)
    return pl.run_state(lambda ref: mg.wgmma(ref, p, v))(mg.ACC.init(acc))


def _laid_out(mg, x, layout):
    """x as the threads of a warpgroup are to hold it."""
    return x if INTERPRET else mg.layout_cast(x, layout)


def _interpreted():
    if not INTERPRET:
        return contextlib.nullcontext()
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode  # has no public name yet

    return force_gpu_interpret_mode(InterpretGPUParams())
