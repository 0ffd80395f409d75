"""The backends of softmax attention over a pattern, behind one signature, and the choice among them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from attn_zoo.ops.blocked import blocked_attention
from attn_zoo.ops.patterns import Band, Pattern
from attn_zoo.spec import UserError, nearest


def _cudnn_serves(pattern: Pattern, dtype, head_dim: int, masked: bool, modified: bool) -> bool | str:
    """Whether cuDNN's fused attention computes this, without a dense mask; else the reason why not."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, not {jnp.dtype(dtype).name}"
    most = _most_head_dim()
    if most == 0:
        return "this GPU is older than the compute capability 8.0 that fused attention needs"
    if head_dim % 8 or head_dim > most:
        return f"the head dim must be a multiple of 8 up to {most}, not {head_dim}"
    if masked:
        return "arbitrary key validity would become a dense mask"
    if modified:
        return "it cannot modify scores"
    if not isinstance(pattern, Band) or (pattern.ahead != 0 and pattern != Band()):
        return "it knows full, causal and causal-window patterns only"
    return True


def _most_head_dim() -> int:
    """Of cuDNN's fused attention on this GPU: 256 from compute capability 9.0 on, 128 from 8.0 on, else 0. On other machines 256, to lower for one."""
    if jax.default_backend() != "gpu":
        return 256
    try:
        capability = float(jax.devices()[0].compute_capability)
    except (AttributeError, ValueError):  # not NVIDIA's
        return 0
    return 256 if capability >= 9 else 128 if capability >= 8 else 0


def _cudnn(q_BTNH, k_BSKH, v_BSKH, *, pattern, valid_BS, score_mod, scale):
    window = None if pattern.back is None else (pattern.back, 0)
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    # Queries more than a window beyond the last key see nothing, which is zero here and undefined there.
    rows = T if window is None else min(T, S + pattern.back)
    o_BTNH = jax.nn.dot_product_attention(
        q_BTNH[:, :rows], k_BSKH, v_BSKH, scale=scale, is_causal=pattern.ahead == 0, local_window_size=window, implementation="cudnn"
    )
    return jnp.pad(o_BTNH, ((0, 0), (0, T - rows), (0, 0), (0, 0)))


def _xla(q_BTNH, k_BSKH, v_BSKH, *, pattern, valid_BS, score_mod, scale):
    return blocked_attention(q_BTNH, k_BSKH, v_BSKH, pattern=pattern, valid_BS=valid_BS, score_mod=score_mod, scale=scale)[0]


RUN: dict[str, Callable] = {"xla": _xla, "cudnn": _cudnn}
BACKENDS = ("auto", *RUN)


def check_backend(backend: str) -> None:
    """Raises UserError unless `backend` is one of BACKENDS."""
    if backend not in BACKENDS:
        raise UserError(f"attention.backend={backend!r}: must be one of {', '.join(BACKENDS)}; {nearest(backend, BACKENDS)}")


def choose(backend: str, pattern: Pattern, dtype, head_dim: int, *, masked: bool = False, modified: bool = False) -> str:
    """The backend that runs: 'auto' takes cuDNN on a GPU where it serves, else XLA. Raises UserError if a forced one cannot serve."""
    check_backend(backend)
    if backend == "xla":
        return "xla"
    serves = _cudnn_serves(pattern, dtype, head_dim, masked, modified)
    if backend == "cudnn" and serves is not True:
        raise UserError(f"attention.backend='cudnn' cannot serve here: {serves}; use auto or xla")
    return "cudnn" if serves is True and (backend == "cudnn" or jax.default_backend() == "gpu") else "xla"


def attention(q_BTNH, k_BSKH, v_BSKH, *, pattern: Pattern, valid_BS=None, score_mod=None, scale=None, backend: str = "auto"):
    """Softmax attention over the pairs of `pattern`, [B, T, N, H], on the backend that `choose` names. See ops.blocked."""
    name = choose(backend, pattern, q_BTNH.dtype, q_BTNH.shape[-1], masked=valid_BS is not None, modified=score_mod is not None)
    return RUN[name](q_BTNH, k_BSKH, v_BSKH, pattern=pattern, valid_BS=valid_BS, score_mod=score_mod, scale=scale)
