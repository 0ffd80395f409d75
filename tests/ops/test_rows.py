"""Products over the last axis: values, gradients and the dtype they are summed in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_zoo.ops.rows import dot_rows, scale_rows


@pytest.mark.parametrize("shape", [(5,), (1, 7, 3, 5), (2, 1, 4, 1, 6)], ids=str)
def test_values_and_gradients_are_those_of_the_plain_forms(shape):
    x, y = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    factor = y[..., 0]
    for ours, plain, args in (
        (dot_rows, lambda x, y: (x * y).sum(axis=-1), (x, y)),
        (scale_rows, lambda x, factor: x * factor[..., None], (x, factor)),
    ):
        (o, pull), (expected, expected_pull) = jax.vjp(ours, *args), jax.vjp(plain, *args)
        assert o.shape == expected.shape
        np.testing.assert_allclose(o, expected, rtol=1e-6, atol=1e-6)
        for gradient, expected_gradient in zip(pull(jnp.sin(expected)), expected_pull(jnp.sin(expected))):
            np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6, atol=1e-6)


def test_half_precision_is_summed_in_float32():
    ones = jnp.ones((2, 1000), jnp.bfloat16)  # kept in bfloat16, the sum stalls at 256
    assert dot_rows(ones, ones).dtype == jnp.float32 and (dot_rows(ones, ones) == 1000).all()
