"""Blocked softmax attention in C++, for CPUs: the block lists of `blocked_attention`, on tiles that stay in registers and cache.

XLA's CPU products of such a tile run on one core, at a fraction of what it can do (docs/performance.md). The source, native_attention.cc beside this
file, is compiled on its first use for the machine at hand, by the C++ compiler that CXX names, or else c++, g++ or clang++, and kept in the user's
cache. Where there is no compiler, the XLA engine runs.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from attn_zoo.ops.blocked import ScoreMod
from attn_zoo.ops.patterns import FULL, Pattern, block_mask, pair_bits
from attn_zoo.spec import Unsupported

BLOCK = 64  # queries, and keys, of a tile
LANES = 16  # the head dim is padded to a multiple of the widest vectors
MOST_HEAD_DIM = 256
MOST_SPLITS = 4  # parts of a head's queries that run beside each other; each has dk and dv of its own
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
SOURCE = Path(__file__).with_suffix(".cc")
NOTHING = np.zeros((0, 0, 0), np.float32)  # added to scores
SAVED = "native attention"  # the name of results, for policies of jax.checkpoint: with them the backward pass need not run the forward pass again
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")


def serves(dtype, head_dim: int, modified: bool) -> bool | str:
    """Whether it computes this on a CPU; else the reason why not. Compiles it where only that is left to find out."""
    if jnp.dtype(dtype) not in DTYPES:
        return f"it takes float32, bfloat16 or float16, not {jnp.dtype(dtype).name}"
    if head_dim > MOST_HEAD_DIM:
        return f"the head dim must be at most {MOST_HEAD_DIM}, not {head_dim}"
    if modified:
        return "it cannot modify scores"
    found = library()
    return found if isinstance(found, str) else True


def native_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    pattern: Pattern,
    valid_BS: Bool[Array, "B S"] | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """As `blocked_attention`: (output in q's dtype, float32 logsumexp), both differentiable. Raises Unsupported, with the reason, for what `serves` refuses.

    Everything is computed in float32. The working memory of a pass is four arrays [S, H] at most for each core that it runs on.
    """
    H = q_BTNH.shape[-1]
    reason = serves(jnp.result_type(q_BTNH, k_BSKH, v_BSKH), H, score_mod is not None)
    if reason is not True:
        raise Unsupported(f"the native kernels cannot serve here: {reason}")
    attend = _attend(pattern, H**-0.5 if scale is None else scale, lambda about: NOTHING)
    o_BTNH, lse_BTN = attend(*(_whole(x, 3) for x in (q_BTNH, k_BSKH, v_BSKH)), np.zeros(0, bool) if valid_BS is None else valid_BS, ())
    return o_BTNH[..., :H].astype(q_BTNH.dtype), lse_BTN


def native_tiles(
    q_MTGH: Float[Array, "M T G H"], k_MSH: Float[Array, "M S H"], v_MSH: Float[Array, "M S H"], added: Callable[[Any], Array], about: Any, *, scale: float
) -> tuple[Float[Array, "M T G H"], Float[Array, "M T G"]]:
    """Attention inside each of M tiles: (output, float32 logsumexp). added(about), [M, T, S], is added to the scaled scores, -1e30 where a pair is hidden.

    It is computed again for the backward pass, and neither it nor `about` has a gradient; it must not close over a traced value. Errors as `native_attention`.
    """
    H = q_MTGH.shape[-1]
    reason = serves(jnp.result_type(q_MTGH, k_MSH, v_MSH), H, False)
    if reason is not True:
        raise Unsupported(f"the native kernels cannot serve here: {reason}")
    attend = _attend(FULL, scale, lambda about: _whole(added(about), 2))
    o_MTGH, lse_MTG = attend(*(_whole(x, 3) for x in (q_MTGH, k_MSH[:, :, None], v_MSH[:, :, None])), np.zeros(0, bool), about)
    return o_MTGH[..., :H].astype(q_MTGH.dtype), lse_MTG


def core_count() -> int:
    """How many cores this process may run on, as XLA counts them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _whole(x: Array, axis: int) -> Array:
    """x in float32, with whole vectors along its last axis."""
    return jnp.pad(x.astype(jnp.float32), ((0, 0),) * axis + ((0, -x.shape[axis] % LANES),))


def _attend(pattern: Pattern, scale: float, added: Callable[[Any], Array]) -> Callable:
    """(q, k, v, valid, about) -> (o, lse), with its own backward pass, of float32 arrays with whole vectors of channels; `valid` and added(about) may be empty."""

    def call(name, results, q, k, v, valid, about, *more):
        (B, T), (S, K, H) = q.shape[:2], k.shape[1:]
        floats = getattr(library(), f"attn_zoo_{name}_floats")(S, H)
        cores = core_count()
        splits = max(1, min(MOST_SPLITS, cores // (B * K), -(-T // BLOCK)))
        mask = block_mask(pattern, T, S, BLOCK, BLOCK)
        lists = mask.full_start, mask.full_block, mask.part_start, mask.part_block, *pair_bits(pattern, T, S)
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (*results(splits), (min(cores, B * K * splits), floats))]
        run = jax.ffi.ffi_call(f"attn_zoo_{name}", shapes, vmap_method="sequential")
        return run(q, k, v, valid, added(about), *lists, *more, scale=np.float32(scale), splits=np.int64(splits))[:-1]

    @jax.custom_vjp
    def attend(q, k, v, valid, about):
        return tuple(call("forward", lambda splits: (q.shape, q.shape[:3]), q, k, v, valid, about))

    def attend_fwd(q, k, v, valid, about):
        o, lse = (checkpoint_name(x, SAVED) for x in attend(q, k, v, valid, about))
        return (o, lse), (q, k, v, valid, about, o, lse)

    def attend_bwd(residuals, cotangents):
        q, k = residuals[:2]
        dq, dk, dv = call("backward", lambda splits: (q.shape, (splits, *k.shape), (splits, *k.shape)), *residuals, *cotangents)
        return dq, dk.sum(axis=0), dv.sum(axis=0), None, None

    attend.defvjp(attend_fwd, attend_bwd)
    return attend


@functools.cache
def library() -> ctypes.CDLL | str:
    """The compiled kernels, known to XLA; else the reason why there are none, of which it warns once."""
    found = _library()
    if isinstance(found, str):
        warnings.warn(f"softmax attention runs on XLA's engine, two to four times slower on a CPU than native kernels: {found}", stacklevel=2)
    return found


def _library() -> ctypes.CDLL | str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next((words for words in map(shlex.split, names) if shutil.which(words[0])), None)
    if compiler is None:
        return f"it is compiled on its first use, and there is no C++ compiler ({', '.join(names)})"
    try:
        found = ctypes.CDLL(str(_compiled(compiler)))
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines() or [f"exit {error.returncode}"]
        return f"{compiler[0]} does not compile it: {lines[0]}"
    except OSError as error:
        return f"it cannot be compiled: {error}"
    for name in ("forward", "backward"):
        floats = getattr(found, f"attn_zoo_{name}_floats")
        floats.restype, floats.argtypes = ctypes.c_int64, [ctypes.c_int64] * 2
        jax.ffi.register_ffi_target(f"attn_zoo_{name}", jax.ffi.pycapsule(getattr(found, f"attn_zoo_{name}")), platform="cpu")
    return found


def _compiled(compiler: list[str]) -> Path:
    """The shared library, compiled unless the cache has one of this source, by this compiler, for this kind of processor and version of JAX."""
    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
    machine = run([*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]).stdout  # the compiler's version is among its macros too
    identity = hashlib.sha256("\n".join([machine, *FLAGS, jaxlib.__version__, SOURCE.read_text()]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attn_zoo"
    path = folder / f"native_attention-{identity}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:  # renamed when whole: other processes may be at it too
            run([*compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", "-o", f"{made}/library.so", str(SOURCE)])
            os.replace(f"{made}/library.so", path)
    return path
