"""The C++ kernels for lists of keys: against XLA's gathers, and under what JAX does to them. The choice of the largest scores is tested with topk."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_pallas_linear import assert_close, inputs, layer, results
from tiny import ON_CPU

from attn_zoo.attention.topk import best_keys
from attn_zoo.ops import native
from attn_zoo.ops.backends import choose_lists
from attn_zoo.ops.gathered import gathered_attention
from attn_zoo.ops.native_gathered import native_best_keys
from attn_zoo.spec import Unsupported, UserError

pytestmark = pytest.mark.skipif(ON_CPU != "native", reason=f"{native.library()}")

SHAPES = {  # T, S, N, K, H, R: vectors are of 16 channels, or listed keys, at most
    "one-of-each": (1, 1, 1, 1, 1, 1),
    "K1": (17, 40, 3, 1, 16, 15),
    "whole-vectors": (40, 17, 4, 2, 64, 16),
    "more-than-a-vector": (33, 90, 4, 4, 65, 33),
    "many-channels": (9, 50, 2, 2, 200, 50),
}
VARIANTS = ["random(k=9)", "tree(neighbours=2)", "bigbird(window=4, globals=2, random=7)", "luong_local(window=5)", "topk(k=7)", "clustered(clusters=7, topk=6)"]


def arrays(T, S, N, K, H, dtype=jnp.float32):
    rng = np.random.default_rng(T)
    return [jnp.asarray(rng.normal(size=(2, *shape)), dtype) for shape in ((T, N, H), (S, K, H), (S, K, H))]


def lists(T, S, K, R, batch):
    """(index, seen, factor) with as many batch axes as asked for; the last query lists nothing."""
    rng = np.random.default_rng(S)
    index = np.argsort(rng.random((*(2, K)[: 2 * batch], T, S)), axis=-1)[..., :R]
    seen = rng.random(index.shape) < 0.8
    seen[..., T - 1 if T > 1 else T :, :] = False
    return jnp.asarray(index), jnp.asarray(seen), jnp.asarray(rng.random(index.shape), jnp.float32)


both = lambda f, args: [results(functools.partial(f, backend=backend), args) for backend in ("native", "xla")]


def attend(q, k, v, factor, index, seen, *, backend, **more):
    """What can be summed: the logsumexp of a row that sees nothing is -inf."""
    o, lse = gathered_attention(q, k, v, index, seen, factor_TR=factor, backend=backend, **more)
    return o, jnp.where(lse > -jnp.inf, lse, -3.0)


@pytest.mark.parametrize("batch", [0, 1], ids=["one-list", "a-list-a-head"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_xla_with_factors_and_holes(shape, batch):
    T, S, N, K, H, R = SHAPES[shape]
    index, seen, factor = lists(T, S, K, R, batch)
    valid = jnp.asarray(np.random.default_rng(0).random((2, S)) < 0.8)
    f = functools.partial(attend, index=index, seen=seen, valid_BS=valid, scale=0.3)
    actual, expected = both(f, (*arrays(T, S, N, K, H), factor))
    assert_close(actual, expected, 3e-6)
    assert_close(*(results(lambda q, k, v, b=b: f(q, k, v, None, backend=b), arrays(T, S, N, K, H)) for b in ("native", "xla")), 3e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
    index, seen, _ = lists(60, 70, 2, 20, 0)
    args = arrays(60, 70, 4, 2, 32, dtype)
    (o, lse), gradients = results(lambda *args: attend(*args, None, index, seen, backend="native"), args)
    expected = results(lambda *args: attend(*args, None, index, seen, backend="xla"), [x.astype(jnp.float32) for x in args])
    assert lse.dtype == jnp.float32 and {x.dtype for x in (o, *gradients)} == {jnp.dtype(dtype)}
    assert_close(lse, expected[0][1], 3e-6)
    assert_close((o, gradients), (expected[0][0], expected[1]), 2.0 ** (-7 if dtype == jnp.bfloat16 else -10))  # the gradient that comes in is rounded too


def test_under_vmap_and_checkpoint():
    index, seen, factor = lists(30, 40, 2, 11, 1)
    args, f = (*arrays(30, 40, 4, 2, 16), factor), functools.partial(attend, backend="native")
    expected = results(lambda *args: f(*args, index, seen), args)
    assert_close(results(jax.checkpoint(lambda *args: f(*args, index, seen)), args), expected, 1e-6)
    one_by_one = jax.vmap(lambda *args: jax.tree.map(lambda x: x[0], f(*(x[None] for x in args))))
    assert_close(results(lambda *args: one_by_one(*args, index, seen), args), expected, 1e-6)


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_what_is_no_number_reaches_those_that_list_it_alone(which):
    """A run that diverges has to show it."""
    index, seen, _ = lists(30, 40, 2, 11, 0)
    args = dict(zip("qkv", arrays(30, 40, 2, 2, 16)))
    args[which] = args[which].at[:, 8].set(jnp.nan)
    o, _ = gathered_attention(*args.values(), index, seen, backend="native")
    reached = np.arange(30) == 8 if which == "q" else ((np.asarray(index) == 8) & np.asarray(seen)).any(axis=-1)
    assert 0 < reached.sum() < 30 and (np.isnan(o).all(axis=(0, 2, 3)) == reached).all() and (np.isfinite(o).all(axis=(0, 2, 3)) == ~reached).all()


@pytest.mark.parametrize("choose", [native_best_keys, best_keys])
def test_what_is_no_number_is_a_largest_score(choose):
    q, k, _ = arrays(20, 200, 1, 1, 16)
    for place in (3, 130):
        index, seen = choose(q, k.at[:, place].set(jnp.nan), None, 5, False)
        assert (index[..., 0] == place).all() and seen.all()
    index, seen = choose(q.at[:, 3].set(jnp.nan), k, None, 5, True)
    assert np.asarray(index)[0, 0, 3][np.asarray(seen)[0, 0, 3]].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [1, 31, 40, 600])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_chooses_among_many(size, causal):
    """Enough keys that lists overflow and are cut again and again: in no order, rising (each better than all before), some far below, all equal; some not valid."""
    B, T, N, S = 2, 710, 2, 700
    rng = np.random.default_rng(0)
    scores = rng.permutation(B * 4 * S).reshape(B, 4, S).astype(np.float32)
    scores[:, 1].sort(axis=-1)
    scores[:, 2, ::3] = -1e30
    scores[:, 3] = 0
    valid = rng.random((B, S)) < 0.8
    # Head n's query t takes row (t + n) % 4 of scores.
    row = (np.arange(T)[:, None] + np.arange(N)) % 4
    q = jnp.asarray(np.eye(4, dtype=np.float32)[row][None].repeat(B, axis=0))
    index, seen = map(np.asarray, native_best_keys(q, jnp.asarray(scores.swapaxes(1, 2)[:, :, None]), jnp.asarray(valid), size, causal))
    for b, n, t in np.ndindex(B, N, T):
        visible = np.flatnonzero(valid[b, : t + 1 if causal else S])
        expected = visible[np.argsort(-scores[b, row[t, n], visible], kind="stable")][:size]
        assert index[b, n, t][seen[b, n, t]].tolist() == expected.tolist()


def test_infinitely_bad_scores_are_not_chosen():
    k = jnp.zeros((1, 100, 1, 1)).at[0, ::2].set(-jnp.inf)
    index, seen = native_best_keys(jnp.ones((1, 3, 1, 1)), k, None, 80, False)
    assert seen.sum() == 3 * 50 and (index[seen] % 2 == 1).all()


def test_large_scores():
    """Differences between scores of 1e5 are what counts, and gradients know them too."""
    q, k, v = arrays(33, 90, 2, 2, 16)
    index, seen, _ = lists(33, 90, 2, 20, 0)
    args = q, 1e5 + k, v
    actual, expected = both(lambda q, k, v, backend: attend(q, k, v, None, index, seen, scale=-1.0, backend=backend), args)
    with jax.enable_x64(True):
        exact = jax.tree.map(np.asarray, results(lambda *args: attend(*args, None, index, seen, scale=-1.0, backend="xla"), [np.asarray(x, np.float64) for x in args]))
    for a, x, e in zip(*map(jax.tree.leaves, (actual, expected, exact))):
        assert np.isfinite(a).all() and abs(a - e).max() < 2 * abs(x - e).max() + 1e-5


def test_lists_of_other_shapes():
    index, seen, _ = lists(30, 40, 2, 11, 1)
    args = arrays(30, 40, 4, 2, 16)
    for i, s in ((index[:1], seen[:1]), (index[:, :1], seen[:, :1]), (index[:1, :1], seen[:1, :1])):
        assert_close(*(attend(*args, None, i, s, backend=backend) for backend in ("native", "xla")), 3e-6)
    with pytest.raises(ValueError, match="must be .T, R. or .B, K, T, R., with B=2 or 1, K=2 or 1 and T=30"):
        gathered_attention(*args, index[:, [0, 1, 0]], seen[:, [0, 1, 0]], backend="native")


def test_working_memory_is_linear():
    """What a pass takes is an argument to XLA, which sees it."""
    peaks = []
    for T in (1024, 2048, 4096):
        q, k, v = (jax.ShapeDtypeStruct((1, T, 8, 64), jnp.float32) for _ in range(3))

        def loss(q, k, v):
            return gathered_attention(q, k, v, *native_best_keys(q, k, None, 32, True), backend="native")[0].sum()

        peaks.append(jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes)
    assert peaks[2] < 2.1 * peaks[1] < 4.3 * peaks[0]


DIRECTIONS = [(spec, causal) for spec in VARIANTS for causal in (False, True) if not (causal and spec.startswith("clustered"))]
named = pytest.mark.parametrize("spec, causal", DIRECTIONS, ids=lambda x: x.split("(")[0] if isinstance(x, str) else "causal" if x else "bidirectional")


@named
def test_variants_equal_their_reference(spec, causal):
    """Outputs and gradients, those of the parameters too, with ragged validity, on the kernels and on XLA's gathers."""
    q, k, v, _ = inputs(90, R=16, H=16)
    valid = jnp.arange(90)[None] < jnp.array([[90], [61]])
    for backend in ("native", "xla"):
        attention = layer(spec, causal, backend=backend)
        graph, params, rest = nnx.split(attention, nnx.Param, ...)
        more = {"valid_BT": valid} if attention.pools_queries else {}

        def run(reference):
            def f(q, k, v, params):
                attention = nnx.merge(graph, params, rest)
                return (attention.reference if reference else attention)(q, k, v, valid_BS=valid, **more)

            return results(f, (q, k, v, params))

        assert_close(run(False), run(True), 1e-4)


@named
def test_auto_runs_them_on_a_cpu_and_the_record_says_so(spec, causal):
    for backend, expected in (("auto", "native"), ("native", "native"), ("xla", "xla")):
        attention = layer(spec, causal, backend=backend)
        assert attention.plan(90, 90, True)["backend"] == attention.backend() == expected
        called = "gathered_forward" in str(jax.make_jaxpr(attention)(*[jnp.zeros((2, 90, heads, 16)) for heads in (4, 2, 2)]))
        assert called == (expected == "native")


def test_refuses_with_the_reason(monkeypatch):
    with pytest.raises(UserError, match="attention.backend='native' cannot serve here: it takes float32, bfloat16 or float16, not float64; use auto or xla"):
        choose_lists("native", jnp.float64)
    with pytest.raises(UserError, match="attention.backend='pallas' cannot serve here: it knows blocks of pairs, not lists of keys; use auto or xla"):
        choose_lists("pallas", jnp.float32)
    assert choose_lists("auto", jnp.float64) == "xla"
    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) for x in arrays(9, 9, 1, 1, 8)]
        with pytest.raises(Unsupported, match="the native kernels cannot serve here: it takes float32, bfloat16 or float16, not float64"):
            gathered_attention(*wide, *lists(9, 9, 1, 3, 0)[:2], backend="native")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match="attention.backend='native' cannot serve here: it is for CPUs, and this runs on gpu"):
        choose_lists("native", jnp.float32)
