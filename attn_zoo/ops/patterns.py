"""Which (query, key) pairs see each other, as functions of indices.

A `Pattern` knows its mask element by element and bounds for whole blocks; patterns combine with & | ~. Which blocks one needs: block_mask.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

Index = np.ndarray | jax.Array | int


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A set of (query i, key j) pairs. Subclasses define `mask`, and `blocks` where whole blocks can be judged from their corners.

    A new pattern needs `mask` alone: without `blocks` its blocks are evaluated one by one, in O(T S) time but bounded memory.
    """

    def mask(self, i: Index, j: Index) -> Index:
        """Whether query i sees key j; broadcasts, on NumPy or JAX integers."""
        raise NotImplementedError

    def blocks(self, i0, i1, j0, j1) -> tuple[np.ndarray, np.ndarray]:
        """(may hold a pair, surely all pairs) for blocks i0 <= i <= i1, j0 <= j <= j1. Both may err on the cautious side."""
        shape = np.broadcast_shapes(i0.shape, j0.shape)
        return np.ones(shape, bool), np.zeros(shape, bool)

    @property
    def exact(self) -> bool:
        """Whether `blocks` never errs, so that no block has to be looked at pair by pair."""
        return False

    @property
    def native_block(self) -> int | None:
        """The block size the pattern is made of, where there is one: an engine that takes it evaluates fewer masks."""
        return None

    @property
    def width(self) -> int | None:
        """About how many keys in a row a query sees at most, where that does not grow with the sequence: blocks need not be wider."""
        return None

    def __and__(self, other: "Pattern") -> "Pattern":
        return And(self, other)

    def __or__(self, other: "Pattern") -> "Pattern":
        return Or(self, other)

    def __invert__(self) -> "Pattern":
        return Not(self)


@dataclasses.dataclass(frozen=True)
class Band(Pattern):
    """-ahead <= i - j <= back; None is no limit. Band() is full attention, Band(ahead=0) causal, Band(W, W) a window."""

    back: int | None = None
    ahead: int | None = None

    def __and__(self, other):
        if not isinstance(other, Band):
            return And(self, other)
        narrower = lambda a, b: b if a is None else a if b is None else min(a, b)
        return Band(narrower(self.back, other.back), narrower(self.ahead, other.ahead))

    def mask(self, i, j):
        seen = (i - j) == (i - j)
        if self.back is not None:
            seen = seen & (i - j <= self.back)
        if self.ahead is not None:
            seen = seen & (j - i <= self.ahead)
        return seen

    def blocks(self, i0, i1, j0, j1):
        low, high = i0 - j1, i1 - j0  # i - j takes every whole number between these
        back = np.inf if self.back is None else self.back
        ahead = np.inf if self.ahead is None else self.ahead
        return (low <= back) & (high >= -ahead) & (back >= -ahead), (high <= back) & (low >= -ahead)

    @property
    def exact(self):
        return True

    @property
    def width(self):
        return None if self.back is None or self.ahead is None else max(self.back + self.ahead + 1, 1)


FULL = Band()
CAUSAL = Band(ahead=0)


@dataclasses.dataclass(frozen=True)
class Every(Pattern):
    """i - j is divisible by `stride`."""

    stride: int

    def mask(self, i, j):
        return (i - j) % self.stride == 0

    def blocks(self, i0, i1, j0, j1):
        low, high = i0 - j1, i1 - j0  # i - j takes every whole number between these
        some = high // self.stride * self.stride >= low
        return some, some & ((low == high) | (self.stride == 1))

    @property
    def exact(self):
        return True


@dataclasses.dataclass(frozen=True)
class BlockTable(Pattern):
    """Key blocks listed for every query block: j // block is in table[i // block]. Source of random and banded block patterns."""

    block: int
    table: tuple[tuple[int, ...], ...]

    @property
    def native_block(self):
        return self.block

    def mask(self, i, j):
        return (jnp if isinstance(i + j, jax.Array) else np).any(self._rows(i // self.block) == (j // self.block)[..., None], axis=-1)

    def blocks(self, i0, i1, j0, j1):
        # Sums over the table's blocks, by its cumulative sum.
        seen = _table_dense(self)
        clip = lambda x, n: np.minimum(x // self.block, n - 1)
        I0, I1, J0, J1 = clip(i0, len(seen)), clip(i1, len(seen)), clip(j0, seen.shape[1]), clip(j1, seen.shape[1])
        one = (I0 == I1) & (J0 == J1)
        total = np.pad(seen.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        count = total[I1 + 1, J1 + 1] - total[I0, J1 + 1] - total[I1 + 1, J0] + total[I0, J0]
        return count > 0, np.where(one, seen[I0, J0], count == (I1 - I0 + 1) * (J1 - J0 + 1))

    @property
    def exact(self):
        return True

    def _rows(self, I):
        if isinstance(I, jax.Array):
            return jnp.asarray(table_rows(self))[jnp.minimum(I, len(self.table) - 1)]
        return table_rows(self)[np.minimum(I, len(self.table) - 1)]


@functools.lru_cache(maxsize=64)
def table_rows(pattern: BlockTable) -> np.ndarray:
    """The table as an array [rows, width], int32, short rows filled up with -1; at least one column."""
    width = max(1, *map(len, pattern.table))
    return np.array([tuple(row) + (-1,) * (width - len(row)) for row in pattern.table], np.int32).reshape(len(pattern.table), width)


@functools.lru_cache(maxsize=64)
def _table_dense(pattern: BlockTable) -> np.ndarray:
    rows = table_rows(pattern)
    seen = np.zeros((len(rows), max(int(rows.max(initial=0)) + 1, 1) + 1), np.int64)  # a last column for blocks no row lists
    I, r = np.nonzero(rows >= 0)
    seen[I, rows[I, r]] = 1
    return seen


@dataclasses.dataclass(frozen=True)
class Prefix(Pattern):
    """The first `count` queries see every key, and every query sees the first `count` keys (global tokens)."""

    count: int

    def mask(self, i, j):
        return (i < self.count) | (j < self.count)

    def blocks(self, i0, i1, j0, j1):
        return (i0 < self.count) | (j0 < self.count), (i1 < self.count) | (j1 < self.count)

    @property
    def exact(self):
        return True

    @property
    def width(self):
        return self.count


@dataclasses.dataclass(frozen=True)
class And(Pattern):
    """Pairs in both patterns."""

    a: Pattern
    b: Pattern

    def mask(self, i, j):
        return self.a.mask(i, j) & self.b.mask(i, j)

    def blocks(self, i0, i1, j0, j1):
        (some_a, all_a), (some_b, all_b) = self.a.blocks(i0, i1, j0, j1), self.b.blocks(i0, i1, j0, j1)
        return some_a & some_b, all_a & all_b

    @property
    def native_block(self):
        return self.a.native_block or self.b.native_block

    @property
    def width(self):
        return min((x for x in (self.a.width, self.b.width) if x is not None), default=None)


@dataclasses.dataclass(frozen=True)
class Or(Pattern):
    """Pairs in either pattern."""

    a: Pattern
    b: Pattern

    def mask(self, i, j):
        return self.a.mask(i, j) | self.b.mask(i, j)

    def blocks(self, i0, i1, j0, j1):
        (some_a, all_a), (some_b, all_b) = self.a.blocks(i0, i1, j0, j1), self.b.blocks(i0, i1, j0, j1)
        return some_a | some_b, all_a | all_b

    @property
    def native_block(self):
        return self.a.native_block or self.b.native_block

    @property
    def width(self):
        return None if self.a.width is None or self.b.width is None else max(self.a.width, self.b.width)


@dataclasses.dataclass(frozen=True)
class Not(Pattern):
    """Pairs that are not in the pattern."""

    a: Pattern

    def mask(self, i, j):
        return ~self.a.mask(i, j)

    def blocks(self, i0, i1, j0, j1):
        some, every = self.a.blocks(i0, i1, j0, j1)
        return ~every, ~some

    @property
    def native_block(self):
        return self.a.native_block

    @property
    def exact(self):
        return self.a.exact
