"""A fixed random graph: distinct keys, drawn by row, and for causal rows without regard to what comes later."""

import numpy as np
import pytest

from attn_zoo.attention.random_keys import draw


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_rows_list_distinct_visible_keys(causal):
    index, seen = draw(8, 0, 50, 50, causal)
    for i in range(50):
        row = index[i][seen[i]]
        assert len(set(row)) == len(row) == min(8, i + 1 if causal else 50)
        assert not causal or row.max() <= i


def test_a_causal_draw_does_not_change_as_the_sequence_grows():
    short, long = draw(8, 3, 40, 40, True), draw(8, 3, 90, 90, True)
    assert all((a == b[:40]).all() for a, b in zip(short, long))


def test_seeds_differ_and_all_keys_are_drawn_alike():
    assert (draw(8, 0, 50, 50, False)[0] != draw(8, 1, 50, 50, False)[0]).any()
    counts = np.bincount(draw(4, 0, 4000, 40, False)[0].ravel(), minlength=40)
    assert abs(counts / 400 - 1).max() < 0.2  # 400 expected, standard deviation 19
