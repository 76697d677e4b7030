"""Media that conversations share: read, and encoded, once."""

from __future__ import annotations

import os
import threading

from cachetools import LRUCache

from triward.conversation import MediaRef, read_ref
from triward.deadline import Deadline

MAX_BYTES = 256 * 2**20


class Shelf:
    """Remembers the bytes of the media that were read last. Safe to share between threads.

    A file that changes while it is remembered is not read again, so a shelf lives no longer than
    one call that scores many conversations.

    Args:
        max_bytes: of all files together, and of the images they were made from.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:  # noqa: D107 - the class says it
        # With the value itself: an object's id is its own only as long as the object lives.
        self._kept: LRUCache[object, tuple[object, bytes]] = LRUCache(
            max_bytes, getsizeof=lambda item: _size(item[0]) + len(item[1])
        )
        self._lock = threading.Lock()
        # Threads that want the same file wait for the one that reads it.
        self._reading: dict[object, threading.Lock] = {}

    def read(self, ref: MediaRef, deadline: Deadline) -> bytes:
        """Return a file's bytes as `read_ref` does, or what that returned before."""
        value = ref.value
        if isinstance(value, (bytes, bytearray, memoryview)):
            return read_ref(ref, deadline)
        key: object = os.fspath(value) if isinstance(value, (str, os.PathLike)) else id(value)
        with self._lock:
            reading = self._reading.setdefault(key, threading.Lock())
        if not reading.acquire(timeout=deadline.remaining()):
            raise deadline.exceeded()
        try:
            with self._lock:
                kept = self._kept.get(key)
            if kept is None:
                kept = value, read_ref(ref, deadline)
                with self._lock:
                    if self._kept.getsizeof(kept) <= self._kept.maxsize:
                        self._kept[key] = kept
            return kept[1]
        finally:
            with self._lock:
                self._reading.pop(key, None)
            reading.release()


def _size(value: object) -> int:
    """Bytes that a value keeps in memory: an image's pixels, or a data: URL's text."""
    if isinstance(value, str):
        return len(value)
    width, height = getattr(value, "size", (0, 0))
    bands = len(value.getbands()) if hasattr(value, "getbands") else 0
    return int(width * height * bands)
