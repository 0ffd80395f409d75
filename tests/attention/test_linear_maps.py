"""The feature maps of linear attention against the dense formulas of their papers, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_zoo import UserError, make_attention
from attn_zoo.attention.linear import FEATURE_MAPS

N, K, H, L = 4, 2, 6, 40  # L is max_len

MAPS = {
    "elu": "linear",
    "relu": "linear(feature_map='relu')",
    "dpfp": "linear(feature_map='dpfp')",
    "dpfp-3": "linear(feature_map='dpfp', nu=3)",
    "cosformer": "linear(feature_map='cosformer')",
}


def make(name, causal=False, K=K):
    return make_attention(MAPS[name], num_heads=N, num_kv_heads=K, head_dim=H, max_len=L, causal=causal)


def inputs(T, S):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, T, N, H), (2, S, K, H), (2, S, K, H))]


def relu(x):
    return np.maximum(x, 0)


def dpfp(x, nu):
    """phi_{i nu} = r([k, -k])_i r([k, -k])_{i - nu}, feature by feature."""
    r = [relu(x[..., i]) for i in range(H)] + [relu(-x[..., i]) for i in range(H)]
    return np.stack([r[i] * r[(i - shift) % (2 * H)] for shift in range(1, nu + 1) for i in range(2 * H)], axis=-1)


def similarity(name, q, k):
    """The weight of every pair of one head, [T, S]."""
    if name.startswith("dpfp"):
        nu = 3 if name == "dpfp-3" else 1
        return dpfp(q, nu) @ dpfp(k, nu).T
    if name == "elu":
        return np.where(q > 0, q + 1, np.exp(q)) @ np.where(k > 0, k + 1, np.exp(k)).T
    similar = relu(q) @ relu(k).T
    if name == "cosformer":
        similar = similar * np.cos(np.pi / 2 * (np.arange(len(q))[:, None] - np.arange(len(k))) / L)
    return similar


def dense(name, q, k, v, causal, valid):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    o = np.zeros(q.shape)
    for b in range(len(q)):
        for n in range(N):
            weights = similarity(name, q[b, :, n], k[b, :, n // (N // K)]) * valid[b]
            weights = np.tril(weights) if causal else weights
            total = weights.sum(axis=1, keepdims=True)
            o[b, :, n] = weights / np.where(total == 0, 1, total) @ v[b, :, n // (N // K)]
    return o


@pytest.mark.parametrize("T, S", [(33, 33), (20, 40)])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("name", MAPS)
def test_formula(name, causal, T, S):
    args = inputs(T, S)
    valid = np.random.default_rng(1).random((2, S)) > 0.2
    valid[1, :4] = False
    attention, expected = make(name, causal), dense(name, *args, causal, valid)
    for run in (attention, attention.reference):
        o = jax.jit(lambda *args: run(*args, valid_BS=jnp.asarray(valid)))(*args)
        np.testing.assert_allclose(o, expected, rtol=0, atol=1e-5)
    assert (o[1, :4] == 0).all() == causal


@pytest.mark.parametrize("name", ["dpfp", "cosformer"])
def test_gradients_equal_those_of_all_pairs(name):
    attention, args = make(name, causal=True), inputs(40, 40)
    args[0], args[1] = args[0] + 1.0, args[1] + 1.0  # no row without weight

    @jax.jit
    def both(args):
        pulls = [jax.vjp(run, *args) for run in (attention, attention.reference)]
        return [pull(jnp.cos(o)) for o, pull in pulls]

    for a, e in zip(*both(args), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=2e-5 * float(abs(e).max()))


@pytest.mark.parametrize("name", ["relu", "dpfp", "cosformer"])
def test_a_query_that_no_key_answers_gives_zeros(name):
    """Queries and keys on opposite sides of zero have no feature in common."""
    q, k, v = inputs(33, 33)
    o = make(name)(abs(q).at[:, 7].multiply(-1), -abs(k).at[0, 3].multiply(-1), v)
    assert (o[1, jnp.arange(33) != 7] == 0).all() and (o[0, jnp.arange(33) != 7] != 0).any()
    assert ((o[1, 7] != 0).all()) == (name == "dpfp"), "only dpfp has features of what is negative"


def test_cosformer_weighs_by_distance_over_max_len():
    """Equal keys: the weight of a pair falls as the cosine of its distance, whatever else is in the sequence."""
    attention = make_attention(MAPS["cosformer"], num_heads=1, head_dim=8, max_len=8)
    ones = jnp.ones((1, 8, 1, 8))
    o = attention(ones, ones, jnp.eye(8)[None, :, None])[0, :, 0]  # outputs are the weights
    expected = np.cos(np.pi / 2 * (np.arange(8)[:, None] - np.arange(8)) / 8)
    np.testing.assert_allclose(o, expected / expected.sum(axis=1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("name, R", [("elu", H), ("relu", H), ("dpfp", 2 * H), ("dpfp-3", 6 * H), ("cosformer", 2 * H)])
def test_flops_follow_the_features_and_the_heads(name, R):
    q, k, _ = inputs(20, 40)
    phi_q, _ = make(name).features(q, k, None)
    assert phi_q.shape[-1] == R
    assert make(name).flops(2, 20, 40) == 2 * 2 * (N * 20 + K * 40) * (R * H + R)
    attention = make(name, K=N)
    assert attention.flops(2, 20, 40) == attention.variant.flops(attention.options, 2, 20, 40, N, H, False)


def test_bf16_features_are_not_rounded_again():
    x = jnp.linspace(-3, 3, 4 * 2 * H).reshape(1, 4, 2, H).astype(jnp.bfloat16)
    for features in (lambda x: FEATURE_MAPS["dpfp"](x, nu=2), lambda x: FEATURE_MAPS["cosformer"](x, M=4)):
        assert features(x).dtype == jnp.float32
        np.testing.assert_array_equal(features(x), features(x.astype(jnp.float32)))


def test_nu_belongs_to_dpfp():
    with pytest.raises(UserError, match="nu=2: belongs to feature_map='dpfp', not to 'relu'"):
        make_attention("linear(feature_map='relu', nu=2)", num_heads=1, head_dim=4, max_len=8)
