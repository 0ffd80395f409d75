"""Linformer: its formula, which projections are shared, and lengths below max_len."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_zoo import Unsupported, config, make_attention
from attn_zoo.attention import parse_variant
from attn_zoo.models import Transformer
from attn_zoo.models.transformer import param_counts

R, L, N, K, H = 5, 24, 4, 2, 8
SHARE = ("none", "heads", "kv", "layers")


def make(share="heads", max_len=L, seed=0, shared=None, rank=R, N=N, K=K, **kwargs):
    spec = f"linformer(rank={rank}, share={share!r})"
    return make_attention(spec, num_heads=N, num_kv_heads=K, head_dim=H, max_len=max_len, shared=shared, rngs=nnx.Rngs(seed), **kwargs)


def inputs(T, S, B=2, N=N, K=K):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H))]


def projections(attention):
    return np.asarray(attention.key_projection[...], np.float64), np.asarray(attention.value_projection[...], np.float64)


def by_definition(attention, q, k, v, valid):
    """softmax(q (E k)' / sqrt(H)) F v, head by head, in float64, with zeros for what is not valid."""
    E, F = projections(attention)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    o, S = np.zeros(q.shape), k.shape[1]
    for b in range(q.shape[0]):
        for n in range(q.shape[2]):
            kv_head = n // (q.shape[2] // k.shape[2])
            E_n, F_n = (x[kv_head if len(x) > 1 else 0, :, :S] * valid[b] for x in (E, F))
            scores = q[b, :, n] @ (E_n @ k[b, :, kv_head]).T / np.sqrt(H)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            o[b, :, n] = weights / weights.sum(axis=1, keepdims=True) @ (F_n @ v[b, :, kv_head])
    return o


@pytest.mark.parametrize("share", SHARE)
def test_formula(share):
    """Over queries and keys of different lengths, both below max_len, with holes in the keys."""
    attention, (q, k, v) = make(share), inputs(9, 17)
    valid = np.random.default_rng(1).random((2, 17)) > 0.3
    expected = by_definition(attention, q, k, v, valid)
    for run in (jax.jit(attention), attention.reference):
        np.testing.assert_allclose(run(q, k, v, valid_BS=jnp.asarray(valid)), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("share, shapes", [("none", [(K, R, L)] * 2), ("heads", [(1, R, L)] * 2), ("kv", [(1, R, L)]), ("layers", [(1, R, L)])])
def test_parameters_of_one_layer(share, shapes):
    attention = make(share)
    assert [x.shape for x in jax.tree.leaves(nnx.state(attention, nnx.Param))] == shapes
    E, F = projections(attention)
    assert (attention.key_projection is attention.value_projection) == (len(shapes) == 1) == (E == F).all()
    assert len({row.tobytes() for row in E.reshape(-1, L)}) == len(E) * R, "heads and slots are drawn apart"


@pytest.mark.parametrize("share, per_model", [("none", 3 * 2 * K), ("heads", 3 * 2), ("kv", 3), ("layers", 1)])
def test_parameters_of_a_model_are_counted_once(share, per_model):
    """Three layers, told apart by what they share."""
    model = Transformer(
        config.Model(D=8, layers=3, N=N, K=K, H=H),
        variant=parse_variant(f"linformer(rank={R}, share={share!r})"),
        inputs_vocab=11,
        num_outputs=11,
        max_len=L,
        causal=False,
        per_token=True,
        rngs=nnx.Rngs(0),
    )
    assert param_counts(model)["attention"] == per_model * R * L
    layers = [block.mixer.attention for block in model.blocks]
    same = [a.key_projection is b.key_projection for a, b in zip(layers, layers[1:])]
    assert same == [share == "layers"] * 2
    if share != "layers":
        assert (projections(layers[0])[0] != projections(layers[1])[0]).any(), "layers are drawn apart"


def test_layers_share_through_the_dict_they_are_handed():
    shared = {}
    first, second, other_rank = make("layers", shared=shared), make("layers", shared=shared, seed=1), make("layers", shared=shared, rank=R + 1)
    assert first.key_projection is second.key_projection is second.value_projection
    assert other_rank.key_projection is not first.key_projection and other_rank.key_projection.shape == (1, R + 1, L)
    assert make("layers", shared={}).key_projection is not first.key_projection
    assert make("layers").key_projection is not make("layers").key_projection, "without a dict nothing is shared"
    assert make("heads", shared=shared).key_projection is not first.key_projection


def test_a_shorter_length_takes_the_first_columns():
    long, short = make(max_len=L), make(max_len=17)
    for name in ("key_projection", "value_projection"):
        getattr(short, name)[...] = getattr(long, name)[...][:, :, :17]
    np.testing.assert_array_equal(jax.jit(long)(*inputs(17, 17)), jax.jit(short)(*inputs(17, 17)))


@pytest.mark.parametrize("share", SHARE)
def test_gradients_reach_every_projection_in_its_first_columns(share):
    attention, args = make(share), inputs(9, 17)
    graph, params, rest = nnx.split(attention, nnx.Param, ...)
    weights = jnp.asarray(np.random.default_rng(2).normal(size=args[0].shape), jnp.float32)
    loss = lambda run: lambda params: (getattr(nnx.merge(graph, params, rest), run)(*args) * weights).sum()
    gradients = jax.tree.leaves(jax.jit(jax.grad(loss("__call__")))(params))
    expected = jax.tree.leaves(jax.jit(jax.grad(loss("reference")))(params))
    assert len(gradients) == (2 if share in ("none", "heads") else 1)
    for gradient, slow in zip(gradients, expected):
        assert (gradient[:, :, 17:] == 0).all() and (gradient[:, :, :17] != 0).all()
        np.testing.assert_allclose(gradient, slow, rtol=0, atol=3e-6 * abs(slow).max())


def test_projections_start_with_entries_of_variance_one_over_rank():
    """So that the length of a projected vector is kept in expectation (Wang et al. 2020, theorem 2)."""
    E, _ = projections(make("heads", max_len=4096, rank=64))
    assert E.mean() == pytest.approx(0, abs=1e-3) and E.std() == pytest.approx(1 / 8, rel=0.01)


def test_causal_is_unsupported_with_the_reason():
    with pytest.raises(Unsupported, match="linformer cannot be causal: its slots mix all positions"):
        make(causal=True)


@pytest.mark.parametrize("share", SHARE)
def test_a_convolution_is_a_projection_with_shifted_rows(share):
    """Kernel and stride ceil(24 / 5) = 5: slot r holds positions 5 r to 5 r + 4, with the filter's weights; the last is cut at S = 17."""
    attention = make_attention(f"linformer(rank={R}, share={share!r}, projection='conv')", num_heads=N, num_kv_heads=K, head_dim=H, max_len=L)
    q, k, v = inputs(9, 17)
    for name, x in (("key_projection", k), ("value_projection", v)):
        filters = np.asarray(getattr(attention, name)[...], np.float64)
        assert filters.shape == (K if share == "none" else 1, 5)
    slots = [np.stack([sum(np.broadcast_to(np.asarray(f[...]), (K, 5))[h, p] * np.asarray(x)[:, 5 * r + p, h] for h in [h] for p in range(5) if 5 * r + p < 17)
             for r in range(4) for h in range(K)], 1).reshape(2, 4, K, H) for f, x in ((attention.key_projection, k), (attention.value_projection, v))]  # fmt: skip
    expected = make_attention("full", num_heads=N, num_kv_heads=K, head_dim=H, max_len=L)(q, *(jnp.asarray(x, jnp.float32) for x in slots))
    np.testing.assert_allclose(attention(q, k, v), expected, rtol=0, atol=3e-6)


def test_pooling_takes_the_mean_of_valid_positions_and_has_no_parameters():
    attention = make_attention(f"linformer(rank={R}, projection='pool')", num_heads=N, num_kv_heads=K, head_dim=H, max_len=L)
    assert not jax.tree.leaves(nnx.state(attention, nnx.Param))
    q, k, v = inputs(9, 17)
    valid = np.ones((2, 17), bool)
    valid[0, 5:10] = False  # a slot of its own: masked
    valid[1, [0, 3, 16]] = False
    means = [np.stack([np.stack([np.asarray(x)[b, s][valid[b, s]].mean(0) if valid[b, s].any() else np.zeros((K, H)) for s in (slice(5 * r, 5 * r + 5) for r in range(4))]) for b in range(2)])
             for x in (k, v)]  # fmt: skip
    slots = jnp.asarray([[valid[b, 5 * r : 5 * r + 5].any() for r in range(4)] for b in range(2)])
    expected = make_attention("full", num_heads=N, num_kv_heads=K, head_dim=H, max_len=L)(q, *(jnp.asarray(x, jnp.float32) for x in means), valid_BS=slots)
    for run in (attention, attention.reference):
        np.testing.assert_allclose(run(q, k, v, valid_BS=jnp.asarray(valid)), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("projection", ["conv", "pool"])
def test_local_projections_equal_their_reference_and_full_attention_at_one_position_a_slot(projection):
    args, valid = inputs(9, 17), jnp.asarray(np.random.default_rng(1).random((2, 17)) > 0.3)
    attention = make_attention(f"linformer(rank={R}, projection={projection!r})", num_heads=N, num_kv_heads=K, head_dim=H, max_len=L)
    np.testing.assert_allclose(attention(*args, valid_BS=valid), attention.reference(*args, valid_BS=valid), rtol=0, atol=3e-6)
    single = make_attention(f"linformer(rank={L}, projection={projection!r})", num_heads=N, num_kv_heads=K, head_dim=H, max_len=L)
    if projection == "conv":
        single.key_projection[...] = single.value_projection[...] = jnp.ones((1, 1))
    full = make_attention("full", num_heads=N, num_kv_heads=K, head_dim=H, max_len=L)
    np.testing.assert_allclose(single(*args, valid_BS=valid), full(*args, valid_BS=valid), rtol=0, atol=3e-6)
