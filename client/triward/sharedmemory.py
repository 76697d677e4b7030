"""Media that reach a server on the same machine without passing through gRPC.

A region of /dev/shm is registered with the server, and requests name places in it. A place is free
again when its request is answered. If nobody knows whether the server still reads it, since the
caller gave up or the connection broke, it rests: another request's bytes there would give the
server a tensor that contradicts itself.

A region's owner holds a lock on its file, so that others can tell what a killed process left.

A server reads and writes a region for everyone who knows the name that it was registered under, and
asks for no key. Anyone on the machine can list the files of /dev/shm, so that name is another one,
which nobody can guess, and only the server is told.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import struct
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

from triward.deadline import Deadline
from triward.errors import InvalidRequest, TriwardError, is_unknown_region

FOLDER = Path("/dev/shm")
PREFIX = "triward-client-"

# Seconds. Requests wait for each model 30 s by default, and one that hangs ends the server after
# 120 s at the latest.
_REST = 300.0

T = TypeVar("T")
Steps = Generator[Any, Any, T]  # as `base.Steps`


@dataclass(frozen=True)
class Place:
    """Position of a BYTES tensor in a region.

    Attributes:
        region: name under which the server knows the region.
        offset: in bytes.
        size: in bytes.
    """

    region: str
    offset: int
    size: int


class Region:
    """Shared memory of this process, gone when it is closed or the process ends.

    Args:
        size: bytes.

    Attributes:
        name: under which a server knows it; a secret.
        key: of its file, for a server.

    Raises:
        OSError: this machine has no /dev/shm, or too little of it.
    """

    def __init__(self, size: int) -> None:  # noqa: D107 - the class says it
        sweep()
        self.size = size
        self.name = secrets.token_hex(16)
        self.path, descriptor = _create()
        self.key = f"/{self.path.name}"
        try:
            os.posix_fallocate(descriptor, 0, size)  # else a full /dev/shm would be a SIGBUS later
            self._memory = mmap.mmap(descriptor, size)
        except BaseException:
            _remove(self.path, descriptor, os.getpid())
            raise
        self.close = weakref.finalize(self, _remove, self.path, descriptor, os.getpid())
        self.registered = False  # as far as this process knows
        self.registering = threading.Lock()
        self._lock = threading.Lock()
        # First and last byte of each place, and when it is free: never, until its request returns.
        self._taken: dict[int, tuple[int, float]] = {}

    @contextmanager
    def lend(self, values: Sequence[bytes]) -> Iterator[Place | None]:
        """Lend a place that holds a BYTES tensor while the context lasts; None if there is no room.

        It rests if the context is left by an exception other than `InvalidRequest`.
        """
        size = sum(4 + len(value) for value in values)
        start = self._take(size)
        if start is None:
            yield None
            return
        offset = start
        for value in values:
            struct.pack_into("<I", self._memory, offset, len(value))
            self._memory[offset + 4 : offset + 4 + len(value)] = value
            offset += 4 + len(value)
        rest = _REST
        try:
            yield Place(self.name, start, size)
            rest = 0.0
        except TriwardError as error:
            if isinstance(error, InvalidRequest) or is_unknown_region(error):
                rest = 0.0  # the server's answer
            raise
        finally:
            with self._lock:
                self._taken[start] = (start + size, monotonic() + rest)

    def _take(self, size: int) -> int | None:
        """Take the first gap that is large enough."""
        with self._lock:
            now, start = monotonic(), 0
            for first, (last, free) in sorted(self._taken.items()):
                if free <= now:
                    del self._taken[first]
                elif first - start >= size:
                    break
                else:
                    start = last
            if not 0 < size <= self.size - start:
                return None
            self._taken[start] = (start + size, float("inf"))
            return start


def sharing(
    region: Region,
    media: Sequence[bytes],
    deadline: Deadline,
    ask: Callable[..., Steps[Any]],
    send: Callable[[Place | None], Steps[T]],
) -> Steps[T]:
    """Register a region where that is due, and send a request whose media lie in it.

    Args:
        region: of this process.
        media: of the request.
        deadline: of the request.
        ask: calls a method of tritonclient's.
        send: sends the request, with None if there was no room for its media.
    """
    yield from _register(region, deadline, ask)
    try:
        with region.lend(media) as place:
            return (yield from send(place))
    except TriwardError as error:
        if not is_unknown_region(error):
            raise
    # The server has been started again since the region was registered there.
    region.registered = False
    yield from _register(region, deadline, ask)
    with region.lend(media) as place:
        return (yield from send(place))


def _register(region: Region, deadline: Deadline, ask: Callable[..., Steps[Any]]) -> Steps[None]:
    """Tell the server about a region, and make it forget those that are gone."""
    if not region.registering.acquire(timeout=deadline.remaining()):
        raise deadline.exceeded()
    try:
        if region.registered:
            return
        known = (yield from ask("get_system_shared_memory_status")).regions
        for other in known.values():
            if is_gone(other.key):
                yield from ask("unregister_system_shared_memory", name=other.name)
        if region.name not in known:
            new = {"name": region.name, "key": region.key, "byte_size": region.size}
            yield from ask("register_system_shared_memory", **new)
        region.registered = True
    finally:
        region.registering.release()


def sweep() -> None:
    """Remove the regions of processes that are gone."""
    for path in FOLDER.glob(PREFIX + "*"):
        with suppress(OSError):  # its owner lives and holds the lock, or another one was quicker
            descriptor = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)


def is_gone(key: str) -> bool:
    """Return True if a region that a server knows was a client's, and its file is gone."""
    name = key.lstrip("/")
    return name.startswith(PREFIX) and not (FOLDER / name).exists()


def _create() -> tuple[Path, int]:
    """Return a new file and its descriptor, with the lock that says that its owner lives."""
    while True:
        path = FOLDER / f"{PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        with suppress(OSError):  # someone who sweeps was quicker than this lock
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:
                return path, descriptor
        os.close(descriptor)


def _remove(path: Path, descriptor: int, owner: int) -> None:
    # A fork's copy goes without a word: the region is its parent's.
    if os.getpid() == owner:
        with suppress(FileNotFoundError):
            path.unlink()
    os.close(descriptor)
