"""Memory of the machine or container: how much there is, who may take it, who gives it back."""

from __future__ import annotations

import ctypes
import resource
import time
from pathlib import Path

import psutil

# What a container's limit is called in version 2 and 1 of Linux' control groups, seen from inside.
_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


_INTERVAL = 20.0  # seconds; one trim of a few hundred MB takes milliseconds
# glibc's names for what mallopt(3) sets.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_LEAST = 4 * 2**30  # an idle one takes up to 1.5 GiB on two cores, mostly threads' stacks


def half_of_the_machine() -> int:
    """Bytes that tritonserver may take: the other half is for its models' processes.

    Never below 4 GiB: what a small machine lacks its own limit says sooner.
    """
    total = int(psutil.virtual_memory().total)
    limits = [path.read_text().strip() for path in _LIMITS if path.is_file()]
    machine = min([total, *(int(limit) for limit in limits if limit.isdecimal())])
    return max(machine // 2, _LEAST)


def lift_limit() -> None:
    """Undo tritonserver's limit in a model's process, which it started and which holds weights."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


class Heap:
    """Gives the pages that are free back to the system, at most every few seconds.

    Batches of all sizes leave the heap full of holes. glibc keeps them, for it gives back only what
    is free at the heap's end, so resident memory grows for hours while what is in use does not.

    Where the C library has no malloc_trim(3) it does nothing.

    Args:
        keep_bytes: free memory that stays with the process from one allocation to the next. Tensors
            that are mapped and unmapped one by one cost a page fault for every 4 KiB each time. 0:
            as the environment says.
    """

    def __init__(self, keep_bytes: int = 0) -> None:
        library = ctypes.CDLL(None)
        self._trim = getattr(library, "malloc_trim", None)
        self._last = time.monotonic()
        if self._trim and keep_bytes:
            library.mallopt(_M_MMAP_MAX, 0)
            library.mallopt(_M_TRIM_THRESHOLD, keep_bytes)

    def tidy(self) -> None:
        """Call it between batches."""
        now = time.monotonic()
        if self._trim and now - self._last >= _INTERVAL:
            self._last = now
            self._trim(0)
