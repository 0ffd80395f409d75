"""The Mosaic kernel, interpreted on the CPU with its barriers and copies, against dense attention in float64; compiled for an H200 by tests/ahead."""

import jax
import jax.numpy as jnp
import pytest
from test_blocked import assert_close, exact, normals, results
from tiny import ON_CPU

from attn_zoo import make_attention
from attn_zoo.ops import backends, mosaic_attention as mosaic, pallas_kernels
from attn_zoo.ops.backends import choose
from attn_zoo.ops.block_mask import block_mask
from attn_zoo.ops.mosaic_attention import lists, mosaic_attention
from attn_zoo.ops.patterns import CAUSAL, FULL, Band, BlockTable, Every, Prefix
from attn_zoo.spec import Unsupported, UserError


@pytest.fixture
def interpreted(monkeypatch):
    """The forward kernel runs on the CPU, and those of the backward pass."""
    monkeypatch.setattr(mosaic, "INTERPRET", True)
    monkeypatch.setattr(pallas_kernels, "INTERPRET", True)


# pattern, T, S, N, K, H, dtype
CASES = {
    "full-cross-grouped-ring-of-five-H256": (FULL, 70, 300, 2, 1, 256, jnp.float16),
    "causal-full-and-partial-blocks": (CAUSAL, 200, 200, 1, 1, 64, jnp.bfloat16),
    "prefix-and-strides-head-dim-padded": (CAUSAL & (Prefix(7) | Every(5)), 150, 150, 1, 1, 40, jnp.float16),
    "rows-and-whole-blocks-that-see-nothing": (Band(4, -1), 200, 21, 1, 1, 128, jnp.bfloat16),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_dense_attention(name, interpreted):
    pattern, T, S, N, K, H, dtype = CASES[name]
    q, k, v = normals(1, T, S, N, K, H, dtype)
    attend = lambda q, k, v, params: mosaic_attention(q, k, v, pattern=pattern)
    (o, lse), gradients = results(attend, q, k, v)
    expected, expected_gradients = exact(q, k, v, pattern=pattern)
    assert o.dtype == dtype and lse.dtype == jnp.float32
    rounding = 2.0 ** (-10 if dtype == jnp.float16 else -7)  # of the weights, and of the output
    assert_close(o, expected[0], rounding)
    assert_close(lse, expected[1], 1e-5)
    assert_close(gradients, expected_gradients, 2 * rounding)


@pytest.mark.parametrize("pattern", [FULL, CAUSAL, Band(200, 0), Band(4, -1), CAUSAL & Prefix(300)], ids=str)
def test_lists_have_the_blocks_of_both_kinds_the_full_ones_first(pattern):
    mask = block_mask(pattern, 1000, 700, 128, 64)
    start, full, block = lists(mask)
    for c in range(mask.num_q):
        of = lambda starts, blocks: blocks[starts[c] : starts[c + 1]].tolist()
        assert block[start[c] : start[c + 1]].tolist() == of(mask.full_start, mask.full_block) + of(mask.part_start, mask.part_block)
        assert full[c] == mask.full_start[c + 1] - mask.full_start[c]


REFUSED = {
    "dtype": (FULL, jnp.float32, {}, "bfloat16 or float16, not float32"),
    "head dim": (FULL, jnp.bfloat16, {"H": 512}, "at most 256, not 512"),
    "padding": (FULL, jnp.bfloat16, {"masked": True}, "which keys are valid"),
    "scores": (FULL, jnp.bfloat16, {"modified": True}, "does not modify scores"),
    "tables": (CAUSAL & BlockTable(64, ((0,),)), jnp.bfloat16, {}, "tables of blocks"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_refuses_is_refused_with_the_reason(name, interpreted):
    pattern, dtype, options, reason = REFUSED[name]
    H = options.pop("H", 64)
    with pytest.raises(UserError, match=f"attention.backend='mosaic' cannot serve here: .*{reason}; use auto or xla"):
        choose("mosaic", pattern, dtype, H, **options)


def test_a_call_with_padding_is_refused():
    q, k, v = normals(1, 16, 16, 1, 1, 64, jnp.bfloat16)
    with pytest.raises(Unsupported, match="the Mosaic kernel cannot serve here: it does not know which keys are valid"):
        mosaic_attention(q, k, v, pattern=FULL, valid_BS=jnp.ones((1, 16), bool))


@pytest.mark.parametrize("platform, capability, reason", [("cpu", 0.0, "NVIDIA GPUs"), ("gpu", 8.0, "Hopper"), ("gpu", 10.0, "Hopper"), ("gpu", 9.0, None)])
def test_it_is_for_hopper_alone_and_asked_for_by_name(platform, capability, reason, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(backends, "_compute_capability", lambda: capability)
    monkeypatch.setattr(backends, "_cuda_version", lambda: 13000)
    assert choose("auto", Band(8, 8), jnp.bfloat16, 64) == (ON_CPU if platform == "cpu" else "pallas")
    if reason is None:
        attention = make_attention("local(window=8)", num_heads=2, head_dim=64, max_len=1000, dtype=jnp.bfloat16, backend="mosaic")
        plan = attention.plan(1000, 1000)
        assert (plan["backend"], plan["q_block"], plan["k_block"]) == ("mosaic", 128, 128)
    else:
        with pytest.raises(UserError, match=f"attention.backend='mosaic' cannot serve here: .*{reason}"):
            choose("mosaic", Band(8, 8), jnp.bfloat16, 64)


def test_lowers_for_cuda():
    """The kernel, and those of the backward pass, on a machine that may have no GPU."""
    shapes = [jax.ShapeDtypeStruct((2, 300, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]
    loss = lambda q, k, v: mosaic_attention(q, k, v, pattern=CAUSAL)[0].astype(jnp.float32).sum()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        text = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 1 and [text.count(f'name = "{kernel}"') for kernel in ("forward_kernel", "dq_kernel", "dkv_kernel")] == [0, 1, 1]


@pytest.mark.parametrize("variant", ["nystrom", "hard"])
def test_a_layer_that_computes_in_float32_is_refused_before_it_runs(variant, interpreted):
    attention = make_attention(variant, num_heads=2, head_dim=16, max_len=64, dtype=jnp.bfloat16, backend="mosaic")
    with pytest.raises(UserError, match="attention.backend='mosaic' cannot serve here: it takes bfloat16 or float16, not float32"):
        attention.plan(64, 64)
