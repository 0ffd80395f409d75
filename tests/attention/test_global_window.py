"""Sliding window with global tokens: who sees whom is in test_more_patterns; here, the global tokens' own projections."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_zoo import make_attention

T, N, K, H, GLOBALS = 21, 4, 2, 8, 3


def make(causal=False, separate=True, seed=None, globals=GLOBALS):
    spec = f"global_window(window=2, globals={globals}, separate={separate})"
    attention = make_attention(spec, num_heads=N, num_kv_heads=K, head_dim=H, max_len=32, causal=causal)
    if seed is not None and globals:
        for name in ("query_map", "key_map", "value_map"):
            param = getattr(attention, name)
            param[...] = jax.random.normal(jax.random.key(seed), param[...].shape)
    return attention


def inputs(T=T, S=T):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, T, N, H), (2, S, K, H), (2, S, K, H))]


def test_separate_projections_start_as_the_common_ones():
    args = inputs()
    np.testing.assert_allclose(make()(*args), make(separate=False)(*args), rtol=0, atol=2e-6)


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_global_queries_use_their_own_projections_and_no_other_query_does(causal):
    q, k, v = inputs()
    attention, common = make(causal, seed=5), make(causal, separate=False)
    o = np.asarray(attention(q, k, v))
    np.testing.assert_array_equal(o[:, GLOBALS:], np.asarray(common(q, k, v))[:, GLOBALS:])
    maps = [np.asarray(m[...], np.float64) for m in (attention.query_map, attention.key_map, attention.value_map)]
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    for n in range(N):
        kv = n // (N // K)
        for i in range(GLOBALS):
            last = i + 1 if causal else T
            scores = (k[0, :last, kv] @ maps[1][kv]) @ (q[0, i, n] @ maps[0][n]) * H**-0.5
            np.testing.assert_allclose(o[0, i, n], softmax(scores) @ (v[0, :last, kv] @ maps[2][kv]), rtol=0, atol=5e-5)


@pytest.mark.parametrize("globals", [0, 3, 40], ids=["none", "some", "more than there are"])
def test_separate_equals_its_reference_for_any_number_of_global_tokens(globals):
    attention = make(seed=3, globals=globals)
    valid = jnp.asarray(np.random.default_rng(1).random((2, 30)) < 0.8)
    args = inputs(T, 30)
    np.testing.assert_allclose(attention(*args, valid_BS=valid), attention.reference(*args, valid_BS=valid), rtol=0, atol=2e-5)


def test_flops_count_the_maps():
    plain, separate = (make(separate=x).flops(2, T, 30) for x in (False, True))
    assert separate - plain == 2 * 2 * N * H * H * (GLOBALS + 2 * 30)
