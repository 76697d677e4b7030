"""Run `tritonserver` on a repository, say in one sentence why it ended, leave nothing behind."""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import IO

from .errors import LaunchError
from .installation import Installation, find_triton

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_PR_SET_PDEATHSIG = 1
_SHARED_MEMORY = Path("/dev/shm")  # Triton's Python backend keeps its regions there
_EXIT_TIMEOUT = 40.0  # Triton's own is 30 s


@dataclass(frozen=True)
class Endpoints:
    """Where the server listens. A port of 0 asks for a free one; `with_ports` finds it."""

    host: str = "0.0.0.0"  # Triton's own default: a container serves its network
    grpc_port: int = 8001
    http_port: int = 8000
    metrics_port: int = 8002

    @property
    def client_host(self) -> str:
        """A name by which this machine reaches the server."""
        return "127.0.0.1" if self.host == "0.0.0.0" else self.host

    @property
    def grpc(self) -> str:
        """What a `RewardClient` on this machine takes."""
        return f"{self.client_host}:{self.grpc_port}"

    def with_ports(self) -> Endpoints:
        """These endpoints with free ports for 0, every other port checked to be free.

        Raises:
            LaunchError: a port is in use.
        """
        names = ("grpc", "http", "metrics")
        with ExitStack() as sockets:
            ports = [self._claim(sockets, name, getattr(self, f"{name}_port")) for name in names]
        return Endpoints(self.host, *ports)

    def _claim(self, sockets: ExitStack, name: str, port: int) -> int:
        probe = sockets.enter_context(socket.socket())
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((self.host, port))
            # A bound port alone may be shared by a second REUSEADDR socket; a listening one not.
            probe.listen()
        except OSError as error:
            raise LaunchError(f"{name} port {port} on {self.host}: {error.strerror}") from None
        return int(probe.getsockname()[1])


@dataclass
class TritonServer:
    """A running Triton, as a context manager: ready on entry, gone on exit.

    Enter it in a thread that lives as long as the server should: the kernel stops the server when
    that thread ends, so that even a killed launcher leaves none behind.

    Args:
        repository: what `export/build_repository.py` wrote.
        endpoints: where to listen.
        flags: further flags for tritonserver.
        log: where its output goes; standard error by default.
        startup_timeout: seconds until all models must be ready.
    """

    repository: Path
    endpoints: Endpoints = field(default_factory=Endpoints)
    flags: Sequence[str] = ()
    log: IO[str] | None = None
    startup_timeout: float = 900.0

    # Names this server's regions in /dev/shm, so that it can remove its own and no other's.
    _shm_prefix: str = field(init=False, default="")
    _cleanup: ExitStack = field(init=False, default_factory=ExitStack)
    _process: subprocess.Popen[str] | None = field(init=False, default=None)
    _pump: threading.Thread | None = field(init=False, default=None)
    _tail: deque[str] = field(init=False, default_factory=lambda: deque(maxlen=2000))

    def __enter__(self) -> TritonServer:
        """Start and wait until every model is ready.

        Raises:
            LaunchError: one sentence that says why it did not start.
        """
        if not (self.repository / "reward" / "config.pbtxt").is_file():
            raise LaunchError(f"{self.repository} is not a repository (no reward/config.pbtxt)")
        self.endpoints = self.endpoints.with_ports()
        self._shm_prefix = f"triward-{os.getpid()}-{secrets.token_hex(4)}-"
        try:
            self._cleanup.callback(self._remove_shared_memory)
            self._wait_until_ready(self._spawn(find_triton(self._cleanup)))
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop."""
        self.stop()

    def wait(self) -> None:
        """Wait until the server ends by itself.

        Raises:
            LaunchError: always, saying how it ended; a server that is told to stop is stopped
                with `stop`, from a signal handler that raises, say.
        """
        assert self._process, "wait is called inside the with block"
        code = self._process.wait()
        raise LaunchError(f"tritonserver stopped by itself ({_describe_exit(code)})")

    def stop(self) -> None:
        """Forward SIGTERM, wait for Triton's own exit, then end what is left of its processes."""
        with _signals_ignored():
            if self._process:
                self._process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(_EXIT_TIMEOUT)
                # Stubs are in the server's process group; what is left of it goes now.
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
                self._process = None
            if self._pump:
                self._pump.join(timeout=10)
            self._cleanup.close()

    def _spawn(self, installation: Installation) -> subprocess.Popen[str]:
        e = self.endpoints
        command = [
            installation.executable,
            f"--model-repository={self.repository.resolve()}",
            *installation.flags,
            f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}",
            "--disable-auto-complete-config",
            "--model-control-mode=none",
            f"--grpc-address={e.host}", f"--grpc-port={e.grpc_port}",
            f"--http-address={e.host}", f"--http-port={e.http_port}",
            f"--metrics-address={e.host}", f"--metrics-port={e.metrics_port}",
            *self.flags,
        ]  # fmt: skip
        # A signal between the fork and the assignment would lose sight of the process.
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._process = process = subprocess.Popen(
                command,
                env=installation.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C in a terminal is the launcher's to handle
                preexec_fn=_in_child(os.getpid()),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        self._pump = threading.Thread(target=self._copy_log, args=(process.stdout,), daemon=True)
        self._pump.start()
        return process

    def _copy_log(self, lines: IO[str]) -> None:
        for line in lines:
            self._tail.append(line)
            print(line, end="", file=self.log or sys.stderr, flush=True)

    def _wait_until_ready(self, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + self.startup_timeout
        url = f"http://{self.endpoints.client_host}:{self.endpoints.http_port}/v2/health/ready"
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while time.monotonic() < deadline:
            code = process.poll()
            if code is not None:
                if self._pump:
                    self._pump.join(timeout=10)
                raise LaunchError(_failure(self._tail) or f"tritonserver: {_describe_exit(code)}")
            # Not reachable yet, or an HTTP 400: not ready yet.
            with suppress(OSError, HTTPException), direct.open(url, timeout=5):
                return
            time.sleep(0.1)
        raise LaunchError(f"not ready after {self.startup_timeout:.0f} s; the log says why")

    def _remove_shared_memory(self) -> None:
        for region in _SHARED_MEMORY.glob(self._shm_prefix + "*"):
            region.unlink(missing_ok=True)


def _in_child(parent: int) -> Callable[[], None]:
    """For the child: take signals, and get SIGTERM when the parent dies (Linux, prctl(2))."""
    libc = ctypes.CDLL(None, use_errno=True)

    def run() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return run


_FAILURES = (
    # A model's own exception, as the Python backend reports it.
    re.compile(r"failed to load '(?P<model>[^']+)' version \d+: \w+: (?P<reason>.+)"),
    re.compile(r"^error: (?P<reason>.+)"),
    re.compile(r"failed to start \w+ service: (?P<reason>.+)"),
    re.compile(r"^E\d+ .*?\] (?P<reason>.+)"),
)


def _failure(log: Sequence[str]) -> str | None:
    """The line of Triton's log that says why it ended, as one sentence."""
    for pattern in _FAILURES:
        for line in log:
            match = pattern.search(line.strip())
            if match:
                groups = match.groupdict()
                reason = groups["reason"].strip().strip('"')
                return f"{groups['model']}: {reason}" if "model" in groups else reason
    return None


def _describe_exit(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


@contextmanager
def _signals_ignored() -> Iterator[None]:
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
