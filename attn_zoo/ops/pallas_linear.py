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

from attn_zoo.ops.pallas_scan import Plan, Run, pad
from attn_zoo.ops.tuning import fit, scan_chunk
from attn_zoo.spec import Unsupported

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
MOST_CORRECTED = 256  # features of a delta rule, whose programs hold all of them at once: with 512, compiled ones spill a kilobyte a thread
Wanted = Literal["both", "first", "ratio"]  # of the two sums, with values and with 1 for them


def serves(dtype, corrected: int = 0) -> bool | str:
    """Whether the kernels can compute this, whatever the device; else the reason why not. corrected: the features of a delta rule, 0 for the rest."""
    if jnp.dtype(dtype) not in DTYPES:
        return f"it takes bfloat16, float16 or float32, not {jnp.dtype(dtype).name}"
    return corrected <= MOST_CORRECTED or f"the features of a delta rule must be at most {MOST_CORRECTED}, not {corrected}"


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
    L = None
    if log_decay_BTK is not None:
        # Of a decay that is a constant XLA would compute the sums while it compiles, for ten seconds and more.
        steps = lax.optimization_barrier(pad(log_decay_BTK.astype(jnp.float32), {1: plan.segments * v.shape[1]})).reshape(len(v), -1, plan.chunk, v.shape[2])
        L = jnp.moveaxis(jnp.cumsum(steps, axis=2).reshape(*v.shape[:2], -1), 1, 2)
    o, norm = _scan(plan, "both", q, k, v, L, None)
    (B, T, N, _), H = q_BTNR.shape, v_BTKH.shape[3]
    return _cut(o, B, T, H), norm.swapaxes(1, 2).reshape(B, -1, N)[:, :T]


def pallas_kernel_attention(
    q_BTNR: Float[Array, "B T N R"],
    k_BTKR: Float[Array, "B T K R"],
    v_BTKH: Float[Array, "B T K H"],
    *,
    causal: bool,
    phi: Callable[[Array], Array] | None = None,
) -> Float[Array, "B T N H"]:
    """The first of the sums above over the second, float32, without decay; zeros where that is zero or subnormal. See ops.linear.

    phi, a function of single numbers that JAX differentiates, is applied to q and k in the kernels, which then read them in the dtype that `pallas_sums` has for
    features. The quotient of bfloat16 values is rounded to bfloat16 once. Raises Unsupported as above.
    """
    plan, (q, k, v) = _whole(None, q_BTNR, k_BTKR, v_BTKH, causal=causal, phi=phi)
    return _cut(_scan(plan, "ratio", q, k, v, None, None), *q_BTNR.shape[:2], v_BTKH.shape[3])


def corrected_sums(
    q_BTNR: Float[Array, "B T N R"], k_BTKR: Float[Array, "B T K R"], w_BTKR: Float[Array, "B T K R"], u_BTKH: Float[Array, "B T K H"], *, chunk: int
) -> Float[Array, "B T N H"]:
    """sum_{j <= t} (q_t'k_j) x_j, float32, with x = u - w'S, S the state before each chunk. See ops.delta, and `wy_form` there.

    chunk: positions, a power of two of at least 16. Raises Unsupported, with the reason, for what `serves` refuses.
    """
    plan, (q, k, w, u) = _whole(chunk, q_BTNR, k_BTKR, w_BTKR, u_BTKH, corrected=k_BTKR.shape[3])
    return _cut(_scan(plan, "first", q, k, u, None, w), *q_BTNR.shape[:2], u_BTKH.shape[3])


def _whole(chunk: int | None, *arrays, corrected: int = 0, causal: bool = True, phi=None):
    """(plan, arrays): in one dtype, bfloat16 if the values are, in whole chunks and tiles, and in segments, of which each is a sequence of the batch.

    The first arrays are [..., R], the last one [..., H]. None: the tuned chunk.
    """
    dtype = arrays[-1].dtype if arrays[-1].dtype == jnp.bfloat16 else jnp.result_type(*arrays)
    reason = serves(dtype, corrected)
    if reason is not True:
        raise Unsupported(f"the Pallas kernels cannot serve here: {reason}")
    (B, T, _, R), (K, H) = arrays[0].shape, arrays[-1].shape[2:]
    kernels = ("corrected" if corrected else "states", "output", "dv", "dqk")
    plan = Plan.of(fit(chunk or scan_chunk(dtype, H), T), dtype, R, H, kernels, causal=causal, phi=phi)
    ceil = lambda size, step: -(-size // step) * step
    length, R, H = (ceil(*pair) for pair in zip((T, R, H), (plan.chunk, *plan.widest), strict=True))
    if not corrected:  # what a delta rule adds to a state depends on the state
        plan = plan.in_segments(B * K, length, R, H)
        length = ceil(length, plan.chunk * plan.segments)
    if phi is not None and (R != arrays[0].shape[3] or not causal and length != T):  # the features of what is padded need not be 0; no query sees later keys
        arrays, plan = (*map(phi, arrays[:2]), arrays[2]), dataclasses.replace(plan, phi=None)
    arrays = [pad(x.astype(dtype), {1: length, 3: H if x is arrays[-1] else R}) for x in arrays]
    return plan, [x.reshape(B * plan.segments, length // plan.segments, *x.shape[2:]) for x in arrays]


def _cut(o, B: int, T: int, H: int):
    """[B, T, N, H], float32, of what is in segments and padded."""
    return o.reshape(B, -1, *o.shape[2:])[:, :T, :, :H].astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(plan: Plan, wanted: Wanted, q, k, v, L, w):
    """What is wanted, o [B, T, N, H] or (o, norm [B, N, T]), of arrays in whole chunks and tiles; L [B, K, T] is None without decay, w without a correction.

    v is U where there is w.
    """
    return _scan_fwd(plan, wanted, q, k, v, L, w)[0]


def _scan_fwd(plan, wanted, q, k, v, L, w):
    run = Run(plan, q, v)
    states, values = run.states(k, v, L, w, wanted != "first")
    o, norm = run.outputs(q, k, values, L, states, wanted == "ratio")
    ratio, inverse = (o, norm) if wanted == "ratio" else (None, None)
    return (o, norm) if wanted == "both" else o, (q, k, values, L, w, states, ratio, inverse)


def _scan_bwd(plan, wanted, kept, cotangents):
    q, k, values, L, w, states, ratio, scale = kept
    run = Run(plan, q, values)
    do, dnorm = cotangents if wanted == "both" else (cotangents, None)
    if wanted == "ratio":
        dnorm = -jnp.sum(ratio.astype(jnp.float32) * do.astype(jnp.float32), axis=3).swapaxes(1, 2)
    if w is None:
        dstates, _ = run.state_gradients(q, do, dnorm, scale, L)
        dv = run.dv(q, k, do, scale, L, dstates)
    else:
        dstates, dv = run.state_gradients(q, do, dnorm, scale, L, correction=(w, k, run.dv(q, k, do, scale, L, None)))
    dq, dk, dL, dw = run.dqk(q, k, values, do, dnorm, scale, L, states, dstates, None if w is None else dv)
    return dq, dk, dv, dL, dw


_scan.defvjp(_scan_fwd, _scan_bwd)
