"""Lengths rounded up, axes made longer, and a sequence in chunks, as a scan goes through it."""

import jax.numpy as jnp
from jaxtyping import Array


def pad(x: Array, sizes: dict[int, int], value: float = 0) -> Array:
    """x with `value` at the end of these axes, up to these sizes."""
    width = [(0, sizes.get(axis, size) - size) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, width, constant_values=value) if any(after for _, after in width) else x


def round_up(n: int, multiple: int) -> int:
    """The least multiple that is not below n."""
    return -(-n // multiple) * multiple


def chunked(x_BT: Array, c: int, value: float = 0) -> Array:
    """[B, T, ...] -> [ceil(T / c), B, c, ...], with `value` after the end."""
    B, T, *rest = x_BT.shape
    return jnp.moveaxis(pad(x_BT, {1: round_up(T, c)}, value).reshape(B, -1, c, *rest), 1, 0)


def joined(x_CB: Array, T: int) -> Array:
    """The inverse of `chunked`, [B, T, ...]."""
    _, B, _, *rest = x_CB.shape
    return jnp.moveaxis(x_CB, 0, 1).reshape(B, -1, *rest)[:, :T]
