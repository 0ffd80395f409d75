"""Recomputing a layer in the backward pass instead of keeping its activations. Chen et al. 2016, sec. 4."""

import contextlib
from typing import Any

import jax
from flax import nnx
from flax.errors import TraceContextError

from attn_zoo import config


def rematerialized(module: nnx.Module, *args: Any) -> Any:
    """module(*args), of which the backward pass keeps the arguments alone.

    jax.checkpoint wants a pure function, and a module may leave variables behind (losses, statistics, updated state):
    they come out of the checkpointed function as outputs and are written back, unless a transformation closed over the
    module, as in Attention.leave.
    """
    graph, params, others = nnx.split(module, nnx.Param, ...)

    @jax.checkpoint
    def run(params, others, args):
        inner = nnx.merge(graph, params, others)
        output = inner(*args)
        _, _, left = nnx.split(inner, nnx.Param, ...)
        return output, left

    output, left = run(params, others, args)
    with contextlib.suppress(TraceContextError):
        nnx.update(module, left)
    return output


def compiler_options(model: config.Model) -> dict[str, str]:
    """Options that a step of this model must be compiled with, for jax.jit or Lowered.compile; {} where none are needed.

    XLA's CPU compiler drops the barriers around a recomputation early, and then merges it with what it should replace:
    without this option remat saves no memory there.
    """
    return {"xla_disable_hlo_passes": "cse_barrier_expander"} if model.remat and jax.default_backend() == "cpu" else {}
