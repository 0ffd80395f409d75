"""Four virtual CPU devices for the sharding tests, and shape annotations checked at every call."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

install_import_hook(["attn_zoo.attention", "attn_zoo.ops", "attn_zoo.models"], "typecheck.check")
