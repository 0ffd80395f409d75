"""Top-k attention: which keys are chosen, against a stable sort, and that nothing reaches the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ON_CPU

from attn_zoo import make_attention
from attn_zoo.attention import topk
from attn_zoo.ops import native
from attn_zoo.ops.native_gathered import native_best_keys

T, S, N, H = 11, 13, 2, 4


def whole_numbers(*shape, seed=0):
    """Small whole numbers: their scores are exact, and many are equal."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)


def by_sorting(q, k, valid, size, causal):
    """Per query the list of its `size` best visible keys: largest score first, equal scores by position."""
    chosen = np.empty((len(q), N, T), object)
    for b, n, t in np.ndindex(*chosen.shape):
        visible = [s for s in range(S) if valid[b, s] and (s <= t or not causal)]
        chosen[b, n, t] = sorted(visible, key=lambda s: (-float(q[b, t, n] @ k[b, s, n]), s))[:size]
    return chosen


CHOICES = [topk.best_keys, pytest.param(native_best_keys, marks=pytest.mark.skipif(ON_CPU != "native", reason=f"{native.library()}"))]
each_choice = pytest.mark.parametrize("choose", CHOICES)


@each_choice
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [1, 4, 50])
def test_the_choice_is_that_of_a_stable_sort(size, causal, choose, monkeypatch):
    monkeypatch.setattr(topk, "SCORE_BYTES", 4 * 2 * N * S * 3)  # three queries at a time, so that the last step is not full
    q, k = whole_numbers(2, T, N, H), whole_numbers(2, S, N, H, seed=1)
    valid = np.random.default_rng(2).random((2, S)) > 0.3
    index, seen = map(np.asarray, choose(jnp.asarray(q), jnp.asarray(k), jnp.asarray(valid), size, causal))
    assert index.shape == seen.shape == (2, N, T, min(size, S))
    expected = by_sorting(q, k, valid, size, causal)
    ties = 0
    for at in np.ndindex(*expected.shape):
        assert index[at][seen[at]].tolist() == expected[at]
        scores = [float(q[at[0], at[2], at[1]] @ k[at[0], s, at[1]]) for s in range(S) if valid[at[0], s]]
        ties += len(set(scores)) < len(scores)
    assert ties > 10, "the order of equal scores was put to the test"


@each_choice
def test_bf16_scores_are_compared_in_float32(choose):
    """Two keys whose scores differ by less than bf16 resolves: 256 and 257."""
    q = jnp.full((1, 1, 1, 257), 1, jnp.bfloat16)
    k = jnp.stack([q[:, 0].at[..., 0].set(0), q[:, 0]], axis=1)
    assert choose(q, k, None, 1, False)[0].tolist() == [[[[1]]]]


def test_one_key_is_a_hard_choice():
    attention = make_attention("topk(k=1)", num_heads=N, head_dim=H, max_len=S)
    q, k, v = (jax.random.normal(key, (1, S, N, H)) for key in jax.random.split(jax.random.key(0), 3))
    best = jnp.einsum("BTNH,BSNH->BNTS", q, k).argmax(axis=-1)
    expected = jnp.take_along_axis(v.swapaxes(1, 2), best[..., None], axis=2).swapaxes(1, 2)
    np.testing.assert_allclose(jax.jit(attention)(q, k, v), expected, rtol=1e-6)


def test_gradients_reach_the_chosen_keys_alone():
    attention = make_attention("topk(k=3)", num_heads=1, head_dim=H, max_len=S)
    q, k, v = (jax.random.normal(key, (1, S, 1, H)) for key in jax.random.split(jax.random.key(0), 3))
    dk, dv = jax.jit(jax.grad(lambda k, v: jnp.sin(attention(q, k, v)[:, 5]).sum(), (0, 1)))(k, v)
    chosen = set(np.argsort(-np.asarray(k[0, :, 0] @ q[0, 5, 0]))[:3].tolist())
    for gradient in (dk, dv):
        assert set(np.flatnonzero(np.abs(gradient[0, :, 0]).sum(axis=-1)).tolist()) == chosen


def test_heads_that_share_keys_choose_apart():
    attention = make_attention("topk(k=1)", num_heads=2, num_kv_heads=1, head_dim=2, max_len=2)
    q = jnp.asarray([[[[1.0, 0.0], [0.0, 1.0]]]])
    k = v = jnp.eye(2)[None, :, None]
    assert jax.jit(attention)(q, k, v).tolist() == [[[[1.0, 0.0], [0.0, 1.0]]]]
