"""Tile sizes of the Pallas kernels: a table by device, dtype and head dim (tuning.json), fitted to the pattern and the lengths.

    {device kind, as JAX names it, or "default": {dtype: {largest head dim: {kernel: [block_q, block_k, num_warps, num_stages]}}}}

The default entries are small enough for the shared memory of any GPU since compute capability 8.0. Those of the H200 are large tiles that compile for
it with next to no register spills (tests/ahead); no entry has been timed against others yet, which experiments/tune.py does. What a device lacks is the default's, and
float16 is as bfloat16.
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
PATH = Path(__file__).parent / "tuning.json"
LEAST = 16  # rows and columns that the matrix units of a GPU take at once


@dataclasses.dataclass(frozen=True)
class Tile:
    """Queries and keys that one step of a kernel takes, powers of two; warps of a program; stages of its load pipeline."""

    q_block: int
    k_block: int
    num_warps: int
    num_stages: int


def tile(kernel: str, pattern: Pattern, T: int, S: int, dtype, head_dim: int, *, device: str | None = None, block: int | None = None) -> Tile:
    """The tile of one of KERNELS: the device's own or the default, no wider than pattern and lengths need; `block` overrides both sizes."""
    chosen = _entry(kernel, jnp.dtype(dtype).name, head_dim, _device_kind() if device is None else device)
    if block is not None:
        return dataclasses.replace(chosen, q_block=block, k_block=block)
    most = _widest(pattern)
    fit = lambda size, length: max(LEAST, min(size, power_of_two(length), size if most is None else most))
    return dataclasses.replace(chosen, q_block=fit(chosen.q_block, T), k_block=fit(chosen.k_block, S))


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _widest(pattern: Pattern) -> int | None:
    """A tile much wider than what the pattern is made of would compute pairs that nobody sees; below 32 nothing is saved."""
    if pattern.native_block is not None:
        whole = pattern.native_block & -pattern.native_block  # its tiles lie inside the pattern's blocks
        return whole if whole >= 32 else max(32, power_of_two(pattern.native_block // 4))
    return None if pattern.width is None else max(32, power_of_two(-(-pattern.width // 2)))


def _entry(kernel: str, dtype: str, head_dim: int, device: str) -> Tile:
    dtypes = table().get(device, {})
    for rows in (dtypes.get(dtype), dtypes.get(_like(dtype)), table()["default"][_like(dtype)]):
        wide_enough = [H for H in rows or () if int(H) >= head_dim and kernel in rows[H]]
        if wide_enough:
            return Tile(*rows[min(wide_enough, key=int)][kernel])
    raise UserError(f"head_dim={head_dim}: there are no tiles for more than {max(map(int, rows))}")


def _like(dtype: str) -> str:
    return "bfloat16" if dtype == "float16" else dtype


@functools.cache
def table() -> dict:
    """The contents of tuning.json."""
    return json.loads(PATH.read_text())


def _device_kind() -> str:
    return getattr(jax.devices()[0], "device_kind", "default")
