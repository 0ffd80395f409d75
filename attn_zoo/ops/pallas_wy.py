"""The triangular systems of a delta rule as Pallas kernels, for NVIDIA GPUs: W and U of all chunks at once. See ops.delta, and `wy_form` there.

With P = K K' of a chunk's keys, L = tril(diag(beta) P, -1) and A = inv(I + L),

    W = A diag(beta) K,    U = A diag(beta) V;

and backwards, with E = tril(dW K' + dU V') and the gradient of L, D = -tril(A' E diag(beta) A', -1),

    dK = diag(beta) A' dW + (diag(beta) D + D' diag(beta)) K,    dV = diag(beta) A' dU,    dbeta_t = sum_s A_st E_st + sum_s D_ts P_ts.

One program has one chunk of one head, and nothing is kept for the backward pass but the inputs. [c, c] matrices are lower triangular, in blocks: {(i, j): block}
for j <= i. L is inverted by substitution in its LEAST x LEAST blocks on the diagonal, and these are merged by products, exactly: inv [[A, 0], [X, B]] =
[[inv A, 0], [-inv B X inv A, inv B]]. (A series of its powers would end too, but with terms that float32 cannot subtract.)

Keys are rounded to the values' dtype before they overlap, as the recurrence between chunks multiplies by rounded ones too: the system solved is theirs. In
bfloat16, P and E are products of what is given, exact in float32; L, A and D are computed in float32, three of TF32 a product; and what they multiply
with keys, values and gradients goes as the sum of two bfloat16 numbers, which leaves W and U good to their own rounding. In float16 all but P and E, of one
TF32, and in float32 everything, are three of TF32.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from attn_zoo.ops.chunks import pad
from attn_zoo.ops.pallas_kernels import precision_of_float32, product
from attn_zoo.ops.pallas_linear import serves
from attn_zoo.ops.pallas_linear_kernels import Form, over_tiles, zeros
from attn_zoo.ops.pallas_scan import Plan, Run
from attn_zoo.ops.tuning import LEAST
from attn_zoo.spec import Unsupported

BLOCK = 32  # positions: with 16 four warps compute all products twice, with 64 those above the diagonal too


def chunk_solutions(
    k_BTKR: Float[Array, "B T K R"], v_BTKH: Float[Array, "B T K H"], beta_BTK: Float[Array, "B T K"], *, chunk: int
) -> tuple[Float[Array, "B T K R"], Float[Array, "B T K H"]]:
    """(W, U), in the dtype of v, to which k is rounded; beta is taken in float32.

    chunk: positions, a power of two of at least 16. Raises Unsupported, with the reason, for what pallas_linear.serves refuses.
    """
    (_, T, _, R), H, dtype = k_BTKR.shape, v_BTKH.shape[3], v_BTKH.dtype
    reason = serves(dtype, corrected=R)
    if reason is not True:
        raise Unsupported(f"the Pallas kernels cannot serve here: {reason}")
    plan = Plan.of(chunk, dtype, R, H, ("wy",))
    length, features, values = (-(-size // step) * step for size, step in zip((T, R, H), (chunk, *plan.widest)))
    k, v, beta = pad(k_BTKR.astype(dtype), {1: length, 3: features}), pad(v_BTKH, {1: length, 3: values}), pad(beta_BTK.astype(jnp.float32), {1: length})
    w, u = solve(plan, k, v, beta)
    return w[:, :T, :, :R], u[:, :T, :, :H]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def solve(plan: Plan, k, v, beta):
    """(W, U) of arrays in whole chunks and tiles."""
    inputs, outputs = [(k, "btnR"), (v, "btnH"), (beta, "btn")], [(plan.dtype, "btnR"), (plan.dtype, "btnH")]
    return Run(plan, k, v).call("wy", wy_kernel, inputs, outputs, k.shape[2], "i")


def _solve_fwd(plan, *inputs):
    return solve(plan, *inputs), inputs


def _solve_bwd(plan, inputs, cotangents):
    (k, v, beta), (dw, du) = inputs, cotangents
    inputs = [(k, "btnR"), (v, "btnH"), (beta, "btn"), (dw, "btnR"), (du, "btnH")]
    outputs = [(plan.dtype, "btnR"), (plan.dtype, "btnH"), (jnp.float32, "btn")]
    return Run(plan, k, v).call("wy", dwy_kernel, inputs, outputs, k.shape[2], "i")


solve.defvjp(_solve_fwd, _solve_bwd)


def wy_kernel(k_ref, v_ref, beta_ref, w_ref, u_ref, *, form: Form):
    """One chunk of one key head: W [c, R] and U [c, H], of k [c, R], v [c, H] and beta [c]."""
    rows = blocks_of(form.chunk)
    beta = [beta_ref[row] for row in rows]

    def overlap(tile, P):
        k = [k_ref[row, tile] for row in rows]
        return add_products(P, k, k, form)

    P = over_tiles(k_ref.shape[1], form.r_tile, overlap, zero_triangle(rows))
    A = {(i, j): block * beta[j][None, :] for (i, j), block in inverse(system(P, beta), form).items()}

    def write(x_ref, y_ref, tile, _):
        x = [x_ref[row, tile] for row in rows]
        for i, row in enumerate(rows):
            y_ref[row, tile] = sum(dot_fine(A[i, j], x[j], 1, form) for j in range(i + 1)).astype(y_ref.dtype)
        return ()

    over_tiles(k_ref.shape[1], form.r_tile, functools.partial(write, k_ref, w_ref), ())
    unrolled(v_ref.shape[1], form.h_tile, functools.partial(write, v_ref, u_ref), ())


def dwy_kernel(k_ref, v_ref, beta_ref, dw_ref, du_ref, dk_ref, dv_ref, dbeta_ref, *, form: Form):
    """One chunk of one key head: dk [c, R], dv [c, H] and dbeta [c], of the inputs of wy_kernel and dW [c, R], dU [c, H]."""
    rows = blocks_of(form.chunk)
    n, beta = len(rows), [beta_ref[row] for row in rows]

    def of_keys(tile, carry):
        k, dw = ([ref[row, tile] for row in rows] for ref in (k_ref, dw_ref))
        return add_products(carry[0], k, k, form), add_products(carry[1], dw, k, form)

    def of_values(tile, E):
        v, du = ([ref[row, tile] for row in rows] for ref in (v_ref, du_ref))
        return add_products(E, du, v, form)

    P, E = over_tiles(k_ref.shape[1], form.r_tile, of_keys, (zero_triangle(rows), zero_triangle(rows)))
    E = below(unrolled(v_ref.shape[1], form.h_tile, of_values, E), 0)
    A = inverse(system(P, beta), form)
    scaled = {(i, j): E[i, j] * beta[j][None, :] for i, j in E}
    turned = {(i, j): sum(dot_float32(scaled[i, l], A[j, l], 1, 1, form) for l in range(j + 1)) for i, j in E}  # of E diag(beta) A', what D has a use for
    D = below({(i, j): -sum(dot_float32(A[l, i], turned[l, j], 0, 0, form) for l in range(i, n)) for i, j in E}, 1)
    for t, row in enumerate(rows):
        dbeta_ref[row] = sum(jnp.sum(A[s, t] * E[s, t], axis=0) for s in range(t, n)) + sum(jnp.sum(D[t, s] * P[t, s], axis=1) for s in range(t + 1))
    A, dP = {(i, j): A[i, j] * beta[j][None, :] for i, j in A}, {(i, j): D[i, j] * beta[i][:, None] for i, j in D}
    diagonal = [dP[i, i] + dP[i, i].T for i in range(n)]

    def write_keys(t, tile, _):
        k, dw = ([ref[row, tile] for row in rows] for ref in (k_ref, dw_ref))
        dk = sum(dot_fine(A[s, t], dw[s], 0, form) for s in range(t, n)) + dot_fine(diagonal[t], k[t], 1, form)
        dk += sum(dot_fine(dP[t, s], k[s], 1, form) for s in range(t)) + sum(dot_fine(dP[s, t], k[s], 0, form) for s in range(t + 1, n))
        dk_ref[rows[t], tile] = dk.astype(dk_ref.dtype)
        return ()

    def write_values(t, tile, _):
        du = [du_ref[row, tile] for row in rows]
        dv_ref[rows[t], tile] = sum(dot_fine(A[s, t], du[s], 0, form) for s in range(t, n)).astype(dv_ref.dtype)
        return ()

    for t in range(n):  # one by one, as the factors of all blocks at once would not fit into registers
        over_tiles(k_ref.shape[1], form.r_tile, functools.partial(write_keys, t), ())
        unrolled(v_ref.shape[1], form.h_tile, functools.partial(write_values, t), ())


def blocks_of(chunk: int):
    """The positions of each block."""
    size = min(BLOCK, chunk)
    return [pl.ds(start, size) for start in range(0, chunk, size)]


def zero_triangle(rows):
    return {(i, j): zeros(rows[i].size, rows[j].size) for i in range(len(rows)) for j in range(i + 1)}


def add_products(total, a, b, form: Form):
    """total + a b', of rows in the inputs' dtype."""
    return {(i, j): block + form.dot(a[i], b[j], 1, 1) for (i, j), block in total.items()}


def below(blocks, least: int):
    """With zeros but where the row is at least so much after the column, 0 or 1."""
    down, along = (lax.broadcasted_iota(jnp.int32, blocks[0, 0].shape, axis) for axis in (0, 1))
    return {(i, j): jnp.where(down >= along + least, block, 0.0) if i == j else block for (i, j), block in blocks.items()}


def system(P, beta):
    """L."""
    return {(i, j): block * beta[i][:, None] for (i, j), block in below(P, 1).items()}


def inverse(L, form: Form):
    """A. Of blocks below the diagonal, A_ij = -A_ii sum_{j <= l < i} L_il A_lj."""
    n = max(i for i, _ in L) + 1
    A = {(i, i): block for i, block in enumerate(diagonal_inverses([L[i, i] for i in range(n)], form))}
    for i in range(n):
        for j in range(i):
            A[i, j] = -dot_float32(A[i, i], sum(dot_float32(L[i, l], A[l, j], 1, 0, form) for l in range(j, i)), 1, 0, form)
    return A


def diagonal_inverses(blocks, form: Form):
    """inv(I + L) of each of these blocks of L."""
    down, along = (lax.broadcasted_iota(jnp.int32, blocks[0].shape, axis) for axis in (0, 1))
    near = down // LEAST == along // LEAST

    def substitute(n, inverses):
        """Row n of every small block is done: the rows after it take it away as often as they hold it."""

        def taken(L, A):
            column = jnp.sum(jnp.where(near & (along % LEAST == n), L, 0.0), axis=1)
            row = jnp.sum(jnp.where(down % LEAST == n, A, 0.0), axis=0)
            return jnp.where(near, column[:, None] * row[None, :], 0.0)

        return [A - taken(L, A) for L, A in zip(blocks, inverses)]

    inverses = lax.fori_loop(0, LEAST - 1, substitute, [jnp.where(down == along, 1.0, 0.0) for _ in blocks])
    size = LEAST
    while size < len(blocks[0]):
        corner = (down // size == along // size + 1) & (along // size % 2 == 0)
        inverses = [A - dot_float32(dot_float32(A, jnp.where(corner, L, 0.0), 1, 0, form), A, 1, 0, form) for L, A in zip(blocks, inverses)]
        size *= 2
    return inverses


def dot_float32(a, b, a_axis: int, b_axis: int, form: Form):
    """The product of two float32 matrices over these axes."""
    return product(a, b, a_axis, b_axis, precision_of_float32(form.interpret))


def dot_fine(a, x, a_axis: int, form: Form):
    """The product of a float32 matrix, over this axis, and rows x in the inputs' dtype."""
    if form.dtype != jnp.bfloat16:
        return dot_float32(a, x.astype(jnp.float32), a_axis, 0, form)
    coarse = a.astype(jnp.bfloat16)
    return form.dot(coarse, x, a_axis, 0) + form.dot(a - coarse.astype(jnp.float32), x, a_axis, 0)


def unrolled(size: int, tile: int, body, carry):
    """As over_tiles, without a loop: where there is one over values, the compiler has all warps multiply small blocks twice, and spills."""
    for start in range(0, size, tile):
        carry = body(pl.ds(start, tile), carry)
    return carry
