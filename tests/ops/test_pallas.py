"""The Pallas kernels: interpreted on the CPU against dense attention in float64, and lowered for NVIDIA GPUs."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_blocked import assert_close, exact, holes, normals, random_table, results

from attn_zoo import VARIANTS, make_attention
from attn_zoo.attention import find
from attn_zoo.attention.fixed import OtherBlocks
from attn_zoo.attention.memory_compressed import PastSlots
from attn_zoo.attention.poolingformer import NearSlots
from attn_zoo.ops import backends, pallas_attention as kernels, pallas_kernels, tuning
from attn_zoo.ops.block_mask import block_mask
from attn_zoo.ops.blocked import ScoreMod, blocked_attention
from attn_zoo.ops.pallas_attention import pallas_attention
from attn_zoo.ops.pallas_kernels import precision_of_float32
from attn_zoo.ops.patterns import CAUSAL, FULL, Band, BlockTable, Every, Pattern, Prefix
from attn_zoo.spec import Unsupported, UserError


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels run on the CPU."""
    monkeypatch.setattr(pallas_kernels, "INTERPRET", True)


def engine(fn=None, attend=pallas_attention, **kwargs):
    return lambda q, k, v, params: attend(q, k, v, score_mod=fn and ScoreMod(fn, params), **kwargs)


# pattern, T, S, N, K, H, validity with holes, further arguments
SLOTS = (PastSlots(3, 5, True) & OtherBlocks(20, 3, False)) | NearSlots(4, -9, 11)
CASES = {
    "full-default-tiles-H64": (FULL, 70, 70, 2, 2, 64, False, {}),
    "full-cross-grouped-holes-H80": (FULL, 50, 83, 4, 2, 80, True, {"block": 16}),
    "strides-three-heads-a-key-head": (CAUSAL & (Every(5) | Band(9, 9)), 96, 96, 3, 1, 16, False, {"block": 32}),
    "window-beyond-the-keys-scale-H128": (Band(4, 0), 60, 21, 2, 1, 128, False, {"block": 16, "scale": 0.7}),
    "prefix-and-a-table-that-blocks-straddle": (CAUSAL & (Prefix(7) | random_table(24, 90, 90)), 90, 90, 2, 1, 8, True, {"block": 16}),
    "tables": (random_table(16, 64, 80) & ~random_table(32, 64, 80) | BlockTable(16, ((0,), (), (1, 2))), 64, 80, 2, 2, 16, False, {"block": 16}),
    "slots-and-an-empty-table": (SLOTS | BlockTable(16, ((), ())), 80, 27, 2, 1, 16, True, {"block": 16}),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_dense_attention(name, interpreted):
    pattern, T, S, N, K, H, masked, kwargs = CASES[name]
    q, k, v = normals(2, T, S, N, K, H)
    valid = holes(2, S) if masked else None
    (o, lse), gradients = results(engine(pattern=pattern, valid_BS=valid, **kwargs), q, k, v)
    expected, expected_gradients = exact(q, k, v, pattern=pattern, valid_BS=valid, scale=kwargs.get("scale"))
    assert (o.dtype, lse.dtype) == (jnp.float32, jnp.float32)
    assert_close((o, lse), expected, 3e-6)
    assert_close(gradients, expected_gradients, 4e-6)


def bend(scores, i, j, params):
    """A soft cap and a slope by distance: nonlinear in the scores, in a tree of parameters."""
    return params["cap"] * jnp.tanh(scores / params["cap"]) - params["slope"] * abs(i - j)


def test_score_mod_and_its_parameters(interpreted):
    q, k, v = normals(2, 53, 61, 4, 2, 16)
    rng, valid = np.random.default_rng(1), holes(2, 61)
    params = {"cap": jnp.asarray(rng.uniform(1, 3, 4), jnp.float32), "slope": jnp.asarray(rng.uniform(0.01, 0.3, 4), jnp.float32)}
    outputs, gradients = results(engine(bend, pattern=Band(40, 25), valid_BS=valid, block=16), q, k, v, params)
    expected, expected_gradients = exact(q, k, v, params, pattern=Band(40, 25), valid_BS=valid, fn=bend)
    assert all((abs(x) > 1e-3).all() for x in gradients[3].values())
    assert_close(outputs, expected, 3e-6)
    assert_close(gradients, expected_gradients, 6e-6)


def test_a_score_mod_is_served_under_a_mesh(interpreted):
    """There JAX writes into gradients where arrays lie, which is no operation of a kernel's."""
    q, k, v = normals(2, 40, 40, 4, 2, 16)
    span = jnp.asarray([5.0, 20.0, 1.0, 9.0])
    run = lambda: results(engine(lambda s, i, j, z: s + jnp.log(jnp.clip((z + 4.0 - (i - j)) / 4.0, 1e-3, 1.0)), pattern=CAUSAL, block=16), q, k, v, span)
    expected = run()
    with jax.set_mesh(jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))):
        assert_close(run(), expected, 1e-6)


def test_float32_is_multiplied_in_three_parts_unless_told_otherwise():
    assert precision_of_float32(interpret=False) == jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    assert precision_of_float32(interpret=True) == jax.lax.Precision.HIGHEST
    with jax.default_matmul_precision("highest"):
        assert precision_of_float32(interpret=False) == jax.lax.Precision.HIGHEST


def test_a_row_that_sees_nothing_gives_zeros_and_moves_nothing(interpreted):
    """Row 0 sees nothing, as no key is before it; the keys 30 to 39 are seen by no row; the last sequence has no valid key."""
    q, k, v = normals(3, 40, 40, 2, 1, 16)
    valid = jnp.ones((3, 40), bool).at[:, 30:].set(False).at[2].set(False)
    (o, lse), (dq, dk, dv, _) = results(engine(pattern=Band(ahead=-1), valid_BS=valid, block=16), q, k, v)
    assert (o[:, 0] == 0).all() and (lse[:, 0] == -jnp.inf).all() and (o[2] == 0).all() and (lse[2] == -jnp.inf).all()
    assert (dq[:, 0] == 0).all() and (dk[:, 30:] == 0).all() and (dv[:, 30:] == 0).all()
    assert all((x[2] == 0).all() and np.isfinite(x).all() for x in (dq, dk, dv))
    assert np.isfinite(lse[:2, 1:]).all() and (dv[:2, :30] != 0).all(axis=(2, 3)).all()


def test_bfloat16_sums_in_float32(interpreted):
    q, k, v = normals(1, 150, 150, 2, 1, 32, jnp.bfloat16)
    (o, lse), gradients = results(engine(pattern=CAUSAL, block=32), q, k, v)
    expected, expected_gradients = exact(q, k, v, pattern=CAUSAL)
    assert all(x.dtype == jnp.bfloat16 for x in (o, *gradients[:3])) and lse.dtype == jnp.float32
    assert_close(o, expected[0], 2**-8)  # one rounding of the weights, one of the output, 2^-9 each
    assert_close(lse, expected[1], 1e-6)
    assert_close(gradients, expected_gradients, 2**-7)


TILES = {"tall": (64, 32), "wide": (16, 64)}  # queries by keys of every kernel


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("H", [96, 256])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["f32", "bf16", "f16"])
def test_tiles_that_are_not_square(dtype, H, tiles, interpreted, monkeypatch):
    """Outputs and gradients in every dtype, with the widest heads, ragged lengths, heads that share keys and holes in these."""
    monkeypatch.setattr(kernels, "tile", lambda *_, **__: tuning.Tile(*TILES[tiles], 4, 2))
    q, k, v = normals(2, 75, 90, 4, 2, H, dtype)
    kwargs = {"pattern": Band(40, 25) | Prefix(5), "valid_BS": holes(2, 90)}
    (o, lse), gradients = results(engine(**kwargs), q, k, v)
    (expected, expected_lse), expected_gradients = exact(q, k, v, **kwargs)
    assert all(x.dtype == dtype for x in (o, *gradients[:3])) and lse.dtype == jnp.float32
    rounding = {jnp.float32: 2**-18, jnp.bfloat16: 2**-8, jnp.float16: 2**-11}[dtype]
    assert_close(o, expected, rounding)
    assert_close(lse, expected_lse, 3e-6)
    assert_close(gradients, expected_gradients, 2 * rounding)


def test_no_product_runs_over_blocks_that_are_not_listed(interpreted):
    """A query block that sees one key block takes one turn of the loop, so garbage in any other block is never read."""
    q, k, v = normals(1, 64, 64, 1, 1, 16)
    pattern = BlockTable(16, ((0,), (2,), (0,), (2,)))
    poisoned = [x.at[:, 16:32].set(jnp.nan).at[:, 48:].set(jnp.nan) for x in (k, v)]
    attend = engine(pattern=pattern, block=16)
    jax.tree.map(np.testing.assert_array_equal, results(attend, q, *poisoned), results(attend, q, k, v))


@dataclasses.dataclass(frozen=True)
class Refusing(Band):
    """A window whose mask must not be asked for."""

    def mask(self, i, j):
        if isinstance(i, jax.Array):
            raise AssertionError("the mask of a full block was evaluated")
        return super().mask(i, j)


def test_full_blocks_do_not_evaluate_the_mask(interpreted, monkeypatch):
    monkeypatch.setattr(kernels, "mask_obstacle", lambda pattern: None)
    q, k, v = normals(1, 32, 32, 1, 1, 16)
    trace = lambda back: jax.eval_shape(jax.grad(lambda *x: pallas_attention(*x, pattern=Refusing(back, back), block=16)[0].sum(), (0, 1, 2)), q, k, v)
    trace(31)
    with pytest.raises(AssertionError, match="mask of a full block"):
        trace(5)


def test_under_vmap_it_equals_the_xla_engine(interpreted):
    q, k, v = (x[:, None] for x in normals(2, 75, 75, 4, 2, 16))
    kwargs = {"pattern": Band(20, 0) | Prefix(3), "block": 16}

    def outputs_and_gradients(attend):
        def loss(*args):
            outputs = jax.vmap(attend)(*args)
            return sum((x * jnp.cos(jnp.arange(x.size)).reshape(x.shape)).sum() for x in outputs), outputs

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    one, other = (outputs_and_gradients(lambda q, k, v: engine(q, k, v, **kwargs)) for engine in (pallas_attention, blocked_attention))
    assert_close(one, other, 2e-6)


def test_refuses_with_the_reason():
    q, k, v = normals(1, 16, 16, 2, 2, 16)
    slopes, positions = jnp.ones(2), jnp.arange(16)[None]

    @dataclasses.dataclass(frozen=True)
    class Captures(Pattern):
        def mask(self, i, j):
            return (positions <= i) & (j == j)

    @dataclasses.dataclass(frozen=True)
    class LooksUp(Pattern):
        def mask(self, i, j):
            return jnp.arange(16)[j] <= i

    mod = lambda fn, params: {"pattern": FULL, "score_mod": ScoreMod(fn, params)}
    for kwargs, reason in (
        ({"pattern": CAUSAL | Captures()}, "the pattern's mask reads an array"),
        ({"pattern": CAUSAL | LooksUp()}, "the pattern's mask uses gather"),
        (mod(lambda s, i, j, p: s * p[..., 0], jnp.ones((2, 3))), "one float a head"),
        (mod(lambda s, i, j, p: s + p, jnp.ones(2, jnp.int32)), "one float a head"),
        (mod(lambda s, i, j, p: s + slopes[0], ()), "score modification reads an array"),
        (mod(lambda s, i, j, p: s + s.sum(), ()), "score modification uses reduce_sum"),
    ):
        with pytest.raises(Unsupported, match=f"Pallas kernels cannot serve here: .*{reason}"):
            pallas_attention(q, k, v, **kwargs)
    wide = [jnp.zeros((1, 16, 1, 272))] * 3
    with pytest.raises(Unsupported, match="at most 256, not 272"):
        pallas_attention(*wide, pattern=FULL)


def layer(name, causal, *, H=16, dtype=jnp.float32, backend="pallas", max_len=96):
    return make_attention(name, num_heads=4, num_kv_heads=2, head_dim=H, max_len=max_len, causal=causal, dtype=dtype, backend=backend, rngs=nnx.Rngs(1))


# The variants whose softmax runs on the kernels; the others say that theirs does not.
SERVED = {
    "full": "full",
    "local": "local(window=9)",
    "global_window": "global_window(window=9, globals=5)",
    "block": "block(block=16)",
    "block-bigbird": "block(block=16, global_blocks=2, random_blocks=1)",
    "block_local": "block_local(block=24)",
    "bigbird": "bigbird(window=9, globals=5, random=7)",
    "strided": "strided",
    "fixed": "fixed",
    "axial": "axial",
    "dilated": "dilated(window=9, dilation=3)",
    "star": "star",
    "sinkhorn": "sinkhorn(block=24)",
    "persistent": "persistent(slots=20)",
    "adaptive_span": "adaptive_span(max_span=96, init=9)",
    "memory_compressed": "memory_compressed",
    "poolingformer": "poolingformer(window=9, second=40)",
    "linformer": "linformer(rank=24)",
    "luong_local": "luong_local(align='monotonic', window=9)",
    "set": "set",
    "nystrom": "nystrom(landmarks=20)",
    "luna": "luna(memory=20)",
    "attention_over_attention": "attention_over_attention",
}
DIRECTIONS = [(name, causal) for name in SERVED for causal in (False, True) if not causal or find(SERVED[name])[0].causal is True and name != "luna"]
named = pytest.mark.parametrize("name, causal", DIRECTIONS, ids=lambda x: x if isinstance(x, str) else "causal" if x else "bidirectional")


def loss_of(attention):
    """(parameters, a loss of queries, keys, values, validity and parameters)."""
    graph, params, rest = nnx.split(attention, nnx.Param, ...)

    def loss(q, k, v, valid, params, reference=False):
        attention = nnx.merge(graph, params, rest)
        o = (attention.reference if reference else attention)(q, k, v, valid_BS=valid)
        return (o.astype(jnp.float32) * jnp.cos(jnp.arange(o.size)).reshape(o.shape)).sum(), o

    return params, loss


@named
def test_variants_equal_their_reference(name, causal, interpreted):
    """Outputs, and gradients of inputs and parameters."""
    attention = layer(SERVED[name], causal)
    q, k, v = normals(2, 90, 90, 4, 2, 16)
    valid = jnp.arange(90)[None] < jnp.array([[90], [61]])
    params, loss = loss_of(attention)
    run = lambda reference: jax.jit(jax.value_and_grad(lambda *args: loss(*args, reference=reference), (0, 1, 2, 4), has_aux=True))(q, k, v, valid, params)
    assert_close(run(False), run(True), 1e-5)


@named
def test_variants_run_on_the_kernels_alone(name, causal, gpu, monkeypatch):
    """Every softmax over a pattern in them, as the plan says."""
    ran = []
    for backend in backends.RUN:
        fake = lambda q, *_, backend=backend, **__: ran.append(backend) or (q, jnp.zeros(q.shape[:3]))
        monkeypatch.setitem(backends.RUN, backend, fake)
    attention = layer(SERVED[name], causal, dtype=jnp.bfloat16)
    shapes = [jax.ShapeDtypeStruct((2, 90, heads, 16), jnp.bfloat16) for heads in (4, 2, 2)]
    jax.eval_shape(lambda *args: attention(*args[:3], valid_BS=args[3]), *shapes, jax.ShapeDtypeStruct((2, 90), bool))
    lists = name in ("bigbird", "nystrom") or (name == "star" and causal)  # random keys, the pseudo-inverse, the relay's running mean: no kernel here knows these
    assert set(ran) == {"pallas"} and attention.plan(90, 90, True)["backend"] == "pallas" + lists * " + xla"


XLA_BESIDE = {  # heads, options and dtypes without a kernel for features, and a choice among all keys
    "performer": ("performer(features=24)", 160, jnp.bfloat16),
    "rfa": ("rfa(features=12)", 160, jnp.bfloat16),
    "delta-nu": ("delta(nu=2)", 32, jnp.bfloat16),
    "delta-dpfp-f32": ("delta", 32, jnp.float32),
    "hard": ("hard", 16, jnp.bfloat16),
    "mix": ("mix(local(window=9), bigbird)", 16, jnp.bfloat16),
}


@pytest.mark.parametrize("name", XLA_BESIDE)
def test_the_record_says_what_xla_computes_beside_the_kernels(name, gpu):
    spec, H, dtype = XLA_BESIDE[name]
    attention = layer(spec, True, H=H, dtype=dtype)
    assert attention.plan(90, 90)["backend"] == "pallas + xla"
    program = str(jax.make_jaxpr(lambda q, k, v, key: attention(q, k, v, key=key))(*[jnp.zeros((2, 90, heads, H), dtype) for heads in (4, 2, 2)], jax.random.key(0)))
    assert "pallas_call" in program and not any(kernel in program for kernel in ("positive_kernel", "sines_kernel", "features_kernel"))
    narrow = {"delta-nu": "delta", "delta-dpfp-f32": "delta(feature_map='elu')", "hard": "full", "mix": "mix(local(window=9), full)"}.get(name, spec)
    assert layer(narrow, True, H=32, dtype=dtype).plan(90, 90)["backend"] == "pallas"


SUMMED = ("linear", "performer", "rfa", "retention", "delta")  # on the kernels of pallas_linear


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in (*SERVED, *SUMMED, "hard", "mix")])  # hard: on them in training
def test_the_other_variants_say_that_they_do_not(name, interpreted):
    with pytest.raises(UserError, match="attention.backend='pallas' .*use auto or xla"):
        nnx.eval_shape(lambda: layer(name, False)).backend()


def lowered(f, *shapes):
    """StableHLO for an H200, on a machine that may have no GPU."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture
def gpu(monkeypatch):
    """JAX says that it runs on a GPU that the kernels are for."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(backends, "_compute_capability", lambda: 9.0)


KERNELS = ("forward_kernel", "dq_kernel", "dkv_kernel")


@pytest.mark.parametrize("H", [64, 128])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=["bf16", "f16", "f32"])
def test_lowers_for_cuda(dtype, H, monkeypatch):
    """Forward and backward, with all that a kernel can be asked for."""
    monkeypatch.setattr(tuning, "_device_kind", lambda: "NVIDIA H200")
    pattern = CAUSAL & (Prefix(7) | random_table(64, 300, 300) | Every(5)) | SLOTS
    shapes = [jax.ShapeDtypeStruct((2, 300, heads, H), dtype) for heads in (4, 2, 2)]
    valid, params = jax.ShapeDtypeStruct((2, 300), bool), {name: jax.ShapeDtypeStruct((4,), jnp.float32) for name in ("cap", "slope")}

    def loss(q, k, v, params, valid):
        o, lse = pallas_attention(q, k, v, pattern=pattern, valid_BS=valid, score_mod=ScoreMod(bend, params))
        return o.astype(jnp.float32).sum() + lse.sum()

    text = lowered(jax.grad(loss, (0, 1, 2, 3)), *shapes, params, valid)
    assert [text.count(f'name = "{kernel}"') for kernel in KERNELS] == [1, 1, 1]
    assert "300x300" not in text and "320x320" not in text, "a dense mask or score matrix"


def test_hard_attention_lowers_for_cuda_in_training(gpu):
    """The average and the mean key, each with its gradients."""
    graph, state = nnx.split(layer("hard", True, H=64, dtype=jnp.bfloat16))

    def loss(q, k, v):
        attention = nnx.merge(graph, state)
        o = attention(q, k, v, key=jax.random.key(0))
        return o.astype(jnp.float32).sum() + attention.log_prob[...].sum() + attention.bonus[...]

    text = lowered(jax.grad(loss, (0, 1, 2)), *[jax.ShapeDtypeStruct((2, 90, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)])
    assert [text.count(f'name = "{kernel}"') for kernel in KERNELS] == [2, 2, 2]


@named
def test_variants_lower_for_cuda(name, causal, gpu):
    """Forward and backward, with padding; a variant that merges parts has kernels for each."""
    params, loss = loss_of(layer(SERVED[name], causal, H=64, dtype=jnp.bfloat16))
    shapes = [jax.ShapeDtypeStruct((2, 90, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]
    text = lowered(jax.grad(lambda *args: loss(*args)[0], (0, 1, 2, 4)), *shapes, jax.ShapeDtypeStruct((2, 90), bool), params)
    forward, dq, dkv = [text.count(f'name = "{kernel}"') for kernel in KERNELS]
    assert forward == dq == dkv >= 1


def test_plan_gives_the_density_of_blocks_beside_that_of_pairs(gpu):
    plan = layer("local(window=100)", False, dtype=jnp.bfloat16, H=64, max_len=1024).plan(1024, 1024)
    mask = block_mask(Band(100, 100), 1024, 1024, plan["q_block"], plan["k_block"])
    assert plan["backend"] == "pallas" and plan["computed_density"] == mask.computed_pairs / 1024**2 > plan["density"]


def entries(engine, kernels):
    """(device, dtype, head dim, kernel) of all that the table has."""
    rows = [(device, dtype, H) for device, dtypes in tuning.table()[engine].items() for dtype, widths in dtypes.items() for H in widths]
    return [(*row, kernel) for row, kernel in itertools.product(rows, kernels)]


ENTRIES = entries("attention", tuning.KERNELS)


@pytest.mark.parametrize("device, dtype, H, kernel", ENTRIES)
def test_tuned_tiles_are_what_the_compiler_takes(device, dtype, H, kernel):
    tile = tuning.tile(kernel, FULL, 2**16, 2**16, dtype, int(H), device=device)
    assert all(x >= 16 and x & (x - 1) == 0 for x in (tile.q_block, tile.k_block)) and tile.num_warps in (1, 2, 4, 8, 16) and tile.num_stages >= 1


@pytest.mark.parametrize("device, dtype, H, kernel", entries("scans", tuning.SCANS))
def test_tuned_tiles_of_scans_are_what_the_compiler_takes(device, dtype, H, kernel):
    tile, chunk = tuning.scan_tile(kernel, dtype, int(H), device=device), tuning.scan_chunk(dtype, int(H), device=device)
    assert all(x >= 16 and x & (x - 1) == 0 for x in (tile.features, tile.values, chunk)) and tile.num_warps in (1, 2, 4, 8, 16) and tile.num_stages >= 1


@pytest.mark.parametrize("device, dtype, H, kernel", [entry for entry in entries("features", tuning.FEATURES) if int(entry[2]) >= 64])
def test_tuned_tiles_of_features_are_what_the_compiler_takes(device, dtype, H, kernel):
    tile = tuning.feature_tile(kernel, dtype, int(H), device=device)
    assert tile.positions >= 16 and (tile.directions == 1 if kernel.startswith("normalized") else tile.directions >= 16)
    assert all(x & (x - 1) == 0 for x in (tile.positions, tile.directions)) and tile.num_warps in (1, 2, 4, 8, 16) and tile.num_stages >= 1


def test_scans_in_float16_have_the_tiles_of_float32_and_wide_ones_those_of_the_last_row():
    assert tuning.scan_tile("dqk", jnp.float16, 64) == tuning.scan_tile("dqk", jnp.float32, 64) != tuning.scan_tile("dqk", jnp.bfloat16, 64)
    assert tuning.scan_tile("dqk", jnp.bfloat16, 1000) == tuning.scan_tile("dqk", jnp.bfloat16, 256)


@pytest.mark.parametrize("dtype, H, kernel", [entry[1:] for entry in ENTRIES if entry[0] == "default"])
def test_default_tiles_fit_the_smallest_shared_memory(dtype, H, kernel):
    """99 KiB a program, on compute capability 8.6 and 8.9: the tiles that stay, and `num_stages` copies of those that are streamed."""
    tile = tuning.tile(kernel, FULL, 2**16, 2**16, dtype, int(H))
    stay = {"forward": tile.q_block, "dq": 2 * tile.q_block, "dkv": 2 * tile.k_block}[kernel]
    stream = 2 * (tile.q_block if kernel == "dkv" else tile.k_block)
    assert (stay + tile.num_stages * stream) * int(H) * jnp.dtype(dtype).itemsize <= 99 * 1024


@pytest.mark.parametrize("pattern", [FULL, Band(3, 0), Band(1000, 0), *(BlockTable(block, ((0,),)) for block in (1, 24, 64, 100, 256, 1000))], ids=str)
def test_tiles_follow_the_pattern_and_the_lengths(pattern):
    for kernel, T, S in itertools.product(tuning.KERNELS, (1, 40, 5000), (1, 40, 5000)):
        tile = tuning.tile(kernel, pattern, T, S, jnp.bfloat16, 64, device="default")
        for size, length in ((tile.q_block, T), (tile.k_block, S)):
            assert 16 <= size <= 64 and size & (size - 1) == 0 and size < max(2 * length, 17)


def test_a_tile_with_fewer_rows_has_fewer_warps():
    of = lambda kernel, pattern: dataclasses.astuple(tuning.tile(kernel, pattern, 5000, 5000, jnp.bfloat16, 64, device="NVIDIA H200"))
    assert (of("forward", FULL), of("dkv", FULL)) == ((128, 128, 8, 3), (64, 128, 8, 3))
    assert (of("forward", Band(8, 8)), of("dkv", Band(8, 8))) == ((32, 32, 4, 3), (32, 32, 4, 3))
