"""attn_zoo: pluggable attention variants in JAX, swept over sequence length."""

__version__ = "0.1.0"

_PUBLIC = {"VARIANTS": "attn_zoo.attention", "make_attention": "attn_zoo.attention", "Unsupported": "attn_zoo.spec", "UserError": "attn_zoo.spec"}
__all__ = sorted(_PUBLIC)


def __getattr__(name):
    """The public names, imported when first used: reading records or parsing flags should not wait for JAX."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'attn_zoo' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)
