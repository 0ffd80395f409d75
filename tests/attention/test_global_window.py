"""Longformer's attention: who sees whom, and the projections of its own that a global query uses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_zoo import make_attention
from attn_zoo.attention.global_window import Options, pattern

T = 30


def make(**options):
    text = ", ".join(f"{k}={v}" for k, v in options.items())
    return make_attention(f"global_window({text})", num_heads=2, head_dim=8, max_len=T, rngs=nnx.Rngs(0))


def inputs():
    return [jax.random.normal(key, (1, T, 2, 8)) for key in jax.random.split(jax.random.key(0), 3)]


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_who_sees_whom(causal):
    i, j = np.arange(T)[:, None], np.arange(T)
    seen = pattern(Options(window=2, globals=3), causal).mask(i, j)
    expected = (abs(i - j) <= 2) | (i < 3) | (j < 3)
    assert (seen == (expected & (j <= i) if causal else expected)).all()


def test_separate_projections_start_as_the_common_ones_and_serve_global_queries_alone():
    args = inputs()
    plain, separate = make(window=2, globals=3), make(window=2, globals=3, separate=True)
    np.testing.assert_allclose(separate(*args), plain(*args), atol=1e-6)
    separate.value_map[...] = 2 * separate.value_map[...]
    o, before = separate(*args), plain(*args)
    np.testing.assert_allclose(o[:, :3], 2 * before[:, :3], atol=1e-5)
    np.testing.assert_array_equal(o[:, 3:], before[:, 3:])


def test_separate_projections_are_trained_by_global_rows():
    graph, params, rest = nnx.split(make(window=2, globals=3, separate=True), nnx.Param, ...)
    loss = lambda params, rows: jnp.square(nnx.merge(graph, params, rest)(*inputs())[:, rows]).sum()
    for rows, trained in ((slice(0, 3), True), (slice(3, T), False)):
        gradients = jax.tree.leaves(jax.grad(loss)(params, rows))
        assert len(gradients) == 3 and all(bool((g != 0).any()) == trained for g in gradients)
