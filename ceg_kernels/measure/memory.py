"""Warm memory for outputs: what is timed is the kernel, not the page faults of a fresh mapping.

glibc gives large blocks back to the system when they are freed, and maps and zeroes new pages for
the next output: 4 KiB at a time, on two cores 5 to 10 times the time of a memory-bound kernel. A
process that keeps what was freed, as the GPU's caching allocator does, pays that once. All
backends and peers of a run are measured under the same setting.
"""

from __future__ import annotations

import ctypes
import functools

# mallopt(3). Negative: never trim the heap.
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4


@functools.cache
def keep_freed() -> bool:
    """Makes this process keep freed memory from now on. False where the C library has no mallopt.

    The memory held is the largest that was in use at one time. Same effect from outside:
    `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return mallopt(_MMAP_MAX, 0) == 1 and mallopt(_TRIM_THRESHOLD, -1) == 1


def kept() -> bool:
    """Whether `keep_freed` was called here, and worked."""
    return keep_freed.cache_info().currsize > 0 and keep_freed()
