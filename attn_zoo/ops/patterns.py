"""Which (query, key) pairs see each other, as functions of indices, and the list of blocks that such a pattern needs.

A `Pattern` knows its mask element by element and bounds for whole blocks; patterns combine with & | ~. A `BlockMask` lists,
for every block of queries, the blocks of keys that hold a visible pair, without ever making a T x S array.
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


@dataclasses.dataclass(frozen=True)
class BlockMask:
    """The blocks a pattern needs, as compressed rows: row c lists its key blocks, fully visible ones apart from partial ones.

    full_start[c]:full_start[c + 1] are row c's entries in full_block; likewise `part`. `transpose()` lists query blocks by key block.
    """

    T: int
    S: int
    q_block: int
    k_block: int
    full_start: np.ndarray
    full_block: np.ndarray
    part_start: np.ndarray
    part_block: np.ndarray

    @property
    def num_q(self) -> int:
        return -(-self.T // self.q_block)

    @property
    def num_k(self) -> int:
        return -(-self.S // self.k_block)

    @property
    def computed_pairs(self) -> int:
        """Pairs in the listed blocks: what the engine computes."""
        return (len(self.full_block) + len(self.part_block)) * self.q_block * self.k_block

    @property
    def listed_before(self) -> np.ndarray:
        """How many blocks the rows before each list, and after the last all of them, int32 [num_q + 1]."""
        return self.full_start + self.part_start

    def longest_first(self, n):
        """The row that comes n-th, where long ones are to come first: rows from the last one on if the later half lists more, as in causal attention."""
        before, half = self.listed_before, self.num_q // 2
        return self.num_q - 1 - n if before[-1] - before[self.num_q - half] > before[half] else n

    def even_parts(self, parts: int) -> np.ndarray:
        """First row of each part, and the end, int32 [parts + 1]: parts list about as many blocks, and have a row each where there are as many rows."""
        if parts == self.num_q:
            return np.arange(parts + 1, dtype=np.int32)
        cost = self.listed_before + np.arange(self.num_q + 1)  # a row costs something of itself
        return np.abs(cost - cost[-1] * np.arange(parts + 1)[:, None] / parts).argmin(axis=1).astype(np.int32)

    def transpose(self) -> "BlockMask":
        """The same blocks listed by key block, for a backward pass that owns keys."""
        full = _flip(self.full_start, self.full_block, self.num_k)
        part = _flip(self.part_start, self.part_block, self.num_k)
        return BlockMask(self.S, self.T, self.k_block, self.q_block, *full, *part)


@functools.lru_cache(maxsize=256)
def block_mask(pattern: Pattern, T: int, S: int, q_block: int, k_block: int) -> BlockMask:
    """Lists the blocks of `pattern` over T queries and S keys. A last key block that S does not fill counts as partial."""
    i0 = np.arange(0, T, q_block)
    j0 = np.arange(0, S, k_block)
    i1, j1 = np.minimum(i0 + q_block, T) - 1, np.minimum(j0 + k_block, S) - 1
    some, every = (np.broadcast_to(x, (len(i0), len(j0))) for x in pattern.blocks(i0[:, None], i1[:, None], j0[None], j1[None]))
    if not pattern.exact:
        some, every = _look(pattern, some, every, i0, i1, j0, j1)
    whole = j0 + k_block <= S
    return BlockMask(T, S, q_block, k_block, *_rows(some & every & whole), *_rows(some & ~(every & whole)))


@functools.lru_cache(maxsize=256)
def count_pairs(pattern: Pattern, T: int, S: int) -> int:
    """How many (query, key) pairs the pattern holds: the useful work, whatever the blocks."""
    mask = block_mask(pattern, T, S, 64, 64)
    pairs = 0
    full_rows = np.minimum(64, T - 64 * np.repeat(np.arange(mask.num_q), np.diff(mask.full_start)))
    pairs += int(full_rows.sum()) * 64  # full blocks are never cut by S
    rows = np.repeat(np.arange(mask.num_q), np.diff(mask.part_start))
    for r, c in _chunks(rows, mask.part_block, 1024):
        i, j = _pairs(r * 64, c * 64, 64, 64)
        pairs += int((pattern.mask(i, j) & (i < T) & (j < S)).sum())
    return pairs


@functools.lru_cache(maxsize=64)
def pair_bits(pattern: Pattern, T: int, S: int) -> tuple[np.ndarray, np.ndarray]:
    """The masks of partial blocks of 64 by 64, a bit a pair: (the tile of each entry of part_block, int32; tiles [., key, query / 8], uint8).

    Equal tiles are kept once, and those of most patterns are few. The first query is the lowest bit; no query sees a key from S on.
    """
    mask = block_mask(pattern, T, S, 64, 64)
    rows = np.repeat(np.arange(mask.num_q), np.diff(mask.part_start))
    numbers: dict[bytes, int] = {}
    tile = []
    for r, c in _chunks(rows, mask.part_block, 1024):
        i, j = _pairs(r * 64, c * 64, 64, 64)
        seen = np.broadcast_to(pattern.mask(i, j) & (j < S), (len(r), 64, 64)).swapaxes(1, 2)
        tile += [numbers.setdefault(bits.tobytes(), len(numbers)) for bits in np.packbits(seen, axis=2, bitorder="little")]
    return np.array(tile, np.int32), np.frombuffer(b"".join(numbers), np.uint8).reshape(-1, 64, 8)


def visibility(pattern: Pattern, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Among T positions: the last query that sees each key (-1 if none does), and how many keys each query sees; int64 [T] both."""
    mask = block_mask(pattern, T, T, 64, 64)
    last, seen = np.full(64 * mask.num_k, -1), np.zeros(64 * mask.num_q, np.int64)
    rows = lambda start: np.repeat(np.arange(mask.num_q), np.diff(start))
    np.maximum.at(last.reshape(-1, 64), mask.full_block, (np.minimum(64 * rows(mask.full_start) + 64, T) - 1)[:, None])
    np.add.at(seen.reshape(-1, 64), rows(mask.full_start), 64)
    for r, c in _chunks(rows(mask.part_start), mask.part_block, 1024):
        i, j = np.broadcast_arrays(*_pairs(r * 64, c * 64, 64, 64))
        visible = pattern.mask(i, j) & (i < T) & (j < T)
        np.maximum.at(last, j[visible], i[visible])
        np.add.at(seen, i[visible], 1)
    return last[:T], seen[:T]


def _look(pattern, some, every, i0, i1, j0, j1):
    """Judges the blocks that the corners left open, pair by pair, some blocks at a time."""
    some, every = some.copy(), every.copy()
    height, width = int((i1 - i0).max()) + 1, int((j1 - j0).max()) + 1
    rows, cols = np.nonzero(some & ~every)
    for r, c in _chunks(rows, cols, max(1, 2**22 // (height * width))):
        i, j = _pairs(i0[r], j0[c], height, width)
        inside = (i <= i1[r][:, None, None]) & (j <= j1[c][:, None, None])
        seen = pattern.mask(i, j)
        some[r, c] = (seen & inside).any((1, 2))
        every[r, c] = (seen | ~inside).all((1, 2))
    return some, every


def _chunks(rows, cols, size):
    for start in range(0, len(rows), size):
        yield rows[start : start + size], cols[start : start + size]


def _pairs(i0, j0, height, width):
    return (i0[:, None, None] + np.arange(height)[None, :, None]), (j0[:, None, None] + np.arange(width)[None, None, :])


def _rows(listed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    start = np.concatenate([[0], listed.sum(1).cumsum()])
    return start.astype(np.int32), np.nonzero(listed)[1].astype(np.int32)


def _flip(start: np.ndarray, block: np.ndarray, num_k: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.repeat(np.arange(len(start) - 1), np.diff(start))
    order = np.argsort(block, kind="stable")
    counts = np.bincount(block, minlength=num_k)
    return np.concatenate([[0], counts.cumsum()]).astype(np.int32), rows[order].astype(np.int32)
