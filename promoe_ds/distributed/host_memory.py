"""What glibc's allocator does with freed blocks, which on a CPU are most of a step's tensors."""

from __future__ import annotations

import ctypes
import os

#: Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process keep freed blocks for its next step, as an allocator for a GPU does; return
    whether it will.

    By default glibc gives every large block back, and the kernel clears its pages again in each
    step. Nothing is changed where the environment has settings of glibc's allocator, or the C
    library has none.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get(
        "GLIBC_TUNABLES", ""
    ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _LARGEST_INT}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])
