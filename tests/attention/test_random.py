"""Random keys: how many, which, and that the draw holds still. Seen from outside: with one-hot values, a positive output is a visible key."""

import jax.numpy as jnp
import numpy as np
import pytest

from attn_zoo import make_attention

LENGTHS = [(41, 41), (23, 41), (41, 23)]


def seen(spec, T, S, causal):
    """Whether query i sees key j, [T, S]."""
    attention = make_attention(spec, num_heads=2, head_dim=48, max_len=48, causal=causal)
    q, k = jnp.zeros((1, T, 2, 48)), jnp.zeros((1, S, 2, 48))
    v = jnp.broadcast_to(jnp.eye(S, 48)[None, :, None], (1, S, 2, 48))
    o = np.asarray(attention(q, k, v))[0, :, :, :S]
    np.testing.assert_array_equal(o[:, 0] > 0, o[:, 1] > 0)
    return o[:, 0] > 0


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("T, S", LENGTHS)
def test_a_query_sees_as_many_keys_as_asked_for_among_those_it_may_see(T, S, causal):
    pairs = seen("random(k=5, seed=3)", T, S, causal)
    may = np.arange(S) <= np.arange(T)[:, None] if causal else np.ones((T, S), bool)
    assert not pairs[~may].any()
    np.testing.assert_array_equal(pairs.sum(1), np.minimum(may.sum(1), 5))


def test_the_causal_draw_does_not_change_as_the_sequence_grows():
    short, long = (seen("random(k=5, seed=3)", T, T, True) for T in (29, 47))
    np.testing.assert_array_equal(short, long[:29, :29])
    few = seen("random(k=5, seed=3)", 4, 4, True)  # fewer positions than keys to draw
    np.testing.assert_array_equal(few, long[:4, :4])


def test_the_draw_follows_from_its_seed_and_differs_between_queries():
    first, again, other = (seen(f"random(k=5, seed={seed})", 41, 41, False) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(axis=1).mean() > 0.9
    assert len({row.tobytes() for row in first}) > 38
