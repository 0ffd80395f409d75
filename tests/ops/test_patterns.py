"""Patterns and their block lists, against every pair looked at one by one."""

import dataclasses
import operator
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attn_zoo.ops.block_mask import block_mask, count_pairs
from attn_zoo.ops.patterns import CAUSAL, FULL, Band, BlockTable, Pattern, Prefix


@dataclasses.dataclass(frozen=True)
class Stripes(Pattern):
    """A newcomer's pattern: a mask and nothing else."""

    period: int

    def mask(self, i, j):
        return (3 * i + j) % self.period == 0


def random_table(block, T, S, seed, width=3):
    """Up to `width` key blocks for each query block, some rows empty."""
    rng = np.random.default_rng(seed)
    columns = -(-S // block)
    return BlockTable(block, tuple(tuple(rng.integers(0, columns, rng.integers(0, width + 1)).tolist()) for _ in range(-(-T // block))))


def seen(pattern, T, S):
    """All pairs, [T, S]."""
    return np.broadcast_to(pattern.mask(np.arange(T)[:, None], np.arange(S)[None, :]), (T, S))


def listed(start, block):
    """Compressed rows as a list of (row, block)."""
    assert start[0] == 0 and start[-1] == len(block) and (np.diff(start) >= 0).all()
    return list(zip(np.repeat(np.arange(len(start) - 1), np.diff(start)).tolist(), block.tolist()))


@st.composite
def cases(draw):
    """(pattern, T, S, q_block, k_block): any composition over any lengths and blocks."""
    T, S = draw(st.integers(1, 130)), draw(st.integers(1, 130))
    limits = st.none() | st.integers(-40, 130)
    leaves = st.one_of(
        st.builds(Band, back=limits, ahead=limits),
        st.builds(Prefix, st.integers(0, 60)),
        st.builds(lambda block, seed: random_table(block, T, S, seed), st.integers(1, 24), st.integers(0, 99)),
        st.builds(Stripes, st.integers(1, 50)),
    )
    both = lambda inner: st.one_of(st.builds(operator.and_, inner, inner), st.builds(operator.or_, inner, inner), st.builds(operator.invert, inner))
    return draw(st.recursive(leaves, both, max_leaves=4)), T, S, draw(st.integers(1, 48)), draw(st.integers(1, 48))


# The shape checks of the import hook draw from `random` while patterns are built.
quiet = pytest.mark.filterwarnings("ignore:Do not use the `random` module")


@quiet
@settings(max_examples=300, deadline=None, derandomize=True)
@given(cases())
@example((Band(back=-3, ahead=1), 20, 20, 4, 4)).via("a band that holds no pair")
@example((Band(ahead=-1) & Band(back=-1), 20, 20, 4, 4)).via("two bands that never meet")
@example((Band(9, 9) & Band(-4, 9) & Band(9, -4), 20, 20, 4, 4)).via("three bands that meet in pairs alone")
def test_block_mask_lists_exactly_the_blocks_it_needs(case):
    pattern, T, S, q_block, k_block = case
    pairs, mask = seen(pattern, T, S), block_mask(*case)
    blocks = [(c, b, pairs[c * q_block : (c + 1) * q_block, b * k_block : (b + 1) * k_block]) for c in range(mask.num_q) for b in range(mask.num_k)]
    whole = {(c, b) for c, b, pairs in blocks if pairs.all() and pairs.shape[1] == k_block}  # a block that S cuts needs a mask
    some = {(c, b) for c, b, pairs in blocks if pairs.any()}
    full, part = listed(mask.full_start, mask.full_block), listed(mask.part_start, mask.part_block)
    assert len(full) + len(part) == len({*full, *part}), "no block is listed twice"
    assert set(full) == whole
    assert set(part) == some - whole
    assert mask.computed_pairs == len(some) * q_block * k_block
    assert count_pairs(pattern, T, S) == pairs.sum()


@quiet
@settings(max_examples=100, deadline=None, derandomize=True)
@given(cases())
def test_transpose_lists_the_same_blocks_by_key(case):
    mask = block_mask(*case)
    transposed = mask.transpose()
    assert (transposed.T, transposed.S, transposed.q_block, transposed.k_block) == (mask.S, mask.T, mask.k_block, mask.q_block)
    for part in ("full", "part"):
        rows, flipped = (listed(getattr(m, f"{part}_start"), getattr(m, f"{part}_block")) for m in (mask, transposed))
        assert sorted(rows) == sorted((c, b) for b, c in flipped)
        assert len(getattr(transposed, f"{part}_start")) == mask.num_k + 1
    again = transposed.transpose()
    for field in dataclasses.fields(mask):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(mask, field.name))


@quiet
@settings(max_examples=100, deadline=None, derandomize=True)
@given(cases(), st.integers(1, 9))
def test_even_parts_are_as_even_as_rows_allow(case, parts):
    mask = block_mask(*case)
    first = mask.even_parts(parts)
    assert (first[0], first[-1], len(first)) == (0, mask.num_q, parts + 1) and (np.diff(first) >= 0).all()
    if parts == mask.num_q:
        assert (np.diff(first) == 1).all()
    else:
        cost = np.diff(mask.listed_before) + 1
        of_parts = np.add.reduceat(np.append(cost, 0), first[:-1]) * (np.diff(first) > 0)
        assert np.abs(of_parts - cost.sum() / parts).max() <= cost.max()


@quiet
@settings(max_examples=100, deadline=None, derandomize=True)
@given(cases())
def test_longest_first_is_every_row_once_and_begins_with_the_half_that_lists_more(case):
    mask = block_mask(*case)
    rows = np.array([mask.longest_first(n) for n in range(mask.num_q)])
    assert sorted(rows) == list(range(mask.num_q))
    listed, half = np.diff(mask.listed_before)[rows], mask.num_q // 2
    assert listed[:half].sum() >= listed[mask.num_q - half :].sum()


def test_causal_queries_come_from_the_last_on_and_their_keys_from_the_first():
    mask = block_mask(CAUSAL, 256, 256, 16, 16)
    assert (mask.longest_first(0), mask.transpose().longest_first(0)) == (15, 0)
    np.testing.assert_array_equal(mask.even_parts(4), [0, 7, 11, 14, 16])


T, S = 37, 53
TABLE = BlockTable(5, ((0, 3), (), (1,), (2, 2, 9), (7,), (10,), (4, 5), (8,)))
DEFINITIONS = {
    "full": (FULL, lambda i, j: True),
    "causal": (CAUSAL, lambda i, j: j <= i),
    "band": (Band(7, 2), lambda i, j: i - 7 <= j <= i + 2),
    "strictly-before": (Band(ahead=-1), lambda i, j: j < i),
    "prefix": (Prefix(6), lambda i, j: i < 6 or j < 6),
    "table": (TABLE, lambda i, j: j // 5 in TABLE.table[i // 5]),
    "union-of-parts": (CAUSAL & (Prefix(6) | TABLE), lambda i, j: j <= i and (i < 6 or j < 6 or j // 5 in TABLE.table[i // 5])),
    "complement": (~(Band(0, 0) | Stripes(4)), lambda i, j: i != j and (3 * i + j) % 4 != 0),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_mask_is_its_definition_on_numpy_and_traced_indices(name):
    pattern, definition = DEFINITIONS[name]
    expected = np.array([[definition(i, j) for j in range(S)] for i in range(T)])
    np.testing.assert_array_equal(seen(pattern, T, S), expected)
    traced = jax.jit(lambda i, j: jnp.broadcast_to(pattern.mask(i, j), (T, S)))(jnp.arange(T)[:, None], jnp.arange(S)[None, :])
    np.testing.assert_array_equal(traced, expected)


def test_equal_patterns_are_one_key():
    """Block lists and compiled functions are cached by pattern, so two that were made alike must be alike."""
    make = lambda: CAUSAL & (Prefix(4) | random_table(5, 40, 40, seed=1)) & ~Band(0, 0)
    assert make() == make() and hash(make()) == hash(make())
    assert block_mask(make(), 40, 40, 8, 8) is block_mask(make(), 40, 40, 8, 8)


def test_a_sparse_mask_of_65536_positions_needs_no_square_array():
    T, block = 65536, 64
    pattern = CAUSAL & (Band(256, 256) | Prefix(block) | random_table(block, T, T, seed=0))
    tracemalloc.start()
    try:
        mask, pairs = block_mask(pattern, T, T, block, block), count_pairs(pattern, T, T)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < T * T / 8 / 4, f"a T x S array of bits takes {T * T / 8:.2g} bytes; this took {peak:.2g}"
    assert mask.computed_pairs < 0.02 * T * T
    full, part = set(listed(mask.full_start, mask.full_block)), set(listed(mask.part_start, mask.part_block))
    rng, checked = np.random.default_rng(1), 0
    for c in rng.integers(0, mask.num_q, 20).tolist():
        for b in {*rng.integers(0, mask.num_k, 20).tolist(), 0, max(c - 4, 0), c, min(c + 1, mask.num_k - 1)}:
            pairs_of = pattern.mask(c * block + np.arange(block)[:, None], b * block + np.arange(block)[None])
            assert ((c, b) in full, (c, b) in part) == (pairs_of.all(), pairs_of.any() and not pairs_of.all())
            checked += pairs_of.any()
    assert checked > 40
    rows = np.linspace(0, T - 1, 400).astype(int)
    sampled = sum(int(pattern.mask(np.int64(i), np.arange(T)).sum()) for i in rows) * T / len(rows)
    assert pairs == pytest.approx(sampled, rel=0.02)
