"""What experiments/tune.py measures of ops.pallas_attention: the kernels forward, dq and dkv, on causal attention and on a causal window."""

import dataclasses
import functools
import itertools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from attn_zoo.ops import tuning
from attn_zoo.ops.block_mask import block_mask, count_pairs
from attn_zoo.ops.blocked import blocked_attention
from attn_zoo.ops.pallas_attention import Run
from attn_zoo.ops.patterns import CAUSAL, Band, Pattern
from attn_zoo.ops.tuning import KERNELS, MOST_HEAD_DIM, Tile, power_of_two

PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}  # of matrices, by a kernel


@dataclasses.dataclass(frozen=True)
class AttentionTiles:
    """The part of attention in tuning.json, of problems of these sizes (the flags of tune.py by their names)."""

    settings: dict
    engine: ClassVar[str] = "attention"
    kernels: ClassVar[tuple[str, ...]] = KERNELS
    tile: ClassVar[type] = Tile
    dtypes: ClassVar[tuple[str, ...]] = ("bfloat16", "float16", "float32")
    widest: ClassVar[int] = MOST_HEAD_DIM

    def patterns(self) -> dict[str, Pattern]:
        return {"causal": CAUSAL, "window": Band(self.settings["window"] - 1, 0)}

    def problems(self, kernel: str) -> list[str]:
        return list(self.patterns())

    def present(self, kernel: str, dtype: str, H: int) -> Tile:
        return tuning.tile(kernel, CAUSAL, self.settings["T"], self.settings["T"], dtype, H)

    def candidates(self, kernel: str, H: int) -> list[Tile]:
        s = self.settings
        blocks = [block for block in s["blocks"] if block <= power_of_two(s["T"])]
        return list(itertools.starmap(Tile, itertools.product(blocks, blocks, s["warps"], s["stages"])))

    def arguments_of(self, tile: Tile) -> None:
        """What of a tile the kernel's arguments depend on: nothing."""

    def solve(self, problem: str, dtype: str, H: int, _: None) -> dict[str, tuple]:
        """{kernel: (its arguments, its results by the XLA engine)}."""
        s = self.settings
        q, k, v, do = (jax.random.normal(key, (s["B"], s["T"], s["N"], H)).astype(dtype) for key in jax.random.split(jax.random.key(0), 4))
        o, lse, dq, dk, dv = _by_xla(self.patterns()[problem], q, k, v, do)
        forward = q, k, v, None, ()
        backward = *forward, do, lse, (do.astype(jnp.float32) * o.astype(jnp.float32)).sum(axis=-1).swapaxes(1, 2)
        return {"forward": (forward, (o, lse)), "dq": (backward, (dq,)), "dkv": (backward, (dk, dv))}

    def call(self, kernel: str, problem: str, tile: Tile, args: tuple):
        """A function of the arguments."""
        return getattr(Run(self.patterns()[problem], None, args[0].shape[3] ** -0.5, tile, args[0].shape, args[1].shape), kernel)

    def choose(self, costs: dict[str, dict[Tile, dict[str, float]]], dtype: str, H: int) -> dict[str, Tile]:
        """{kernel: the tile of the least product of the problems' seconds}, of {kernel: {tile: {problem: seconds}}}."""
        return {kernel: min(tiles, key=lambda tile: math.prod(tiles[tile].values())) for kernel, tiles in costs.items()}

    def entries(self, chosen: dict[str, Tile]) -> dict[str, list | int]:
        return {kernel: list(dataclasses.astuple(tile)) for kernel, tile in chosen.items()}

    def columns(self, record: dict, tile: Tile) -> dict[str, str]:
        """What else the table says of a measurement."""
        s, pattern, length = self.settings, self.patterns()[record["problem"]], self.settings["T"]
        flops = 2 * PRODUCTS[record["kernel"]] * count_pairs(pattern, length, length) * s["B"] * s["N"] * record["H"]
        pairs, computed = count_pairs(pattern, length, length), block_mask(pattern, length, length, tile.q_block, tile.k_block).computed_pairs
        return {
            "tile": f"{tile.q_block} × {tile.k_block}",
            "rate": f"{flops / record['speed']['median_s'] / 1e12:.1f} TFLOP/s",
            "density": f"{pairs / length**2:.4f}",
            "density of its blocks": f"{computed / length**2:.4f}",
        }


@functools.partial(jax.jit, static_argnums=0)
def _by_xla(pattern: Pattern, q, k, v, do):
    (o, lse), pull = jax.vjp(lambda *x: blocked_attention(*x, pattern=pattern), q, k, v)
    return o, lse.swapaxes(1, 2), *pull((do, jnp.zeros_like(lse)))
