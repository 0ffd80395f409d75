"""The backends of softmax attention over a pattern, behind one signature, and the choice among them; the choice for linearized attention too."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attn_zoo.ops import mosaic_attention, native, native_attention, pallas_attention, pallas_kernels, pallas_linear
from attn_zoo.ops.blocked import ScoreMod, block_sizes, blocked_attention
from attn_zoo.ops.patterns import Band, Pattern
from attn_zoo.ops.tuning import tile
from attn_zoo.spec import UserError, nearest

ANYWHERE = False  # whether cuDNN can be asked for where it is not: tests lower its calls on a CPU


def _cudnn_serves(pattern: Pattern, dtype, head_dim: int, masked: bool | str, modified: bool, logsumexp: bool) -> bool | str:
    """Whether cuDNN's fused attention computes this, without a dense mask; else the reason why not."""
    if not ANYWHERE and jax.default_backend() != "gpu":
        return f"it is for NVIDIA GPUs, and this runs on {jax.default_backend()}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, not {jnp.dtype(dtype).name}"
    most = _most_head_dim()
    if most == 0:
        return "this GPU is older than the compute capability 8.0 that fused attention needs"
    if head_dim % 8 or head_dim > most:
        return f"the head dim must be a multiple of 8 up to {most}, not {head_dim}"
    if masked and masked != "end":
        return "arbitrary key validity would become a dense mask"
    if modified:
        return "it cannot modify scores"
    if logsumexp:
        return "it gives no logsumexp that could be differentiated, to merge parts of attention by"
    if not isinstance(pattern, Band) or (pattern.ahead != 0 and pattern != Band()):
        return "it knows full, causal and causal-window patterns only"
    if masked and pattern.back is not None:
        return "beyond the window of the last valid key its rows are undefined"
    return True


def _most_head_dim() -> int:
    """Of cuDNN's fused attention on this GPU: 256 from compute capability 9.0 on, 128 from 8.0 on, else 0. On other machines 256, to lower for one."""
    if jax.default_backend() != "gpu":
        return 256
    capability = _compute_capability()
    return 256 if capability >= 9 else 128 if capability >= 8 else 0


def _compute_capability() -> float:
    """Of the GPU, if it is NVIDIA's, else 0."""
    try:
        return float(jax.devices()[0].compute_capability)
    except (AttributeError, ValueError):
        return 0.0


def _cuda_version() -> int:
    """Of the CUDA runtime that JAX's plugin is made for, as 12080 for 12.8; 0 without a plugin."""
    from jax._src.lib import cuda_versions  # has no public name

    return cuda_versions.cuda_runtime_get_version() if cuda_versions else 0


def _device_obstacle(interpret: bool) -> str | None:
    """Why this machine does not run Pallas kernels for NVIDIA GPUs, if it does not."""
    if interpret:
        return None
    if jax.default_backend() != "gpu":
        return f"its kernels are for NVIDIA GPUs, and this runs on {jax.default_backend()}"
    return None if _compute_capability() >= 8 else "its kernels need an NVIDIA GPU of compute capability 8.0 or more"


def _pallas_serves(pattern: Pattern, dtype, head_dim: int, modified: ScoreMod | str | bool) -> bool | str:
    """Whether the Pallas kernels compute this on this machine; else the reason why not."""
    obstacle = _device_obstacle(pallas_kernels.INTERPRET)
    return obstacle or pallas_attention.serves(pattern, dtype, head_dim, modified if isinstance(modified, ScoreMod) else None)


def _mosaic_serves(pattern: Pattern, dtype, head_dim: int, masked: bool | str, modified: bool) -> bool | str:
    """Whether the Mosaic kernel computes this on this machine; else the reason why not."""
    obstacle = _device_obstacle(mosaic_attention.INTERPRET)
    if obstacle is None and not mosaic_attention.INTERPRET and int(_compute_capability()) != 9:
        obstacle = "it is for Hopper GPUs, of compute capability 9.0"
    elif obstacle is None and not mosaic_attention.INTERPRET and 12080 <= _cuda_version() < 12091:  # for which JAX refuses its own causal kernel of this kind
        obstacle = "the assembler of CUDA 12.8 and 12.9 compiles such kernels wrongly"
    return obstacle or mosaic_attention.serves(pattern, dtype, head_dim, masked, modified)


def _splash():
    """ops.splash, imported when it is asked for: what that takes from JAX is experimental, and where it has moved, the other backends still run."""
    from attn_zoo.ops import splash

    return splash


def _splash_serves(dtype, head_dim: int, modified: bool) -> bool | str:
    """Whether splash attention computes this on this machine; else the reason why not."""
    try:
        splash = _splash()
    except ImportError as e:
        return f"jax {jax.__version__} has it elsewhere: {e}"
    if not splash.INTERPRET and jax.default_backend() != "tpu":
        return f"its kernels are for TPUs, and this runs on {jax.default_backend()}"
    return splash.serves(dtype, head_dim, modified)


def _native_serves(dtype, head_dim: int, modified: ScoreMod | str | bool) -> bool | str:
    """Whether the C++ kernels compute this on this machine; else the reason why not."""
    return _cpu_obstacle() or native_attention.serves(dtype, head_dim, modified)


def _cpu_obstacle() -> str | None:
    """Why this machine does not run kernels for CPUs, if it does not."""
    return None if jax.default_backend() == "cpu" else f"it is for CPUs, and this runs on {jax.default_backend()}"


def _cudnn(q_BTNH, k_BSKH, v_BSKH, *, pattern, valid_BS, score_mod, scale):
    window = None if pattern.back is None else (pattern.back, 0)
    (B, T), S = q_BTNH.shape[:2], k_BSKH.shape[1]
    # Queries more than a window beyond the last key see nothing, which is zero here and undefined there.
    rows = T if window is None else min(T, S + pattern.back)
    lengths = {} if valid_BS is None else {"key_value_seq_lengths": jnp.maximum(valid_BS.sum(axis=1, dtype=jnp.int32), 1)}
    # With how many positions there are, cuDNN takes a window of more queries than keys, and JAX, with one position more, gradients of odd lengths.
    if rows % 2 or S % 2 or (window is not None and rows > S):
        lengths = {"query_seq_lengths": jnp.full((B,), rows, jnp.int32), "key_value_seq_lengths": jnp.full((B,), S, jnp.int32)} | lengths
    even = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))
    o_BTNH = jax.nn.dot_product_attention(
        *map(even, (q_BTNH[:, :rows], k_BSKH, v_BSKH)), scale=scale, is_causal=pattern.ahead == 0, local_window_size=window, implementation="cudnn", **lengths
    )[:, :rows]
    if valid_BS is not None:  # of a sequence without a valid key one was taken to be
        o_BTNH = jnp.where(valid_BS.any(axis=1)[:, None, None, None], o_BTNH, 0)
    return jnp.pad(o_BTNH, ((0, 0), (0, T - rows), (0, 0), (0, 0))), None


# (q, k, v, pattern, valid_BS, score_mod, scale) -> (output, logsumexp)
RUN: dict[str, Callable] = {
    "xla": blocked_attention,
    "native": native_attention.native_attention,
    "cudnn": _cudnn,
    "pallas": pallas_attention.pallas_attention,
    "mosaic": mosaic_attention.mosaic_attention,
    "splash": lambda *args, **options: _splash().splash_attention(*args, **options),
}
BACKENDS = ("auto", *RUN)
AUTO = {"cpu": ("native",), "gpu": ("cudnn", "pallas"), "tpu": ("splash",)}  # what is tried before XLA, by platform


def check_backend(backend: str) -> None:
    """Raises UserError unless `backend` is one of BACKENDS."""
    if backend not in BACKENDS:
        raise UserError(f"attention.backend={backend!r}: must be one of {', '.join(BACKENDS)}; {nearest(backend, BACKENDS)}")


def choose(
    backend: str, pattern: Pattern, dtype, head_dim: int, *, masked: bool | str = False, modified: ScoreMod | str | bool = False, logsumexp: bool = False
) -> str:
    """The backend that runs: 'auto' takes the first of this platform's AUTO that serves, else XLA. Raises UserError if a forced one cannot serve.

    masked: whether some keys are not valid; 'end' if all of those stand behind the valid ones. modified: the score modification, or True for one whose
    parameters are one float a head, or 'by distance' for one of those that is a ScoreMod.by_distance; logsumexp: whether that is needed too.
    """
    serve = {
        "native": lambda: _native_serves(dtype, head_dim, modified),
        "cudnn": lambda: _cudnn_serves(pattern, dtype, head_dim, masked, bool(modified), logsumexp),
        "pallas": lambda: _pallas_serves(pattern, dtype, head_dim, modified),
        "mosaic": lambda: _mosaic_serves(pattern, dtype, head_dim, masked, bool(modified)),
        "splash": lambda: _splash_serves(dtype, head_dim, bool(modified)),
    }
    return _choose(backend, serve)


def choose_scan(backend: str, dtype, *, corrected: int = 0) -> str:
    """The backend that runs the sums of linearized attention: 'auto' takes the native or Pallas kernels where they serve, else XLA. Errors as `choose`.

    corrected: the features of a delta rule, 0 for the rest. See ops.pallas_linear.
    """
    serve = {
        "native": lambda: _cpu_obstacle() or native.serves(dtype),
        "pallas": lambda: _device_obstacle(pallas_kernels.INTERPRET) or pallas_linear.serves(dtype, corrected),
    }
    return _choose(backend, serve, "it knows softmax attention only")


def choose_tiles(backend: str, dtype, head_dim: int) -> str:
    """The backend that runs attention inside tiles that a variant has brought together (ops.tiled): the native kernels on a CPU, else XLA. Errors as `choose`."""
    return _choose(backend, {"native": lambda: _native_serves(dtype, head_dim, False)}, "it does not know tiles whose pairs follow from the data")


def choose_lists(backend: str, dtype) -> str:
    """The backend that runs attention of queries over their own lists of keys (ops.gathered): the native kernels on a CPU, else XLA. Errors as `choose`."""
    return _choose(backend, {"native": lambda: _cpu_obstacle() or native.serves(dtype)}, "it knows blocks of pairs, not lists of keys")


def choose_additive(backend: str, dtype) -> str:
    """The backend that runs attention whose scores are those of a network (ops.additive): the native kernels on a CPU, else XLA. Errors as `choose`."""
    return _choose(backend, {"native": lambda: _cpu_obstacle() or native.serves(dtype)}, "its scores are products of queries and keys")


def native_or_xla(backend: str) -> str:
    """Of a layer on `backend`, the backend of what only native kernels and XLA compute."""
    return "native" if backend == "native" else "xla"


def _choose(backend: str, serve: dict[str, Callable[[], bool | str]], others: str = "") -> str:
    """`backend`, or for 'auto' the first of this platform's that serves: those of `serve` say True, or the reason why not, which `others` is for the rest."""
    check_backend(backend)
    answer = lambda name: serve[name]() if name in serve else others
    if backend == "xla":
        return "xla"
    if backend == "auto":
        return next((name for name in AUTO.get(jax.default_backend(), ()) if answer(name) is True), "xla")
    reason = answer(backend)
    if reason is not True:
        raise UserError(f"attention.backend={backend!r} cannot serve here: {reason}; use auto or xla")
    return backend


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    pattern: Pattern,
    valid_BS: Bool[Array, "B S"] | None = None,
    padding: str = "any",
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Array, "B T N H"]:
    """Softmax attention over the pairs of `pattern`, [B, T, N, H], on the backend that `choose` names. See ops.blocked.

    padding='end' promises that in every row of `valid_BS` the valid keys come first, so that their number says all.
    """
    return _run(backend, False, padding, q_BTNH, k_BSKH, v_BSKH, pattern=pattern, valid_BS=valid_BS, score_mod=score_mod, scale=scale)[0]


def attention_and_logsumexp(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    pattern: Pattern,
    valid_BS: Bool[Array, "B S"] | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """(output, float32 logsumexp [B, T, N]), both differentiable: a part of attention, to be merged with others. See ops.blocked."""
    return _run(backend, True, "any", q_BTNH, k_BSKH, v_BSKH, pattern=pattern, valid_BS=valid_BS, score_mod=score_mod, scale=scale)


def _run(backend, logsumexp, padding, q_BTNH, k_BSKH, v_BSKH, **arguments):
    masked, modified = arguments["valid_BS"] is not None and padding, arguments["score_mod"] or False
    name = choose(backend, arguments["pattern"], q_BTNH.dtype, q_BTNH.shape[-1], masked=masked, modified=modified, logsumexp=logsumexp)
    return RUN[name](q_BTNH, k_BSKH, v_BSKH, **arguments)


def blocks(backend: str, pattern: Pattern, T: int, S: int, dtype, head_dim: int) -> tuple[int, int] | None:
    """(query block, key block) that the backend's forward pass takes; None for cuDNN, which does not say."""
    known = {
        "xla": lambda: block_sizes(pattern, T, S),
        "native": lambda: (native_attention.BLOCK, native_attention.BLOCK),
        "cudnn": lambda: None,
        "pallas": lambda: dataclasses.astuple(tile("forward", pattern, T, S, dtype, head_dim))[:2],
        "mosaic": lambda: mosaic_attention.block_sizes(head_dim),
        "splash": lambda: _splash().block_sizes(pattern, T, S),
    }
    return known[backend]()
