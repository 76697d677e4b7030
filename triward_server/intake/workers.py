"""Processes that may be killed at any moment, and channels to them.

A worker does what no other means can interrupt: the C code of a codec. It is forked by the
**zygote**, a single-threaded process that has imported all that workers need, so that another one
is there within milliseconds. One zygote serves all that its process needs.

    this process  --fork, kill-->  zygote  --fork, SIGKILL, wait-->  worker
         \\__________________ a channel of its own __________________/

The zygote ends when its channel closes, so with this process; a worker ends with the zygote.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Buffer = bytes | memoryview

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_HEAD = struct.Struct("<I")
_LARGEST_MESSAGE = 16 * 2**20  # of JSON; a request's parts are far smaller
# Pictures come and go all the time. Mapping fresh pages for each takes as long as decoding it, so
# they come from the heap (32 MiB is glibc's largest threshold), and its free end stays.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "134217728"}
_TICK = 1.0  # seconds between two calls of `progress` while a channel waits
_START_TIMEOUT = 300.0  # importing takes seconds, on a busy machine many


class TimeIsOver(Exception):
    """The other side of a channel did not answer in time."""


class WorkerLost(Exception):
    """The other side of a channel is gone."""


class Channel:
    """Messages as JSON, each with raw bytes behind it if both sides know so, over a socket.

    JSON and not pickle: a worker that a damaged file has taken over must not run code here.

    Args:
        sock: connected.
        progress: called while this side waits, each second.
    """

    def __init__(self, sock: socket.socket, progress: Callable[[], None] = lambda: None) -> None:
        self._socket = sock
        self.progress = progress

    def send(self, message: Any, payload: Sequence[Buffer] = (), end: float = float("inf")) -> None:
        """Send a message and what belongs to it.

        Args:
            message: of JSON's types.
            payload: bytes behind it.
            end: until when, of `time.monotonic`.

        Raises:
            TimeIsOver: the other side does not take it.
            WorkerLost: there is no other side.
        """
        text = json.dumps(message).encode()
        for part in (_HEAD.pack(len(text)) + text, *payload):
            rest = memoryview(part)
            while rest:
                rest = rest[self._wait(self._socket.send, rest, end) :]

    def receive(self, end: float = float("inf")) -> Any:
        """Receive the next message; raises as `send` does."""
        head = bytearray(_HEAD.size)
        self.receive_into(head, end)
        [size] = _HEAD.unpack(head)
        if size > _LARGEST_MESSAGE:
            raise WorkerLost(f"it sends a message of {size} bytes")
        text = bytearray(size)
        self.receive_into(text, end)
        return json.loads(text)

    def receive_into(self, buffer: bytearray | memoryview, end: float = float("inf")) -> None:
        """Fill a buffer with bytes that follow a message; raises as `send` does."""
        rest = memoryview(buffer)
        while rest:
            count = self._wait(self._socket.recv_into, rest, end)
            if not count:
                raise WorkerLost("it has closed the channel")
            rest = rest[count:]

    def send_socket(self, other: socket.socket) -> None:
        """Hand a socket over."""
        socket.send_fds(self._socket, [b"."], [other.fileno()])

    def receive_socket(self) -> socket.socket:
        """Take one."""
        self._socket.settimeout(None)
        _, [number], *_ = socket.recv_fds(self._socket, 1, 1)
        return socket.socket(fileno=number)

    @property
    def is_alive(self) -> bool:
        """True if both sides are open, and the other sent nothing that nobody asked for."""
        try:
            self._socket.settimeout(0)
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def close(self) -> None:
        """Close this side."""
        self._socket.close()

    def _wait(self, call: Callable[[memoryview], int], rest: memoryview, end: float) -> int:
        """Try a call until it does not time out, as long as there is time."""
        while True:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeIsOver
            self._socket.settimeout(min(_TICK, left))
            try:
                return call(rest)
            except TimeoutError:
                self.progress()
            except OSError as error:
                raise WorkerLost(str(error)) from None


class Zygote:
    """Forks workers of one kind.

    Args:
        module: what the zygote imports; its `prepare(settings)` makes, in the zygote, what its
            `serve(channel, prepared)` works with in a worker.
    """

    def __init__(self, module: str) -> None:
        ours, theirs = socket.socketpair()
        # As in this process, which may be embedded; PYTHONPATH alone might miss what it added.
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import run_zygote; "
            f"run_zygote({module!r}, {theirs.fileno()})"
        )
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # else fork is unsafe
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                env=os.environ | one_thread | _ALLOCATOR | {"CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._channel = Channel(ours)
        self._lock = threading.Lock()

    @property
    def is_alive(self) -> bool:
        """True if it can be asked."""
        return self._channel.is_alive

    def fork(
        self, settings: bytes, max_bytes: int, progress: Callable[[], None] = lambda: None
    ) -> Worker:
        """Start a worker.

        Args:
            settings: for `prepare`.
            max_bytes: of data that it may have beside what the zygote has.
            progress: called while anything waits for it.

        Raises:
            WorkerLost: the zygote itself has ended.
            TimeIsOver: it does not answer.
        """
        ours, theirs = socket.socketpair()
        with self._lock, theirs:
            self._channel.progress = progress
            self._channel.send({"max_bytes": max_bytes, "settings": len(settings)}, [settings])
            self._channel.send_socket(theirs)
            answer = self._channel.receive(time.monotonic() + _START_TIMEOUT)
        return Worker(answer["pid"], Channel(ours, progress), self)

    def kill(self, pid: int) -> int:
        """End one of its workers; raises as `fork` does."""
        with self._lock:
            self._channel.send({"kill": pid})
            return int(self._channel.receive(time.monotonic() + _START_TIMEOUT)["status"])

    def close(self) -> None:
        """End it and all its workers."""
        self._channel.close()
        self._process.kill()
        self._process.wait()


@dataclass(frozen=True)
class Worker:
    """A running one.

    Attributes:
        pid: of its process.
        channel: to it.
        zygote: its parent.
    """

    pid: int
    channel: Channel
    zygote: Zygote

    def kill(self) -> int:
        """End it, whatever it does.

        Returns:
            How it had ended before, if it had: its exit code, or a signal's number below 0.
        """
        self.channel.close()
        try:
            return self.zygote.kill(self.pid)
        except (WorkerLost, TimeIsOver):  # a zygote that dies takes its workers with it
            self.zygote.close()
            return -signal.SIGKILL


_zygotes: dict[str, Zygote] = {}
_guard = threading.Lock()


def zygote(module: str) -> Zygote:
    """Return this process's zygote for a kind of workers; a new one where it has died."""
    with _guard:
        if module in _zygotes and not _zygotes[module].is_alive:
            _zygotes.pop(module).close()
        if module not in _zygotes:
            _zygotes[module] = Zygote(module)
        return _zygotes[module]


@atexit.register
def close_all() -> None:
    """End every zygote with its workers; who needs one later gets a new one."""
    with _guard:
        while _zygotes:
            _zygotes.popitem()[1].close()


def run_zygote(module: str, number: int) -> None:
    """Be a zygote: what its process does.

    Args:
        module: as for `Zygote`.
        number: of the descriptor of its channel.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's is for its parent to handle
    _call_me("triward-zygote")
    kind = importlib.import_module(module)
    control = Channel(socket.socket(fileno=number))
    with suppress(WorkerLost):
        while True:
            message = control.receive()
            if "kill" in message:
                os.kill(message["kill"], signal.SIGKILL)
                _, status = os.waitpid(message["kill"], 0)
                control.send({"status": os.waitstatus_to_exitcode(status)})
                continue
            settings = bytearray(message["settings"])
            control.receive_into(settings)
            with control.receive_socket() as theirs:
                prepared = kind.prepare(bytes(settings))
                control.send({"pid": _fork(kind, prepared, theirs, control, message["max_bytes"])})


def _fork(kind: Any, prepared: Any, sock: socket.socket, control: Channel, max_bytes: int) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        _call_me("triward-worker")
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            control.close()
            _bound(max_bytes)
            with suppress(WorkerLost):
                kind.serve(Channel(sock), prepared)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)  # nothing of the zygote's is this process's to tidy up


def _bound(max_bytes: int) -> None:
    """Limit the data of this process, leave no core files, and be what the kernel kills first."""
    has = int(_status()["VmData"].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (has + max_bytes, has + max_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):  # a system that is hardened may not let a process say so
        Path("/proc/self/oom_score_adj").write_text("1000")


def _status() -> dict[str, str]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def _call_me(name: str) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)
