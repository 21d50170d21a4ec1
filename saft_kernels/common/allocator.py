"""What glibc's malloc does with the memory of gradients that have been freed."""

from __future__ import annotations

import ctypes
import functools
import os

_M_MMAP_THRESHOLD = -3  # of malloc.h
_MMAP_THRESHOLD = 1 << 20  # bytes. Smaller blocks find room among each other; each larger one costs its page faults

# each of these, set by the user, ends the adaptation that is undone here, and says what he wants in its place
_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
_TUNABLES = ("mmap_threshold", "mmap_max", "trim_threshold", "top_pad")


@functools.cache
def return_large_blocks() -> bool:
    """Has freed CPU memory go back to the system, block by block, from 1 MiB on: once per process, under glibc.

    By default the first free of a mapped block of up to 32 MiB moves all blocks of its size to the heap for good.
    There, an aligned block does not fit where one of the same size was freed, once anything small lies beside it:
    gradients that are freed one by one then take as much memory as all of them together.

    Returns:
        Whether it does; False under another malloc, or where the environment sets one of malloc's limits.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if any(name in os.environ for name in _VARIABLES) or any(f"glibc.malloc.{name}=" in tunables for name in _TUNABLES):
        return False
    try:
        libc = ctypes.CDLL(None)
        if not hasattr(libc, "gnu_get_libc_version") or not libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD):
            return False
        libc.malloc_trim(ctypes.c_size_t(0))  # holes that earlier blocks left in the heap
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no CDLL(None)
        return False
    return True
