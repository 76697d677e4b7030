"""State that belongs to one process: gRPC's channels and locks do not survive a fork."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar
from weakref import WeakSet

from triward.errors import TriwardError

T = TypeVar("T")


class PerProcess(Generic[T]):
    """A value of one process: made when it is first asked for, and anew after a fork.

    Args:
        make: makes it.
    """

    def __init__(self, make: Callable[[], T]) -> None:  # noqa: D107 - the class says it
        self._make = make
        self._lock = threading.Lock()
        self._made: list[T] = []
        _FORGETFUL.add(self)

    def get(self) -> T:
        """Return this process's value."""
        with self._lock:
            if not self._made:
                self._made.append(self._make())
            return self._made[0]

    def take(self) -> T | None:
        """Return and forget this process's value, if there is one; the next `get` makes another."""
        with self._lock:
            return self._made.pop() if self._made else None

    def forget(self) -> None:
        """Drop the parent's value, and its lock, in a fork's child."""
        # Kept alive: a channel that is closed in a child waits for threads of its parent.
        _ABANDONED.append(self._made)
        self._lock, self._made = threading.Lock(), []


_FORGETFUL: WeakSet[PerProcess[Any]] = WeakSet()
_ABANDONED: list[object] = []


def _after_fork() -> None:
    for each in list(_FORGETFUL):
        each.forget()


if hasattr(os, "register_at_fork"):  # where there is a fork
    os.register_at_fork(after_in_child=_after_fork)

_OWNER: list[int] = []  # the process in which asyncio's gRPC was first used


def check_not_forked() -> None:
    """Raise where a call would hang for ever: gRPC's asyncio half does not survive a fork."""
    if not _OWNER:
        _OWNER.append(os.getpid())
    elif [os.getpid()] != _OWNER:
        raise TriwardError(
            "an AsyncRewardClient was used before this process was forked, and gRPC cannot follow; "
            "start processes with 'spawn'"
        )
