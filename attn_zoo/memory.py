"""Where the memory of a call comes from, on a CPU: the next call gets what the last one freed, or else times are those of the system too."""

import ctypes

ARENA_MAX, MMAP_MAX, TRIM_THRESHOLD = -8, -4, -1  # of glibc's mallopt(3)
_kept = False  # in this process, which has one C library


def keep_freed_memory() -> bool:
    """Has the C library keep what is freed for the next call; False where it is not glibc, which cannot be told so.

    Otherwise each call gets large arrays as fresh pages, which the system fills with zeros: up to half of a call's time, by an amount that depends on which
    sizes the process has freed before, and so on what else is timed.
    """
    global _kept
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    _kept = mallopt is not None and all(mallopt(*option) for option in ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, -1)))
    return _kept


def freed_memory_is_kept() -> bool:
    """Whether this process was told so."""
    return _kept
