"""What experiments/tune.py measures of ops.pallas_scan: the kernels of its scans, of as many features as values, and how long a chunk should be."""

import dataclasses
import functools
import itertools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from attn_zoo.ops import delta, tuning
from attn_zoo.ops.decayed import decayed_sums
from attn_zoo.ops.linear import kernel_sums
from attn_zoo.ops.pallas_scan import Plan, Run, States
from attn_zoo.ops.pallas_wy import solve
from attn_zoo.ops.tuning import DELTA, LEAST, MOST_HEAD_DIM, SCANS, ScanTile, fit, power_of_two

RUNS = {"states": 2, "output": 1, "dv": 1, "dqk": 1}  # of a kernel, forward + backward


@dataclasses.dataclass(frozen=True)
class ChunkedTile:
    """A tile, and the positions of the chunk that it was measured at."""

    chunk: int
    features: int
    values: int
    num_warps: int
    num_stages: int

    @property
    def scan_tile(self) -> ScanTile:
        return ScanTile(self.features, self.values, self.num_warps, self.num_stages)


@dataclasses.dataclass(frozen=True)
class ScanTiles:
    """The part of scans in tuning.json, of problems of these sizes (the flags of tune.py by their names)."""

    settings: dict
    engine: ClassVar[str] = "scans"
    kernels: ClassVar[tuple[str, ...]] = SCANS
    tile: ClassVar[type] = ChunkedTile
    dtypes: ClassVar[tuple[str, ...]] = ("bfloat16", "float32")
    widest: ClassVar[int] = MOST_HEAD_DIM

    def problems(self, kernel: str) -> list[str]:
        return ["delta"] if kernel in DELTA else ["linear", "decayed"]

    def present(self, kernel: str, dtype: str, H: int) -> ChunkedTile:
        tile = tuning.scan_tile(kernel, dtype, H)
        chunk = delta.CHUNK if kernel in DELTA else tuning.scan_chunk(dtype, H)
        return ChunkedTile(fit(chunk, self.settings["T"]), fit(tile.features, H), fit(tile.values, H), tile.num_warps, tile.num_stages)

    def candidates(self, kernel: str, H: int) -> list[ChunkedTile]:
        s = self.settings
        chunks = [delta.CHUNK] if kernel in DELTA else s["chunks"]
        chunks = sorted({fit(chunk, s["T"]) for chunk in chunks})
        blocks = [block for block in s["blocks"] if block <= power_of_two(H)]
        return list(itertools.starmap(ChunkedTile, itertools.product(chunks, blocks, blocks, s["warps"], s["stages"])))

    def arguments_of(self, tile: ChunkedTile) -> int:
        """What of a tile the kernel's arguments depend on."""
        return tile.chunk

    def solve(self, problem: str, dtype: str, H: int, chunk: int) -> dict[str, tuple]:
        """{kernel: (its arguments, its results by XLA)}; of segments, which are sequences of the batch to the kernels."""
        s = self.settings
        B, length, width = s["B"], -(-s["T"] // chunk) * chunk, max(LEAST, power_of_two(H))  # whole chunks and tiles, as the kernels want them
        if problem != "delta":
            segments = Plan.of(chunk, dtype, width, width, RUNS).in_segments(B * s["N"], length, width, width).segments
            B, length = B * segments, -(-length // (chunk * segments)) * chunk
        keys = jax.random.split(jax.random.key(0), 6)
        q, k, v, do = (jax.random.normal(key, (B, length, s["N"], width)).astype(dtype) for key in keys[:4])
        if problem == "delta":
            k = (k / width**0.5).astype(dtype)
            w = (k / 8).astype(dtype)  # small: the memory is stable, as that of a delta rule is
            beta, dw = jax.random.uniform(keys[4], k.shape[:3]), jax.random.normal(keys[5], k.shape).astype(dtype)
            return {"corrected": ((k, v, w), _corrected(k, v, w, chunk)), "wy": ((k, v, beta, dw, do), _solved(k, v, beta, dw, do, chunk))}
        dnorm = jax.random.normal(keys[4], (B, s["N"], length))
        L = None
        if problem == "decayed":
            steps = -0.1 * jax.random.uniform(keys[5], (B, s["N"], length // chunk, chunk))
            L = jnp.cumsum(steps, axis=-1).reshape(B, s["N"], length)
        return _by_xla(q, k, v, L, do, dnorm, chunk)

    def call(self, kernel: str, problem: str, tile: ChunkedTile, args: tuple):
        """A function of the arguments."""
        (dtype,) = {x.dtype for x in args[:2]}
        plan = Plan(tile.chunk, dtype, ((kernel, tile.scan_tile),))
        return functools.partial(_CALLS[kernel], plan)

    def choose(self, costs: dict[str, dict[ChunkedTile, dict[str, float]]], dtype: str, H: int) -> dict[str, ChunkedTile]:
        """{kernel: its best tile at the chunk at which all kernels, forward + backward, take the least}, of {kernel: {tile: {problem: seconds}}}.

        Where a kernel has not been measured at a chunk, that chunk is none to choose; where none is, it stays the present one.
        """
        best = {}
        for kernel, tiles in costs.items():
            for tile, at in tiles.items():
                if (kernel, tile.chunk) not in best or math.prod(at.values()) < math.prod(tiles[best[kernel, tile.chunk]].values()):
                    best[kernel, tile.chunk] = tile
        chunks = {chunk for _, chunk in best}
        whole = [chunk for chunk in chunks if all((kernel, chunk) in best for kernel in RUNS)]

        def together(chunk):
            return math.prod(sum(n * costs[kernel][best[kernel, chunk]][problem] for kernel, n in RUNS.items()) for problem in self.problems("states"))

        chunk = min(whole, key=together) if whole else self.present("states", dtype, H).chunk
        return {kernel: tile for (kernel, at), tile in best.items() if at == chunk or kernel in DELTA}

    def entries(self, chosen: dict[str, ChunkedTile]) -> dict[str, list | int]:
        chunk = {tile.chunk for kernel, tile in chosen.items() if kernel in RUNS}
        return {"chunk": c for c in chunk} | {kernel: list(dataclasses.astuple(tile.scan_tile)) for kernel, tile in chosen.items()}

    def columns(self, record: dict, tile: ChunkedTile) -> dict[str, str]:
        """What else the table says of a measurement."""
        return {"tile": f"{tile.features} × {tile.values}", "chunk": str(tile.chunk), "rate": f"{record['bytes'] / record['speed']['median_s'] / 1e9:.0f} GB/s"}


_CALLS = {
    "states": lambda plan, k, v, L: _found(Run(plan, k, v).states(k, v, L, None, True)[0]),
    "output": lambda plan, q, k, v, L, states, totals: Run(plan, q, v).outputs(q, k, v, L, _held(states, totals), "both"),
    "dv": lambda plan, q, k, do, L, dstates: Run(plan, q, do).dv(q, k, do, None, L, _held(dstates)),
    "dqk": lambda plan, q, k, v, do, dnorm, L, states, dstates, totals, dtotals: Run(plan, q, v).dqk(
        q, k, v, do, dnorm, None, L, _held(states, totals), _held(dstates, dtotals)
    ),
    "corrected": lambda plan, k, u, w: _corrected_found(*Run(plan, k, u).states(k, u, None, w, False)),
    "wy": lambda plan, k, v, beta, dw, du: _with_gradients(functools.partial(solve, plan), (k, v, beta), (dw, du)),
}


def _held(states, totals=None) -> States:
    return States(states, None, None, totals)


def _found(states: States) -> tuple:
    return states.local, states.totals


def _corrected_found(states: States, values) -> tuple:
    return states.local, values


def _with_gradients(f, inputs: tuple, cotangents: tuple) -> tuple:
    outputs, pull = jax.vjp(f, *inputs)
    return (*outputs, *pull(cotangents))


@functools.partial(jax.jit, static_argnums=5)
def _solved(k, v, beta, dw, du, chunk: int) -> tuple:
    """(W, U), and the gradients of keys, values and rates, of float32 systems."""
    wide = lambda *arrays: [x.astype(jnp.float32) for x in arrays]
    return _with_gradients(lambda *inputs: delta.wy_form(*inputs, chunk), wide(k, v, beta), tuple(wide(dw, du)))


@functools.partial(jax.jit, static_argnums=6)
def _by_xla(q, k, v, L, do, dnorm, chunk: int) -> dict[str, tuple]:
    def sums(q, k, v, L):
        if L is None:
            return kernel_sums(q, k, v, causal=True)
        within = L.reshape(*L.shape[:2], -1, chunk)
        steps = jnp.diff(within, axis=-1, prepend=jnp.zeros_like(within[..., :1])).reshape(L.shape)
        return decayed_sums(q, k, v, steps.swapaxes(1, 2))

    (o, norm), pull = jax.vjp(sums, q, k, v, L)
    dq, dk, dv, dL = pull((do.astype(o.dtype), dnorm.swapaxes(1, 2)))
    states, totals = _states(k, v, jnp.ones_like(dnorm), L, chunk)
    dstates, dtotals = _states(q, do, dnorm, L, chunk, reverse=True)
    return {
        "states": ((k, v, L), (states, totals)),
        "output": ((q, k, v, L, states, totals), (o, norm.swapaxes(1, 2))),
        "dv": ((q, k, do, L, dstates), (dv,)),
        "dqk": ((q, k, v, do, dnorm, L, states, dstates, totals, dtotals), (dq, dk, dL)),
    }


def _states(k, v, one, L, chunk: int, reverse: bool = False) -> tuple[jax.Array, jax.Array]:
    """(states [B, N, C, R, H] before every chunk, of keys and values [B, T, N, ...], totals [B, N, C, R], `one` [B, N, T] for a value); reverse: their gradients after it."""
    B, T, N, R = k.shape
    chunked = lambda x: jnp.moveaxis(x, 2, 1).reshape(B, N, T // chunk, chunk, -1).astype(jnp.float32)
    L = (jnp.zeros((B, N, T)) if L is None else L).reshape(B, N, -1, chunk, 1)
    last = L[..., -1:, :]
    values = jnp.concatenate([chunked(v), one.reshape(B, N, -1, chunk, 1)], axis=-1)
    added = jnp.einsum("BNCTR,BNCTH->CBNRH", chunked(k) * jnp.exp(L if reverse else last - L), values, precision="highest")

    def step(state, chunk):
        added, left = chunk
        return left * state + added, state

    _, found = lax.scan(step, jnp.zeros_like(added[0]), (added, jnp.moveaxis(jnp.exp(last), 2, 0)), reverse=reverse)
    found = jnp.moveaxis(found, 0, 2)
    return found[..., :-1].astype(jnp.bfloat16 if k.dtype == jnp.bfloat16 else jnp.float32), found[..., -1]


@functools.partial(jax.jit, static_argnums=3)
def _corrected(k, u, w, chunk: int) -> tuple[jax.Array, jax.Array]:
    """(states before every chunk, x = u - w S of all positions), S <- S + k'x."""
    B, T, N, R = k.shape
    chunked = lambda x: jnp.moveaxis(x.reshape(B, T // chunk, chunk, N, -1), (1, 3), (0, 2)).astype(jnp.float32)  # [C, B, N, chunk, ...]

    def step(state, chunk):
        k, u, w = chunk
        x = u - jnp.einsum("BNTR,BNRH->BNTH", w, state, precision="highest")
        return state + jnp.einsum("BNTR,BNTH->BNRH", k, x, precision="highest"), (state, x)

    _, (states, x) = lax.scan(step, jnp.zeros((B, N, R, u.shape[-1])), tuple(map(chunked, (k, u, w))))
    return jnp.moveaxis(states, 0, 2), jnp.moveaxis(x, (0, 2), (1, 3)).reshape(u.shape)
