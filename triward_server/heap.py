"""Keeps a long-lived process's memory level.

Batches of all sizes leave the heap full of holes. glibc keeps them, for it gives back only what is
free at the heap's end, so resident memory grows for hours while what is in use does not.
"""

from __future__ import annotations

import ctypes
import time

_INTERVAL = 20.0  # seconds; one trim of a few hundred MB takes milliseconds


class Heap:
    """Gives the pages that are free back to the system, at most every few seconds.

    Where the C library has no malloc_trim(3) it does nothing.
    """

    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._last = time.monotonic()

    def tidy(self) -> None:
        """Call it between batches."""
        now = time.monotonic()
        if self._trim and now - self._last >= _INTERVAL:
            self._last = now
            self._trim(0)
