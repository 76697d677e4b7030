"""Copies tritonserver's output to where it can be read, whatever becomes of that place.

A log on a full disk, or one whose reader has gone or stands still, must not stop the server:
nothing here waits for it or raises because of it. What cannot be written is counted and dropped.
"""

from __future__ import annotations

import os
import select
import sys
import threading
from collections import deque
from typing import IO

_PATIENCE = 1.0  # seconds for a slow reader, until it has missed a line
_CHUNK = select.PIPE_BUF  # a pipe that is ready takes as many bytes without blocking


class LineWriter:
    """Writes whole lines to a file; callers may be several threads.

    Args:
        out: None is standard error; where there is none all is dropped.

    Attributes:
        lost: lines that could not be written since the last that was.
    """

    def __init__(self, out: IO[str] | None) -> None:
        self._out = out or sys.stderr
        self._descriptor = _descriptor(self._out)
        self.lost = 0
        self._torn = False  # the last line that was written is half a line
        self._lock = threading.Lock()

    def write(self, line: str) -> None:
        """Write a line that ends in a newline, or count it as lost."""
        with self._lock:
            if self.lost and not self._put(self._apology()):
                self.lost += 1
                return
            self.lost = 0 if self._put(line) else 1

    def _apology(self) -> str:
        start = "\n" if self._torn else ""
        return f"{start}triward-server: {self.lost} lines of log could not be written\n"

    def _put(self, text: str) -> bool:
        """Return True if all of it was written."""
        if self._descriptor is None:
            if self._out is None:
                return False
            self._out.write(text)
            self._out.flush()
            return True
        data = memoryview(text.encode(errors="replace"))
        done = 0
        try:
            while done < len(data) and self._is_ready(self._descriptor):
                done += os.write(self._descriptor, data[done : done + _CHUNK])
        except OSError:
            pass  # no space, no reader: counted
        if done:
            self._torn = done < len(data)
        return done == len(data)

    def _is_ready(self, descriptor: int) -> bool:
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        return bool(poll.poll(0 if self.lost else _PATIENCE * 1000))


def _descriptor(target: IO[str] | None) -> int | None:
    """Return where to write without ever waiting; None for a stream in memory, as a notebook's."""
    try:
        descriptor = target.fileno() if target else None
        if descriptor is not None and os.isatty(descriptor):
            # A terminal that is ready need not have room for a whole line, and one that nobody
            # reads would be waited for. The flag must not be set for others who write there.
            return os.open(os.ttyname(descriptor), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError):
        return None
    return descriptor


class LogPump:
    """Drains a process's output until it ends.

    Args:
        lines: the output.
        writer: where it goes.
    """

    def __init__(self, lines: IO[str], writer: LineWriter) -> None:
        self.tail: deque[str] = deque(maxlen=2000)
        self.signalled = False  # tritonserver was told to stop
        self._lines = lines
        self._writer = writer
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the end of the output; a process that inherited it may keep it open."""
        self._thread.join(timeout=10)

    def _copy(self) -> None:
        for line in self._lines:
            self.tail.append(line)
            # It does not say so with a level and a time, as it says everything else.
            self.signalled |= line.startswith(("Signal (15) received", "Signal (2) received"))
            self._writer.write(line if line.endswith("\n") else line + "\n")
