"""The sums of linearized attention, causal ones and over all keys, as Pallas kernels, for NVIDIA GPUs: what flash-linear-attention is to PyTorch.

Forwards the states at the boundaries of chunks, then the outputs of all chunks at once; backwards the gradients of the states, by the same kernel from the
end on, then those of the inputs for all chunks at once (see pallas_scan for how, pallas_linear_kernels for what). Memory is O(T): the states are kept, which
are R / chunk of the values.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attn_zoo.ops.chunks import pad
from attn_zoo.ops.pallas_linear_kernels import Norm
from attn_zoo.ops.pallas_scan import Plan, Run
from attn_zoo.ops.tuning import fit, scan_chunk
from attn_zoo.spec import Unsupported

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
MOST_CORRECTED = 256  # features of a delta rule, whose programs hold all of them at once: with 512, compiled ones spill a kilobyte a thread
MOST_NORMED = 128  # values of a row of which a program of the outputs holds all, in bfloat16; in float32 64 of them spill 800 bytes a thread on an A6000
Wanted = Literal["both", "first", "ratio"] | Norm  # of the two sums, with values and with 1 for them


def serves(dtype, corrected: int = 0) -> bool | str:
    """Whether the kernels can compute this, whatever the device; else the reason why not. corrected: the features of a delta rule, 0 for the rest."""
    if jnp.dtype(dtype) not in DTYPES:
        return f"it takes bfloat16, float16 or float32, not {jnp.dtype(dtype).name}"
    return corrected <= MOST_CORRECTED or f"the features of a delta rule must be at most {MOST_CORRECTED}, not {corrected}"


def serves_normed(dtype, H: int) -> bool:
    """Whether a program of the outputs can hold whole rows, to normalize them."""
    return jnp.dtype(dtype) == jnp.bfloat16 and H <= MOST_NORMED


def pallas_sums(
    q_BTNR: Float[Array, "B T N R"],
    k_BTKR: Float[Array, "B T K R"],
    v_BTKH: Float[Array, "B T K H"],
    log_decay_BTK: Float[Array, "B T K"] | None = None,
    *,
    causal: bool = True,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """(sum_j exp(L_t - L_j) (q_t'k_j) v_j, the same with 1 for v_j) over j <= t, float32; L is the running sum of the log decays, or 0. See ops.linear, ops.decayed.
    Unless causal, over all j, and without decay.

    All sums are in float32; of bfloat16 values, all factors of products are bfloat16, as the matrix units want them, and the first sum is rounded to it.
    Raises Unsupported, with the reason, for what `serves` refuses.
    """
    if log_decay_BTK is not None and not causal:
        raise ValueError("log_decay_BTK: sums over all keys do not fade; a decay needs causal=True")
    plan, (q, k, v) = _whole(None, q_BTNR, k_BTKR, v_BTKH, causal=causal)
    (B, T, N, _), H, length = q_BTNR.shape, v_BTKH.shape[3], plan.segments * v.shape[1]
    o, norm = _scan(plan, "both", q, k, v, None if log_decay_BTK is None else _running(plan, log_decay_BTK, length), None, None)
    return _cut(o, B, T, H), norm.swapaxes(1, 2).reshape(B, -1, N)[:, :T]


def pallas_normed_sums(
    q_BTNR: Float[Array, "B T N R"],
    k_BTKR: Float[Array, "B T K R"],
    v_BTKH: Float[Array, "B T K H"],
    log_decay_BTK: Float[Array, "B T K"],
    scale_TN: Float[Array, "T N"],
    *,
    epsilon: float,
) -> Float[Array, "B T N H"]:
    """ops.decayed.group_norm of the causal sums above, float32; decays and scale are constants to the gradient. Of bfloat16 values it is rounded to bfloat16 once.

    Meant for what `serves_normed` says; wider rows, or those of float32, would want more of a processor than there is. Raises Unsupported as above.
    """
    (B, T, N, _), H = q_BTNR.shape, v_BTKH.shape[3]
    plan, (q, k, v) = _whole(None, q_BTNR, k_BTKR, v_BTKH, whole_rows=True)
    length = plan.segments * v.shape[1]
    scale = pad(scale_TN.astype(jnp.float32).T, {1: length}).reshape(N, plan.segments, -1).swapaxes(0, 1)
    return _cut(_scan(plan, Norm(H, epsilon), q, k, v, _running(plan, log_decay_BTK, length), None, scale), B, T, H)


def pallas_kernel_attention(
    q_BTNR: Float[Array, "B T N R"],
    k_BTKR: Float[Array, "B T K R"],
    v_BTKH: Float[Array, "B T K H"],
    *,
    causal: bool,
    phi: Callable[[Array], Array] | None = None,
    least_BTK: Float[Array, "B T K"] | None = None,
) -> Float[Array, "B T N H"]:
    """The first of the sums above over the second, or `least`, a constant to the gradient, where that is more; float32, without decay. Zeros where a denominator
    is zero or subnormal. See ops.linear.

    phi, a function of single numbers that JAX differentiates, is applied to q and k in the kernels, which then read them in the dtype that `pallas_sums` has for
    features. The quotient of bfloat16 values is rounded to bfloat16 once. Raises Unsupported as above.
    """
    plan, (q, k, v) = _whole(None, q_BTNR, k_BTKR, v_BTKH, causal=causal, phi=phi)
    least = None if least_BTK is None else _in_segments(plan, least_BTK.astype(jnp.float32), plan.segments * v.shape[1]).swapaxes(1, 2)
    return _cut(_scan(plan, "ratio", q, k, v, None, None, least), *q_BTNR.shape[:2], v_BTKH.shape[3])


def corrected_sums(
    q_BTNR: Float[Array, "B T N R"], k_BTKR: Float[Array, "B T K R"], w_BTKR: Float[Array, "B T K R"], u_BTKH: Float[Array, "B T K H"], *, chunk: int
) -> Float[Array, "B T N H"]:
    """sum_{j <= t} (q_t'k_j) x_j, float32, with x = u - w'S, S the state before each chunk. See ops.delta, and `wy_form` there.

    chunk: positions, a power of two of at least 16. Raises Unsupported, with the reason, for what `serves` refuses.
    """
    plan, (q, k, w, u) = _whole(chunk, q_BTNR, k_BTKR, w_BTKR, u_BTKH, corrected=k_BTKR.shape[3])
    return _cut(_scan(plan, "first", q, k, u, None, w, None), *q_BTNR.shape[:2], u_BTKH.shape[3])


def _whole(chunk: int | None, *arrays, corrected: int = 0, causal: bool = True, phi=None, whole_rows: bool = False):
    """(plan, arrays): in one dtype, bfloat16 if the values are, in whole chunks and tiles, and in segments, of which each is a sequence of the batch.

    The first arrays are [..., R], the last one [..., H]. None: the tuned chunk. whole_rows: a program of the outputs has all values.
    """
    dtype = arrays[-1].dtype if arrays[-1].dtype == jnp.bfloat16 else jnp.result_type(*arrays)
    reason = serves(dtype, corrected)
    if reason is not True:
        raise Unsupported(f"the Pallas kernels cannot serve here: {reason}")
    (B, T, _, R), (K, H) = arrays[0].shape, arrays[-1].shape[2:]
    kernels = ("corrected" if corrected else "states", "output", "dv", "dqk")
    plan = Plan.of(fit(chunk or scan_chunk(dtype, H), T), dtype, R, H, kernels, causal=causal, phi=phi)
    plan = plan.with_whole_rows(H) if whole_rows else plan
    ceil = lambda size, step: -(-size // step) * step
    length, R, H = (ceil(*pair) for pair in zip((T, R, H), (plan.chunk, *plan.widest), strict=True))
    if not corrected:  # what a delta rule adds to a state depends on the state
        plan = plan.in_segments(B * K, length, R, H)
        length = ceil(length, plan.chunk * plan.segments)
    if phi is not None and (R != arrays[0].shape[3] or not causal and length != T):  # the features of what is padded need not be 0; no query sees later keys
        arrays, plan = (*map(phi, arrays[:2]), arrays[2]), dataclasses.replace(plan, phi=None)
    return plan, [_in_segments(plan, pad(x.astype(dtype), {3: H if x is arrays[-1] else R}), length) for x in arrays]


def _cut(o, B: int, T: int, H: int):
    """[B, T, N, H], float32, of what is in segments and padded."""
    return o.reshape(B, -1, *o.shape[2:])[:, :T, :, :H].astype(jnp.float32)


def _running(plan: Plan, log_decay_BTK, length: int):
    """L, float32: the sums of the log decays within each chunk, of sequences of this length in segments, [B segments, K, T]."""
    # Of a decay that is a constant XLA would compute the sums while it compiles, for ten seconds and more.
    steps = _in_segments(plan, lax.optimization_barrier(log_decay_BTK.astype(jnp.float32)), length)
    L = jnp.cumsum(steps.reshape(len(steps), -1, plan.chunk, steps.shape[2]), axis=2)
    return L.reshape(steps.shape).swapaxes(1, 2)


def _in_segments(plan: Plan, x, length: int):
    """[B, T, ...], padded to this length, as sequences that are segments."""
    return pad(x, {1: length}).reshape(len(x) * plan.segments, -1, *x.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(plan: Plan, wanted: Wanted, q, k, v, L, w, per_row):
    """What is wanted, o [B, T, N, H] or (o, norm [B, N, T]), of arrays in whole chunks and tiles; L [B, K, T] is None without decay, w without a correction.

    v is U where there is w. per_row: the scale of a Norm, [segments, N, T], or what the denominators of a ratio are at least, [B, K, T], or None. Neither it nor,
    with a Norm, L has a gradient.
    """
    return _scan_fwd(plan, wanted, q, k, v, L, w, per_row)[0]


def _scan_fwd(plan, wanted, q, k, v, L, w, per_row):
    run = Run(plan, q, v)
    states, values = run.states(k, v, L, w, wanted != "first")
    o, norm = run.outputs(q, k, values, L, states, wanted, per_row)
    if wanted in ("both", "first"):
        return (o, norm) if wanted == "both" else o, (q, k, values, L, w, per_row, states, None, None)
    return o, (q, k, values, L, w, per_row, states if wanted == "ratio" else states._replace(totals=None), o, norm)


def _scan_bwd(plan, wanted, kept, cotangents):
    q, k, values, L, w, per_row, states, scaled, scale = kept
    run = Run(plan, q, values)
    do, dnorm = cotangents if wanted == "both" else (cotangents, None)
    if wanted == "ratio":
        dnorm = -jnp.sum(scaled.astype(jnp.float32) * do.astype(jnp.float32), axis=3).swapaxes(1, 2)
        if per_row is not None:  # none where the denominator was held, and is the inverse of `scale` but for rounding
            dnorm = jnp.where(scale * jnp.repeat(per_row, run.N // run.K, axis=1) > 1 - 1e-6, 0.0, dnorm)
    elif isinstance(wanted, Norm):
        do = run.unit_gradients(scaled, do, wanted)
    if w is None:
        dstates, _ = run.state_gradients(q, do, dnorm, scale, L)
        dv = run.dv(q, k, do, scale, L, dstates)
    else:
        dstates, dv = run.state_gradients(q, do, dnorm, scale, L, correction=(w, k, run.dv(q, k, do, scale, L, None)))
    dq, dk, dL, dw = run.dqk(q, k, values, do, dnorm, scale, L, states, dstates, None if w is None else dv, fixed=isinstance(wanted, Norm))
    return dq, dk, dv, dL, dw, None


_scan.defvjp(_scan_fwd, _scan_bwd)
