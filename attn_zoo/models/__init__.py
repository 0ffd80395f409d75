"""Models: they know the registry of attention variants and nothing above it."""

from attn_zoo.models.bodies import BODIES, Body, Entry, read_variant, read_variants
from attn_zoo.models.reader import READERS, Reader
from attn_zoo.models.recurrent import ALIGNMENTS, Recurrent
from attn_zoo.models.remat import compiler_options
from attn_zoo.models.transformer import Transformer, param_counts

__all__ = ["ALIGNMENTS", "BODIES", "Body", "Entry", "READERS", "Reader", "Recurrent", "Transformer", "compiler_options", "param_counts", "read_variant", "read_variants"]
