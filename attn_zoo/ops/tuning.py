"""Tile sizes of the Pallas kernels: a table by device, dtype and head dim (tuning.json), those of attention fitted to the pattern and the lengths.

    {"attention": {device kind, as JAX names it, or "default": {dtype: {largest head dim: {kernel: [block_q, block_k, num_warps, num_stages]}}}},
     "scans":     {device kind or "default": {dtype: {largest head dim: {"chunk": positions, kernel: [features, values, num_warps, num_stages]}}}},
     "features":  {device kind or "default": {dtype: {largest head dim: {kernel: [positions, directions, num_warps, num_stages]}}}}}

The default entries are small enough for the shared memory of any GPU since compute capability 8.0. Those of the H200 are large tiles that compile for
it with next to no register spills (tests/ahead); no entry has been timed against others yet, which experiments/tune.py does. What a device lacks is the default's.
float16 is as bfloat16 in attention, and as float32 in scans and features, which compute it in TF32.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from attn_zoo.ops.patterns import Pattern
from attn_zoo.spec import UserError

KERNELS = ("forward", "dq", "dkv")
DELTA = ("corrected", "wy")  # of a delta rule, at its own chunk: "corrected" is "states" there, "wy" solves its systems
SCANS = ("states", "output", "dv", "dqk", *DELTA)
FEATURES = ("random", "positive_gradient", "sines_gradient", "normalized", "normalized_gradient")  # "random" are exponentials and sines; the last two have no directions
MOST_HEAD_DIM = 256  # the last row of a table; scans of more values have its tiles
PATH = Path(__file__).parent / "tuning.json"
LEAST = 16  # rows and columns that the matrix units of a GPU take at once


@dataclasses.dataclass(frozen=True)
class Tile:
    """Queries and keys that one step of a kernel takes, powers of two; warps of a program; stages of its load pipeline."""

    q_block: int
    k_block: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class ScanTile:
    """Features and values that one step of a scan's kernel takes, powers of two; warps of a program; stages of its load pipeline."""

    features: int
    values: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class FeatureTile:
    """Positions of a program, and random directions that it multiplies them by at once, powers of two; its warps; stages of its load pipeline."""

    positions: int
    directions: int
    num_warps: int
    num_stages: int


def tile(kernel: str, pattern: Pattern, T: int, S: int, dtype, head_dim: int, *, device: str | None = None, block: int | None = None) -> Tile:
    """The tile of one of KERNELS: the device's own or the default, no wider than pattern and lengths need; `block` overrides both sizes."""
    chosen = Tile(*_entry("attention", kernel, jnp.dtype(dtype).name, head_dim, device))
    if block is not None:
        return dataclasses.replace(chosen, q_block=block, k_block=block)
    widest = _widest(pattern)
    at_most = lambda size: size if widest is None else min(size, widest)
    q_block, k_block = fit(at_most(chosen.q_block), T), fit(at_most(chosen.k_block), S)
    rows, tuned_rows = (k_block, chosen.k_block) if kernel == "dkv" else (q_block, chosen.q_block)  # those that a program owns, which its warps divide
    num_warps = min(chosen.num_warps, max(4, rows // LEAST)) if rows < tuned_rows else chosen.num_warps
    return Tile(q_block, k_block, num_warps, chosen.num_stages)


def scan_tile(kernel: str, dtype, head_dim: int, *, device: str | None = None) -> ScanTile:
    """The tile of one of SCANS, of values of this head dim: the device's own or the default."""
    return ScanTile(*_entry("scans", kernel, _computed(dtype), min(head_dim, MOST_HEAD_DIM), device))


def scan_chunk(dtype, head_dim: int, *, device: str | None = None) -> int:
    """Positions of a chunk of a scan, a power of two: the device's own or the default."""
    return _entry("scans", "chunk", _computed(dtype), min(head_dim, MOST_HEAD_DIM), device)


def feature_tile(kernel: str, dtype, head_dim: int, *, device: str | None = None) -> FeatureTile:
    """The tile of one of FEATURES, of vectors of this head dim: the device's own or the default."""
    return FeatureTile(*_entry("features", kernel, _computed(dtype), head_dim, device))


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def fit(most: int, size: int) -> int:
    """A power of two, at most `most` and no more than `size` needs, but at least what the matrix units take."""
    return max(LEAST, min(most, power_of_two(size)))


def _widest(pattern: Pattern) -> int | None:
    """A tile much wider than what the pattern is made of would compute pairs that nobody sees; below 32 nothing is saved."""
    if pattern.native_block is not None:
        whole = pattern.native_block & -pattern.native_block  # its tiles lie inside the pattern's blocks
        return whole if whole >= 32 else max(32, power_of_two(pattern.native_block // 4))
    return None if pattern.width is None else max(32, power_of_two(-(-pattern.width // 2)))


def _entry(engine: str, kernel: str, dtype: str, head_dim: int, device: str | None):
    entries = table()[engine]
    dtypes = entries.get(_device_kind() if device is None else device, {})
    for rows in (dtypes.get(dtype), dtypes.get(_like(dtype)), entries["default"][_like(dtype)]):
        wide_enough = [H for H in rows or () if int(H) >= head_dim and kernel in rows[H]]
        if wide_enough:
            return rows[min(wide_enough, key=int)][kernel]
    raise UserError(f"head_dim={head_dim}: there are no tiles for more than {max(map(int, rows))}")


def _like(dtype: str) -> str:
    return "bfloat16" if dtype == "float16" else dtype


def _computed(dtype) -> str:
    """The dtype of a scan's factors, and of products with directions."""
    return "bfloat16" if jnp.dtype(dtype) == jnp.bfloat16 else "float32"


@functools.cache
def table() -> dict:
    """The contents of tuning.json."""
    return json.loads(PATH.read_text())


def _device_kind() -> str:
    return getattr(jax.devices()[0], "device_kind", "default")
