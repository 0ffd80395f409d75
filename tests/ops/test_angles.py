"""Sines and cosines, by the addition theorem and of numbers, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_zoo.ops.angles import FINE, sine_and_cosine, sines_and_cosines

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


@pytest.mark.parametrize("largest", [1.0, 100.0, 8192.0])
def test_of_numbers(largest):
    x = np.concatenate([np.linspace(-largest, largest, 100_001), np.pi / 4 * np.arange(-9, 10)]).astype(np.float32)
    call = jax.jit(lambda x: jax.jvp(sine_and_cosine, (x,), (jnp.full(x.shape, 2.0),)))
    (sin, cos), (d_sin, d_cos) = call(x)
    exact = np.sin(x.astype(np.float64)), np.cos(x.astype(np.float64))
    for found, expected in zip((sin, cos, d_sin / 2, -d_cos / 2), (*exact, exact[1], exact[0])):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=1.2e-7)


def test_of_what_is_no_number():
    for found in sine_and_cosine(jnp.asarray([jnp.nan, jnp.inf, -jnp.inf])):
        assert np.isnan(found).all()
