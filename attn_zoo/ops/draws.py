"""Random draws without replacement, many rows at a time, for variants whose queries see random keys."""

import numpy as np


def draw_distinct(count: int, among_T: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(number [T, R] int32, drawn [T, R] bool): row t draws min(count, among[t]) distinct numbers below among[t], all sets equally likely.

    Which ones follows from (count, seed, t, among[t]) alone, so a row keeps its draw when rows are added. R is at most `count`; a place that
    a row leaves unused holds 0. Floyd's algorithm (Bentley & Floyd 1987) on all rows at once: O(T R) memory, O(T R^2) time.
    """
    among_T = np.maximum(among_T, 0)
    most = int(among_T.max(initial=0))
    if count >= most:  # every row takes all it may
        drawn_TR = np.arange(most) < among_T[:, None]
        return np.where(drawn_TR, np.arange(most, dtype=np.int32), 0), drawn_TR
    uniform_TR = np.random.default_rng(seed).random((len(among_T), count))  # filled row by row, so that row t does not depend on T
    size_T = np.minimum(count, among_T)
    drawn_TR = np.arange(count) < size_T[:, None]
    number_TR = np.zeros((len(among_T), count), np.int32)
    for r in range(count):
        last_T = among_T - size_T + r  # step r draws from 0..last, and takes `last`, which no step before could, where that draw is taken
        draw_T = (uniform_TR[:, r] * (last_T + 1)).astype(np.int32)
        taken_T = (number_TR[:, :r] == draw_T[:, None]).any(axis=1)
        number_TR[:, r] = np.where(taken_T, last_T, draw_T)
    return np.where(drawn_TR, number_TR, 0), drawn_TR
