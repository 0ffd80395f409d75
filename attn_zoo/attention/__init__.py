"""The zoo: the registry of attention variants, and how one is made from a spec."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from attn_zoo.attention.adaptive_span import ADAPTIVE_SPAN
from attn_zoo.attention.additive import ADDITIVE
from attn_zoo.attention.attention_over_attention import ATTENTION_OVER_ATTENTION
from attn_zoo.attention.axial import AXIAL
from attn_zoo.attention.base import Attention, Dims, Drawn, Loss, Paper, ScoreFunction, Statistic, Variant, require
from attn_zoo.attention.bigbird import BIGBIRD
from attn_zoo.attention.block import BLOCK
from attn_zoo.attention.block_local import BLOCK_LOCAL
from attn_zoo.attention.clustered import CLUSTERED
from attn_zoo.attention.delta import DELTA
from attn_zoo.attention.dilated import DILATED
from attn_zoo.attention.fixed import FIXED
from attn_zoo.attention.full import FULL_VARIANT
from attn_zoo.attention.global_window import GLOBAL_WINDOW
from attn_zoo.attention.hard import HARD
from attn_zoo.attention.informer import INFORMER
from attn_zoo.attention.linear import LINEAR
from attn_zoo.attention.linformer import LINFORMER
from attn_zoo.attention.local import LOCAL
from attn_zoo.attention.lsh import LSH
from attn_zoo.attention.luna import LUNA
from attn_zoo.attention.luong_local import LUONG_LOCAL
from attn_zoo.attention.memory_compressed import MEMORY_COMPRESSED
from attn_zoo.attention.mix import MIX
from attn_zoo.attention.nystrom import NYSTROM
from attn_zoo.attention.performer import PERFORMER
from attn_zoo.attention.persistent import PERSISTENT
from attn_zoo.attention.poolingformer import POOLINGFORMER
from attn_zoo.attention.random import RANDOM
from attn_zoo.attention.retention import RETENTION
from attn_zoo.attention.rfa import RFA
from attn_zoo.attention.routing import ROUTING
from attn_zoo.attention.set_attention import SET
from attn_zoo.attention.sinkhorn import SINKHORN
from attn_zoo.attention.star import STAR
from attn_zoo.attention.strided import STRIDED
from attn_zoo.attention.topk import TOPK
from attn_zoo.attention.tree import TREE
from attn_zoo.ops.backends import check_backend
from attn_zoo.spec import Spec, UserError, check, check_choice, check_int, nearest, parse, parse_one

# In the order of the table, family by family.
VARIANTS: dict[str, Variant] = {
    "full": FULL_VARIANT,
    "additive": ADDITIVE,
    "hard": HARD,
    "luong_local": LUONG_LOCAL,
    "persistent": PERSISTENT,
    "attention_over_attention": ATTENTION_OVER_ATTENTION,
    "local": LOCAL,
    "strided": STRIDED,
    "block": BLOCK,
    "block_local": BLOCK_LOCAL,
    "dilated": DILATED,
    "fixed": FIXED,
    "axial": AXIAL,
    "global_window": GLOBAL_WINDOW,
    "bigbird": BIGBIRD,
    "star": STAR,
    "random": RANDOM,
    "tree": TREE,
    "lsh": LSH,
    "routing": ROUTING,
    "sinkhorn": SINKHORN,
    "topk": TOPK,
    "linear": LINEAR,
    "performer": PERFORMER,
    "rfa": RFA,
    "delta": DELTA,
    "retention": RETENTION,
    "clustered": CLUSTERED,
    "informer": INFORMER,
    "linformer": LINFORMER,
    "memory_compressed": MEMORY_COMPRESSED,
    "set": SET,
    "luna": LUNA,
    "poolingformer": POOLINGFORMER,
    "nystrom": NYSTROM,
    "adaptive_span": ADAPTIVE_SPAN,
    "mix": MIX,
}


def find(spec: str | Spec, registry: Mapping[str, Any] = VARIANTS, kind: str = "attention variant") -> tuple[Any, object]:
    """The registry entry and the validated options of one spec. Raises UserError with the nearest valid name."""
    spec = parse_one(spec) if isinstance(spec, str) else spec
    if spec.name not in registry:
        raise UserError(f"there is no {kind} {spec.name!r}; {nearest(spec.name, registry)}")
    entry = registry[spec.name]
    return entry, spec.resolve(kind, entry.options)


def canonical(spec: Spec, registry: Mapping[str, Any] = VARIANTS, kind: str = "attention variant") -> Spec:
    """The one text of what a spec means: known options in their order, defaults left out."""
    return spec.canonical(kind, find(spec, registry, kind)[0].options)


def parse_variants(text: str, registry: Mapping[str, Any] = VARIANTS, kind: str = "attention variant") -> list[list[Spec]]:
    """The entries of a sweep, 'full, [local(window=128), full]', each as the list of specs that its layers cycle through, in canonical form."""
    entries = [entry if isinstance(entry, list) else [entry] for entry in parse(text)]
    return [[canonical(spec, registry, kind) for spec in entry] for entry in entries]


def parse_variant(text: str, registry: Mapping[str, Any] = VARIANTS, kind: str = "attention variant") -> list[Spec]:
    """One entry of a sweep."""
    return only(parse_variants(text, registry, kind), text)


def only(entries: list, text: str) -> Any:
    """The one entry that was read from `text`. Raises UserError where there are more, or none."""
    if len(entries) != 1:
        raise UserError(f"expected one variant, or a [list] to cycle over layers; got {text!r}")
    return entries[0]


def variant_text(specs: list[Spec]) -> str:
    """The inverse of `parse_variant`: 'local(window=128)' or '[local(window=128), full]'."""
    return str(specs[0]) if len(specs) == 1 else f"[{', '.join(map(str, specs))}]"


def make_attention(
    spec: str | Spec,
    *,
    num_heads: int,
    head_dim: int,
    max_len: int,
    causal: bool = False,
    num_kv_heads: int | None = None,
    dtype=jnp.float32,
    backend: str = "auto",
    padding: str = "any",
    shared: dict | None = None,
    rngs: nnx.Rngs | None = None,
) -> Attention:
    """Builds one attention layer from its spec.

    padding='end' promises that valid keys come before all others, so that their number says all: then cuDNN, too, serves padded sequences.
    `shared` is handed along by the layers of one model that may share parameters. Raises UserError for a bad spec, Unsupported for what
    the variant cannot do.
    """
    variant, options = find(spec)
    require(variant, causal)
    check_backend(backend)
    K = num_heads if num_kv_heads is None else num_kv_heads
    for name, value in (("num_heads", num_heads), ("num_kv_heads", K), ("head_dim", head_dim), ("max_len", max_len)):
        check_int(name, value, 1)
    check(num_heads % K == 0, "num_kv_heads", K, f"must divide num_heads={num_heads}")
    check_choice("padding", padding, ("any", "end"))
    dims = Dims(num_heads, K, head_dim, max_len, causal, dtype, backend, padding)
    attention = variant.build(options, dims, shared={} if shared is None else shared, rngs=rngs or nnx.Rngs(0))
    attention.variant = variant
    return attention
