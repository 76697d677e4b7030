"""Signals that end a server of this package."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any


@contextmanager
def stopping() -> Iterator[SimpleQueue[int]]:
    """Let SIGINT and SIGTERM put their number into the queue that is yielded.

    Nothing is raised, for Python drops a KeyboardInterrupt that arrives in a finaliser or in a
    callback of gRPC's. Behind the first signal the next one acts as before.
    """
    stops: SimpleQueue[int] = SimpleQueue()
    earlier: dict[int, Any] = {}

    def stop(number: int, frame: object) -> None:
        restore()
        stops.put(number)  # which may be called at any point, even inside another put

    def restore() -> None:
        for each, handler in earlier.items():
            signal.signal(each, handler)

    for each in (signal.SIGINT, signal.SIGTERM):
        earlier[each] = signal.signal(each, stop)
    try:
        yield stops
    finally:
        restore()


def wait_for(stops: SimpleQueue[int]) -> None:
    """Wait until something is in the queue."""
    while True:
        with suppress(Empty):
            stops.get(timeout=0.5)  # Windows would not look for signals in a wait without end
            return
