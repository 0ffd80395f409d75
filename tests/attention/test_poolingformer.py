"""Poolingformer: which slots are seen, how they are pooled, and that the levels are added."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_zoo import UserError, make_attention
from attn_zoo.attention.poolingformer import Options, num_slots, pool_slots, slot_pattern
from attn_zoo.ops import backends

T, N, K, H = 30, 4, 2, 8


def make(causal=False, **options):
    text = ", ".join(f"{k}={v!r}" for k, v in options.items())
    return make_attention(f"poolingformer({text})", num_heads=N, num_kv_heads=K, head_dim=H, max_len=T, causal=causal, rngs=nnx.Rngs(0))


def inputs():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(2, T, heads, H)), jnp.float32) for heads in (N, K, K)]


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("second, kernel, stride", [(8, 5, 4), (6, 3, 3), (9, 4, 1)])
def test_slots_are_seen_by_their_middle_and_causally_by_their_end(causal, second, kernel, stride):
    options = Options(second=second, kernel=kernel, stride=stride)
    seen = slot_pattern(options, causal).mask(np.arange(T)[:, None], np.arange(num_slots(options, T))[None, :])
    for i in range(T):
        for c in range(num_slots(options, T)):
            middle, end = c * stride + kernel // 2, c * stride + kernel - 1
            assert seen[i, c] == (i - middle <= second and end <= i if causal else abs(i - middle) <= second)


def test_every_position_is_in_a_slot():
    for kernel, stride, S in ((5, 4, 30), (3, 3, 31), (4, 1, 2), (5, 4, 5)):
        options = Options(kernel=kernel, stride=stride)
        covered = {c * stride + p for c in range(num_slots(options, S)) for p in range(kernel)}
        assert covered >= set(range(S)) and (num_slots(options, S) - 1) * stride < S


@pytest.mark.parametrize("pool", ["mean", "max", "ldconv"])
def test_pooling_is_over_the_valid_positions(pool):
    x = np.random.default_rng(0).normal(size=(1, 13, K, H)).astype(np.float32)
    valid = np.array([[True] * 6 + [False] * 3 + [True] * 4])
    field = 4 * np.arange(3)[:, None] + np.arange(5)
    W = np.random.default_rng(1).normal(size=(K, H, 5))
    found = pool_slots(jnp.asarray(x), jnp.asarray(valid)[:, field], field, pool, jnp.asarray(W, jnp.float32))
    for c in range(3):
        for h in range(K):
            members = [p for p in range(5) if valid[0, 4 * c + p]]
            rows = x[0, 4 * c + np.array(members), h]
            logits = (x[0, 4 * c + 2, h] @ W[h])[members] if pool == "ldconv" else np.zeros(len(members))
            share = np.exp(logits) / np.exp(logits).sum()
            np.testing.assert_allclose(found[0, c, h], rows.max(0) if pool == "max" else share @ rows, atol=1e-5)


def test_ldconv_starts_as_the_mean_and_learns():
    args = inputs()
    options = dict(window=2, second=12, kernel=5, stride=4)
    ldconv, mean = make(pool="ldconv", **options), make(pool="mean", **options)
    np.testing.assert_allclose(ldconv(*args), mean(*args), atol=2e-6)
    graph, params, rest = nnx.split(ldconv, nnx.Param, ...)
    gradients = jax.tree.leaves(jax.grad(lambda params: jnp.square(nnx.merge(graph, params, rest)(*args)).sum())(params))
    assert len(gradients) == 2 and all((g != 0).any() for g in gradients)


def test_the_levels_are_added():
    args = inputs()
    both, near = make(window=2, second=12, pool="mean"), make(window=2, second=0)
    pooled_k, pooled_v, _ = both.pooled(args[1], args[2], None)
    mask = slot_pattern(both.options, False).mask(np.arange(T)[:, None], np.arange(pooled_k.shape[1]))
    k, v = (np.repeat(np.asarray(x), N // K, axis=2) for x in (pooled_k, pooled_v))
    scores = np.where(mask, np.einsum("btnh,bsnh->bnts", np.asarray(args[0]), k) / np.sqrt(H), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    far = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(both(*args) - near(*args), far, atol=3e-6)


def test_each_level_has_the_backend_that_serves_it(monkeypatch):
    """cuDNN knows the causal window, and not the slots."""
    monkeypatch.setattr(backends, "_compute_capability", lambda: 9.0)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    attention = make_attention("poolingformer", num_heads=2, head_dim=64, max_len=1024, causal=True, dtype=jnp.bfloat16)
    plan = attention.plan(1024, 1024)
    assert attention.backend() == plan["backend"] == "cudnn + pallas" and plan["second"]["backend"] == "pallas"
    assert attention.backend(masked=True) == "pallas"
    forced = make_attention("poolingformer", num_heads=2, head_dim=64, max_len=1024, causal=True, dtype=jnp.bfloat16, backend="cudnn")
    with pytest.raises(UserError, match="cudnn' cannot serve here"):
        forced.backend()
