"""Models: they know the registry of attention variants and nothing above it."""

from attn_zoo.models.remat import compiler_options
from attn_zoo.models.transformer import Transformer, activation_bytes, flops_per_step, param_counts

__all__ = ["Transformer", "activation_bytes", "compiler_options", "flops_per_step", "param_counts"]
