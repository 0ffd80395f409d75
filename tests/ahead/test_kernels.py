"""The Pallas kernels, compiled for GPUs: they fit into shared memory and spill little, with the tiles that the tables give them."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ahead import A6000, H200, WITHOUT_PRODUCTS, assembled, compiled
from attn_zoo.attention.fixed import OtherBlocks
from attn_zoo.attention.linear import elu
from attn_zoo.attention.memory_compressed import PastSlots
from attn_zoo.attention.poolingformer import NearSlots
from attn_zoo.ops import pallas_linear, tuning
from attn_zoo.ops.blocked import ScoreMod
from attn_zoo.ops.decayed import normed_sums
from attn_zoo.ops.delta import delta_rule
from attn_zoo.ops.linear import linear_attention
from attn_zoo.ops.mosaic_attention import mosaic_attention
from attn_zoo.ops.pallas_attention import pallas_attention
from attn_zoo.ops.pallas_features import positive_features, sine_features
from attn_zoo.ops.pallas_normalized import normalized_features
from attn_zoo.ops.patterns import CAUSAL, FULL, Band, BlockTable, Every, Prefix

DTYPES = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=["bf16", "f16", "f32"])
KINDS = pytest.mark.parametrize("kind", [H200, A6000])
SPILLED = 512  # bytes a thread, at most
TABLE = BlockTable(64, tuple((i % 5, (i + 3) % 11) for i in range(16)))


def bend(scores, i, j, params):
    """A soft cap and a slope by distance."""
    return params["cap"] * jnp.tanh(scores / params["cap"]) - params["slope"] * abs(i - j)


def attends(dtype, H, **kwargs):
    """(forward and backward of a kernel call, its shapes)."""
    shapes = [jax.ShapeDtypeStruct((2, 1000, heads, H), dtype) for heads in (4, 2, 2)]
    loss = lambda q, k, v: sum(x.astype(jnp.float32).sum() for x in pallas_attention(q, k, v, **kwargs))
    return jax.value_and_grad(loss, (0, 1, 2)), *shapes


def scans(name, dtype, R, H=64):
    """The same of a scan, with keys and queries of R features."""
    shapes = [jax.ShapeDtypeStruct((2, 1000, *rest), dtype) for rest in ((4, R), (2, R), (2, H))] + [jax.ShapeDtypeStruct((2, 1000, 2), jnp.float32)]
    run = {
        "linear": lambda q, k, v, _: pallas_linear.pallas_sums(q, k, v),
        "decayed": pallas_linear.pallas_sums,
        "normed": lambda *args: normed_sums(*args, jnp.ones((1000, 4)), backend="pallas"),
        "mapped": lambda q, k, v, _: linear_attention(q, k, v, causal=True, backend="pallas", phi=elu),
        "all": lambda q, k, v, _: linear_attention(q, k, v, causal=False, backend="pallas"),
        "delta": lambda q, k, v, beta: delta_rule(q, k, v, beta, backend="pallas"),
    }[name]
    return jax.value_and_grad(lambda *args: sum(x.sum() for x in jax.tree.leaves(run(*args))), (0, 1, 2, 3)), *shapes


def by_matrix_units(kernels) -> bool:
    """Also in float32, whose products are three of TF32: a third of 495 TFLOP/s by an H200's data sheet, where its units for single numbers do 67."""
    return all(re.search(r"mma\.(mma_async|sync)", kernel.ptx) for kernel in kernels.values())


PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}  # of a block


def products_of(kernel, num_warps) -> int:
    """Multiply-adds that stand in a program, of all its warpgroups: a tile with too few rows for them has each compute all of it."""
    return num_warps // 4 * sum(64 * int(columns) * int(depth) for columns, depth in re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)", kernel.ptx))


@KINDS
@DTYPES
@pytest.mark.parametrize("H", [16, 64, 128, 256])
def test_attention_fits(kind, dtype, H, monkeypatch):
    monkeypatch.setattr(tuning, "_device_kind", lambda: kind)
    found = assembled(*attends(dtype, H, pattern=CAUSAL), gpu=kind)
    assert set(found) == {"forward_kernel", "dq_kernel", "dkv_kernel"} and by_matrix_units(found)
    assert {name: kernel.spilled for name, kernel in found.items() if kernel.spilled > SPILLED} == {}
    if kind == H200 and dtype != jnp.float32:
        for kernel, products in PRODUCTS.items():
            tile, blocks = tuning.tile(kernel, CAUSAL, 1000, 1000, dtype, H), 2  # a full one, and a partial one
            if (kernel, H) == ("dkv", 256):  # its sums fill the registers of two warpgroups with 64 keys, of which both compute all scores
                continue
            assert products_of(found[f"{kernel}_kernel"], tile.num_warps) == blocks * products * tile.q_block * tile.k_block * H, "by Hopper's own instructions, none twice"


@pytest.mark.parametrize("H", [64, 128])
def test_blocks_of_64_fit(H):
    """A pattern of such blocks has tiles no wider, and so with fewer warps."""
    found = assembled(*attends(jnp.bfloat16, H, pattern=CAUSAL & TABLE))
    assert {name: kernel.spilled for name, kernel in found.items() if kernel.spilled > SPILLED} == {}
    for kernel, products in PRODUCTS.items():
        assert products_of(found[f"{kernel}_kernel"], 4) == 2 * products * 64 * 64 * H


def everything(dtype, H):
    """All that the attention kernels can be asked for: tables, slots, strides, a score modification with gradients, validity, a head dim to be padded."""
    shapes = [jax.ShapeDtypeStruct((2, 1000, heads, H), dtype) for heads in (4, 2, 2)]
    shapes += [{name: jax.ShapeDtypeStruct((4,), jnp.float32) for name in ("cap", "slope")}, jax.ShapeDtypeStruct((2, 1000), bool)]

    def loss(q, k, v, params, valid):
        pattern = CAUSAL & (Prefix(7) | TABLE | Every(5)) | PastSlots(3, 5, True) | NearSlots(4, -9, 11)
        return sum(x.astype(jnp.float32).sum() for x in pallas_attention(q, k, v, pattern=pattern, valid_BS=valid, score_mod=ScoreMod(bend, params)))

    return jax.value_and_grad(loss, (0, 1, 2, 3)), *shapes


@KINDS
@DTYPES
@pytest.mark.parametrize("H", [40, 128])
def test_attention_with_everything_compiles(kind, dtype, H, monkeypatch):
    monkeypatch.setattr(tuning, "_device_kind", lambda: kind)
    text = compiled(*everything(dtype, H), gpu=kind).as_text()
    assert "1000,1000]" not in text and "1024,1024]" not in text, "a dense mask or score matrix"


SCANS = [(name, R, dtype) for name in ("linear", "decayed", "mapped", "all", "delta") for R in (64, 256) for dtype in (jnp.bfloat16, jnp.float32)]
SCANS += [("normed", R, jnp.bfloat16) for R in (64, 128)]  # of as many values


@KINDS
@pytest.mark.parametrize("name, R, dtype", SCANS, ids=lambda x: x if isinstance(x, str | int) else jnp.dtype(x).name)
def test_scans_fit(name, R, dtype, kind, monkeypatch):
    monkeypatch.setattr(tuning, "_device_kind", lambda: kind)
    found = assembled(*scans(name, dtype, R, R if name == "normed" else 64), gpu=kind)
    kernels = {kernel.partition("__")[0] for kernel in found} - WITHOUT_PRODUCTS
    systems = {"wy_kernel", "dwy_kernel"} if name == "delta" else set()
    assert kernels == {"states_kernel", "output_kernel", "dv_kernel", "dqk_kernel"} | systems
    assert by_matrix_units({name: kernel for name, kernel in found.items() if name.partition("__")[0] in kernels})
    assert {name: kernel.spilled for name, kernel in found.items() if kernel.spilled > SPILLED} == {}


def features(name, dtype, R, H):
    """Forward and backward of random features, and their shapes: rfa's directions are of two heads, and have a gradient."""
    w = jax.ShapeDtypeStruct((2, R, H) if name == "sines" else (R, H), jnp.float32)
    run = {"queries": positive_features, "keys": functools.partial(positive_features, largest=60.0), "sines": sine_features}[name]
    return jax.value_and_grad(lambda x, w: run(x, w).astype(jnp.float32).sum(), (0, 1)), jax.ShapeDtypeStruct((2, 1000, 4, H), dtype), w


@KINDS
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("H, R", [(64, 128), (64, 256), (128, 128), (128, 256)])
@pytest.mark.parametrize("name", ["queries", "keys", "sines"])
def test_random_features_fit(name, H, R, dtype, kind):
    found = assembled(*features(name, dtype, R, H), gpu=kind)
    prefix = "sines" if name == "sines" else "positive"
    assert {kernel.partition("__")[0] for kernel in found} == {f"{prefix}_kernel", f"{prefix}_gradient_kernel"}
    assert by_matrix_units(found)
    assert {kernel: it.spilled for kernel, it in found.items() if it.spilled > SPILLED} == {}


@KINDS
@pytest.mark.parametrize("name, dtype", [("elu", jnp.bfloat16), ("elu", jnp.float32), ("dpfp", jnp.bfloat16)], ids=["elu-bf16", "elu-f32", "dpfp-bf16"])
@pytest.mark.parametrize("H", [64, 128])
def test_normalized_features_fit(H, name, dtype, kind):
    loss = lambda x: normalized_features(x, dpfp=name == "dpfp").astype(jnp.float32).sum()
    found = assembled(jax.value_and_grad(loss), jax.ShapeDtypeStruct((2, 1000, 4, H), dtype), gpu=kind)
    assert {kernel.partition("__")[0] for kernel in found} == {"features_kernel", "features_gradient_kernel"}
    assert by_matrix_units(found) == (name == "dpfp")
    assert {kernel: it.spilled for kernel, it in found.items() if it.spilled > SPILLED} == {}


PATTERNS = [FULL, CAUSAL, Band(256, 0), Band(100, 100), CAUSAL & (Prefix(7) | Every(5)), PastSlots(3, 5, True), CAUSAL & OtherBlocks(20, 3, False)]
MOSAIC = [(pattern, 64, jnp.bfloat16) for pattern in PATTERNS] + [(CAUSAL, H, dtype) for H in (40, 128, 256) for dtype in (jnp.bfloat16, jnp.float16)]


@pytest.mark.parametrize("pattern, H, dtype", MOSAIC, ids=lambda x: getattr(x, "__name__", str(x)))
def test_the_mosaic_kernel_compiles(pattern, H, dtype):
    shapes = [jax.ShapeDtypeStruct((2, 1000, heads, H), dtype) for heads in (4, 2, 2)]
    text = compiled(lambda q, k, v: mosaic_attention(q, k, v, pattern=pattern), *shapes).as_text()
    assert text.count("mosaic_gpu") and "1000,1000]" not in text and "1024,1024]" not in text


@pytest.mark.parametrize("H", [64, 128])
def test_the_hopper_kernel_of_jax_compiles_as_core_bench_calls_it(H, monkeypatch):
    """Of bidirectional attention with its gradients; causal it has none."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "experiments")
    from bench.jax_peers import _pallas_hopper

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    shapes = [jax.ShapeDtypeStruct((1, 1024, 2, H), jnp.float16)] * 3
    compiled(lambda q, k, v: jax.vjp(functools.partial(_pallas_hopper, is_causal=False), q, k, v)[1](q), *shapes)
    compiled(functools.partial(_pallas_hopper, is_causal=True), *shapes)


def test_what_does_not_fit_is_caught():
    with pytest.raises(jax.errors.JaxRuntimeError, match="Shared memory size limit exceeded"):
        compiled(*attends(jnp.float32, 128, pattern=CAUSAL, block=128))
