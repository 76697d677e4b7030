"""The signals that end `serve`, taken from its first moment on.

`cli` imports this module before all others: what they import takes a second, in which a signal
would end the process with a code that looks like a failure.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def farewell(number: int) -> str:
    """Return the line that says why `serve` ends."""
    return f"triward-server: told to stop by {signal.Signals(number).name}\n"


def _end(number: int, frame: object) -> NoReturn:
    """Exit before anything has been started: an import could swallow an exception."""
    try:
        os.write(2, farewell(number).encode())
    finally:
        os._exit(0)


if sys.argv[1:2] == ["serve"]:  # other commands end as any command does
    for each in STOP_SIGNALS:
        signal.signal(each, _end)
