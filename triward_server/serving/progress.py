"""Notice that a server which should start does nothing any more.

While a model loads, the Python backend of Triton 24.10 gives its process up after one second
without a sign of life, which an overloaded machine can cause. Then both wait for each other for
ever, or Triton aborts (`lock_exception`).
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field

import psutil

_PATIENCE = 20.0  # seconds
_IDLE = 0.004  # of each process' time; the ticks of one that waits take a quarter of it


class Progress:
    """Watches a process and all below it. Reading weights, compiling and importing are work.

    Args:
        pid: the server's.
        patience: seconds without work after which it stands still.
    """

    def __init__(self, pid: int, patience: float = _PATIENCE) -> None:
        self._pid = pid
        self._patience = patience
        self._since, self._seen = time.monotonic(), Work.of(pid)

    def stands_still(self) -> bool:
        """Look again; return True if nothing was done for that long."""
        waited = time.monotonic() - self._since
        if waited < self._patience:
            return False
        before, self._seen = self._seen, Work.of(self._pid)
        self._since = time.monotonic()
        return self._seen.is_idle_since(before, waited)


@dataclass
class Work:
    """Work that processes have done so far.

    Attributes:
        done: process -> seconds of processor time, resident bytes.
        waits_for_disk: one of them does.
    """

    done: dict[int, tuple[float, int]] = field(default_factory=dict)
    waits_for_disk: bool = False

    @classmethod
    def of(cls, pid: int) -> Work:
        """Add up a process and all below it; nothing if it has ended."""
        work = cls()
        try:
            process = psutil.Process(pid)
            family = [process, *process.children(recursive=True)]
        except psutil.Error:
            return work
        for each in family:
            with suppress(psutil.Error), each.oneshot():  # it may just have ended
                cpu = each.cpu_times()
                work.done[each.pid] = (cpu.user + cpu.system, each.memory_info().rss)
                work.waits_for_disk |= each.status() == psutil.STATUS_DISK_SLEEP
        return work

    def is_idle_since(self, before: Work, seconds: float) -> bool:
        """Return True if the same processes are there and have hardly done anything."""
        if self.waits_for_disk or self.done.keys() != before.done.keys() or not self.done:
            return False
        pairs = [(now, before.done[pid]) for pid, now in self.done.items()]
        cpu = sum(now[0] - then[0] for now, then in pairs)
        # Weights that come slowly over a network take hardly any processor time, but memory.
        grows = any(now[1] > then[1] for now, then in pairs)
        return not grows and cpu < _IDLE * seconds * len(self.done)
