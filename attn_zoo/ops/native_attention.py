"""Blocked softmax attention in C++, for CPUs: the block lists of `blocked_attention`, on tiles that stay in registers and cache. See ops.native."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from attn_zoo.ops import native
from attn_zoo.ops.block_mask import block_mask, pair_bits
from attn_zoo.ops.blocked import ScoreMod
from attn_zoo.ops.native import whole
from attn_zoo.ops.patterns import FULL, Pattern
from attn_zoo.spec import Unsupported

BLOCK = 64  # queries, and keys, of a tile
MOST_HEAD_DIM = 256
MOST_SPLITS = 4  # parts of a head's queries that run beside each other; each has dk and dv of its own
NOTHING = np.zeros((0, 0, 0), np.float32)  # added to scores


def serves(dtype, head_dim: int, modified: ScoreMod | str | bool = False) -> bool | str:
    """Whether it computes this on a CPU; else the reason why not. Compiles it where only that is left to find out. modified: as of backends.choose."""
    if head_dim > MOST_HEAD_DIM:
        return f"the head dim must be at most {MOST_HEAD_DIM}, not {head_dim}"
    if modified and modified != "by distance" and not getattr(modified, "by_distance", False):
        return "it cannot modify scores, but by what the distance alone adds"
    return native.serves(dtype)


def native_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    pattern: Pattern,
    valid_BS: Bool[Array, "B S"] | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """As `blocked_attention`: (output in q's dtype, float32 logsumexp), both differentiable. Raises Unsupported, with the reason, for what `serves` refuses.

    Everything is computed in float32. The working memory of a pass is four arrays [S, H] at most for each core that it runs on. What score_mod adds is read
    from a table of all distances.
    """
    H = q_BTNH.shape[-1]
    reason = serves(jnp.result_type(q_BTNH, k_BSKH, v_BSKH), H, score_mod or False)
    if reason is not True:
        raise Unsupported(f"the native kernels cannot serve here: {reason}")
    attend = _attend(pattern, H**-0.5 if scale is None else scale, lambda about: NOTHING)
    table = np.zeros((0, 0), np.float32) if score_mod is None else _table(score_mod, q_BTNH.shape[1], k_BSKH.shape[1])
    o_BTNH, lse_BTN = attend(*(whole(x, 3) for x in (q_BTNH, k_BSKH, v_BSKH)), np.zeros(0, bool) if valid_BS is None else valid_BS, (), table)
    return o_BTNH[..., :H].astype(q_BTNH.dtype), lse_BTN


def native_tiles(
    q_MTGH: Float[Array, "M T G H"], k_MSH: Float[Array, "M S H"], v_MSH: Float[Array, "M S H"], added: Callable[[Any], Array], about: Any, *, scale: float
) -> tuple[Float[Array, "M T G H"], Float[Array, "M T G"]]:
    """Attention inside each of M tiles: (output, float32 logsumexp). added(about), [M, T, S], is added to the scaled scores, -1e30 where a pair is hidden.

    It is computed again for the backward pass, and neither it nor `about` has a gradient; it must not close over a traced value. Errors as `native_attention`.
    """
    H = q_MTGH.shape[-1]
    reason = serves(jnp.result_type(q_MTGH, k_MSH, v_MSH), H)
    if reason is not True:
        raise Unsupported(f"the native kernels cannot serve here: {reason}")
    attend = _attend(FULL, scale, lambda about: whole(added(about), 2))
    o_MTGH, lse_MTG = attend(*(whole(x, 3) for x in (q_MTGH, k_MSH[:, :, None], v_MSH[:, :, None])), np.zeros(0, bool), about, np.zeros((0, 0), np.float32))
    return o_MTGH[..., :H].astype(q_MTGH.dtype), lse_MTG


def _splits(tasks: int, rows: int, cores: int, backward: bool) -> int:
    """Into how many parts the rows of each task are split: as few as keep the cores busy for 0.9 of the time, or come nearest to it.

    Backward only where there are cores without a task: gradients of keys, of which every part has its own, take longer than a core waits at the end.
    """
    most = max(1, min(MOST_SPLITS, rows))
    if backward:
        return max(1, min(most, cores // tasks))
    busy = [tasks * parts / (cores * -(-tasks * parts // cores)) for parts in range(1, most + 1)]
    return 1 + next((n for n, share in enumerate(busy) if share >= 0.9), busy.index(max(busy)))


def _table(score_mod: ScoreMod, T: int, S: int) -> Array:
    """What it adds, by head and by distance i - j from 1 - S on, [N, S + T + BLOCK - 2]: up to the end of a block that begins with the last query."""
    distances = jnp.arange(1 - S, T + BLOCK - 1)
    params = jax.tree.map(lambda x: x[:, None, None], score_mod.params)
    return jnp.squeeze(score_mod.fn(jnp.zeros((1, len(distances), 1)), distances[:, None], jnp.zeros((1, 1), int), params), -1)


def _attend(pattern: Pattern, scale: float, added: Callable[[Any], Array]) -> Callable:
    """(q, k, v, valid, about, table) -> (o, lse), with its own backward pass, of float32 arrays with whole vectors of channels.

    `valid`, added(about) and the table by distance may be empty.
    """

    def call(name, results, q, k, v, valid, about, table, *more):
        (B, T), (S, K, H) = q.shape[:2], k.shape[1:]
        mask = block_mask(pattern, T, S, BLOCK, BLOCK)
        splits = _splits(B * K, mask.num_q, native.core_count(), backward=name == "backward")
        lists = mask.full_start, mask.full_block, mask.part_start, mask.part_block, *pair_bits(pattern, T, S)
        arguments = q, k, v, valid, added(about), table, *lists, mask.even_parts(splits), *more
        return native.call(f"attention_{name}", results(splits), arguments, tasks=B * K * splits, room=(S, H), scale=np.float32(scale))

    @jax.custom_vjp
    def attend(q, k, v, valid, about, table):
        return tuple(call("forward", lambda splits: (q.shape, q.shape[:3]), q, k, v, valid, about, table))

    def attend_fwd(*inputs):
        o, lse = attend(*inputs)
        return (o, lse), (*inputs, o, lse)

    def attend_bwd(residuals, cotangents):
        q, k, *_, table = residuals[:6]
        shapes = lambda splits: (q.shape, (splits, *k.shape), (splits, *k.shape), (splits, len(q), *(table.shape if table.size else (q.shape[2], 0))))
        dq, dk, dv, d_table = call("backward", shapes, *residuals, *cotangents)
        # Split by split: XLA's sum over that axis takes thirty times as long.
        return dq, sum(dk), sum(dv), None, None, sum(d_table).sum(axis=0) if table.size else jnp.zeros_like(table)

    attend.defvjp(attend_fwd, attend_bwd)
    return attend
