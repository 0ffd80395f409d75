"""BigBird in its element form: window and global tokens are always there, and the draw is from what they leave."""

import numpy as np
import pytest
from test_random import LENGTHS, seen

W, G, R = 3, 2, 4
SPEC = f"bigbird(window={W}, globals={G}, random={R}, seed=3)"


def fixed(T, S, causal):
    """(pairs of window and globals, pairs that causality allows), [T, S] each."""
    i, j = np.arange(T)[:, None], np.arange(S)[None, :]
    may = (j <= i) | (not causal)
    return ((abs(i - j) <= W) | (i < G) | (j < G)) & may, may


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("T, S", LENGTHS)
def test_random_keys_are_drawn_among_those_that_window_and_globals_leave(T, S, causal):
    pairs, (always, may) = seen(SPEC, T, S, causal), fixed(T, S, causal)
    assert pairs[always].all() and not pairs[~may].any()
    np.testing.assert_array_equal((pairs & ~always).sum(1), np.minimum((may & ~always).sum(1), R))


def test_the_causal_draw_does_not_change_as_the_sequence_grows():
    short, long = (seen(SPEC, T, T, True) for T in (29, 47))
    np.testing.assert_array_equal(short, long[:29, :29])


def test_the_draw_reaches_both_sides_of_the_window_and_follows_from_its_seed():
    always, _ = fixed(41, 41, False)
    drawn = [seen(SPEC.replace("seed=3", f"seed={seed}"), 41, 41, False) & ~always for seed in (3, 4)]
    assert (drawn[0] != drawn[1]).any(axis=1)[G:].mean() > 0.9
    i, j = np.nonzero(drawn[0])
    assert (j < i - W).sum() > 30 and (j > i + W).sum() > 30
