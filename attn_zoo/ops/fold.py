"""Folding a sequence by a stride, so that what is strided in it becomes dense: positions of equal remainder are one sequence."""

import jax.numpy as jnp

from attn_zoo.ops.chunks import pad


def fold(x_BT, stride: int):
    """[B, T, ...] -> [B stride, ceil(T / stride), ...], padded with zeros (False) at the end."""
    B, T, *rest = x_BT.shape
    rows = -(-T // stride)
    x = pad(x_BT, {1: rows * stride}).reshape(B, rows, stride, *rest)
    return x.swapaxes(1, 2).reshape(B * stride, rows, *rest)


def unfold(x, stride: int, T: int):
    """The inverse of `fold`, [B, T, ...]."""
    rows = x.shape[1]
    x = x.reshape(-1, stride, *x.shape[1:]).swapaxes(1, 2)
    return x.reshape(x.shape[0], rows * stride, *x.shape[3:])[:, :T]


def fold_valid(valid_BS, B: int, S: int, stride: int):
    """Validity of the folded keys: `valid_BS` if given, and False where folding pads; None where all are valid."""
    if valid_BS is None and S % stride == 0:
        return None
    return fold(jnp.ones((B, S), bool) if valid_BS is None else valid_BS, stride)
