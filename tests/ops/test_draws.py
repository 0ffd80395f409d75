"""Draws without replacement: distinct, in range, uniform, and the same whatever rows stand beside."""

import collections

import numpy as np

from attn_zoo.ops.draws import draw_distinct


def test_rows_are_distinct_and_in_range():
    among = np.array([0, 1, 3, 4, 5, 9, 1000, -2, 17])
    number, drawn = draw_distinct(4, among, seed=0)
    np.testing.assert_array_equal(drawn.sum(1), np.clip(among, 0, 4))
    for row, place, n in zip(number, drawn, among):
        chosen = row[place]
        assert len(set(chosen)) == len(chosen) and (chosen >= 0).all() and (chosen < max(n, 1)).all()
        assert (row[~place] == 0).all()


def test_rows_do_not_depend_on_those_below_them():
    long, _ = draw_distinct(6, np.full(50, 40), seed=1)
    short, _ = draw_distinct(6, np.full(7, 40), seed=1)
    np.testing.assert_array_equal(long[:7], short)


def test_every_set_is_equally_likely():
    """The 20 sets of 3 of 6: 12,000 draws put 600 in each, with a standard deviation of 24."""
    number, drawn = draw_distinct(3, np.full(12_000, 6), seed=2)
    assert drawn.all()
    counts = collections.Counter(tuple(sorted(row)) for row in number.tolist())
    assert len(counts) == 20 and all(480 < count < 720 for count in counts.values())


def test_no_draw_and_more_than_there_are():
    number, drawn = draw_distinct(0, np.full(3, 9), seed=0)
    assert number.shape == drawn.shape == (3, 0)
    number, drawn = draw_distinct(10**9, np.array([2, 5, 0]), seed=0)
    np.testing.assert_array_equal(drawn, np.arange(5) < np.array([[2], [5], [0]]))
    np.testing.assert_array_equal(number, np.where(drawn, np.arange(5), 0))
