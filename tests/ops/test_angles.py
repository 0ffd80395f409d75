"""Sines and cosines by the addition theorem, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_zoo.ops.angles import FINE, sines_and_cosines

FREQUENCIES = 10000.0 ** (-np.arange(32) / 32)


def exactly(T, start, frequencies=FREQUENCIES):
    angles = np.arange(start, start + T)[:, None] * frequencies
    return np.sin(angles), np.cos(angles)


@pytest.mark.parametrize("start", [0, 1000])
@pytest.mark.parametrize("T", [1, FINE - 1, FINE, FINE + 1, 65536])
def test_of_float64(T, start):
    for found, expected in zip(jax.jit(lambda: sines_and_cosines(T, FREQUENCIES, start))(), exactly(T, start)):
        assert found.shape == (T, 32) and found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=5e-7)


@pytest.mark.parametrize("T", [1, 200])
@pytest.mark.parametrize("start", [0, 3, 70000])
def test_of_a_start_known_only_when_run(T, start):
    call = jax.jit(lambda start: sines_and_cosines(T, FREQUENCIES, start))
    for found, expected in zip(call(jnp.int32(start)), exactly(T, start)):
        assert found.shape == (T, 32) and found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=5e-7 + 1e-9 * start)


def test_frequencies_beyond_a_circle():
    frequencies = np.array([2 * np.pi - 1e-3, 7.0, 100.0])
    for start in (5, jnp.int32(5)):
        for found, expected in zip(sines_and_cosines(300, frequencies, start), exactly(300, 5, frequencies)):
            np.testing.assert_allclose(found, expected, atol=1e-6)
