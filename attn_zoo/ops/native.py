"""Kernels in C++ for CPUs, called by XLA (its foreign function interface): how they are compiled, known to XLA, and called.

XLA's CPU products of a tile's size run on one core, at a fraction of what it can do (docs/performance.md). The sources, *.cc beside this file, are compiled
on their first use for the machine at hand, by the C++ compiler that CXX names, or else c++, g++ or clang++, and kept in the user's cache. Where there is no
compiler, XLA's engines run.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
from jaxtyping import Array

from attn_zoo.spec import Unsupported

PASSES = ("attention", "linear", "delta", "gathered", "rounds", "additive", "convolution", "inverse")  # a source each, with a kernel forward and one backward
KERNELS = (*(f"{name}_{way}" for name in PASSES for way in ("forward", "backward")), "best_keys", "buckets")
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)  # of arguments; all is computed in float32
LANES = 16  # of the widest vectors; channels are padded to whole ones
FOLDER = Path(__file__).parent
HEADER = "native.h"
SOURCES = tuple(f"native_{name}.cc" for name in PASSES)
# What the first option after -O3 leaves out carries factors from one step of a product to the next: where rows of factors overlap, as taps do, one sum too many for the registers.
FLAGS = ("-O3", "-fno-predictive-commoning", "-march=native", "-std=c++17", "-fPIC")


def serves(dtype) -> bool | str:
    """Whether there are kernels on this machine, for arguments of this dtype; else the reason why not. Compiles them where only that is left to find out."""
    if jnp.dtype(dtype) not in DTYPES:
        return f"it takes float32, bfloat16 or float16, not {jnp.dtype(dtype).name}"
    found = library()
    return found if isinstance(found, str) else True


def check(dtype) -> None:
    """Raises Unsupported, with the reason, unless there are kernels on this machine for arguments of this dtype."""
    reason = serves(dtype)
    if reason is not True:
        raise Unsupported(f"the native kernels cannot serve here: {reason}")


def call(kernel: str, shapes, arguments, *, tasks: int, room: tuple[int, ...], dtype=jnp.float32, **attributes) -> list[Array]:
    """Runs one of KERNELS: its results of these shapes, of `dtype`. It has so many tasks, and what `room` tells it to need of memory for each core."""
    floats = getattr(library(), f"attn_zoo_{kernel}_floats")(*map(ctypes.c_int64, room))
    results = [*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes), jax.ShapeDtypeStruct((min(core_count(), tasks), floats), jnp.float32)]
    return jax.ffi.ffi_call(f"attn_zoo_{kernel}", results, vmap_method="sequential")(*arguments, **attributes)[:-1]


def whole(x: Array, axis: int) -> Array:
    """x in float32, with whole vectors along `axis`, its last."""
    return jnp.pad(x.astype(jnp.float32), ((0, 0),) * axis + ((0, -x.shape[axis] % LANES),))


def core_count() -> int:
    """How many cores this process may run on, as XLA counts them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def library() -> ctypes.CDLL | str:
    """The compiled kernels, known to XLA; else the reason why there are none, of which it warns once."""
    found = _library()
    if isinstance(found, str):
        warnings.warn(f"attention runs on XLA's engines, which take up to six and a half times as long on a CPU as native kernels: {found}", stacklevel=2)
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
    for name in KERNELS:
        getattr(found, f"attn_zoo_{name}_floats").restype = ctypes.c_int64
        jax.ffi.register_ffi_target(f"attn_zoo_{name}", jax.ffi.pycapsule(getattr(found, f"attn_zoo_{name}")), platform="cpu")
    return found


def _compiled(compiler: list[str]) -> Path:
    """The shared library, compiled unless the cache has one of these sources, by this compiler, for this kind of processor and version of JAX."""
    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
    machine = run([*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]).stdout  # the compiler's version is among its macros too
    texts = [(FOLDER / name).read_text() for name in (HEADER, *SOURCES)]
    identity = hashlib.sha256("\n".join([machine, *FLAGS, jaxlib.__version__, *texts]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attn_zoo"
    path = folder / f"native-{identity}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:  # renamed when whole: other processes may be at it too
            compile = lambda name: run([*compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", "-c", "-o", f"{made}/{name}.o", str(FOLDER / name)])
            with ThreadPoolExecutor() as pool:
                list(pool.map(compile, SOURCES))
            run([*compiler, "-shared", "-o", f"{made}/library.so", *(f"{made}/{name}.o" for name in SOURCES)])
            os.replace(f"{made}/library.so", path)
    return path
