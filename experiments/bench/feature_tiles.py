"""What experiments/tune.py measures of ops.pallas_features and ops.pallas_normalized: the kernels of features, and those of a delta rule."""

import dataclasses
import itertools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from attn_zoo.attention.delta import normalized
from attn_zoo.attention.linear import dpfp, elu
from attn_zoo.attention.performer import LARGEST, key_features
from attn_zoo.attention.rfa import random_features
from attn_zoo.ops import pallas_features, pallas_normalized, tuning
from attn_zoo.ops.tuning import FEATURES, FeatureTile, power_of_two

DIRECTIONS = 256  # of random features, as many as the benchmarks give performer


@dataclasses.dataclass(frozen=True)
class FeatureTiles:
    """The part of features in tuning.json, of problems of these sizes (the flags of tune.py by their names)."""

    settings: dict
    engine: ClassVar[str] = "features"
    kernels: ClassVar[tuple[str, ...]] = FEATURES
    tile: ClassVar[type] = FeatureTile
    dtypes: ClassVar[tuple[str, ...]] = ("bfloat16", "float32")
    widest: ClassVar[int] = pallas_features.MOST

    def problems(self, kernel: str) -> list[str]:
        return {"random": ["exponentials", "sines"], "positive_gradient": ["exponentials"], "sines_gradient": ["sines"]}.get(kernel, ["delta"])

    def present(self, kernel: str, dtype: str, H: int) -> FeatureTile:
        return tuning.feature_tile(kernel, dtype, H)

    def candidates(self, kernel: str, H: int) -> list[FeatureTile]:
        s = self.settings
        directions = [1] if kernel.startswith("normalized") else [block for block in s["blocks"] if block <= DIRECTIONS]
        positions = [block for block in s["blocks"] if block <= power_of_two(s["B"] * s["T"])]
        return list(itertools.starmap(FeatureTile, itertools.product(positions, directions, s["warps"], s["stages"])))

    def arguments_of(self, tile: FeatureTile) -> None:
        """What of a tile the kernel's arguments depend on: nothing."""

    def solve(self, problem: str, dtype: str, H: int, _: None) -> dict[str, tuple]:
        """{kernel: (its arguments, its results by XLA)}."""
        s = self.settings
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (s["B"], s["T"], s["N"], H)).astype(dtype)
        w = jax.random.normal(keys[1], (1, DIRECTIONS, H))
        if problem == "exponentials":
            w = w * H**-0.25
        phi, pull = jax.vjp(_by_xla(problem, H, dtype), x.astype(jnp.float32), w)
        dphi = jax.random.normal(keys[2], phi.shape)
        dx, dw = pull(dphi)
        dphi = dphi.astype(jnp.bfloat16 if dtype == "bfloat16" else jnp.float32)
        if problem == "delta":
            return {"normalized": ((x,), (phi,)), "normalized_gradient": ((x, dphi), (dx,))}
        forward = {"random": ((x, w), (phi,))}
        return forward | ({"positive_gradient": ((x, w, dphi), (dx,))} if problem == "exponentials" else {"sines_gradient": ((x, w, dphi), (dx, dw))})

    def call(self, kernel: str, problem: str, tile: FeatureTile, args: tuple):
        """A function of the arguments."""
        run = lambda x, w: pallas_features.Run(tile, x, w)
        x = args[0]
        dpfp = _dpfp(x.dtype, x.shape[-1])
        return {
            ("random", "exponentials"): lambda x, w: (run(x, w).positive(LARGEST),),
            ("random", "sines"): lambda x, w: (run(x, w).sines(),),
            ("positive_gradient", "exponentials"): lambda x, w, dphi: (run(x, w).positive_gradient(dphi, LARGEST),),
            ("sines_gradient", "sines"): lambda x, w, dphi: run(x, w).sines_gradient(dphi),
            ("normalized", "delta"): lambda x: (pallas_normalized.features(tile, dpfp, x),),
            ("normalized_gradient", "delta"): lambda x, dphi: (pallas_normalized.features_gradient(tile, dpfp, x, dphi),),
        }[kernel, problem]

    def choose(self, costs: dict[str, dict[FeatureTile, dict[str, float]]], dtype: str, H: int) -> dict[str, FeatureTile]:
        """{kernel: the tile of the least product of the problems' seconds}, of {kernel: {tile: {problem: seconds}}}."""
        return {kernel: min(tiles, key=lambda tile: math.prod(tiles[tile].values())) for kernel, tiles in costs.items()}

    def entries(self, chosen: dict[str, FeatureTile]) -> dict[str, list | int]:
        return {kernel: list(dataclasses.astuple(tile)) for kernel, tile in chosen.items()}

    def columns(self, record: dict, tile: FeatureTile) -> dict[str, str]:
        """What else the table says of a measurement."""
        return {"tile": f"{tile.positions} × {tile.directions}" if tile.directions > 1 else str(tile.positions), "rate": f"{record['bytes'] / record['speed']['median_s'] / 1e9:.0f} GB/s"}


def _dpfp(dtype, H: int) -> bool:
    """Whether the delta rule's own features have a kernel; else those of elu + 1 are measured."""
    return pallas_normalized.serves(dtype, H, True)


def _by_xla(problem: str, H: int, dtype: str):
    """phi of vectors and directions, in float32; sines as pairs [..., 2, R]."""
    if problem == "exponentials":
        return lambda x, w: key_features(x, w[0] * H**0.25)
    if problem == "sines":
        return lambda x, w: random_features(x, jnp.repeat(w, x.shape[2], axis=0)).reshape(*x.shape[:3], 2, -1)
    features = dpfp if _dpfp(jnp.dtype(dtype), H) else elu
    return lambda x, w: normalized(features(x))
