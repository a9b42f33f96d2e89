"""Memory that the C library's allocator keeps after it was freed, given back to the system."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable


def give_back_freed_memory() -> None:
    """Have glibc return all whole pages that are free in its heaps; does nothing with another C library.

    glibc serves blocks of up to 32 MiB from its heaps once blocks of such sizes have been freed (mallopt(3),
    M_MMAP_THRESHOLD), and of what is freed there it returns by itself only what lies at the end.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim
