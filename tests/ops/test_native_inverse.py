"""The C++ kernels of Nyströmformer's pseudo-inverse: against XLA's form, outputs and gradients, and under what JAX does to them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pallas_linear import assert_close, results
from tiny import ON_CPU

from attn_zoo.attention.nystrom import pseudo_inverse
from attn_zoo.ops import native
from attn_zoo.ops.native_inverse import native_pseudo_inverse
from attn_zoo.spec import Unsupported

pytestmark = pytest.mark.skipif(ON_CPU != "native", reason=f"{native.library()}")

SHAPES = {"one": (1, 1), "wide": (3, 5, 70), "tall": (70, 5), "whole-vectors": (2, 64, 64), "more-than-them": (2, 3, 40, 17)}


def weights(*shape, dtype=jnp.float32):
    """Rows that sum to 1, the diagonal's weights the largest, so that the inverse is not rounding."""
    scores = np.random.default_rng(shape[-1]).normal(size=shape) + 3 * np.eye(*shape[-2:])
    return jax.nn.softmax(jnp.asarray(scores, dtype), axis=-1)


@pytest.mark.parametrize("iterations", [1, 6])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_iteration_in_xla(shape, iterations):
    args = [weights(*SHAPES[shape])]
    native_form, xla = (functools.partial(pseudo_inverse, iterations=iterations, backend=backend) for backend in ("native", "xla"))
    assert_close(results(native_form, args), results(xla, args), 1e-5)


def test_gradient_by_the_start():
    """Which pseudo_inverse makes from the matrix itself."""
    A = weights(2, 20, 33)
    start = 0.02 * jnp.asarray(np.random.default_rng(0).normal(size=(2, 33, 20)), jnp.float32)

    def xla(A, Z):
        product, I = functools.partial(jnp.matmul, precision="highest"), jnp.eye(20)
        for _ in range(3):
            X = product(A, Z)
            Z = 0.25 * product(Z, 13 * I - product(X, 15 * I - product(X, 7 * I - X)))
        return Z

    assert_close(results(lambda *args: native_pseudo_inverse(*args, 3), (A, start)), results(xla, (A, start)), 1e-5)


def test_under_vmap_and_checkpoint():
    args, f = [weights(3, 20, 20)], functools.partial(pseudo_inverse, iterations=6, backend="native")
    expected = results(f, args)
    assert_close(results(jax.checkpoint(f), args), expected, 1e-6)
    assert_close(results(jax.vmap(f), args), expected, 1e-6)


def test_refuses_float64():
    with jax.enable_x64(True), pytest.raises(Unsupported, match="the native kernels cannot serve here: it takes float32, bfloat16 or float16, not float64"):
        pseudo_inverse(weights(4, 4, dtype=jnp.float64), 6, backend="native")
