"""What JAX and tokamax have, each as the variant of this package that sees the same pairs. The kernels are imported when they are asked for, and may be missing."""

import importlib

import jax
import jax.numpy as jnp
from bench.candidates import CannotRun, Jax, Problem, plain, way


def jax_peers(problem: Problem, window: int, qkv: tuple) -> list[Jax]:
    """JAX's own attention and tokamax's, each as the variant that sees the same pairs; one that cannot run says why when it is prepared."""
    local = plain(f"local(window={window})")
    found = []
    kernels = {  # JAX's own in Pallas: for any GPU by Triton, for Hopper by Mosaic, and for TPUs
        "jax pallas": _pallas_mha,
        "jax pallas (mosaic_gpu), float16, without a scale": _pallas_hopper,
        "jax pallas (flash, TPU)": _pallas_tpu,
    }
    for causal in (True, False):
        calls = {"jax.nn (xla)": jax.nn.dot_product_attention, "jax.nn (cudnn)": _cudnn}
        for name, call in (calls | {"tokamax": _tokamax} | kernels).items():
            half = call is _pallas_hopper and problem.dtype == "bfloat16" and jax.default_backend() == "gpu"  # it says of bfloat16 that its factors are of two dtypes
            args = tuple(x.astype(jnp.float16) for x in qkv) if half else qkv
            found.append(Jax(name + way(causal), _partial(call, is_causal=causal), args, spec="full", causal=causal, peer=True))
    for name, call in (("jax.nn (cudnn): window", _cudnn), ("tokamax: window", _tokamax)):
        found.append(Jax(name, _partial(call, is_causal=True, local_window_size=(window, 0)), qkv, spec=local, causal=True, peer=True))
    return found


def _partial(function, **options):
    return lambda q, k, v: function(q, k, v, **options)


def _needs(platform: str) -> None:
    if jax.default_backend() != platform:
        raise CannotRun(f"its kernels are for {platform.upper()}s")


def _cudnn(q, k, v, **options):
    _needs("gpu")
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **options)


def _tokamax(q, k, v, **options):
    kernels = {"implementation": ("mosaic", "triton")} if jax.default_backend() == "gpu" else {}  # or it would run XLA, and not say so
    return importlib.import_module("tokamax").dot_product_attention(q, k, v, **options, **kernels)


def _pallas_mha(q, k, v, *, is_causal):
    _needs("gpu")
    return importlib.import_module("jax.experimental.pallas.ops.gpu.attention").mha(q, k, v, None, sm_scale=q.shape[-1] ** -0.5, causal=is_causal)


def _pallas_hopper(q, k, v, *, is_causal):
    """In the tiles that its own benchmark tries first, as far as shared memory holds them, and 64 rows backwards; it has no gradients where it is causal."""
    _needs("gpu")
    kernels = importlib.import_module("jax.experimental.pallas.ops.gpu.attention_mgpu")
    back = {f"block_{side}_{kernel}": 64 for side in ("q", "kv") for kernel in ("dkv", "dq")}
    config = kernels.TuningConfig(block_q=64, block_kv=256 if q.shape[-1] <= 64 else 128, max_concurrent_steps=2, causal=is_causal, **back)
    return kernels.attention(q, k, v, config)


def _pallas_tpu(q, k, v, *, is_causal):
    _needs("tpu")
    attend = importlib.import_module("jax.experimental.pallas.ops.tpu.flash_attention").flash_attention
    heads_first = (x.swapaxes(1, 2) for x in (q, k, v))  # the layout that it asks for: XLA may turn them, as it may what is timed beside it
    return attend(*heads_first, causal=is_causal, sm_scale=q.shape[-1] ** -0.5).swapaxes(1, 2)
