"""The iteration of Nyströmformer's pseudo-inverse in C++, for CPUs: a matrix with all its iterations is one task. See attention.nystrom, ops.native.

XLA takes each product for itself, and a batch of small ones on one core.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attn_zoo.ops import native


def native_pseudo_inverse(A: Float[Array, "*batch M N"], start: Float[Array, "*batch N M"], iterations: int) -> Float[Array, "*batch N M"]:
    """As `pseudo_inverse`'s iterations from `start`, in float32. Keeps what each of them comes to for the backward pass.

    Working memory is that of some ten matrices for each core. Raises Unsupported, with the reason, for what native.serves refuses.
    """
    native.check(jnp.result_type(A, start))
    *batch, M, N = A.shape
    pad = lambda x: jnp.pad(x.astype(jnp.float32).reshape(math.prod(batch), *x.shape[-2:]), ((0, 0), *((0, -n % native.LANES) for n in x.shape[-2:])))
    return _inverse(iterations, pad(A), pad(start))[:, :N, :M].reshape(start.shape)


def _call(name, shapes, A, *more):
    return native.call(f"inverse_{name}", shapes, (A.swapaxes(1, 2), *more), tasks=len(A), room=A.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _inverse(iterations, A, start):
    """Of float32 matrices [matrices, M, N] with whole vectors both ways."""
    return _inverse_fwd(iterations, A, start)[0]


def _inverse_fwd(iterations, A, start):
    start = start.swapaxes(1, 2)
    (iterates,) = _call("forward", [(iterations, *start.shape)], A, start)
    return iterates[-1].swapaxes(1, 2), (A, start, iterates)


def _inverse_bwd(iterations, residuals, cotangent):
    return tuple(_call("backward", (residuals[0].shape, cotangent.shape), *residuals, cotangent))


_inverse.defvjp(_inverse_fwd, _inverse_bwd)
