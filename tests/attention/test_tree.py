"""Tree attention: what a query sees tiles the sequence, span by span, and a span weighs as one key."""

import jax.numpy as jnp
import numpy as np
import pytest

from attn_zoo import make_attention
from attn_zoo.attention.tree import level_sizes, nodes_seen

DIRECTION = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])


def make(neighbours, causal, max_len=64, H=64):
    return make_attention(f"tree(neighbours={neighbours})", num_heads=1, head_dim=H, max_len=max_len, causal=causal)


def spans(neighbours, T, causal):
    """For every query, the (start, stop) of the spans it sees, by the layout of the tree: level after level, the leaves first."""
    layout = [(n * 2**level, min((n + 1) * 2**level, T)) for level, size in enumerate(level_sizes(T)) for n in range(size)]
    return [[layout[c] for c in index[seen]] for index, seen in zip(*nodes_seen(neighbours, T, causal))]


@DIRECTION
@pytest.mark.parametrize("neighbours", [1, 2, 3, 4, 7, 100])
@pytest.mark.parametrize("T", [1, 2, 13, 32, 63, 201])
def test_what_a_query_sees_covers_every_visible_position_once(T, neighbours, causal):
    for i, seen in enumerate(spans(neighbours, T, causal)):
        covered = sorted(j for start, stop in seen for j in range(start, stop))
        assert covered == list(range(i + 1 if causal else T))
        assert (i, i + 1) in seen


@pytest.mark.parametrize("neighbours", [1, 3, 4])
def test_spans_grow_with_distance_and_are_few(neighbours):
    T = 1024
    for i, seen in enumerate(spans(neighbours, T, False)):
        for side in (sorted((s for s in seen if s[1] <= i), reverse=True), sorted(s for s in seen if s[0] > i)):
            lengths = [stop - start for start, stop in side if stop < T]
            assert lengths[:neighbours] == [1] * len(lengths[:neighbours])
            # A level up doubles, and so does going from a half that closed a gap to whole nodes.
            assert all(b in (a, 2 * a, 4 * a) for a, b in zip(lengths, lengths[1:]))
            assert len(side) <= neighbours * np.ceil(np.log2(T / neighbours) + 1)


def weights_of(attention, T, valid=None):
    """The weight of key j in output i when all scores are equal, [T, T]."""
    v = jnp.eye(T, attention.dims.head_dim)[None, :, None]
    return np.asarray(attention(jnp.zeros(v.shape), jnp.zeros(v.shape), v, valid_BS=valid))[0, :, 0, :T]


@DIRECTION
def test_a_span_shares_one_weight_among_its_positions(causal):
    T = 45
    expected = np.zeros((T, T))
    for i, seen in enumerate(spans(2, T, causal)):
        for start, stop in seen:
            expected[i, start:stop] = 1 / len(seen) / (stop - start)
    np.testing.assert_allclose(weights_of(make(2, causal), T), expected, rtol=1e-5, atol=1e-8)


def test_invalid_positions_leave_their_span_to_the_others():
    T = 45
    valid = np.random.default_rng(0).random(T) < 0.5
    valid[8:16] = False  # whole spans without a valid position
    expected = np.zeros((T, T))
    for i, seen in enumerate(spans(2, T, False)):
        seen = [valid[start:stop].nonzero()[0] + start for start, stop in seen]
        seen = [positions for positions in seen if len(positions)]
        for positions in seen:
            expected[i, positions] = 1 / len(seen) / len(positions)
    np.testing.assert_allclose(weights_of(make(2, False), T, jnp.asarray(valid)[None]), expected, rtol=1e-5, atol=1e-8)


def test_a_span_is_scored_by_its_mean_key():
    """One query, scores that differ: softmax over the span means, by hand."""
    T, H, rng = 16, 8, np.random.default_rng(1)
    q, k, v = (rng.normal(size=(1, T, 1, H)) for _ in range(3))
    o = make(1, True, H=H)(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
    seen = [(13, 14), (12, 13), (10, 12), (8, 10), (0, 8)]  # query 13 with one neighbour a level; the 8 to 10 closes a gap at level 2
    means = [np.stack([x[0, start:stop, 0].mean(0) for start, stop in seen]) for x in (k, v)]
    weights = np.exp(means[0] @ q[0, 13, 0] * H**-0.5)
    np.testing.assert_allclose(o[0, 13, 0], weights / weights.sum() @ means[1], rtol=0, atol=2e-6)
