"""The blocks of (query, key) pairs that a pattern needs.

A `BlockMask` lists, for every block of queries, the blocks of keys that hold a visible pair, without ever making a T x S array. FlexAttention (Dong et al.
2024) has such lists by this name.
"""

import dataclasses
import functools

import numpy as np

from attn_zoo.ops.patterns import Pattern


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
