"""Memory as a benchmark wants it: warm, and in large pages, so that the kernel is what is timed.

*Warm.* glibc gives large blocks back to the system when they are freed, and maps and zeroes new
pages for the next output: 4 KiB at a time, on two cores 5 to 10 times the time of a memory-bound
kernel. A process that keeps what was freed, as the GPU's caching allocator does, pays that once.

*Large pages.* Where the 4 KiB pages of a tensor lie in the machine is chance, and a scattered one
can cost several times a contiguous one (every page is looked up, in a virtual machine twice). So
two runs of one build would disagree. The heap is therefore advised to use transparent huge pages,
of 2 MiB, where the system leaves the choice to the program.

All backends and peers of a run are measured under the same setting, and each row says which.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from pathlib import Path

# mallopt(3). Negative: never trim the heap.
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4

_HEAP_BYTES = 8 << 30  # of addresses, which cost nothing; what does not fit gets small pages
_HUGE_BYTES = 2 << 20


@functools.cache
def prepare() -> bool:
    """Makes this process keep freed memory from now on, and its heap ask for huge pages.

    False where the C library has no mallopt: then neither is done. The memory held is the largest
    that was in use at one time. For another process `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1`
    and `THP_MEM_ALLOC_ENABLE=1` (of torch) do about the same from outside.
    """
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is None:
        return False
    if not (mallopt(_MMAP_MAX, 0) == 1 and mallopt(_TRIM_THRESHOLD, -1) == 1):
        return False
    _advised()
    return True


def prepared() -> bool:
    """Whether `prepare` was called here, and worked."""
    return prepare.cache_info().currsize > 0 and prepare()


def page_size() -> str | None:
    """What most of the heap lies in: "2 MiB" (huge) or "4 KiB"; None where no kernel says.

    Once `prepare` was called it is asked of what was allocated since.
    """
    resident = huge = 0
    since, until = (prepared() and _advised()) or (0, sys.maxsize)
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return None
    heap = False
    for line in lines:
        name, _, rest = line.partition(":")
        if " " in name:  # the first line of a mapping: addresses, flags, what it is
            start, _, end = name.split()[0].partition("-")
            heap = line.endswith("[heap]") and since <= int(start, 16) and int(end, 16) <= until
        elif heap and name in ("Rss", "AnonHugePages"):
            kib = int(rest.split()[0])
            resident, huge = resident + kib * (name == "Rss"), huge + kib * (name != "Rss")
    if not resident:
        return None
    return f"{_HUGE_BYTES >> 20} MiB" if 2 * huge > resident else f"{mmap.PAGESIZE >> 10} KiB"


@functools.cache
def _advised() -> tuple[int, int] | None:
    """Grows the heap by a block that is never touched, and frees it: what comes lies there.

    Its first and last address, in whole huge pages; None where the heap cannot be advised.
    """
    libc, advice = ctypes.CDLL(None), getattr(mmap, "MADV_HUGEPAGE", None)  # Linux only
    if advice is None:
        return None
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes = (ctypes.c_size_t,)
    libc.sbrk.argtypes = (ctypes.c_ssize_t,)
    libc.free.argtypes = (ctypes.c_void_p,)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    size = _HEAP_BYTES
    # A limit on memory may forbid it; and a malloc that fails would move to another heap for good.
    while libc.sbrk(size + _HUGE_BYTES) == ctypes.c_void_p(-1).value:
        size //= 2
        if size < _HUGE_BYTES:
            return None
    libc.sbrk(-size - _HUGE_BYTES)
    if not (block := libc.malloc(size)):
        return None
    start = -(-block // _HUGE_BYTES) * _HUGE_BYTES
    end = (block + size) // _HUGE_BYTES * _HUGE_BYTES
    libc.madvise(start, end - start, advice)
    libc.free(block)
    return start, end
