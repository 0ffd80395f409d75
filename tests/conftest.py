"""Four virtual CPU devices for the sharding tests, and shape annotations checked at every call.

XLA compiles here without LLVM's optimizations, which takes half the time; gate 1 is also run with them, as users have them.
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

install_import_hook(["attn_zoo.attention", "attn_zoo.ops", "attn_zoo.models"], "typecheck.check")


def pytest_terminal_summary(terminalreporter):
    """What the gates of the registry did not ask of a variant, for the reason that the variant itself declares."""
    if any("test_gates.py" in getattr(report, "nodeid", "") for reports in terminalreporter.stats.values() for report in reports):
        from attn_zoo import VARIANTS
        from attn_zoo.catalogue import refusals

        terminalreporter.section("gates that a variant is excused from, by its own entry")
        for name, variant in VARIANTS.items():
            for reason in refusals(variant):
                terminalreporter.line(f"{name} {reason}")
