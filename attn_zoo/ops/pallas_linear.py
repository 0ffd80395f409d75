"""The causal scans of linearized attention as Pallas kernels, for NVIDIA GPUs: what flash-linear-attention is to PyTorch.

Two kernels (see pallas_linear_kernels) forwards: the states at the boundaries of chunks, in sequence, then the outputs of all chunks at once. Backwards the
states are computed again, then their gradients by the same kernel from the end on, and those of the inputs for all chunks at once: memory is O(T), and
nothing is kept but the inputs. They are compiled by Pallas' Triton backend, like those of pallas_attention; what belongs to it stands in `_Kernels.call` alone.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from attn_zoo.ops.pallas_linear_kernels import Form, dqk_kernel, dv_kernel, factor_of, output_kernel, states_kernel
from attn_zoo.ops.tuning import SCANS, ScanTile, fit, scan_chunk, scan_tile
from attn_zoo.spec import Unsupported

INTERPRET = False  # tests set it: the kernels then run on any device, slowly
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
MOST_CORRECTED = 256  # features of a delta rule, whose programs hold all of them at once: with 512, compiled ones spill a kilobyte a thread


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a problem is computed: positions of a chunk, the inputs' dtype, and the tiles of the kernels that it runs, each by its name in tuning.SCANS."""

    chunk: int
    dtype: Any
    tiles: tuple[tuple[str, ScanTile], ...]

    @classmethod
    def of(cls, chunk: int, dtype, R: int, H: int, kernels) -> "Plan":
        """The tuned tiles of these kernels, no wider than R features and H values need."""
        tuned = {kernel: scan_tile(kernel, dtype, H) for kernel in kernels}
        tiles = {name: dataclasses.replace(t, features=fit(t.features, R), values=fit(t.values, H)) for name, t in tuned.items()}
        return cls(chunk, jnp.dtype(dtype), tuple(tiles.items()))

    @property
    def widest(self) -> tuple[int, int]:
        """Features and values of which whole tiles of every kernel can be made."""
        return max(tile.features for _, tile in self.tiles), max(tile.values for _, tile in self.tiles)

    def form(self, kernel: str) -> Form:
        tile = dict(self.tiles)[kernel]
        return Form(self.chunk, tile.features, tile.values, self.dtype, INTERPRET)


def serves(dtype, corrected: int = 0) -> bool | str:
    """Whether the kernels can compute this, whatever the device; else the reason why not. corrected: the features of a delta rule, 0 for the rest."""
    if jnp.dtype(dtype) not in DTYPES:
        return f"it takes bfloat16, float16 or float32, not {jnp.dtype(dtype).name}"
    return corrected <= MOST_CORRECTED or f"the features of a delta rule must be at most {MOST_CORRECTED}, not {corrected}"


def causal_sums(
    q_BTNR: Float[Array, "B T N R"], k_BTKR: Float[Array, "B T K R"], v_BTKH: Float[Array, "B T K H"], log_decay_BTK: Float[Array, "B T K"] | None = None
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """(sum_{j <= t} exp(L_t - L_j) (q_t'k_j) v_j, the same with 1 for v_j), float32; L is the running sum of the log decays, or 0. See ops.linear, ops.decayed.

    All sums are in float32; of bfloat16 values, all factors of products are bfloat16, as the matrix units want them, and the first sum is rounded to it.
    Raises Unsupported, with the reason, for what `serves` refuses.
    """
    plan, (q, k, v) = _whole(None, q_BTNR, k_BTKR, v_BTKH)
    L = None
    if log_decay_BTK is not None:
        # Of a decay that is a constant XLA would compute the sums while it compiles, for ten seconds and more.
        steps = lax.optimization_barrier(_pad(log_decay_BTK.astype(jnp.float32), {1: v.shape[1]})).reshape(len(v), -1, plan.chunk, v.shape[2])
        L = jnp.moveaxis(jnp.cumsum(steps, axis=2).reshape(*v.shape[:2], -1), 1, 2)
    o, norm = _scan(plan, True, q, k, v, L, None)
    T, H = q_BTNR.shape[1], v_BTKH.shape[3]
    return o[:, :T, :, :H].astype(jnp.float32), norm[..., :T].swapaxes(1, 2)


def corrected_sums(
    q_BTNR: Float[Array, "B T N R"], k_BTKR: Float[Array, "B T K R"], w_BTKR: Float[Array, "B T K R"], u_BTKH: Float[Array, "B T K H"], *, chunk: int
) -> Float[Array, "B T N H"]:
    """sum_{j <= t} (q_t'k_j) x_j, float32, with x = u - w'S, S the state before each chunk. See ops.delta, and `wy_form` there.

    chunk: positions, a power of two of at least 16. Raises Unsupported, with the reason, for what `serves` refuses.
    """
    plan, (q, k, w, u) = _whole(chunk, q_BTNR, k_BTKR, w_BTKR, u_BTKH, corrected=k_BTKR.shape[3])
    return _scan(plan, False, q, k, u, None, w)[0][:, : q_BTNR.shape[1], :, : u_BTKH.shape[3]].astype(jnp.float32)


def _whole(chunk: int | None, *arrays, corrected: int = 0):
    """(plan, arrays): in one dtype, bfloat16 if the values are, and in whole chunks and tiles. The first arrays are [..., R], the last one [..., H]. None: the tuned chunk."""
    dtype = arrays[-1].dtype if arrays[-1].dtype == jnp.bfloat16 else jnp.result_type(*arrays)
    reason = serves(dtype, corrected)
    if reason is not True:
        raise Unsupported(f"the Pallas kernels cannot serve here: {reason}")
    (T, _, R), H = arrays[0].shape[1:], arrays[-1].shape[3]
    kernels = [kernel for kernel in SCANS if kernel != ("states" if corrected else "corrected")]
    plan = Plan.of(fit(chunk or scan_chunk(dtype, H), T), dtype, R, H, kernels)
    ceil = lambda size, step: -(-size // step) * step
    length, R, H = (ceil(*pair) for pair in zip((T, R, H), (plan.chunk, *plan.widest), strict=True))
    return plan, [_pad(x.astype(dtype), {1: length, 3: H if x is arrays[-1] else R}) for x in arrays]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(plan: Plan, normed: bool, q, k, v, L, w):
    """(o, norm [B, N, T] or None) of arrays in whole chunks and tiles; L [B, K, T] is None without decay, w without a correction. v is U where there is w."""
    run = Run(plan, q, v)
    states, totals, values = run.states(k, v, L, w, normed)
    return run.outputs(q, k, values, L, states, totals)


def _scan_fwd(plan, normed, *inputs):
    return _scan(plan, normed, *inputs), inputs


def _scan_bwd(plan, normed, inputs, cotangents):
    q, k, v, L, w = inputs
    do, dnorm = cotangents
    run = Run(plan, q, v)
    states, totals, values = run.states(k, v, L, w, normed)
    dw = None
    if w is None:
        dstates, dtotals, _ = run.state_gradients(q, do, dnorm, L)
        dv = run.dv(q, k, do, L, dstates)
    else:
        dstates, dtotals, dv = run.state_gradients(q, do, dnorm, L, correction=(-w, k, run.dv(q, k, do, L, None)))
        chunks = dv.reshape(len(dv), -1, plan.chunk, *dv.shape[2:])
        dw = -jnp.einsum("BCSKH,BKCRH->BCSKR", chunks, states, precision="highest").reshape(w.shape).astype(w.dtype)
    dq, dk, dL = run.dqk(q, k, values, do, dnorm, L, states, dstates, totals, dtotals)
    return dq, dk, dv, dL, dw


_scan.defvjp(_scan_fwd, _scan_bwd)


class Run:
    """The kernels over one problem, whose sizes are whole chunks and tiles: what each gets, and which part of it each program.

    An array is given with its axes, a letter each, which name the part that one program has: b its sequence; n its head, k the key head of its query head, g
    the G query heads of its key head; i its chunk and t the positions of it; r and h its tile of features and of values, x and y the number of that tile. C, T,
    R and H are all chunks, positions, features and values, and 0 is the first of all.
    """

    def __init__(self, plan: Plan, q, v):
        self.plan, self.B, self.T, self.N, self.R = plan, *q.shape
        self.K, self.H = v.shape[2:]
        self.C = self.T // plan.chunk
        self.dtype, self.factor = plan.dtype, factor_of(plan.dtype)

    def states(self, k, v, L, w, normed: bool):
        """(states before every chunk [B, K, C, R, H], totals [y, B, K, C, R] or None, values corrected by w, or v itself)."""
        if w is not None:
            return self._states((None, None, None), (k, -w, v), L, normed, reverse=False)
        states, totals, _ = self._states((k, v, None), None, L, normed, reverse=False)
        return states, totals, v

    def state_gradients(self, q, do, dnorm, L, correction=None):
        """(gradients of the states after every chunk, those of totals or None, those of the values corrected, or None)."""
        return self._states((q, do, dnorm), correction, L, dnorm is not None, reverse=True)

    def _states(self, given, correction, L, normed: bool, reverse: bool):
        """Of given (k, v, one) and correction (write, read, offset)."""
        k, v, one = given
        write, read, offset = correction or (None, None, None)
        name, part = ("corrected", "R") if correction else ("states", "r")
        inputs = [(L, "bnT"), (k, f"bTg{part}"), (v, "bTgh"), (one, "bgT"), (write, "bTnR"), (read, "bTnR"), (offset, "bTnh")]
        outputs = [(self.factor, f"bnC{part}h"), (jnp.float32 if normed else None, f"ybnC{part}"), (self.dtype if correction else None, "bTnh")]
        group = 1 if k is None else k.shape[2] // self.K
        return self.call(name, states_kernel, inputs, outputs, self.K, "h" if correction else "rh", group=group, reverse=reverse)

    def outputs(self, q, k, v, L, states, totals):
        """(o [B, T, N, H], as factors are, norm [B, N, T] or None, float32)."""
        inputs = [(L, "bkt"), (q, "btnR"), (k, "btkR"), (v, "btkh"), (states, "bkiRh"), (totals, "0bkiR")]
        outputs = [(self.factor, "btnh"), (None if totals is None else jnp.float32, "ybnt")]
        o, norm = self.call("output", output_kernel, inputs, outputs, self.N, "hi")
        return o, None if norm is None else norm[0]

    def dv(self, q, k, do, L, dstates):
        """[B, T, K, H]; the part of it within chunks, if without `dstates`."""
        inputs = [(L, "bnt"), (q, "btgR"), (k, "btnR"), (do, "btgh"), (dstates, "bniRh")]
        return self.call("dv", dv_kernel, inputs, [(self.dtype, "btnh")], self.K, "hi")[0]

    def dqk(self, q, k, v, do, dnorm, L, states, dstates, totals, dtotals):
        """(dq, dk, dL [B, K, T] or None)."""
        inputs = [(L, "bnt"), (q, "btgr"), (k, "btnr"), (v, "btnH"), (do, "btgH"), (dnorm, "bgt")]
        inputs += [(states, "bnirH"), (dstates, "bnirH"), (totals, "0bnir"), (dtotals, "0bnir")]
        outputs = [(self.dtype, "btgr"), (self.dtype, "btnr"), (None if L is None else jnp.float32, "xbnt")]
        dq, dk, dL = self.call("dqk", dqk_kernel, inputs, outputs, self.K, "ri")
        return dq, dk, None if dL is None else dL.sum(axis=0)

    def call(self, name: str, kernel, inputs, outputs, heads: int, spread: str, *, group: int | None = None, **static):
        """Runs `kernel`, with the tile of `name`, for these heads and all sequences, and for all tiles or chunks of each axis in `spread`, of r, h and i.

        Outputs are (dtype, axes); an array or a dtype that is None is left out.
        """
        from jax.experimental.pallas import triton  # here, so that machines that never run it need not have it

        form, tile = self.plan.form(name), dict(self.plan.tiles)[name]
        G = self.N // self.K if group is None else group
        r, h, i = (size if letter in spread else 1 for letter, size in (("r", self.R // form.r_tile), ("h", self.H // form.h_tile), ("i", self.C)))
        # Letter: (size, the part of one program, or None for a single one, which part that is).
        axes = {
            "b": (self.B, None, lambda r, h, i, n, b: b),
            "n": (heads, None, lambda r, h, i, n, b: n),
            "k": (self.K, None, lambda r, h, i, n, b: n // G),
            "g": (heads * G, G, lambda r, h, i, n, b: n),
            "i": (self.C, None, lambda r, h, i, n, b: i),
            "t": (self.T, form.chunk, lambda r, h, i, n, b: i),
            "r": (self.R, form.r_tile, lambda r, h, i, n, b: r),
            "h": (self.H, form.h_tile, lambda r, h, i, n, b: h),
            "x": (r, None, lambda r, h, i, n, b: r),
            "y": (h, None, lambda r, h, i, n, b: h),
            "0": (1, None, lambda r, h, i, n, b: 0),
        } | {letter: (size, size, lambda r, h, i, n, b: 0) for letter, size in zip("CTRH", (self.C, self.T, self.R, self.H))}

        def spec(letters):
            _, parts, places = zip(*(axes[letter] for letter in letters))
            return pl.BlockSpec(parts, lambda *program: tuple(place(*program) for place in places))

        shape = lambda dtype, letters: None if dtype is None else jax.ShapeDtypeStruct(tuple(axes[letter][0] for letter in letters), dtype)
        return pl.pallas_call(
            functools.partial(kernel, form=form, **static),
            grid=(r, h, i, heads, self.B),
            in_specs=[None if x is None else spec(letters) for x, letters in inputs],
            out_specs=tuple(None if dtype is None else spec(letters) for dtype, letters in outputs),
            out_shape=tuple(shape(*output) for output in outputs),
            compiler_params=triton.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
            interpret=INTERPRET,
            name=kernel.__name__,
        )(*(x for x, _ in inputs))


def _pad(x, sizes: dict[int, int]):
    width = [(0, sizes.get(axis, size) - size) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, width) if any(after for _, after in width) else x
