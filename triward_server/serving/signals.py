"""The signals that end `serve`, taken from its first moment on.

`cli` imports this module before all others: what they import takes a second, in which a signal
would end the process with a code that looks like a failure.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def farewell(number: int) -> str:
    """Return the line that says why `serve` ends."""
    return f"triward-server: told to stop by {signal.Signals(number).name}\n"


@contextmanager
def signals_ignored() -> Iterator[None]:
    """While stopping, a second Ctrl-C must not leave half a server behind."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals, and only it may set handlers
        return
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end(number: int, frame: object) -> NoReturn:
    """Exit before anything has been started: an import could swallow an exception."""
    try:
        os.write(2, farewell(number).encode())
    finally:
        os._exit(0)


if sys.argv[1:2] == ["serve"]:  # other commands end as any command does
    for each in STOP_SIGNALS:
        signal.signal(each, _end)
