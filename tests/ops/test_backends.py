"""Which backend runs, why one is refused, and that all of them lower for the accelerators they are for."""

import dataclasses
import re
import types

import jax
import jax._src.cudnn.fused_attention_stablehlo as cudnn
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ON_CPU

from attn_zoo import VARIANTS, make_attention
from attn_zoo.ops import backends
from attn_zoo.ops.backends import attention, choose
from attn_zoo.ops.blocked import ScoreMod, blocked_attention
from attn_zoo.ops.patterns import CAUSAL, FULL, Band, Pattern, Prefix
from attn_zoo.spec import UserError

SHAPES = {dtype: [jax.ShapeDtypeStruct((2, 48, heads, 16), dtype) for heads in (4, 2, 2)] for dtype in (jnp.float32, jnp.bfloat16)}


def pretend(monkeypatch, platform, **device):
    """JAX says that it runs on such a platform, whose first device has these attributes."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(**({"compute_capability": "9.0"} if platform == "gpu" and not device else device))])


@pytest.fixture
def gpu(monkeypatch):
    """JAX says that it runs on a GPU, with a recent cuDNN."""
    pretend(monkeypatch, "gpu")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)


@pytest.fixture(autouse=True)
def cudnn_anywhere(monkeypatch):
    """Its calls are lowered here, not run."""
    monkeypatch.setattr(backends, "ANYWHERE", True)


def test_cudnn_is_refused_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(backends, "ANYWHERE", False)
    with pytest.raises(UserError, match="attention.backend='cudnn' cannot serve here: it is for NVIDIA GPUs, and this runs on cpu"):
        choose("cudnn", FULL, jnp.bfloat16, 64)


def layer(spec, dtype=jnp.bfloat16, causal=True, backend="cudnn", N=4, H=16, padding="any"):
    return make_attention(spec, num_heads=N, num_kv_heads=2, head_dim=H, max_len=48, causal=causal, dtype=dtype, backend=backend, padding=padding)


# What cuDNN serves without a dense mask.
SERVED = {
    "full-bf16": (FULL, jnp.bfloat16, 64),
    "full-f16": (FULL, jnp.float16, 256),
    "causal": (CAUSAL, jnp.bfloat16, 8),
    "causal-window": (Band(128, 0), jnp.bfloat16, 64),
    "causal-window-of-one": (Band(0, 0), jnp.bfloat16, 64),
}
# pattern, dtype, head dim, masked, modified, and words of the reason
REFUSED = {
    "f32": (FULL, jnp.float32, 64, False, False, "bfloat16 or float16, not float32"),
    "key-validity": (CAUSAL, jnp.bfloat16, 64, True, False, "validity"),
    "padded-causal-window": (Band(128, 0), jnp.bfloat16, 64, "end", False, "last valid key"),
    "score-mod": (CAUSAL, jnp.bfloat16, 64, False, True, "modify scores"),
    "window-on-both-sides": (Band(128, 128), jnp.bfloat16, 64, False, False, "causal-window"),
    "window-ahead": (Band(128, -1), jnp.bfloat16, 64, False, False, "causal-window"),
    "all-but-the-past": (Band(0, None), jnp.bfloat16, 64, False, False, "causal-window"),
    "sparse": (CAUSAL & Prefix(8), jnp.bfloat16, 64, False, False, "causal-window"),
    "head-dim-not-of-8": (FULL, jnp.bfloat16, 60, False, False, "multiple of 8 up to 256, not 60"),
    "head-dim-over-256": (FULL, jnp.bfloat16, 264, False, False, "multiple of 8 up to 256, not 264"),
}


@pytest.mark.parametrize("name", SERVED)
def test_cudnn_where_it_serves(name, monkeypatch):
    assert choose("auto", *SERVED[name]) == ON_CPU
    assert choose("cudnn", *SERVED[name]) == "cudnn"  # asked for, so that lowering can be tested anywhere
    for platform, expected in (("gpu", "cudnn"), ("tpu", "xla" if SERVED[name][1] == jnp.float16 else "splash")):
        pretend(monkeypatch, platform)
        assert choose("auto", *SERVED[name]) == expected
        assert choose("xla", *SERVED[name]) == "xla"


@pytest.mark.parametrize("capability, most", [("7.5", 0), ("8.6", 128), ("9.0", 256), ("10.0", 256), ("gfx90a", 0)])
def test_cudnn_follows_the_gpu(capability, most, monkeypatch):
    pretend(monkeypatch, "gpu", compute_capability=capability)
    served = [H for H in (64, 128, 256) if choose("auto", FULL, jnp.bfloat16, H) == "cudnn"]
    assert served == [H for H in (64, 128, 256) if H <= most]
    if most < 256:
        with pytest.raises(UserError, match="cudnn' cannot serve here"):
            choose("cudnn", FULL, jnp.bfloat16, 256)


def test_queries_beyond_the_last_window_are_left_out_of_cudnn(gpu, monkeypatch):
    """They see no key: zeros, with zero gradients, and no row that cuDNN would have to make up."""
    seen = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **_: seen.append(q.shape) or q)
    q, k, v = (jnp.ones((1, n, 2, 16), jnp.bfloat16) for n in (20, 10, 10))
    o = attention(q, k, v, pattern=Band(4, 0), backend="cudnn")
    assert seen == [(1, 14, 2, 16)] and o.shape == q.shape and (o[:, 14:] == 0).all()


@pytest.mark.parametrize("capability, cuda, reason", [("9.0", 13000, None), ("10.0", 13000, "for Hopper GPUs"), ("9.0", 12090, "the assembler of CUDA 12.8 and 12.9")])
def test_mosaic_follows_the_gpu_and_its_assembler(capability, cuda, reason, monkeypatch):
    pretend(monkeypatch, "gpu", compute_capability=capability)
    monkeypatch.setattr(backends, "_cuda_version", lambda: cuda)
    if reason is None:
        assert choose("mosaic", CAUSAL, jnp.bfloat16, 64) == "mosaic"
    else:
        with pytest.raises(UserError, match=f"mosaic' cannot serve here: .*{reason}"):
            choose("mosaic", CAUSAL, jnp.bfloat16, 64)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason_when_forced_and_the_kernels_otherwise(name, gpu):
    *case, masked, modified, reason = REFUSED[name]
    with pytest.raises(UserError, match=f"attention.backend='cudnn' cannot serve here: .*{reason}.*; use auto or xla"):
        choose("cudnn", *case, masked=masked, modified=modified)
    assert choose("xla", *case, masked=masked, modified=modified) == "xla"
    assert choose("auto", *case, masked=masked, modified=modified) == ("pallas" if case[2] <= 256 else "xla")


@dataclasses.dataclass(frozen=True)
class Listed(Pattern):
    """A mask that looks something up."""

    def mask(self, i, j):
        return jnp.arange(64)[i] >= j


PLATFORMS = [("cpu", "9.0", ON_CPU), ("tpu", "9.0", "splash"), ("gpu", "7.5", "xla"), ("gpu", "gfx90a", "xla"), ("gpu", "8.0", "pallas")]


@pytest.mark.parametrize("platform, capability, expected", PLATFORMS)
def test_pallas_is_for_nvidia_gpus(platform, capability, expected, monkeypatch):
    pretend(monkeypatch, platform, compute_capability=capability)
    assert choose("auto", Band(8, 8), jnp.bfloat16, 64) == expected
    if expected == "pallas":
        assert choose("pallas", Band(8, 8), jnp.bfloat16, 64) == "pallas"
        return
    with pytest.raises(UserError, match="attention.backend='pallas' cannot serve here: its kernels .* NVIDIA GPU.*; use auto or xla"):
        choose("pallas", Band(8, 8), jnp.bfloat16, 64)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_splash_is_for_tpus(platform, monkeypatch):
    pretend(monkeypatch, platform)
    reason = f"its kernels are for TPUs, and this runs on {platform}"
    with pytest.raises(UserError, match=f"attention.backend='splash' cannot serve here: {reason}; use auto or xla"):
        choose("splash", CAUSAL, jnp.bfloat16, 64)


def test_what_splash_cannot_do_is_left_to_xla(monkeypatch):
    pretend(monkeypatch, "tpu")
    case = CAUSAL & Prefix(8), jnp.bfloat16, 64
    for kwargs in ({"masked": True}, {"logsumexp": True}):
        assert choose("auto", *case, **kwargs) == choose("splash", *case, **kwargs) == "splash"
    for case, kwargs, reason in (
        (case, {"modified": True}, "cannot modify scores"),
        ((FULL, jnp.float16, 64), {}, "bfloat16 or float32, not float16"),
        ((FULL, jnp.bfloat16, 512), {}, "at most 256, not 512"),
    ):
        assert choose("auto", *case, **kwargs) == "xla"
        with pytest.raises(UserError, match=f"attention.backend='splash' cannot serve here: .*{reason}.*; use auto or xla"):
            choose("splash", *case, **kwargs)


def test_what_the_kernels_cannot_do_is_left_to_xla(gpu):
    two_slopes = ScoreMod(lambda scores, i, j, slopes: scores - slopes[..., 0] * abs(i - j), jnp.ones((4, 2)))
    for case, modified, reason in (
        ((Listed(), jnp.bfloat16, 64), False, "mask uses gather"),
        ((FULL, jnp.bfloat16, 512), False, "at most 256, not 512"),
        ((FULL, jnp.int8, 64), False, "bfloat16, float16 or float32, not int8"),
        ((FULL, jnp.bfloat16, 64), two_slopes, "one float a head"),
    ):
        assert choose("auto", *case, masked=True, modified=modified) == "xla"
        with pytest.raises(UserError, match=f"attention.backend='pallas' cannot serve here: .*{reason}.*; use auto or xla"):
            choose("pallas", *case, modified=modified)


def test_parts_that_are_merged_run_where_there_is_a_logsumexp(gpu):
    assert choose("auto", FULL, jnp.bfloat16, 64) == "cudnn" and choose("auto", FULL, jnp.bfloat16, 64, logsumexp=True) == "pallas"
    strided = layer("strided", backend="auto")
    assert strided.plan(48, 48)["backend"] == strided.backend() == "pallas"


@pytest.mark.parametrize("make", [lambda b: choose(b, FULL, jnp.bfloat16, 64), lambda b: layer("strided", backend=b)], ids=["choose", "make_attention"])
def test_an_unknown_backend_names_the_nearest(make):
    with pytest.raises(UserError, match="attention.backend='cudn': must be one of auto, xla, native, cudnn, pallas, mosaic, splash; did you mean 'cudnn'"):
        make("cudn")


def called(attention, dtype=jnp.bfloat16, valid=None):
    """Traces a call, without running it."""
    return jax.eval_shape(lambda *args: attention(*args, valid_BS=valid), *SHAPES[dtype])


@pytest.mark.parametrize("spec", ["strided", "block", "linear", "adaptive_span", "local(window=8)-bidirectional", "full-f32", "full-masked"])
def test_a_forced_backend_is_an_error_for_what_it_cannot_serve(spec, gpu):
    spec, _, case = spec.partition("-")
    dtype = jnp.float32 if case == "f32" else jnp.bfloat16
    attention = layer(spec, dtype, causal=case != "bidirectional")
    with pytest.raises(UserError, match=r"attention.backend='cudnn' .*use auto or xla"):
        called(attention, dtype, jnp.ones((2, 48), bool) if case == "masked" else None)


@pytest.fixture
def ran(monkeypatch):
    """The names of the backends that run, in order."""
    names = []
    for name in backends.RUN:
        monkeypatch.setitem(backends.RUN, name, lambda q, *args, name=name, **kwargs: names.append(name) or (q, None))
    return names


AUTO = {  # spec, causal, dtype, masked, what runs on a GPU
    "full": ("full", False, jnp.bfloat16, False, "cudnn"),
    "full-causal": ("full", True, jnp.bfloat16, False, "cudnn"),
    "full-masked": ("full", True, jnp.bfloat16, True, "pallas"),
    "full-padded": ("full", True, jnp.bfloat16, "end", "cudnn"),
    "local-padded": ("local(window=8)", True, jnp.bfloat16, "end", "pallas"),
    "full-f32": ("full", True, jnp.float32, False, "pallas"),
    "local-causal": ("local(window=8)", True, jnp.bfloat16, False, "cudnn"),
    "local-bidirectional": ("local(window=8)", False, jnp.bfloat16, False, "pallas"),
    "block": ("block(block=8)", True, jnp.bfloat16, False, "pallas"),
    "adaptive_span": ("adaptive_span", True, jnp.bfloat16, False, "pallas"),
    "set-padded": ("set(inducing=8)", False, jnp.bfloat16, "end", "cudnn"),
    "linformer-masked": ("linformer(rank=8)", False, jnp.bfloat16, True, "cudnn"),  # its slots are all valid
}


@pytest.mark.parametrize("name", AUTO)
def test_auto_on_a_gpu_runs_what_the_record_says(name, gpu, ran):
    spec, causal, dtype, masked, expected = AUTO[name]
    attention = layer(spec, dtype, causal, backend="auto", padding=masked if masked == "end" else "any")
    assert attention.plan(48, 48, bool(masked))["backend"] == attention.backend(bool(masked)) == expected
    called(attention, dtype, jnp.ones((2, 48), bool) if masked else None)
    assert set(ran) == {expected}


def test_arrays_of_another_dtype_do_not_change_the_recorded_backend(gpu, ran):
    """Built for float32 and called in bfloat16: what runs is what the layer says."""
    attention = layer("full", jnp.float32, backend="auto")
    called(attention, jnp.bfloat16)
    assert ran == [attention.backend()]


def lowered(f, shapes, platforms):
    """StableHLO of the function and its gradients, on a machine that may have none of these platforms."""
    both = jax.value_and_grad(lambda *args: f(*args).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    return jax.jit(both).trace(*shapes).lower(lowering_platforms=platforms).as_text()


@pytest.mark.parametrize(
    "pattern, mask_type, window", [(FULL, "NO_MASK", 0), (CAUSAL, "CAUSAL", 0), (Band(16, 0), "CAUSAL", 17)], ids=["full", "causal", "causal-window"]
)
def test_cudnn_lowers_to_its_fused_kernels(pattern, mask_type, window, gpu):
    text = lowered(lambda q, k, v: attention(q, k, v, pattern=pattern, scale=0.5, backend="cudnn"), SHAPES[jnp.bfloat16], ("cuda",))
    calls = [line for line in text.splitlines() if "custom_call" in line]
    assert [re.search(r"__cudnn\$\w+", call)[0] for call in calls] == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    for call in calls:
        for key, value in (("mask_type", rf"\22{mask_type}\22"), ("sliding_window_length", str(window)), ("fmha_scale", "0.5")):
            assert rf"\22{key}\22: {value}" in call
    assert "48x48" not in text, "a dense mask or score matrix"


@pytest.mark.parametrize("pattern, mask_type", [(FULL, "PADDING"), (CAUSAL, "PADDING_CAUSAL")], ids=["full", "causal"])
def test_padding_reaches_cudnn_as_lengths(pattern, mask_type, gpu):
    valid = jnp.arange(48)[None] < jnp.array([[48], [0]])
    text = lowered(lambda q, k, v: attention(q, k, v, pattern=pattern, valid_BS=valid, padding="end", backend="cudnn"), SHAPES[jnp.bfloat16], ("cuda",))
    calls = [line for line in text.splitlines() if "custom_call" in line and "fmha" in line]
    assert len(calls) == 2 and all(rf"\22mask_type\22: \22{mask_type}\22" in call and "tensor<2xi32>" in call for call in calls)
    assert "48x48" not in text, "a dense mask or score matrix"


def test_the_lengths_are_those_of_the_valid_keys_and_a_row_without_any_is_zero(gpu, monkeypatch):
    seen = {}
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **options: seen.update(options) or jnp.full_like(q, jnp.nan if options["key_value_seq_lengths"].min() < 1 else 1))
    q, k, v = (jnp.ones(x.shape, x.dtype) for x in SHAPES[jnp.bfloat16])
    o = attention(q, k, v, pattern=CAUSAL, valid_BS=jnp.arange(48)[None] < jnp.array([[30], [0]]), padding="end", backend="cudnn")
    assert seen["key_value_seq_lengths"].tolist() == [30, 1]
    assert (o[0] == 1).all() and (o[1] == 0).all()


@pytest.mark.parametrize("T, S, asked", [(48, 32, ["PADDING_CAUSAL"] * 2), (32, 48, ["CAUSAL"] * 2)])
def test_a_window_of_more_queries_than_keys_reaches_cudnn_with_lengths(T, S, asked, gpu):
    """Without them it refuses it: "Sliding window attention is only supported with max_s_q <= max_s_kv" (cudnn-frontend, sdpa_support_surface.h)."""
    shape = lambda length: jax.ShapeDtypeStruct((2, length, 2, 16), jnp.bfloat16)
    text = lowered(lambda q, k, v: attention(q, k, v, pattern=Band(6, 0), backend="cudnn"), [shape(T), shape(S), shape(S)], ("cuda",))
    assert re.findall(r"mask_type\\22: \\22(\w+)", text) == asked


@pytest.mark.parametrize("T, S", [(47, 47), (48, 47), (47, 48), (20, 15), (20, 14), (15, 20)])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("pattern", [FULL, CAUSAL, Band(4, 0)], ids=["full", "causal", "causal-window"])
def test_odd_lengths_reach_cudnn_as_even_ones(pattern, masked, T, S, gpu, monkeypatch):
    """JAX refuses the gradients of odd ones. Outputs and gradients are those without the positions added, computed by JAX's XLA form of the same call."""
    if masked and pattern == Band(4, 0):
        pytest.skip("refused: see REFUSED")
    shape = lambda length, heads: jax.ShapeDtypeStruct((2, length, heads, 16), jnp.bfloat16)
    valid = jnp.arange(S)[None] < jnp.array([[S], [S // 2]]) if masked else None
    cudnn = lambda q, k, v: attention(q, k, v, pattern=pattern, valid_BS=valid, padding="end" if masked else "any", backend="cudnn")
    assert lowered(cudnn, [shape(T, 4), shape(S, 2), shape(S, 2)], ("cuda",)).count("__cudnn$fmhaSoftmaxBackward") == 1

    asked = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *args, **options: asked(*args, **options | {"implementation": "xla"}))
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (2, length, heads, 16)) for key, length, heads in zip(keys, (T, S, S), (4, 2, 2)))
    direction = jax.random.normal(keys[3], q.shape)
    loss = lambda run: jax.value_and_grad(lambda *args: (run(*args, pattern=pattern, valid_BS=valid)[0] * direction).sum(), (0, 1, 2))(q, k, v)
    cudnn_of = lambda *args, **options: backends.RUN["cudnn"](*args, **options, score_mod=None, scale=None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), loss(cudnn_of), loss(blocked_attention))


def test_grouped_heads_reach_cudnn_as_they_are(gpu):
    text = lowered(lambda q, k, v: attention(q, k, v, pattern=CAUSAL, backend="cudnn"), SHAPES[jnp.bfloat16], ("cuda",))
    forward = next(line for line in text.splitlines() if "fmhaSoftmax(" in line)
    assert forward.count("tensor<2x48x2x16xbf16>") == 2, "keys and values with their own two heads"


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("name", VARIANTS)
def test_xla_lowers_for_every_accelerator(name, causal):
    if causal and VARIANTS[name].causal is not True:
        pytest.skip(f"{name} cannot be causal")
    attention = layer(name, causal=causal, backend="xla")
    valid = jnp.arange(48)[None] < jnp.array([[48], [30]])
    text = lowered(lambda q, k, v: attention(q, k, v, valid_BS=valid), SHAPES[jnp.bfloat16], ("cuda", "tpu"))
    assert "__cudnn" not in text
