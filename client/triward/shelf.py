"""Media that conversations share: read, and encoded, once."""

from __future__ import annotations

import os
import threading

from cachetools import LRUCache

from triward.conversation import MediaRef, read_ref
from triward.deadline import Deadline

MAX_BYTES = 256 * 2**20
_LOCKS = 64


class Shelf:
    """Remembers the bytes of the media that were read last. Safe to share between threads.

    A file that changes while it is remembered is not read again, so a shelf lives no longer than
    one call that scores many conversations.

    Args:
        max_bytes: of all files together.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:  # noqa: D107 - the class says it
        # With the value itself: an object's id is its own only as long as the object lives.
        self._kept: LRUCache[object, tuple[object, bytes]] = LRUCache(
            max_bytes, getsizeof=lambda item: len(item[1])
        )
        self._lock = threading.Lock()
        # Threads that want the same file wait for the one that reads it.
        self._reading = [threading.Lock() for _ in range(_LOCKS)]

    def read(self, ref: MediaRef, deadline: Deadline) -> bytes:
        """Like `read_ref`, or what it returned before."""
        value = ref.value
        if isinstance(value, (bytes, bytearray, memoryview)):
            return read_ref(ref, deadline)
        key: object = value if isinstance(value, (str, os.PathLike)) else id(value)
        lock = self._reading[hash(key) % _LOCKS]
        if not lock.acquire(timeout=deadline.remaining()):
            raise deadline.exceeded()
        try:
            with self._lock:
                kept = self._kept.get(key)
            if kept is None:
                kept = value, read_ref(ref, deadline)
                if len(kept[1]) <= self._kept.maxsize:
                    with self._lock:
                        self._kept[key] = kept
            return kept[1]
        finally:
            lock.release()
