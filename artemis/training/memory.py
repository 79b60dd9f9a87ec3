"""What a training process does with the memory that it frees."""

import ctypes
import os

# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Have glibc's malloc keep what this process frees, for its next allocations.

    By itself malloc gives large freed blocks back to the system, and every training step on a CPU
    pays for their pages again: a step takes up to a quarter longer. From this call on, and for the
    whole process, all blocks come from the heap, and the heap never shrinks: the process holds its
    peak until it ends (glibc's `malloc_trim` gives back what is free at that moment).

    Returns:
        Whether malloc does so now; False where the C library is not glibc. Source: mallopt(3).
    """
    if os.name != "posix":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    wanted = {_M_TRIM_THRESHOLD: -1, _M_MMAP_MAX: 0}  # never trim; no mapping for a single block
    return all([libc.mallopt(name, value) for name, value in wanted.items()])
