"""Padding and chunks: what stands where, and that nothing of it is lost."""

import jax.numpy as jnp
import numpy as np
import pytest

from attn_zoo.ops.chunks import chunked, joined, pad, round_up


def test_rounding_up():
    assert [round_up(n, 4) for n in (0, 1, 4, 5)] == [0, 4, 4, 8]


def test_padding_adds_at_the_ends_that_are_asked_for():
    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(pad(x, {1: 5}, -1.0), [[0, 1, 2, -1, -1], [3, 4, 5, -1, -1]])
    assert pad(x, {0: 2, 1: 3}) is x


@pytest.mark.parametrize("T", [1, 6, 7])
def test_chunks_are_the_sequence_in_order(T):
    x = jnp.arange(2 * T * 5).reshape(2, T, 5)
    chunks = chunked(x, 3, 99)
    assert chunks.shape == (-(-T // 3), 2, 3, 5)
    for t in range(T):
        np.testing.assert_array_equal(chunks[t // 3, :, t % 3], x[:, t])
    assert (chunks[-1, :, (T - 1) % 3 + 1 :] == 99).all()
    np.testing.assert_array_equal(joined(chunks, T), x)


def test_what_is_added_has_the_dtype_of_the_rest():
    np.testing.assert_array_equal(chunked(jnp.ones((1, 3), bool), 2), [[[True, True]], [[True, False]]])
    np.testing.assert_array_equal(chunked(jnp.zeros((1, 3)), 2, -jnp.inf), [[[0, 0]], [[0, -np.inf]]])
