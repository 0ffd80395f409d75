"""One number a row: products over the last axis, as einsums, and the place of the largest number.

`(x * y).sum(axis=-1)`, which is also the gradient of `x * factor[..., None]` in factor, takes XLA's CPU backend (jaxlib 0.10) 10 to 60 times longer than
the einsum if another axis has length 1, as a batch of one sequence has: 30 ms in place of 0.5 for 2 million numbers.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def dot_rows(x: Float[Array, "*rows H"], y: Float[Array, "*rows H"]) -> Float[Array, "*rows"]:
    """sum_h x y, accumulated in float32 at least."""
    wide = jnp.result_type(x, y, jnp.float32)
    x, y = x.astype(wide), y.astype(wide)  # before, not in the product: of bfloat16 XLA's CPU backend has no such one
    return jnp.einsum("...H,...H->...", x, y, precision="highest")


def scale_rows(x: Float[Array, "*rows H"], factor: Float[Array, "*rows"]) -> Float[Array, "*rows H"]:
    """x * factor[..., None], whose gradient in factor is a `dot_rows`."""
    return jnp.einsum("...H,...->...H", x, factor, precision="highest")


def first_largest(x: Float[Array, "..."], axis: int) -> tuple[Float[Array, "..."], Int[Array, "..."]]:
    """(max, argmax) along an axis, the first of several. If it is not the last axis, in less than half the time of argmax on a CPU: two plain reductions."""
    most = x.max(axis=axis, keepdims=True)
    places = jnp.arange(x.shape[axis], dtype=jnp.int32).reshape([-1 if a == axis % x.ndim else 1 for a in range(x.ndim)])
    return most.squeeze(axis), jnp.where(x == most, places, x.shape[axis] - 1).min(axis=axis)
