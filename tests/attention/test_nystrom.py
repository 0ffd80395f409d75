"""Nyströmformer: its landmarks, its pseudo-inverse, the limit of many landmarks, and the convolution of values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import ON_CPU

from attn_zoo import Unsupported, UserError, make_attention
from attn_zoo.attention.nystrom import Options, kernel, nystrom_attention, pseudo_inverse, segment_means
from attn_zoo.ops import native

N, K, H = 4, 2, 8
BACKENDS = ("xla", pytest.param("native", marks=pytest.mark.skipif(ON_CPU != "native", reason=f"{native.library()}")))


def make(options="", **kwargs):
    return make_attention(f"nystrom({options})", num_heads=N, num_kv_heads=K, head_dim=H, max_len=64, rngs=nnx.Rngs(0), **kwargs)


def inputs(T, S=None, B=2, seed=0):
    rng = np.random.default_rng(seed)
    S = S or T
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H))]


@pytest.mark.parametrize("T, R", [(12, 4), (13, 4), (23, 5), (5, 8)])
def test_landmarks_are_means_of_the_valid_positions_of_near_equal_segments(T, R):
    rng = np.random.default_rng(0)
    x, valid = rng.normal(size=(2, T, N, H)), rng.random((2, T)) > 0.3
    valid[0, : -(-T // min(R, T))] = False  # a whole segment
    means, some = segment_means(jnp.asarray(x), jnp.asarray(valid), R)
    segments = [np.flatnonzero(np.arange(T) * min(R, T) // T == r) for r in range(min(R, T))]
    assert np.ptp([len(s) for s in segments]) <= 1 and means.shape == (2, len(segments), N, H)
    assert not some[0, 0] and (means[0, 0] == 0).all()
    for b in range(2):
        for r, segment in enumerate(segments):
            chosen = segment[valid[b, segment]]
            assert some[b, r] == (len(chosen) > 0)
            if len(chosen):
                np.testing.assert_allclose(means[b, r], x[b, chosen].mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pseudo_inverse_of_any_shape_and_rank(backend):
    """Of square, wide, tall and rank-deficient matrices, and with zero rows and columns, where masked landmarks stand."""
    rng = np.random.default_rng(0)
    square = rng.dirichlet(np.full(6, 0.3), size=6)
    low_rank = np.kron(np.array([[0.9, 0.1], [0.3, 0.7]]), np.full((3, 2), 0.5))
    masked = square.copy()
    masked[2], masked[:, [0, 4]] = 0, 0
    for A in (square, square[:4], square[:, :4], low_rank, masked, np.zeros((3, 3)), np.full((4, 4), 0.25)):
        Z = pseudo_inverse(jnp.asarray(A, jnp.float32), 12, backend)  # with many more, rounding would grow where the singular value is zero
        np.testing.assert_allclose(Z, np.linalg.pinv(A, rcond=1e-6), atol=3e-4 * max(1, abs(Z).max()))
    Z = np.asarray(pseudo_inverse(jnp.asarray(masked, jnp.float32), 6, backend))
    assert (Z[:, 2] == 0).all() and (Z[[0, 4]] == 0).all()


def test_the_iteration_is_of_third_order():
    """The paper's polynomial, worked out in e = 1 - A Z: e becomes (3 e^3 + e^4) / 4."""
    s = 0.7
    z, errors = s / (s * s + 0.3), []
    for _ in range(3):
        errors.append(1 - s * z)
        z = 0.25 * z * (13 - s * z * (15 - s * z * (7 - s * z)))
    for before, after in zip(errors, errors[1:]):
        assert after == pytest.approx((3 * before**3 + before**4) / 4, rel=1e-6, abs=1e-15)
    # The same through matrices: |diag(1, s)|_1 = 1, so that z starts at s.
    A = jnp.diag(jnp.array([1.0, s]))
    e = 1 - s * s
    for iterations in (1, 2):
        e = (3 * e**3 + e**4) / 4
        np.testing.assert_allclose(1 - s * pseudo_inverse(A, iterations)[1, 1], e, atol=1e-6)


def test_formula_with_the_true_pseudo_inverse():
    """Few landmarks and many iterations: F A^+ B V in float64, with masked keys and queries, a segment of each without valid positions."""
    T, R = 30, 5
    q, k, v = inputs(T)
    valid = np.random.default_rng(1).random((2, T)) > 0.3
    valid[1, 6:12] = False
    attention = make(f"landmarks={R}, iterations=25")
    o = attention(q, k, v, valid_BS=jnp.asarray(valid))
    q, k, v = (np.repeat(np.asarray(x, np.float64), N // x.shape[2], axis=2) for x in (q, k, v))
    softmax = lambda x: np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)
    for b in range(2):
        segments = [s[valid[b, s]] for s in np.arange(T).reshape(R, -1)]
        for n in range(N):
            q_n, k_n, v_n = q[b, :, n] / H**0.5, k[b, valid[b], n], v[b, valid[b], n]
            q_l, k_l = (np.array([x[s].mean(axis=0) for s in segments if len(s)]) for x in (q_n, k[b, :, n]))
            expected = softmax(q_n @ k_l.T) @ np.linalg.pinv(softmax(q_l @ k_l.T)) @ softmax(q_l @ k_n.T) @ v_n
            np.testing.assert_allclose(o[b, valid[b], n], expected[valid[b]], atol=2e-3 * abs(expected).max())


def full(q, k, v):
    return make_attention("full", num_heads=N, num_kv_heads=K, head_dim=H, max_len=64)(q, k, v)


def test_full_attention_is_the_limit_of_many_landmarks():
    """Before the switch to softmax attention: F A^+ B is A itself when all positions are landmarks, in gradients too.

    Queries twice as long make A less like a constant, whose inverse is rounding."""
    q, k, v = inputs(48, B=1, seed=1)
    q = 2 * q
    weights = jnp.asarray(np.random.default_rng(2).normal(size=q.shape), jnp.float32)
    nystrom = lambda q, k, v: nystrom_attention(q, k, v, None, None, Options(landmarks=48, iterations=20))
    np.testing.assert_allclose(nystrom(q, k, v), full(q, k, v), atol=1e-4)
    gradients = lambda f: jax.jit(jax.grad(lambda *x: (f(*x) * weights).sum(), (0, 1, 2)))(q, k, v)
    for actual, expected in zip(gradients(nystrom), gradients(full)):
        np.testing.assert_allclose(actual, expected, atol=2e-3 * abs(expected).max())


@pytest.mark.parametrize("T, S, is_full", [(12, 12, True), (13, 13, False), (9, 12, True), (9, 13, False)])
def test_short_sequences_have_softmax_attention(T, S, is_full):
    args = inputs(T, S)
    error = abs(make("landmarks=12")(*args) - full(*args)).max()
    assert error == 0 if is_full else error > 1e-3


def test_queries_and_keys_of_two_lengths_have_landmarks_of_their_own():
    attention, args = make("landmarks=12"), inputs(9, 40)
    np.testing.assert_allclose(attention(*args), attention.reference(*args), atol=3e-6)


@pytest.mark.parametrize("taps", [1, 5, 33])
def test_convolution_of_values(taps):
    """Added to the output, one filter a head, centred, zero beyond the ends and at invalid positions; the same in the slow form."""
    T = 21
    q, k, v = inputs(T)
    valid = np.random.default_rng(1).random((2, T)) > 0.3
    plain, attention = make("landmarks=5"), make(f"landmarks=5, residual_kernel={taps}")
    assert attention.taps.shape == (N, taps) and abs(attention.taps[...]).max() <= taps**-0.5
    added = attention(q, k, v, valid_BS=jnp.asarray(valid)) - plain(q, k, v, valid_BS=jnp.asarray(valid))
    padded = np.pad(np.where(valid[..., None, None], v, 0), ((0, 0), (taps // 2, taps // 2), (0, 0), (0, 0)))
    weights = np.asarray(attention.taps[...])
    for n in range(N):
        expected = sum(weights[n, w] * padded[:, w : w + T, n // (N // K)] for w in range(taps))
        np.testing.assert_allclose(added[:, :, n], expected, atol=1e-5)
    np.testing.assert_allclose(attention(q, k, v), attention.reference(q, k, v), atol=1e-5)
    gradient = jax.grad(lambda taps: nnx.merge(*nnx.split(attention)[:1], {"taps": taps})(q, k, v).sum())(attention.taps)
    assert (np.asarray(jax.tree.leaves(gradient)[0]) != 0).all()
    with pytest.raises(Unsupported, match="T=9 must equal S=21"):
        attention(*inputs(9, 21))


def test_a_row_of_the_kernels_sums_to_one_over_visible_landmarks():
    q, k, _ = inputs(6)
    rows, columns = jnp.array([[True] * 4 + [False] * 2] * 2), jnp.array([[False] + [True] * 5] * 2)
    F = kernel(q, jnp.repeat(k, 2, axis=2), rows, columns)
    np.testing.assert_allclose(F.sum(axis=-1), np.broadcast_to(rows[:, None], F.shape[:3]), atol=1e-6)
    assert (F[..., 0] == 0).all()


def test_flops():
    B, T, R = 3, 64, 8
    assert make(f"landmarks={R}").flops(B, T, T) == B * N * (8 * T * R * H + 4 * R * R * H + 6 * 4 * 2 * R**3)
    assert make("landmarks=64").flops(B, T, T) == 4 * B * N * T * T * H
    assert make(f"landmarks={R}, residual_kernel=5").flops(B, T, T) - make(f"landmarks={R}").flops(B, T, T) == 2 * B * N * T * H * 5


@pytest.mark.parametrize("options, message", [("residual_kernel=4", "must be odd"), ("landmarks=0", "at least 1"), ("iterations=0", "at least 1")])
def test_mistakes(options, message):
    with pytest.raises(UserError, match=message):
        make(options)
