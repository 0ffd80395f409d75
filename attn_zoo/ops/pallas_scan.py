"""How the kernels of linearized attention are called: tiles, segments, and which part of every array each program has.

They are compiled by Pallas' Triton backend, like those of pallas_attention; what belongs to it stands in `Run.call` alone.

A sequence at a time would leave most of a GPU idle where there are few: it is cut into segments, whose states begin at zero, and which are sequences of the
batch to all that follows. What the state before a segment adds is known when all are done. Where nothing is causal, that is the sum of all segments.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from attn_zoo.ops import pallas_kernels
from attn_zoo.ops.pallas_linear_kernels import Form, Norm, dqk_kernel, dv_kernel, factor_of, output_kernel, starts_kernel, states_kernel, unit_gradient_kernel
from attn_zoo.ops.tuning import ScanTile, fit, power_of_two, scan_tile

PROGRAMS = 512  # that go through segments side by side, where sequences and heads alone are fewer: some four for each processor of a large GPU
LEAST_CHUNKS = 4  # of a segment
BETWEEN = ScanTile(32, 32, 4, 1)  # of the states between segments, at most


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a problem is computed: positions of a chunk, the inputs' dtype, and the tiles of the kernels that it runs, each by its name.

    segments: of each sequence; causal: whether queries see no later keys; phi: what makes features of the numbers in queries and keys, or None.
    """

    chunk: int
    dtype: Any
    tiles: tuple[tuple[str, ScanTile], ...]
    segments: int = 1
    causal: bool = True
    phi: Callable[[jax.Array], jax.Array] | None = None

    @classmethod
    def of(cls, chunk: int, dtype, R: int, H: int, kernels, **options) -> "Plan":
        """The tuned tiles of these kernels, no wider than R features and H values need."""
        tuned = {kernel: scan_tile(kernel, dtype, H) for kernel in kernels} | {"starts": BETWEEN}
        tiles = {name: dataclasses.replace(t, features=fit(t.features, R), values=fit(t.values, H)) for name, t in tuned.items()}
        return cls(chunk, jnp.dtype(dtype), tuple(tiles.items()), **options)

    def in_segments(self, heads: int, T: int, R: int, H: int) -> "Plan":
        """The same with as many segments as keep a GPU busy, for this many key heads of all sequences; whole chunks and tiles.

        If half as many divide the chunks, these are taken: to pad the others with chunks of zeros would copy all arrays.
        """
        tile, chunks = dict(self.tiles)["states"], T // self.chunk
        wanted = max(1, min(PROGRAMS // (heads * (R // tile.features) * (H // tile.values)), chunks // LEAST_CHUNKS))
        dividing = max(n for n in range(1, wanted + 1) if chunks % n == 0)
        return dataclasses.replace(self, segments=dividing if 2 * dividing >= wanted else wanted)

    def with_whole_rows(self, H: int) -> "Plan":
        """The same where a program of the outputs has all of these values, and as many more warps as they are more, 8 at most."""
        tile = dict(self.tiles)["output"]
        more = max(tile.values, power_of_two(H)) // tile.values
        wide = dataclasses.replace(tile, values=more * tile.values, num_warps=min(8, more * tile.num_warps))
        return dataclasses.replace(self, tiles=tuple((dict(self.tiles) | {"output": wide}).items()))

    @property
    def widest(self) -> tuple[int, int]:
        """Features and values of which whole tiles of every kernel can be made."""
        return max(tile.features for _, tile in self.tiles), max(tile.values for _, tile in self.tiles)

    def form(self, kernel: str) -> Form:
        tile = dict(self.tiles)[kernel]
        return Form(self.chunk, tile.features, tile.values, self.dtype, self.phi, self.causal, pallas_kernels.INTERPRET)


class States(NamedTuple):
    """The states before every chunk [B, K, C, R, H], or their gradients after it, of a segment alone; and totals, [B, K, C, R], which are whole, or None.

    left [B, K, C] of the state before the segment, start [B, K, R, H], are to be added: all of it if `left` is None, nothing if `start` is. Where nothing is
    causal there are no local ones, and start and totals are those of all keys, [sequences, K, R, ...].
    """

    local: Any
    start: Any
    left: Any
    totals: Any


class Run:
    """The kernels over one problem, whose sizes are whole chunks and tiles: what each gets, and which part of it each program.

    An array is given with its axes, a letter each, which name the part that one program has: b its sequence; n its head, k the key head of its query head, g
    the G query heads of its key head; i its chunk and t the positions of it; r and h its tile of features and of values, x and y the number of that tile. C, T,
    R and H are all chunks, positions, features and values, s all segments of a sequence, a is the sequence of which b is a segment, and p which one it is.
    """

    def __init__(self, plan: Plan, q, v):
        self.plan, self.B, self.T, self.N, self.R = plan, *q.shape
        self.K, self.H = v.shape[2:]
        self.C = self.T // plan.chunk
        self.dtype, self.factor = plan.dtype, factor_of(plan.dtype)

    def states(self, k, v, L, w, normed: bool) -> tuple[States, Array]:
        """(the states before every chunk, values corrected by w, or v itself)."""
        if w is not None:
            return self._states((None, None, None, None), (k, w, v), L, normed, reverse=False)
        return self._states((k, v, None, None), None, L, normed, reverse=False)[0], v

    def state_gradients(self, q, do, dnorm, scale, L, correction=None) -> tuple[States, Array | None]:
        """(gradients of the states after every chunk, those of the values corrected, or None)."""
        return self._states((q, do, scale, dnorm), correction, L, dnorm is not None, reverse=True)

    def _states(self, given, correction, L, normed: bool, reverse: bool):
        """Of given (k, v, scale, one) and correction (write, read, offset)."""
        k, v, scale, one = given
        write, read, offset = correction or (None, None, None)
        name, part = ("corrected", "R") if correction else ("states", "r")
        inputs = [(L, "bnT"), (k, f"bTg{part}"), (v, "bTgh"), (scale, "bgT"), (one, "bgT"), (write, "bTnR"), (read, "bTnR"), (offset, "bTnh")]
        ends, each = jnp.float32 if self.plan.segments > 1 or not self.plan.causal else None, self.plan.causal
        outputs = [(self.factor if each else None, f"bnC{part}h"), (jnp.float32 if normed and each else None, f"ybnC{part}"), (self.dtype if correction else None, "bTnh")]
        outputs += [(ends, f"bn{part}h"), (ends if normed else None, f"ybn{part}")]
        group = 1 if k is None else k.shape[2] // self.K
        local, totals, values, end, total_end = self.call(name, states_kernel, inputs, outputs, self.K, "h" if correction else "rh", group=group, reverse=reverse)
        if not self.plan.causal:
            of_all = lambda x: x.reshape(-1, self.plan.segments, *x.shape[1:]).sum(axis=1)
            return States(None, of_all(end).astype(self.factor), None, of_all(total_end[0]) if normed else None), None
        totals, start, left = None if totals is None else totals[0], None, None
        if end is not None:
            start, start_totals = self._starts(end, None if total_end is None else total_end[0], L, reverse)
            left = None if L is None else jnp.exp(self._before(self._lasts(L), reverse))
            if totals is not None:
                totals = totals + (start_totals[:, :, None] if left is None else left[..., None] * start_totals[:, :, None])
        return States(local, start, left, totals), values

    def _starts(self, ends, total_ends, L, reverse: bool):
        """(states, totals or None) before each segment, [B, K, R, ...], of those that each ends with when it begins at zero; with `reverse` those after it."""
        s = self.plan.segments
        by_sequence = lambda x: None if x is None else x.reshape(-1, s, *x.shape[1:])
        inputs = [(by_sequence(None if L is None else self._lasts(L).sum(axis=2)), "bsn"), (by_sequence(ends), "bsnrh"), (by_sequence(total_ends), "bsnr")]
        outputs = [(self.factor, "bsnrh"), (None if total_ends is None else jnp.float32, "ybsnr")]
        starts, totals = self.call("starts", starts_kernel, inputs, outputs, self.K, "rh", sequences=self.B // s, reverse=reverse)
        return starts.reshape(ends.shape), None if totals is None else totals[0].reshape(total_ends.shape)

    def _before(self, x, reverse: bool):
        """The sum of all chunks' numbers before each, [B, K, C], or with `reverse` after it: without what a difference of sums would lose."""
        shifted = jnp.pad(x[:, :, 1:], ((0, 0), (0, 0), (0, 1))) if reverse else jnp.pad(x[:, :, :-1], ((0, 0), (0, 0), (1, 0)))
        return lax.cumsum(shifted, axis=2, reverse=reverse)

    def _lasts(self, L):
        """L at the last position of each chunk, [B, K, C]."""
        return L.reshape(*L.shape[:2], self.C, self.plan.chunk)[..., -1]

    def outputs(self, q, k, v, L, states: States, finish: str | Norm, per_row=None):
        """(o [B, T, N, H], as factors are, norm [B, N, T] or None, float32).

        finish: "ratio", o / norm and 1 / norm, zeros where it would not be finite, of a norm that is held at per_row [B, K, T] or above, if there is one; a Norm, o
        times its factor, and that factor, per_row [s, N, T] being its scale; else the two sums.
        """
        within = [(k, "btkR"), (v, "btkh")] if self.plan.causal else [(None, "")] * 2
        outputs = [(self.factor, "btnh"), (None if states.totals is None else jnp.float32, "ybnt")]
        inputs = [(L, "bkt"), (q, "btnR"), *within, *self._held(states, "k", "Rh"), (per_row, "pnt" if isinstance(finish, Norm) else "bkt")]
        o, norm = self.call("output", output_kernel, inputs, outputs, self.N, "hi", finish=finish)
        return o, None if norm is None else norm[0]

    def unit_gradients(self, y, dy, norm: Norm):
        """[B, T, N, H], of what `norm` has made, and its gradient: that of the sums over the factor of each row. In a plan with whole rows."""
        return self.call("output", unit_gradient_kernel, [(y, "btnH"), (dy, "btnH")], [(self.factor, "btnH")], self.N, "i", norm=norm)[0]

    def dv(self, q, k, do, scale, L, dstates: States | None):
        """[B, T, K, H]; the part of it within chunks, if without `dstates`."""
        held = self._held(dstates or States(None, None, None, None), "n", "Rh")[:3]
        within = [(q, "btgR"), (k, "btnR"), (do, "btgh"), (scale, "bgt")] if self.plan.causal else [(None, ""), (k, "btnR"), (None, ""), (None, "")]
        return self.call("dv", dv_kernel, [(L, "bnt"), *within, *held], [(self.dtype, "btnh")], self.K, "hi")[0]

    def dqk(self, q, k, v, do, dnorm, scale, L, states: States, dstates: States, dx=None, fixed: bool = False):
        """(dq, dk, dL [B, K, T] or None, dw); dx: the gradient of values that were corrected by w; fixed: L has no gradient."""
        inputs = [(L, "bnt"), (q, "btgr"), (k, "btnr"), (v, "btnH"), (do, "btgH"), (dnorm, "bgt"), (scale, "bgt")]
        (*before, total), (*after, dtotal) = (self._held(x, "n", "rH") for x in (states, dstates))
        outputs = [(self.dtype, "btgr"), (self.dtype, "btnr"), (None if L is None or fixed else jnp.float32, "xbnt"), (None if dx is None else self.dtype, "btnr")]
        dq, dk, dL, dw = self.call("dqk", dqk_kernel, [*inputs, *before, *after, total, dtotal, (dx, "btnH")], outputs, self.K, "ri")
        return dq, dk, None if dL is None else dL.sum(axis=0), dw

    def _held(self, states: States, head: str, part: str) -> list[tuple]:
        """The four arrays of `states`, each with its axes: of this letter's head, and this part of features and values."""
        local, start, left, totals = states
        if self.plan.causal:
            return [(local, f"b{head}i{part}"), (start, f"b{head}{part}"), (left, f"b{head}i"), (totals, f"b{head}i{part[0]}")]
        return [(None, ""), (start, f"a{head}{part}"), (None, ""), (totals, f"a{head}{part[0]}")]

    def call(self, name: str, kernel, inputs, outputs, heads: int, spread: str, *, group: int | None = None, sequences: int | None = None, **static):
        """Runs `kernel`, with the tile of `name`, for these heads and all, or these, sequences, and for all tiles or chunks of each axis in `spread`, of r, h and i.

        Outputs are (dtype, axes); an array or a dtype that is None is left out.
        """
        from jax.experimental.pallas import triton  # here, so that machines that never run it need not have it

        form, tile = self.plan.form(name), dict(self.plan.tiles)[name]
        G, B = self.N // self.K if group is None else group, self.B if sequences is None else sequences
        r, h, i = (size if letter in spread else 1 for letter, size in (("r", self.R // form.r_tile), ("h", self.H // form.h_tile), ("i", self.C)))
        # Letter: (size, the part of one program, or None for a single one, which part that is).
        axes = {
            "b": (B, None, lambda r, h, i, n, b: b),
            "a": (self.B // self.plan.segments, None, lambda r, h, i, n, b: b // self.plan.segments),
            "p": (self.plan.segments, None, lambda r, h, i, n, b: b % self.plan.segments),
            "n": (heads, None, lambda r, h, i, n, b: n),
            "k": (self.K, None, lambda r, h, i, n, b: n // G),
            "g": (heads * G, G, lambda r, h, i, n, b: n),
            "i": (self.C, None, lambda r, h, i, n, b: i),
            "t": (self.T, form.chunk, lambda r, h, i, n, b: i),
            "r": (self.R, form.r_tile, lambda r, h, i, n, b: r),
            "h": (self.H, form.h_tile, lambda r, h, i, n, b: h),
            "x": (r, None, lambda r, h, i, n, b: r),
            "y": (h, None, lambda r, h, i, n, b: h),
        } | {letter: (size, size, lambda r, h, i, n, b: 0) for letter, size in zip("CTRHs", (self.C, self.T, self.R, self.H, self.plan.segments))}

        def spec(letters):
            _, parts, places = zip(*(axes[letter] for letter in letters))
            return pl.BlockSpec(parts, lambda *program: tuple(place(*program) for place in places))

        shape = lambda dtype, letters: None if dtype is None else jax.ShapeDtypeStruct(tuple(axes[letter][0] for letter in letters), dtype)
        return pl.pallas_call(
            functools.partial(kernel, form=form, **static),
            grid=(r, h, i, heads, B),
            in_specs=[None if x is None else spec(letters) for x, letters in inputs],
            out_specs=tuple(None if dtype is None else spec(letters) for dtype, letters in outputs),
            out_shape=tuple(shape(*output) for output in outputs),
            compiler_params=triton.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
            interpret=form.interpret,
            name=kernel.__name__,
        )(*(x for x, _ in inputs))
