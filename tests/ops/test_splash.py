"""Splash attention: interpreted on the CPU against dense attention in float64, and lowered for TPUs."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_blocked import assert_close, exact, holes, normals, random_table, results
from test_pallas import DIRECTIONS, SERVED as SERVED_BY_PALLAS, SLOTS, loss_of

from attn_zoo import VARIANTS, make_attention
from attn_zoo.ops import backends, splash
from attn_zoo.ops.blocked import ScoreMod
from attn_zoo.ops.patterns import CAUSAL, FULL, Band, BlockTable, Every, Prefix
from attn_zoo.ops.splash import ComputedMask, mask_of, splash_attention
from attn_zoo.spec import Unsupported, UserError


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels run on the CPU."""
    monkeypatch.setattr(splash, "INTERPRET", True)


def engine(**kwargs):
    return lambda q, k, v, params: splash_attention(q, k, v, **kwargs)


# pattern, T, S, N, K, H, validity with holes, further arguments
CASES = {
    "full": (FULL, 128, 128, 1, 1, 64, False, {}),
    "full-cross-grouped-holes-H80": (FULL, 50, 183, 4, 2, 80, True, {}),
    "causal-grouped": (CAUSAL, 200, 200, 4, 2, 16, False, {"block": 128}),
    "strides-three-heads-a-key-head": (CAUSAL & (Every(5) | Band(9, 9)), 130, 130, 3, 1, 16, True, {"block": 128}),
    "window-beyond-the-keys-scale-H136": (Band(4, 0), 260, 121, 2, 1, 136, False, {"scale": 0.7}),
    "slots": (SLOTS, 150, 47, 2, 1, 16, True, {"block": 128}),
    "table-that-blocks-straddle": (CAUSAL & (Prefix(7) | random_table(24, 170, 170)), 170, 170, 2, 1, 8, True, {"block": 128}),
    "table-of-whole-blocks": (BlockTable(128, ((1,), (), (0, 1))), 384, 256, 1, 1, 16, False, {}),
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
    assert_close(gradients, expected_gradients, 6e-6)


def test_a_row_that_sees_nothing_gives_zeros_and_moves_nothing(interpreted):
    """Row 0 sees nothing, as no key is before it; the keys 100 to 139 are seen by no row; the last sequence has no valid key."""
    q, k, v = normals(3, 140, 140, 2, 1, 16)
    valid = jnp.ones((3, 140), bool).at[:, 100:].set(False).at[2].set(False)
    (o, lse), (dq, dk, dv, _) = results(engine(pattern=Band(ahead=-1), valid_BS=valid, block=128), q, k, v)
    assert (o[:, 0] == 0).all() and (lse[:, 0] == -jnp.inf).all() and (o[2] == 0).all() and (lse[2] == -jnp.inf).all()
    assert (dq[:, 0] == 0).all() and (dk[:, 100:] == 0).all() and (dv[:, 100:] == 0).all()
    assert all((x[2] == 0).all() and np.isfinite(x).all() for x in (dq, dk, dv))
    assert np.isfinite(lse[:2, 1:]).all() and (dv[:2, :100] != 0).all(axis=(2, 3)).all()


def test_where_no_row_sees_anything_all_is_zero(interpreted):
    q, k, v = normals(1, 20, 20, 2, 2, 16)
    (o, lse), (dq, dk, dv, _) = results(engine(pattern=BlockTable(16, ((), ()))), q, k, v)
    assert all((x == 0).all() for x in (o, dq, dk, dv)) and (lse == -jnp.inf).all()


def test_bfloat16_sums_in_float32(interpreted):
    q, k, v = normals(1, 250, 250, 2, 1, 32, jnp.bfloat16)
    (o, lse), gradients = results(engine(pattern=CAUSAL, block=128), q, k, v)
    expected, expected_gradients = exact(q, k, v, pattern=CAUSAL)
    assert all(x.dtype == jnp.bfloat16 for x in (o, *gradients[:3])) and lse.dtype == jnp.float32
    assert_close(o, expected[0], 2**-7)  # one rounding of the scaled queries, one of the output, 2^-9 each
    assert_close(lse, expected[1], 2**-9)
    assert_close(gradients, expected_gradients, 2**-6)


@dataclasses.dataclass(frozen=True)
class Unlooked(Band):
    """A band whose mask must not be asked for, unless inside a kernel."""

    def mask(self, i, j):
        if not isinstance(i, jax.Array):
            raise AssertionError("a block was evaluated pair by pair")
        return super().mask(i, j)


def shapes(B, T, S, N, K, H, dtype):
    return [jax.ShapeDtypeStruct((B, length, heads, H), dtype) for length, heads in ((T, N), (S, K), (S, K))]


def test_no_pair_of_an_elementwise_pattern_is_evaluated_beforehand():
    long = shapes(1, 2**14, 2**14, 2, 1, 64, jnp.bfloat16)
    attend = lambda pattern: jax.eval_shape(lambda *x: splash_attention(*x, pattern=pattern)[0], *long)
    assert attend(Unlooked(1000, 0)).shape == (1, 2**14, 2, 64)
    with pytest.raises(AssertionError, match="pair by pair"):
        attend(Unlooked(1000, 0) & BlockTable(2**13, ((0, 1), (0, 1))))


@pytest.mark.parametrize(
    "pattern, computed, distinct",
    [(FULL, False, 0), (BlockTable(256, ((0, 2), (1,), (2,), (3,))), False, 0), (CAUSAL, True, 0), (CAUSAL & BlockTable(512, ((0,), (0, 1))), False, 1)],
    ids=["full", "blocks", "causal", "causal-blocks"],
)
def test_partial_blocks_are_computed_or_stored_once(pattern, computed, distinct):
    """Where all blocks are full there is nothing to mask; the diagonal blocks of a causal pattern are all alike."""
    mask = mask_of(pattern, 1024, 1024, 128, 128)
    assert isinstance(mask, ComputedMask) == computed and len({id(block) for block in mask.stored.values()}) == distinct
    for c, d in np.ndindex(8, 8):
        i, j = 128 * c + np.arange(128)[:, None], 128 * d + np.arange(128)[None]
        seen, stands_for = np.broadcast_to(pattern.mask(i, j), (128, 128)), mask[128 * c : 128 * c + 128, 128 * d : 128 * d + 128]
        assert (stands_for.any(), stands_for.all()) == (seen.any(), seen.all())
        if (c, d) in mask.stored:
            np.testing.assert_array_equal(stands_for, seen)


def test_refuses_with_the_reason():
    q, k, v = normals(1, 16, 16, 2, 2, 16)
    for args, kwargs, reason in (
        ((q, k, v), {"score_mod": ScoreMod(lambda s, i, j, p: s, ())}, "it cannot modify scores"),
        ([x.astype(jnp.float16) for x in (q, k, v)], {}, "bfloat16 or float32, not float16"),
        ([jnp.zeros((1, 16, 1, 272))] * 3, {}, "at most 256, not 272"),
    ):
        with pytest.raises(Unsupported, match=f"splash attention cannot serve here: .*{reason}"):
            splash_attention(*args, pattern=FULL, **kwargs)


def layer(spec, causal, max_len=150):
    return make_attention(spec, num_heads=4, num_kv_heads=2, head_dim=16, max_len=max_len, causal=causal, backend="splash", rngs=nnx.Rngs(1))


# The variants whose softmax runs on splash attention; the others say that theirs does not. Adaptive span modifies scores.
SERVED = {name: spec for name, spec in SERVED_BY_PALLAS.items() if name != "adaptive_span"}
SERVED_DIRECTIONS = [(name, causal) for name, causal in DIRECTIONS if name in SERVED]
named = pytest.mark.parametrize("name, causal", SERVED_DIRECTIONS, ids=lambda x: x if isinstance(x, str) else "causal" if x else "bidirectional")


def asked(name, causal, monkeypatch):
    """{(pattern, T, S)} of every softmax that a variant takes over 150 positions; splash alone is asked for them."""
    found = set()

    def record(q, k, v, *, pattern, **_):
        found.add((pattern, q.shape[1], k.shape[1]))
        return q, jnp.zeros(q.shape[:3])

    for backend in backends.RUN:
        monkeypatch.setitem(backends.RUN, backend, record if backend == "splash" else None)
    attention = layer(SERVED[name], causal)
    lists = name in ("bigbird", "nystrom") or (name == "star" and causal)  # random keys, the pseudo-inverse, the relay's running mean: splash does not know these
    assert set(attention.plan(150, 150, True)["backend"].split(" + ")) == {"splash"} | ({"xla"} if lists else set())
    jax.eval_shape(lambda *args: attention(*args[:3], valid_BS=args[3]), *shapes(2, 150, 150, 4, 2, 16, jnp.float32), jax.ShapeDtypeStruct((2, 150), bool))
    assert found
    return found


@named
def test_the_masks_of_variants_are_their_patterns(name, causal, interpreted, monkeypatch):
    """Block by block, as splash asks for them, and as its kernels evaluate or load them; the kernels know nothing else of a pattern."""
    for pattern, T, S in asked(name, causal, monkeypatch):
        mask = mask_of(pattern, T, S, 128, 128)
        i, j = np.ogrid[: mask.shape[0], : mask.shape[1]]
        seen = np.broadcast_to(pattern.mask(i, j) & (j < S), mask.shape)
        for c, d in np.ndindex(mask.shape[0] // 128, mask.shape[1] // 128):
            rows, columns = slice(128 * c, 128 * c + 128), slice(128 * d, 128 * d + 128)
            block, stands_for = seen[rows, columns][: T - 128 * c], mask[rows, columns]
            assert stands_for.any() == block.any() and (block.all() or not stands_for.all())
            if isinstance(mask, ComputedMask):
                np.testing.assert_array_equal(mask.mask_function(*map(jnp.asarray, np.broadcast_arrays(i[rows], j[:, columns]))), seen[rows, columns])
            else:
                np.testing.assert_array_equal(np.broadcast_to(stands_for, (128, 128))[: T - 128 * c], block)


def test_a_variant_that_merges_parts_equals_its_reference(interpreted):
    attention = layer(SERVED["bigbird"], True)
    q, k, v = normals(2, 150, 150, 4, 2, 16)
    valid = jnp.arange(150)[None] < jnp.array([[150], [61]])
    params, loss = loss_of(attention)
    run = lambda reference: jax.jit(jax.value_and_grad(lambda *args: loss(*args, reference=reference), (0, 1, 2, 4), has_aux=True))(q, k, v, valid, params)
    assert_close(run(False), run(True), 1e-5)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in (*SERVED, "hard", "mix")])  # hard: on them in training
def test_the_other_variants_say_that_they_do_not(name, interpreted):
    with pytest.raises(UserError, match="attention.backend='splash' .*use auto or xla"):
        nnx.eval_shape(lambda: layer(name, False)).backend()


def kernels_in(text):
    calls = [line for line in text.splitlines() if "tpu_custom_call" in line]
    return sorted(re.search(r"splash_mha_([a-z]+)", call)[1] for call in calls)


def lowered(attend, *arguments):
    """StableHLO of the gradients for a TPU, on a machine that may have none."""
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    loss = lambda *args: sum(x.astype(jnp.float32).sum() for x in attend(*args))
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("pattern", [CAUSAL & (Prefix(7) | Every(5)) | SLOTS, CAUSAL & random_table(64, 600, 600), FULL], ids=["computed", "stored", "full"])
def test_lowers_for_tpu(pattern, dtype):
    """Forward and backward, with key validity."""
    attend = lambda q, k, v, valid: splash_attention(q, k, v, pattern=pattern, valid_BS=valid, block=128)
    text = lowered(attend, *shapes(2, 600, 600, 4, 2, 64, dtype), jax.ShapeDtypeStruct((2, 600), bool))
    assert kernels_in(text) == ["dkv", "dq", "fwd"]
    assert "600x600" not in text and "640x640" not in text, "a dense mask or score matrix"


@pytest.mark.parametrize("H", [16, 40, 128, 256])
def test_heads_of_other_widths_lower_for_tpu(H):
    attend = lambda q, k, v: splash_attention(q, k, v, pattern=CAUSAL, block=128)
    assert kernels_in(lowered(attend, *shapes(1, 256, 256, 2, 1, H, jnp.bfloat16))) == ["dkv", "dq", "fwd"]


@named
def test_the_masks_of_variants_lower_for_tpu(name, causal, interpreted, monkeypatch):
    for pattern, T, S in asked(name, causal, monkeypatch):
        monkeypatch.setattr(splash, "INTERPRET", False)
        attend = lambda q, k, v: splash_attention(q, k, v, pattern=pattern, block=128)
        assert kernels_in(lowered(attend, *shapes(1, T, S, 1, 1, 64, jnp.bfloat16))) == ["dkv", "dq", "fwd"]


def test_lists_of_blocks_fit_the_scalar_memory():
    """A row that sees every key makes all lists as long as its own, and then the blocks grow."""
    for pattern, expected in ((Prefix(16), 256), (Band(255, 0), 128)):
        sizes = splash.block_sizes(pattern, 2**17, 2**17)
        assert sizes == (expected, expected) and mask_of(pattern, 2**17, 2**17, *sizes).scalar_bytes <= splash.SCALAR_BYTES


def test_where_jax_has_moved_it_the_others_still_run(monkeypatch):
    def moved():
        raise ImportError("No module named 'jax.experimental.pallas.ops.tpu.splash_attention'")

    monkeypatch.setattr(backends, "_splash", moved)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert backends.choose("auto", FULL, jnp.bfloat16, 64) == "xla"
    with pytest.raises(UserError, match=f"'splash' cannot serve here: jax {jax.__version__} has it elsewhere: No module named .*; use auto or xla"):
        backends.choose("splash", FULL, jnp.bfloat16, 64)


def test_an_unknown_backward_pass_is_left_alone(interpreted, monkeypatch):
    monkeypatch.setattr(splash.kernels, "_splash_attention_bwd_dq", lambda q, k, v, do, mask_info: None)
    monkeypatch.setattr(splash, "backward_is_known", splash.backward_is_known.__wrapped__)
    with pytest.raises(UserError, match=f"'splash' cannot serve here: its backward pass in jax {jax.__version__} is not the one known here; use auto or xla"):
        backends.choose("splash", FULL, jnp.bfloat16, 64)
