"""Where the memory of a call comes from, on a CPU: the next call gets what the last one freed, or else times are those of the system too."""

import ctypes
import importlib.util
import re
from pathlib import Path

ARENA_MAX, MMAP_MAX, TRIM_THRESHOLD = -8, -4, -1  # of glibc's mallopt(3)
FIRST = 2**30  # bytes, or a quarter of what is available if that is less
_kept = False  # in this process, which has one C library


def keep_freed_memory() -> bool:
    """Has the C library keep what is freed for the next call, a first GiB from now on; False where it is not glibc, which cannot be told so, or where JAX has a
    plugin for an accelerator, whose calls do not take memory of the host.

    To be called before JAX is asked for its devices: later it changes nothing for arrays of JAX, presumably since the threads that it then starts have memory of
    their own (arenas).
    Otherwise each call gets large arrays as fresh pages, which the system fills with zeros: up to half of a call's time, by an amount that depends on which
    sizes the process has freed before, and so on what else is timed.
    """
    global _kept
    if any(importlib.util.find_spec(plugin) for plugin in ("jax_plugins", "libtpu")):
        return False
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None)
    _kept = mallopt is not None and all(mallopt(*option) for option in ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, -1)))
    if _kept:  # until there are gaps that fit, what is aligned comes from the end of memory, which would still be fresh
        libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
        size = min(FIRST, _available() // 4)
        if room := libc.malloc(size):
            ctypes.memset(room, 0, size)
            libc.free(room)
    return _kept


def freed_memory_is_kept() -> bool:
    """Whether this process was told so."""
    return _kept


def _available() -> int:
    """Bytes that could be had without swapping, as Linux tells; enough for FIRST where it does not."""
    told = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable: *(\d+) kB$", told.read_text(), re.MULTILINE) if told.exists() else None
    return 1024 * int(found[1]) if found else 4 * FIRST
