"""The bodies of the Pallas kernels of linear attention: what one program does with the states of one head, or with one chunk of positions.

S_t = exp(a_t) S_{t-1} + k_t v_t' is read as o_t = S_t' q_t; z_t, the same sum of k_t alone, as n_t = z_t' q_t. In chunks (Sun et al. 2023, eq. 7; Yang et
al. 2024, Gated Linear Attention Transformers with Hardware-Efficient Training, sec. 4), with L the running sum of the log decays a within a chunk, its
last number L_c, and S the state before the chunk,

    o_t = exp(L_t) S' q_t + sum_{j <= t} exp(L_t - L_j) (q_t'k_j) v_j,    S <- exp(L_c) S + sum_j exp(L_c - L_j) k_j v_j'.

One kernel goes through a sequence, or a segment of one, and leaves the state before every chunk, of which each program carries one tile; the others take all
chunks at once, and add to that state what is left of the one before the segment. The gradient of the states is the same recurrence from the end,
dS <- exp(L_c) dS + sum_t exp(L_t) q_t do_t', so the same kernel runs it. With the delta rule
(see ops.delta) what is written is corrected by what the state held, x = U - W S and S <- S + K'x, and backwards dx = (its part of the chunk) + K dS and
dS <- dS + Q'do - W'dx: both are x = offset -+ read S, S <- S +- write'x. The gradient of W is -dx S'.

Where nothing is causal all queries read one state, and all keys get its gradient: the same kernels, without what is within a chunk.

What is asked for may be o_t / n_t. With r_t = 1 / n_t its gradients are those of the sums with queries r_t q_t, of outputs do_t, and of totals -o_t'do_t: kernels
of the backward pass are given r, and multiply queries by it. Or it may be y_t = r_t o_t, with the r_t that a `Norm` makes of o_t and n_t, and a gradient by o_t
alone: that of the sums with queries r_t q_t, of outputs dy_t - y_t (y_t'dy_t) / H. Queries and keys may be features phi(x) of single numbers x, made when x has been read.

Bodies use references, loops and products alone, which Pallas' compilers for NVIDIA GPUs share. A reference that a problem has no use for is None. All that
products need is read before the first of them: the compiler leaves reads where they are written, and one between products would be waited for with nothing to do.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from attn_zoo.ops.pallas_kernels import precision_of_float32, product


def factor_of(dtype):
    """The dtype of the factors of products, and of states in memory. float16 is computed in TF32, of the same digits, and the range that sums need."""
    return jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32


@dataclasses.dataclass(frozen=True)
class Form:
    """What a kernel knows at compile time: positions of a chunk, features and values of a tile (powers of two, at least 16), the inputs' dtype, who runs it.

    phi: what makes features of the numbers in queries and keys, or None; causal: whether queries see no later keys.
    """

    chunk: int
    r_tile: int
    h_tile: int
    dtype: Any
    phi: Callable[[jax.Array], jax.Array] | None
    causal: bool
    interpret: bool

    @property
    def factor(self):
        return factor_of(self.dtype)

    def features(self, x):
        """phi(x), rounded as if it had been made before and read here."""
        return x if self.phi is None else self.phi(x.astype(jnp.float32)).astype(self.factor)

    def queries(self, x, scale):
        """Rows of features, [c, r], times a number each, or 1 if None."""
        return self.features(x) if scale is None else by_row(scale, self.features(x).astype(jnp.float32)).astype(self.factor)

    def gradient(self, x, dphi):
        """Of x, from that of its features."""
        return dphi if self.phi is None else jax.vjp(self.phi, x.astype(jnp.float32))[1](dphi)[0]

    def dot(self, a, b, a_axis: int, b_axis: int):
        """The product of two matrices over these axes, in float32."""
        precision = precision_of_float32(self.interpret) if self.dtype == jnp.float32 else None
        return product(a.astype(self.factor), b.astype(self.factor), a_axis, b_axis, precision)


@dataclasses.dataclass(frozen=True)
class Norm:
    """What ops.decayed.group_norm multiplies rows of H values by, for a root mean square of 1 but for epsilon."""

    H: int
    epsilon: float

    def factor(self, o, scores, scale):
        """Of rows o [c, h], their sums of scores and their scale, [c] each; h is H and what is padded with zeros."""
        factor = scale / jnp.maximum(jnp.abs(scores) * scale, 1.0)
        return factor * lax.rsqrt(jnp.sum(o * o, axis=1) / self.H * factor * factor + self.epsilon)


@dataclasses.dataclass(frozen=True)
class Decay:
    """How a chunk fades: L at its positions, [c], and at the last one; None without decay."""

    L: jax.Array | None
    last: jax.Array | None

    @classmethod
    def read(cls, ref, start, chunk: int) -> "Decay":
        """Of the chunk whose first position is `start`."""
        return cls(None, None) if ref is None else cls(ref[pl.ds(start, chunk)], ref[start + chunk - 1])

    def since_start(self, x):
        """Rows [c, ...] times what is left, at their positions, of the state before the chunk."""
        return x if self.L is None else by_row(jnp.exp(self.L), x)

    def until_end(self, x):
        """Rows [c, ...] times what is left of them after the chunk."""
        return x if self.L is None else by_row(jnp.exp(self.last - self.L), x)

    def across(self, x):
        """A state times what is left of it after the chunk."""
        return x if self.L is None else jnp.exp(self.last) * x

    def within(self, products, keys_first: bool = False):
        """Products of the chunk's queries and keys, [c, c], faded, and zero where the key is after the query; keys_first: a row is a key."""
        down, along = (lax.broadcasted_iota(jnp.int32, products.shape, axis) for axis in (0, 1))
        seen = down <= along if keys_first else along <= down
        if self.L is None:
            return jnp.where(seen, products, 0.0)
        gap = self.L[None, :] - self.L[:, None] if keys_first else self.L[:, None] - self.L[None, :]
        return products * jnp.exp(jnp.where(seen, gap, -jnp.inf))  # masked before the exponential, which could overflow


@dataclasses.dataclass(frozen=True)
class Held:
    """References to the states of one chunk, [R, h]: `local`, of its segment alone, to which that before the segment adds what is left of it. None is nothing, or all."""

    local: Any
    start: Any
    left: Any

    def __getitem__(self, tile):
        if self.local is None or self.start is None:
            return (self.start if self.local is None else self.local)[tile]
        state, start = self.local[tile].astype(jnp.float32), self.start[tile].astype(jnp.float32)
        return state + (start if self.left is None else self.left[...] * start)


def states_kernel(
    decay_ref, k_ref, v_ref, scale_ref, one_ref, write_ref, read_ref, offset_ref, state_ref, total_ref, x_ref, end_ref, total_end_ref, *, form: Form, reverse: bool
):
    """The states of one key head before every chunk, [C, r, h], and after the last one, and the same of totals z, [C, r]; with `reverse` their gradients, from the end on.
    What is not asked for is None.

    Of k [T, G, r] and v [T, G, h], of the G heads that share the state (k is multiplied by `scale`, [G, T], and `one`, the same, is for the total what v is for
    the state; None means 1), and of the correction's write and read, [T, R], and offset, [T, h], whose x is [T, h]. With a correction a program has all R
    features, in tiles.
    """
    (T, *_, R), c = (write_ref if k_ref is None else k_ref).shape, form.chunk
    chunks, normed = T // c, total_ref is not None or total_end_ref is not None
    tiles = [pl.ds(r, form.r_tile) for r in range(0, R, form.r_tile)]

    def step(n, carry):
        states, total = carry
        i = chunks - 1 - n if reverse else n
        rows, fade = pl.ds(i * c, c), Decay.read(decay_ref, i * c, c)
        for tile, state in zip(tiles, states):
            if state_ref is not None:
                state_ref[i, tile, :] = state.astype(state_ref.dtype)
        if total_ref is not None:
            total_ref[i, :] = total
        faded = [fade.across(state) for state in states], None if total is None else fade.across(total)
        if offset_ref is not None:
            offset, x = offset_ref[rows, :], zeros(c, form.h_tile)
            for tile, state in zip(tiles, states):
                x += form.dot(read_ref[rows, tile], state, 1, 0)
            x = offset.astype(jnp.float32) + (x if reverse else -x)
            x_ref[rows, :] = x.astype(x_ref.dtype)
            written = -x if reverse else x
            faded = [state + form.dot(write_ref[rows, tile], written, 0, 0) for tile, state in zip(tiles, faded[0])], faded[1]

        def head(g, carry):
            states, total = carry
            v = v_ref[rows, g, :]
            k = [form.queries(k_ref[rows, g, tile], None if scale_ref is None else scale_ref[g, rows]).astype(jnp.float32) for tile in tiles]
            k = [(fade.since_start if reverse else fade.until_end)(k) for k in k]
            if total is not None:
                total = total + jnp.sum(k[0] if one_ref is None else by_row(one_ref[g, rows], k[0]), axis=0)
            return [state + form.dot(k, v, 0, 0) for state, k in zip(states, k)], total

        return faded if k_ref is None else repeat(k_ref.shape[1], head, faded)

    zero = [zeros(form.r_tile, form.h_tile) for _ in tiles]
    states, total = repeat(chunks, step, (zero, zeros(R) if normed else None))
    if end_ref is not None:
        for tile, state in zip(tiles, states):
            end_ref[tile, :] = state
    if total_end_ref is not None:
        total_end_ref[...] = total


def starts_kernel(through_ref, end_ref, total_end_ref, start_ref, total_start_ref, *, form: Form, reverse: bool):
    """A tile of the states before every segment, [s, r, h], of those that each ends with when it begins at zero; with `reverse` those after it. Totals, [s, r], too.

    through [s]: the log of what is left of a state after a segment, None if all of it.
    """
    segments = end_ref.shape[0]
    width = math.gcd(segments, 8)  # read at once: nothing is computed meanwhile

    def step(n, carry):
        places = [n * width + j for j in range(width)]
        places = [segments - 1 - i if reverse else i for i in places]
        ends = [(end_ref[i], None if total_end_ref is None else total_end_ref[i]) for i in places]
        for i, (end, total_end) in zip(places, ends):
            state, total = carry
            start_ref[i] = state.astype(start_ref.dtype)
            if total is not None:
                total_start_ref[i] = total
            left = 1.0 if through_ref is None else jnp.exp(through_ref[i])
            carry = left * state + end, None if total is None else left * total + total_end
        return carry

    repeat(segments // width, step, (zeros(form.r_tile, form.h_tile), None if total_end_ref is None else zeros(form.r_tile)))


def output_kernel(decay_ref, q_ref, k_ref, v_ref, state_ref, start_ref, left_ref, total_ref, per_row_ref, o_ref, norm_ref, *, form: Form, finish: str | Norm):
    """One chunk of one query head: o [c, h] and n [c], of q, k [c, R], v [c, h], and the state [R, h] and total [R] before the chunk.

    finish: "ratio", o / n and 1 / n in their place, of n that is held at per_row [c] or above, if there is one; a Norm, o times its factor, and that factor, per_row
    being its scale.
    """
    c, R = q_ref.shape
    fade, held = Decay.read(decay_ref, 0, c), Held(state_ref, start_ref, left_ref)
    v = v_ref[...] if form.causal else None

    def features(tile, carry):
        products, o, norm = carry
        q, k, state = form.features(q_ref[:, tile]), form.features(k_ref[:, tile]) if form.causal else None, held[tile, :]
        if norm is not None:
            norm = norm + jnp.sum(q.astype(jnp.float32) * total_ref[tile][None, :], axis=1)
        return products + form.dot(q, k, 1, 1) if form.causal else None, o + form.dot(q, state, 1, 0), norm

    start = (zeros(c, c) if form.causal else None, zeros(c, form.h_tile), None if norm_ref is None else zeros(c))
    products, o, norm = over_tiles(R, form.r_tile, features, start)
    o, norm = fade.since_start(o), None if norm is None else fade.since_start(norm)
    if form.causal:
        scores = fade.within(products)
        o, norm = o + form.dot(scores, v, 1, 0), None if norm is None else norm + jnp.sum(scores, axis=1)
    if norm is not None:
        if finish == "ratio":
            norm = norm if per_row_ref is None else jnp.maximum(norm, per_row_ref[...])
            none = norm < jnp.finfo(norm.dtype).tiny
            norm = jnp.where(none, 0.0, 1 / jnp.where(none, 1.0, norm))
            o = by_row(norm, o)
        elif isinstance(finish, Norm):
            norm = finish.factor(o, norm, per_row_ref[...])
            o = by_row(norm, o)
        norm_ref[...] = norm
    o_ref[...] = o.astype(o_ref.dtype)


def unit_gradient_kernel(y_ref, dy_ref, dx_ref, *, form: Form, norm: Norm):
    """What the sums get, over the factor of each row, of rows y [c, H] that `norm` has made of them, and their gradient."""
    y, dy = y_ref[...].astype(jnp.float32), dy_ref[...].astype(jnp.float32)
    dx_ref[...] = (dy - by_row(jnp.sum(y * dy, axis=1) / norm.H, y)).astype(dx_ref.dtype)


def dv_kernel(decay_ref, q_ref, k_ref, do_ref, scale_ref, dstate_ref, dstart_ref, dleft_ref, dv_ref, *, form: Form):
    """One chunk of one key head: dv [c, h], of q [c, G, R] and its scale [G, c], k [c, R], do [c, G, h] and, if given, the gradient [R, h] of the state after the chunk."""
    c, R = k_ref.shape
    fade, held = Decay.read(decay_ref, 0, c), Held(dstate_ref, dstart_ref, dleft_ref)

    def head(g, dv):
        scale = None if scale_ref is None else scale_ref[g, :]

        def features(tile, products):
            q, k = form.queries(q_ref[:, g, tile], scale), form.features(k_ref[:, tile])
            return products + form.dot(k, q, 1, 1)

        products = over_tiles(R, form.r_tile, features, zeros(c, c))
        return dv + form.dot(fade.within(products, keys_first=True), do_ref[:, g, :], 1, 0)

    def read(tile, dv):
        k, dstate = form.features(k_ref[:, tile]), held[tile, :]
        return dv + form.dot(k, dstate, 1, 0)

    dv = zeros(c, form.h_tile)
    if dstate_ref is not None or dstart_ref is not None:
        dv = fade.until_end(over_tiles(R, form.r_tile, read, dv))
    dv_ref[...] = (repeat(q_ref.shape[1], head, dv) if form.causal else dv).astype(dv_ref.dtype)


def dqk_kernel(
    decay_ref, q_ref, k_ref, v_ref, do_ref, dnorm_ref, scale_ref, state_ref, start_ref, left_ref, dstate_ref, dstart_ref, dleft_ref, total_ref, dtotal_ref, dx_ref,
    dq_ref, dk_ref, dL_ref, dw_ref, *, form: Form,
):  # fmt: skip
    """One chunk of one key head, a tile of features: dq [c, G, r], dk [c, r], these features' part of dL [c], and dw [c, r].

    Of q [c, G, r], k [c, r], v [c, H], do [c, G, H], dnorm and the scale of q [G, c], the state before the chunk and the gradient of the one after it, [r, H],
    the same of totals, [r], and dx [c, H]. exp(L_t) is a factor of all that q_t reads, 1 / exp(L_t) of all that k_t gives: dL_t = q_t'dq_t - k_t'dk_t. The last one is a
    factor of the state that goes on, too.
    """
    c, H = v_ref.shape
    fade, k = Decay.read(decay_ref, 0, c), form.features(k_ref[...]).astype(jnp.float32)
    before, after = Held(state_ref, start_ref, left_ref), Held(dstate_ref, dstart_ref, dleft_ref)

    def written(tile, carry):
        dk, overlap = carry
        v, dstate = v_ref[:, tile], after[:, tile]
        if overlap is not None:
            overlap = overlap + jnp.sum(before[:, tile].astype(jnp.float32) * dstate.astype(jnp.float32))
        return dk + form.dot(v, dstate, 1, 1), overlap

    dk, overlap = over_tiles(H, form.h_tile, written, (zeros(*k.shape), None if dL_ref is None else jnp.float32(0)))
    dk, dL = fade.until_end(dk if dtotal_ref is None else dk + dtotal_ref[...][None, :]), None
    if dL_ref is not None:
        if dtotal_ref is not None:
            overlap += jnp.sum(total_ref[...] * dtotal_ref[...])
        dL = jnp.where(lax.iota(jnp.int32, c) == c - 1, fade.across(overlap) + jnp.sum(k * dk), 0.0)

    def head(g, carry):
        dk, dL = carry
        scale = None if scale_ref is None else scale_ref[g, :]
        q = form.queries(q_ref[:, g, :], scale)

        def read(tile, carry):
            products, dq = carry
            do, v, state = do_ref[:, g, tile], v_ref[:, tile] if form.causal else None, before[:, tile]
            return products + form.dot(do, v, 1, 1) if form.causal else None, dq + form.dot(do, state, 1, 1)

        products, dq = over_tiles(H, form.h_tile, read, (zeros(c, c) if form.causal else None, zeros(*k.shape)))
        if dnorm_ref is not None:  # as of one more value, which is 1
            dnorm = dnorm_ref[g, :][:, None]
            products, dq = products + dnorm if form.causal else None, dq + dnorm * total_ref[...][None, :]
        dq = fade.since_start(dq)
        if form.causal:
            dscores = fade.within(products)
            dq += form.dot(dscores, k, 1, 0)
        dL = None if dL is None else dL + jnp.sum(q.astype(jnp.float32) * dq, axis=1)
        dq_ref[:, g, :] = form.gradient(q_ref[:, g, :], dq if scale is None else by_row(scale, dq)).astype(dq_ref.dtype)
        if form.causal:  # at last, as registers are short while dq is there
            dk += form.dot(dscores, q, 0, 0)
        return dk, dL

    if dx_ref is not None:

        def corrected(tile, dw):
            dx, state = dx_ref[:, tile], before[:, tile]
            return dw - form.dot(dx, state, 1, 1)

        dw_ref[...] = over_tiles(H, form.h_tile, corrected, zeros(*k.shape)).astype(dw_ref.dtype)

    dk, dL = repeat(q_ref.shape[1], head, (dk, dL))
    dk_ref[...] = form.gradient(k_ref[...], dk).astype(dk_ref.dtype)
    if dL_ref is not None:
        dL_ref[...] = dL - jnp.sum(k * dk, axis=1)


def repeat(count: int, body, carry):
    """body(n, carry) for n < count."""
    return body(0, carry) if count == 1 else lax.fori_loop(0, count, body, carry)


def over_tiles(size: int, tile: int, body, carry):
    """body(slice, carry) for each tile of an axis."""
    return repeat(size // tile, lambda n, carry: body(pl.ds(n * tile, tile), carry), carry)


def by_row(factor, x):
    """Rows [c, ...] times a number a row."""
    return x * (factor if x.ndim == 1 else factor[:, None])


def zeros(*shape: int):
    return jnp.zeros(shape, jnp.float32)
