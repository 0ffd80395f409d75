"""The C++ kernels: against dense attention in float64, under what JAX does to them, with narrower vectors, and where there is no compiler."""

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_blocked import Stripes, assert_close, exact, holes, normals, random_table, results
from test_pallas import CASES, SERVED, layer, loss_of, named
from tiny import ON_CPU

from attn_zoo import make_attention
from attn_zoo.ops import native
from attn_zoo.ops.backends import choose
from attn_zoo.ops.block_mask import block_mask, pair_bits
from attn_zoo.ops.blocked import NEG, ScoreMod, blocked_attention
from attn_zoo.ops.native_attention import _splits, native_attention
from attn_zoo.ops.patterns import CAUSAL, FULL, Band, BlockTable, Every, Prefix
from attn_zoo.spec import Unsupported, UserError

compiled = pytest.mark.skipif(ON_CPU != "native", reason=f"{native.library()}")


def engine(**kwargs):
    return lambda q, k, v, params: native_attention(q, k, v, **kwargs)


# pattern, T, S, N, K, H, validity with holes, further arguments
CASES = {name: (*case[:-1], {key: value for key, value in case[-1].items() if key != "block"}) for name, case in CASES.items()} | {
    "one-query-one-key": (FULL, 1, 1, 1, 1, 8, False, {}),
    "whole-blocks-H256": (CAUSAL, 128, 128, 1, 1, 256, False, {}),
    "a-key-more-than-blocks-H48": (Band(70, 3), 130, 129, 6, 2, 48, True, {}),
    "a-lone-block-of-queries": (FULL, 50, 300, 2, 2, 32, True, {}),
    "a-lone-block-that-leaves-keys-out": (Band(70, 3), 40, 300, 2, 2, 32, False, {}),
    "stripes-over-many-blocks-H112": (Stripes(5), 200, 333, 2, 2, 112, False, {"scale": 0.2}),
}


@compiled
@pytest.mark.parametrize("name", CASES)
def test_equals_dense_attention(name):
    pattern, T, S, N, K, H, masked, kwargs = CASES[name]
    q, k, v = normals(2, T, S, N, K, H)
    valid = holes(2, S) if masked else None
    (o, lse), gradients = results(engine(pattern=pattern, valid_BS=valid, **kwargs), q, k, v)
    expected, expected_gradients = exact(q, k, v, pattern=pattern, valid_BS=valid, scale=kwargs.get("scale"))
    assert (o.dtype, lse.dtype) == (jnp.float32, jnp.float32)
    assert_close((o, lse), expected, 3e-6)
    assert_close(gradients, expected_gradients, 4e-6)


@compiled
def test_a_row_that_sees_nothing_gives_zeros_and_moves_nothing():
    """Row 0 sees nothing, as no key is before it; the keys 90 to 99 are seen by no row; the last sequence has no valid key."""
    q, k, v = normals(3, 100, 100, 2, 1, 16)
    valid = jnp.ones((3, 100), bool).at[:, 90:].set(False).at[2].set(False)
    (o, lse), (dq, dk, dv, _) = results(engine(pattern=Band(ahead=-1), valid_BS=valid), q, k, v)
    assert (o[:, 0] == 0).all() and (lse[:, 0] == -jnp.inf).all() and (o[2] == 0).all() and (lse[2] == -jnp.inf).all()
    assert (dq[:, 0] == 0).all() and (dk[:, 90:] == 0).all() and (dv[:, 90:] == 0).all()
    assert all((x[2] == 0).all() and np.isfinite(x).all() for x in (dq, dk, dv))
    assert np.isfinite(lse[:2, 1:]).all() and (dv[:2, :90] != 0).all(axis=(2, 3)).all()


@compiled
def test_blocks_that_are_not_listed_are_not_read():
    q, k, v = normals(1, 256, 256, 1, 1, 16)
    pattern = BlockTable(64, ((0,), (2,), (0,), (2,)))
    poisoned = [x.at[:, 64:128].set(jnp.nan).at[:, 192:].set(jnp.nan) for x in (k, v)]
    jax.tree.map(np.testing.assert_array_equal, results(engine(pattern=pattern), q, *poisoned), results(engine(pattern=pattern), q, k, v))


@compiled
@pytest.mark.parametrize("dtype, bits", [(jnp.bfloat16, 9), (jnp.float16, 12)])
def test_half_precision_is_rounded_at_the_end_alone(dtype, bits):
    q, k, v = normals(1, 150, 150, 2, 1, 32, dtype)
    (o, lse), gradients = results(engine(pattern=CAUSAL), q, k, v)
    expected, expected_gradients = exact(q, k, v, pattern=CAUSAL)
    assert all(x.dtype == dtype for x in (o, *gradients[:3])) and lse.dtype == jnp.float32
    assert_close(o, expected[0], 2**-bits + 1e-6)
    assert_close(lse, expected[1], 1e-6)
    assert_close(gradients, expected_gradients, 2.0 ** (1 - bits))  # that of o comes rounded too


@compiled
def test_scores_that_are_large_or_far_apart():
    """Weights below 2^-126 are zero, as exp's are, and no row overflows."""
    q, k, v = normals(1, 80, 80, 1, 1, 16)
    (o, lse), gradients = results(engine(pattern=CAUSAL, scale=100.0), q, k, v)
    expected, expected_gradients = exact(q, k, v, pattern=CAUSAL, scale=100.0)
    assert_close((o, lse), expected, 1e-4)  # scores of some thousand, in float32
    assert all(np.isfinite(x).all() for x in gradients[:3])
    assert_close(gradients[2], expected_gradients[2], 2e-4)


@compiled
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_no_number_is_not_lost(which):
    """A run that diverges has to show it: NaN in one query, key or value is in the outputs and gradients that depend on it."""
    arrays = list(normals(1, 100, 100, 1, 1, 16))
    arrays[which] = arrays[which].at[0, 70, 0, 3].set(jnp.nan)
    (o, lse), gradients = results(engine(pattern=CAUSAL), *arrays)
    spoiled = slice(70, 71) if which == 0 else slice(70, None)
    assert np.isnan(o[0, spoiled, 0, 3]).all() and all(np.isnan(x).any() for x in gradients[:2])
    if which < 2:  # a hidden score is whatever was computed, but a value of no weight that is NaN times it
        assert np.isnan(lse[0, spoiled]).all() and np.isfinite(o[0, :70]).all()


@compiled
@pytest.mark.parametrize("T", [63, 65, 300])
def test_few_heads_are_split_among_many_cores(T, monkeypatch):
    """Each part of the queries has keys' gradients of its own, which are added up."""
    q, k, v = normals(1, T, 90, 2, 1, 16)
    monkeypatch.setattr(native, "core_count", lambda: 1)
    one = results(engine(pattern=Band(40, 9)), q, k, v)
    monkeypatch.setattr(native, "core_count", lambda: 64)
    many = results(engine(pattern=Band(40, 9)), q, k, v)
    np.testing.assert_array_equal(one[0][0], many[0][0])
    assert_close(many, one, 1e-6)


SPLIT = [(8, 64, 2, 1, 1), (1, 64, 2, 2, 2), (3, 64, 2, 2, 1), (5, 64, 4, 3, 1), (1, 64, 64, 4, 4), (1, 1, 64, 1, 1), (33, 64, 32, 4, 1), (256, 64, 48, 2, 1)]


@pytest.mark.parametrize("tasks, rows, cores, forward, backward", SPLIT)
def test_rows_are_split_where_cores_would_wait(tasks, rows, cores, forward, backward):
    assert (_splits(tasks, rows, cores, False), _splits(tasks, rows, cores, True)) == (forward, backward)


@compiled
def test_callers_beside_each_other_get_what_one_alone_gets():
    """More callers than threads, on all the devices there are."""
    q, k, v = normals(2, 300, 300, 4, 2, 16)
    run = jax.jit(jax.grad(lambda q, k, v: (native_attention(q, k, v, pattern=CAUSAL)[0] ** 2).sum(), (0, 1, 2)))
    expected = run(q, k, v)
    calls = [jax.device_put((q, k, v), device) for device in jax.devices()] * 8
    with ThreadPoolExecutor(16) as pool:
        for actual in pool.map(lambda args: jax.block_until_ready(run(*args)), calls):
            jax.tree.map(np.testing.assert_array_equal, actual, expected)


@compiled
def test_under_vmap_and_checkpoint():
    q, k, v = normals(3, 75, 75, 4, 2, 16)
    attend = lambda q, k, v: native_attention(q, k, v, pattern=Band(20, 0) | Prefix(3))
    loss = lambda attend: lambda *args: sum((x * jnp.cos(jnp.arange(x.size)).reshape(x.shape)).sum() for x in attend(*args))
    run = lambda attend, *args: jax.jit(jax.value_and_grad(loss(attend), (0, 1, 2)))(*args)
    expected = run(attend, q, k, v)
    assert_close(run(jax.checkpoint(attend), q, k, v), expected, 1e-6)
    alone = run(jax.vmap(attend), *(x[:, None] for x in (q, k, v)))
    assert_close((alone[0], [x[:, 0] for x in alone[1]]), expected, 1e-6)


@compiled
def test_working_memory_is_linear():
    """What a pass takes is an argument to XLA, which sees it."""
    peaks = []
    for T in (1024, 2048, 4096):
        shape = jax.ShapeDtypeStruct((1, T, 8, 64), jnp.float32)
        f = jax.jit(jax.grad(lambda q, k, v: native_attention(q, k, v, pattern=CAUSAL)[0].sum(), (0, 1, 2)))
        peaks.append(f.lower(*[shape] * 3).compile().memory_analysis().temp_size_in_bytes)
    assert peaks[2] < 2.1 * peaks[1] < 4.3 * peaks[0]


@pytest.mark.parametrize("T, S", [(64, 64), (100, 333), (257, 70)])
@pytest.mark.parametrize("name", ["band", "stripes", "table", "strides"])
def test_bits_are_the_masks_of_partial_blocks(name, T, S):
    pattern = {"band": Band(70, 9), "stripes": Stripes(7), "table": random_table(24, T, S), "strides": Every(16) & ~Prefix(5)}[name]
    mask = block_mask(pattern, T, S, 64, 64)
    number, tiles = pair_bits(pattern, T, S)
    seen = np.zeros((64 * mask.num_q, 64 * mask.num_k), bool)
    for start, block, part in ((mask.full_start, mask.full_block, False), (mask.part_start, mask.part_block, True)):
        for c in range(mask.num_q):
            for n in range(start[c], start[c + 1]):
                bits = np.unpackbits(tiles[number[n]], axis=1, bitorder="little").T if part else 1
                seen[64 * c :, 64 * block[n] :][:64, :64] = bits
    assert len(tiles) == len({tile.tobytes() for tile in tiles})
    np.testing.assert_array_equal(seen[:T, :S], np.broadcast_to(pattern.mask(np.arange(T)[:, None], np.arange(S)[None]), (T, S)))
    assert not seen[:, S:].any()


def test_equal_tiles_are_kept_once():
    assert len(pair_bits(CAUSAL, 2**16, 2**16)[1]) == 1 and len(pair_bits(Band(256, 256), 2**14, 2**14)[1]) == 2


# T, S, pattern
DISTANCES = {"T1": (1, 1, FULL), "causal": (100, 100, CAUSAL), "fewer-queries": (130, 257, Band(70, 30)), "fewer-keys": (257, 70, FULL)}


@compiled
@pytest.mark.parametrize("name", DISTANCES)
def test_what_distances_add(name):
    """A slope and an edge a head, learned, beyond which nothing is seen: as XLA's engine has it, and the gradients by both too."""
    T, S, pattern = DISTANCES[name]
    q, k, v = normals(2, T, S, 4, 2, 20)
    params = {"slope": jnp.asarray([0.0, 0.1, 1.0, -0.2]), "edge": jnp.asarray([3.0, 20.5, 50.5, 1000.0])}

    def change(scores, i, j, params):
        edge = params["edge"] - abs(i - j)
        return jnp.where(edge > 0, scores - params["slope"] * (i - j) + jnp.log1p(jnp.maximum(edge, 0)), NEG)

    mod = lambda params: ScoreMod(change, params, by_distance=True)
    for valid in (None, holes(2, S)):
        actual, expected = (
            results(lambda q, k, v, params: run(q, k, v, pattern=pattern, valid_BS=valid, score_mod=mod(params)), q, k, v, params)
            for run in (native_attention, blocked_attention)
        )
        assert_close(actual, expected, 2e-5)  # a slope's gradient is a sum over all pairs, up to 257 apart
        assert T == 1 or all((x != 0).any() for x in jax.tree.leaves(actual[1][3]))


@compiled
@named
def test_variants_equal_their_reference(name, causal):
    """Those whose softmax is over patterns, on these kernels and on XLA's engine: outputs, and gradients of inputs and parameters."""
    q, k, v = normals(2, 90, 90, 4, 2, 16)
    valid = jnp.arange(90)[None] < jnp.array([[90], [61]])
    for backend in ("native", "xla"):
        params, loss = loss_of(layer(SERVED[name], causal, backend=backend))
        run = lambda reference: jax.jit(jax.value_and_grad(lambda *args: loss(*args, reference=reference), (0, 1, 2, 4), has_aux=True))(q, k, v, valid, params)
        assert_close(run(False), run(True), 1e-5)


@compiled
def test_auto_runs_it_on_a_cpu_and_the_plan_says_so():
    q, k, v = normals(1, 256, 256, 2, 2, 16)
    for spec in ("local(window=100)", "adaptive_span"):
        attention = make_attention(spec, num_heads=2, head_dim=16, max_len=256, causal=True)
        assert attention.plan(256, 256) | {"backend": "native", "q_block": 64, "k_block": 64} == attention.plan(256, 256)
        assert "attn_zoo_attention_forward" in jax.jit(attention).lower(q, k, v).as_text()


@compiled
def test_refuses_with_the_reason(monkeypatch):
    q, k, v = normals(1, 16, 16, 2, 2, 16)
    slope = ScoreMod(lambda s, i, j, p: s - p * abs(i - j), jnp.ones(2))
    for args, mod, reason in (((q, k, v), slope, "cannot modify scores"), ([jnp.zeros((1, 16, 1, 272))] * 3, None, "at most 256, not 272")):
        with pytest.raises(Unsupported, match=f"the native kernels cannot serve here: .*{reason}"):
            native_attention(*args, pattern=FULL, score_mod=mod)
    assert choose("auto", FULL, jnp.float32, 16, modified=slope) == choose("auto", FULL, jnp.float64, 16) == choose("auto", FULL, jnp.float32, 272) == "xla"
    with pytest.raises(UserError, match="attention.backend='native' cannot serve here: it takes float32, bfloat16 or float16, not float64; use auto or xla"):
        choose("native", FULL, jnp.float64, 16)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match="attention.backend='native' cannot serve here: it is for CPUs, and this runs on gpu"):
        choose("native", FULL, jnp.float32, 16)


# A script that says what 'auto' takes, and why not the native kernels, and then holds them against XLA's engine; a process has one compiler.
SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from attn_zoo.attention.lsh import Options, hash_buckets, lsh_attention
from attn_zoo.attention.nystrom import pseudo_inverse
from attn_zoo.attention.topk import best_keys
from attn_zoo.ops.additive import additive_attention
from attn_zoo.ops.backends import attention_and_logsumexp, choose
from attn_zoo.ops.convolution import convolve
from attn_zoo.ops.decayed import decayed_sums
from attn_zoo.ops.delta import delta_rule
from attn_zoo.ops.gathered import gathered_attention
from attn_zoo.ops.native import library
from attn_zoo.ops.native_gathered import native_best_keys
from attn_zoo.ops.native_rounds import native_buckets
from attn_zoo.ops.patterns import FULL, Band
found = library()
print(choose("auto", FULL, jnp.float32, 16), found if isinstance(found, str) else "")
if not isinstance(found, str):
    rng = np.random.default_rng(0)
    normals = lambda *shapes: [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    arrays = lambda *lengths: normals(*((2, T, 2, 48) for T in lengths))
    decay = -0.1 * jnp.asarray(rng.random((2, 133, 2)), jnp.float32)
    index = jnp.asarray(rng.random((2, 2, 133, 75)).argsort(axis=-1)[..., :23])
    factor, weight = jnp.asarray(rng.random(index.shape), jnp.float32), *normals((2, 48))
    buckets = jnp.asarray(rng.integers(0, 8, (3, 2, 2, 133)), jnp.int32)
    for f, args in (
        (lambda q, k, v, backend: attention_and_logsumexp(q, k, v, pattern=Band(90, 40), backend=backend), arrays(133, 75, 75)),
        (decayed_sums, (*arrays(133, 133, 133), decay)),
        (lambda q, k, v, f, backend: gathered_attention(q, k, v, index, index % 5 > 0, factor_TR=f, backend=backend), (*arrays(133, 75, 75), factor)),
        (lambda q, k, v, w, backend: (additive_attention(q, k, w, v, causal=True, backend=backend),), (*arrays(133, 75, 75), weight)),
        (lambda v, taps, backend: (convolve(v, taps, backend=backend),), (*arrays(133), *normals((4, 33)))),
        (lambda A, backend: (pseudo_inverse(jax.nn.softmax(A + 3 * jnp.eye(40, 23)), 6, backend),), normals((2, 3, 40, 23))),
        (lambda q, k, v, backend: (lsh_attention(q, k, v, None, buckets, Options(bucket_size=33), True, backend),), arrays(133, 133, 133)),
        (lambda q, k, v, decay, backend: (delta_rule(q, k / 8, v, jnp.exp(decay), backend=backend),), (*arrays(133, 133, 133), decay)),
    ):
        def run(backend):
            loss = lambda *args: (lambda o, *_: ((o**2).sum(), o))(*f(*args, backend=backend))
            return jax.jit(jax.value_and_grad(loss, range(len(args)), has_aux=True))(*args)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * max(1, abs(b).max())), run("native"), run("xla"))
    q, k = (jnp.asarray(rng.integers(-3, 4, (2, T, 2, 48)), jnp.float32) for T in (133, 300))  # whole numbers: scores are exact, and many are equal
    for chosen in zip(*(choose(q, k, jnp.tile(jnp.arange(300) % 7 > 0, (2, 1)), 20, True) for choose in (native_best_keys, best_keys))):
        np.testing.assert_array_equal(*(np.where(np.arange(133)[:, None] > 40, x, 0) for x in chosen))  # before there are fewer than 20 to choose from
    rotations = jnp.asarray(rng.integers(-3, 4, (3, 2, 48, 7)), jnp.float32)
    np.testing.assert_array_equal(*(hash(k, rotations, (10, 4)) for hash in (native_buckets, hash_buckets)))
"""


def process(tmp_path, **env):
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)} | env
    return subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True).stdout.strip()


@compiled
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86-64")
@pytest.mark.parametrize("narrower", ["-mno-avx512f", "-mno-avx", "-DNO_SHUFFLE"])  # the last as of compilers before GCC 12
def test_processors_with_narrower_vectors(narrower, tmp_path):
    compiler = os.environ.get("CXX", "c++")
    assert process(tmp_path, CXX=f"{compiler} {narrower}") == "native"
    (library,) = (tmp_path / "attn_zoo").iterdir()
    before = library.stat().st_mtime_ns
    assert process(tmp_path, CXX=f"{compiler} {narrower}") == "native" and library.stat().st_mtime_ns == before  # once for all processes


def test_without_a_compiler_xla_runs(tmp_path):
    assert process(tmp_path, CXX="no-such-compiler") == "xla it is compiled on its first use, and there is no C++ compiler (no-such-compiler)"
    assert process(tmp_path, CXX="false") == "xla false does not compile it: exit 1"
    file = tmp_path / "file"
    file.touch()
    assert process(tmp_path, XDG_CACHE_HOME=str(file)).startswith("xla it ") or ON_CPU == "xla"


def test_the_source_is_part_of_the_package():
    folder = Path(native.__file__).parent
    assert {path.name for path in folder.glob("*.cc")} == set(native.SOURCES) and (folder / native.HEADER).exists()
