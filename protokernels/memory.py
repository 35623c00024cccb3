# SPDX-License-Identifier: MIT
"""Memory between the steps of a training loop on the CPU."""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["keep_memory"]

_SET_BY_USER = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # beginnings of variables that already choose an allocator
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>


def keep_memory() -> bool:
    """Lets this process keep the memory that it frees, for the next step, instead of returning it to the system.

    A training step on the CPU frees hundreds of megabytes of activations and asks for as many a moment later. glibc gives
    every block of more than 32 MB back at once, so each step gets its pages anew, and the system has to find, clear and map
    them one by one: in a virtual machine that can take as long as the arithmetic. With this the blocks stay in the heap. The
    process then holds what it needed at its peak until it ends, and the peak is somewhat higher. Results do not change.

    ``protokernels train`` and the other commands call this first. Call it in a training program of your own, once, before
    its first large tensor; it is a property of the whole process.

    Returns:
        Whether it did so. False where the environment chooses already (``MALLOC_...``, ``GLIBC_TUNABLES``, ``LD_PRELOAD``),
        and where the C library is not glibc. CUDA memory is not concerned: torch keeps it anyway.

    Example:
        >>> from protokernels import memory
        >>> kept = memory.keep_memory()

    Source:
        ``mallopt(3)`` of the GNU C library: ``M_MMAP_THRESHOLD``, ``M_TRIM_THRESHOLD``.
    """
    if sys.platform != "linux" or any(value and name.startswith(_SET_BY_USER) for name, value in os.environ.items()):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    largest = 2**31 - 1  # mallopt takes an int
    return bool(library.mallopt(_MMAP_THRESHOLD, largest) and library.mallopt(_TRIM_THRESHOLD, -1))
