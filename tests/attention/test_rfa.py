"""Random feature attention: its kernel, its gate, and denominators that an estimate lets vanish."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_zoo import Unsupported, make_attention
from attn_zoo.attention.rfa import FLOOR, random_features

T, N, H = 24, 2, 8


def make(features=32, gate=False, redraw=False, causal=True, N=N, K=None):
    spec = f"rfa(features={features}, gate={gate}, redraw={redraw})"
    return make_attention(spec, num_heads=N, num_kv_heads=K, head_dim=H, max_len=64, causal=causal, rngs=nnx.Rngs(1))


def inputs(N=N, K=N, T=T):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(2, T, heads, H)), jnp.float32) for heads in (N, K, K)]


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_the_kernel_is_that_of_unit_vectors(sigma):
    """phi(x)'phi(y) estimates exp(-sigma^2 |x - y|^2 / 2) = exp(sigma^2 (x'y - 1)), whatever the lengths of x and y."""
    q, k, _ = inputs()
    w_NRH = sigma * jax.random.normal(jax.random.key(0), (N, 20_000, H))
    phi_q, phi_k = (random_features(x, w_NRH) for x in (3 * q, k / 3))
    expected = jnp.exp(sigma**2 * (jnp.einsum("BTNH,BSNH->BNTS", unit(q), unit(k)) - 1))
    np.testing.assert_allclose(jnp.einsum("BTNR,BSNR->BNTS", phi_q, phi_k), expected, atol=0.03)


def test_the_error_falls_as_one_over_the_root_of_the_features():
    q, k = (unit(x)[:1, :, :1] for x in inputs()[:2])
    exact = jnp.exp(jnp.einsum("BTNH,BSNH->BNTS", q, k) - 1)

    @jax.jit
    def square_error(w_NRH):
        """Over twenty draws, as twenty heads."""
        phi_q, phi_k = (random_features(jnp.repeat(x, 20, axis=2), w_NRH) for x in (q, k))
        return jnp.square(jnp.einsum("BTNR,BSNR->BNTS", phi_q, phi_k) - exact).mean()

    counts = (16, 128, 1024)
    errors = [np.sqrt(square_error(jax.random.normal(jax.random.key(R), (20, R, H)))) for R in counts]
    assert np.polyfit(np.log(counts), np.log(errors), 1)[0] == pytest.approx(-0.5, abs=0.1)


def test_sigma_is_learned_and_sharpens():
    """A larger sigma is a lower temperature: more of the weight goes to the key that is the query itself."""
    attention, (_, k, _) = make(features=64, causal=False), inputs(T=H)
    v = jnp.broadcast_to(jnp.eye(H)[None, :, None], (2, H, N, H))  # outputs are the weights
    own = []
    for sigma in (0.5, 1.0, 2.0):
        attention.sigma[...] = jnp.full((N, H), sigma)
        own.append(np.einsum("BTNT->", np.asarray(attention(k, k, v))) / (2 * H * N))
    assert own[0] < own[1] < own[2]
    assert {path[0] for path, _ in nnx.to_flat_state(nnx.state(attention, nnx.Param))} == {"sigma"}


def recurrence(attention, q, k, v, valid):
    """S_t and z_t one position at a time, float64, on the features of the layer."""
    phi_q, phi_k = (np.asarray(x, np.float64) for x in attention.features(q, k, None, None))
    v, w, b = (np.asarray(x, np.float64) for x in (v, attention.gate_kernel[...], attention.gate_bias[...]))
    S, z, o = np.zeros((2, N, phi_k.shape[-1], H)), np.zeros((2, N, phi_k.shape[-1])), np.zeros(v.shape)
    for t in range(T):
        g = 1 / (1 + np.exp(-(np.einsum("BNH,NH->BN", np.asarray(k[:, t], np.float64), w) + b)))
        g_S, g_z = np.where(valid[:, t, None], g, 1)[..., None, None], np.where(valid[:, t, None], g, 1)[..., None]
        S = g_S * S + (1 - g_S) * phi_k[:, t, :, :, None] * v[:, t, :, None]
        z = g_z * z + (1 - g_z) * phi_k[:, t]
        norm = np.einsum("BNR,BNR->BN", phi_q[:, t], z)[..., None]
        o[:, t] = np.einsum("BNR,BNRH->BNH", phi_q[:, t], S) / np.where(norm == 0, 1, norm)
    return o


def test_the_gate_is_the_recurrence():
    attention, (q, k, v) = make(gate=True, features=128), inputs()
    valid = np.random.default_rng(1).random((2, T)) > 0.2
    valid[1, :3] = False
    o = jax.jit(attention)(q, k, v, valid_BS=jnp.asarray(valid))
    np.testing.assert_allclose(o, recurrence(attention, q, k, v, valid), atol=2e-5)
    assert (o[1, :3] == 0).all()


def results(attention, args, valid=None, reference=False):
    """(output, gradients with respect to q, k, v and parameters)."""
    graph, params, rest = nnx.split(attention, nnx.Param, ...)

    def run(q, k, v, params):
        attention = nnx.merge(graph, params, rest)
        return (attention.reference if reference else attention)(q, k, v, valid_BS=valid)

    @jax.jit
    def both(*args):
        o, pull = jax.vjp(run, *args)
        return o, pull(jnp.cos(jnp.arange(o.size, dtype=jnp.float32)).reshape(o.shape))

    return jax.tree.leaves(both(*args, params))


def test_the_gate_in_chunks_equals_the_dense_form_with_its_gradients():
    """The registry's gates test the default options, without a gate."""
    T = 150  # more than a chunk
    attention = make_attention("rfa(features=16, gate=True)", num_heads=4, num_kv_heads=2, head_dim=H, max_len=T, causal=True)
    args, valid = inputs(4, 2, T), jnp.asarray(np.random.default_rng(1).random((2, T)) > 0.2)
    for a, e in zip(*(results(attention, args, valid, reference) for reference in (False, True)), strict=True):
        # Gradients by the gate's bias sum those by all log decays, each a running sum of what rounding left in the others: see _sums_bwd.
        np.testing.assert_allclose(a, e, rtol=0, atol=3e-5 * max(1.0, float(abs(e).max())))


def test_a_saturated_gate_keeps_gradients_finite():
    """One head writes nothing at all, the other forgets everything at once."""
    attention, (q, k, v) = make(gate=True), inputs()
    attention.gate_kernel[...] = jnp.full((N, H), 300.0).at[1].multiply(-1)
    assert all(np.isfinite(np.asarray(x)).all() for x in results(attention, (q, abs(k), v)))


def test_a_gate_near_one_forgets_nothing():
    """With all gates alike and close to 1 every visible key weighs the same: the layer without a gate."""
    gated, plain, (q, k, v) = make(gate=True), make(), inputs()
    gated.gate_kernel[...] = jnp.zeros((N, H))
    gated.gate_bias[...] = jnp.full((N,), 9.0)
    plain.directions[...] = gated.directions[...]
    np.testing.assert_allclose(jax.jit(gated)(q, k, v), jax.jit(plain)(q, k, v), atol=2e-2)


@pytest.mark.parametrize("gate", [False, True])
def test_outputs_are_bounded_where_the_denominator_vanishes(gate):
    """One direction of large sigma: kernel values cos(w'(q - k)) of either sign, whose sum may be anything down to below zero."""
    attention, (q, k, v) = make(features=1, gate=gate), inputs()
    attention.sigma[...] = jnp.full((N, H), 5.0)
    phi_q, phi_k = attention.features(q, k, None, None)
    assert (jnp.tril(jnp.einsum("BTNR,BSNR->BNTS", phi_q, phi_k)).sum(axis=-1) < 0).any()
    o, *gradients = results(attention, (q, k, v))
    assert abs(o).max() <= abs(v).max() / FLOOR and all(np.isfinite(np.asarray(x)).all() for x in gradients)


def test_new_directions_are_drawn_in_training_only_and_kept():
    attention, (q, k, v) = make(redraw=True, causal=False), inputs()
    o = attention(q, k, v)
    trained = attention(q, k, v, key=jax.random.key(1))
    assert (trained != o).any()
    np.testing.assert_allclose(attention(q, k, v), trained, atol=1e-6)
    assert (make().features(q, k, None, jax.random.key(1))[0] == make().features(q, k, None, None)[0]).all()


def test_a_gate_is_causal_and_of_one_sequence():
    with pytest.raises(Unsupported, match="gate=True.* causal only"):
        make(gate=True, causal=False)
    q, k, v = inputs()
    with pytest.raises(Unsupported, match="gate=True.* one sequence"):
        make(gate=True)(q[:, :5], k, v)
    assert jax.eval_shape(make(), q[:, :5], k, v).shape == (2, 5, N, H)
