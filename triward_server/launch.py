"""Find `tritonserver`, run it, and leave nothing behind.

In NVIDIA's container `tritonserver` is on PATH and used as it is. Elsewhere the one in the
nvidia-pytriton wheel is assembled into something that serves an ordinary model repository: its
Python backend and the stub that matches this interpreter, in one temporary folder.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import IO

from .errors import LaunchError

_PR_SET_PDEATHSIG = 1
_SHARED_MEMORY = Path("/dev/shm")
_EXIT_TIMEOUT = 40.0  # Triton's own is 30 s


@dataclass(frozen=True)
class Installation:
    """A runnable Triton: its executable, the flags it needs and its environment."""

    executable: str
    flags: tuple[str, ...]
    environment: dict[str, str]


@dataclass(frozen=True)
class Endpoints:
    """Where the server listens. A port of 0 asks for a free one; `with_ports` finds it."""

    host: str = "0.0.0.0"
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

    def __enter__(self) -> TritonServer:
        """Start and wait until every model is ready.

        Raises:
            LaunchError: one sentence that says why it did not start.
        """
        if not (self.repository / "reward" / "config.pbtxt").is_file():
            raise LaunchError(f"{self.repository} is not a repository (no reward/config.pbtxt)")
        self.endpoints = self.endpoints.with_ports()
        # Names this server's regions in /dev/shm, so that it can remove its own and no other's.
        self._shm_prefix = f"triward-{os.getpid()}-{secrets.token_hex(4)}-"
        self._cleanup = ExitStack()
        self._cleanup.callback(self._remove_shared_memory)
        try:
            installation = find_triton(self._cleanup)
            self._process = self._spawn(installation)
            self._wait_until_ready()
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

    @property
    def pid(self) -> int:
        """Process id of tritonserver."""
        return self._process.pid

    def wait(self) -> None:
        """Wait until the server ends by itself.

        Raises:
            LaunchError: always, saying how it ended; a server that is told to stop is stopped
                with `stop`, from a signal handler that raises, say.
        """
        code = self._process.wait()
        raise LaunchError(f"tritonserver stopped by itself ({_describe_exit(code)})")

    def stop(self) -> None:
        """Forward SIGTERM, wait for Triton's own exit, then end what is left of its processes."""
        process = getattr(self, "_process", None)
        if process is not None:
            with _signals_ignored():
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_EXIT_TIMEOUT)
                # Stubs are in the server's process group; what is left of it goes now.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                self._pump.join()
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
        process = subprocess.Popen(
            command,
            env=installation.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C in a terminal is the launcher's to handle
            preexec_fn=_die_with(os.getpid()),
        )
        self._tail: deque[str] = deque(maxlen=2000)
        self._pump = threading.Thread(target=self._copy_log, args=(process.stdout,), daemon=True)
        self._pump.start()
        return process

    def _copy_log(self, lines: IO[str]) -> None:
        for line in lines:
            self._tail.append(line)
            print(line, end="", file=self.log or sys.stderr, flush=True)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.startup_timeout
        url = f"http://{self.endpoints.client_host}:{self.endpoints.http_port}/v2/health/ready"
        while time.monotonic() < deadline:
            code = self._process.poll()
            if code is not None:
                self._pump.join()
                raise LaunchError(_failure(self._tail) or f"tritonserver: {_describe_exit(code)}")
            # Not reachable yet, or an HTTP 400: not ready yet.
            with suppress(OSError), urllib.request.urlopen(url, timeout=5):
                return
            time.sleep(0.1)
        raise LaunchError(f"not ready after {self.startup_timeout:.0f} s; the log says why")

    def _remove_shared_memory(self) -> None:
        for region in _SHARED_MEMORY.glob(self._shm_prefix + "*"):
            region.unlink(missing_ok=True)


def find_triton(cleanup: ExitStack) -> Installation:
    """The `tritonserver` on PATH, or else the wheel's.

    Args:
        cleanup: takes over the temporary folder that the wheel's needs.

    Raises:
        LaunchError: there is none, or it cannot run here; says what to install.
    """
    executable = shutil.which("tritonserver")
    if executable is not None:
        return Installation(executable, (), dict(os.environ))
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise LaunchError(
            "no tritonserver on PATH and no nvidia-pytriton installed; use NVIDIA's Triton "
            "container, or: pip install 'triward-server[embedded]'"
        )
    if int(version("numpy").split(".")[0]) >= 2:
        raise LaunchError(
            f"numpy {version('numpy')} silently breaks the Python backend of nvidia-pytriton's "
            "Triton; pip install 'numpy<2'"
        )
    package = Path(spec.origin).parent
    return _from_wheel(package, Path(cleanup.enter_context(tempfile.TemporaryDirectory())))


def _from_wheel(package: Path, folder: Path) -> Installation:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    triton = package / "tritonserver"
    stub = triton / "python_backend_stubs" / python / "triton_python_backend_stub"
    if not stub.is_file():
        known = sorted(p.name for p in stub.parent.parent.iterdir())
        raise LaunchError(f"nvidia-pytriton has no stub for Python {python}, only {known}")
    library = _python_library()
    backend = folder / "backends" / "python"
    shutil.copytree(triton / "backends" / "python", backend)
    shutil.copy(stub, backend)
    environment = dict(os.environ)
    libraries = [str(library.parent), str(package.parent / "nvidia_pytriton.libs")]
    _prepend(environment, "LD_LIBRARY_PATH", libraries)
    # The stub is an embedded interpreter: it finds its packages through the `python3` on PATH.
    _prepend(environment, "PATH", [str(Path(sys.executable).parent)])
    return Installation(
        executable=str(triton / "bin" / "tritonserver"),
        flags=(f"--backend-directory={backend.parent}",),
        environment=environment,
    )


def _python_library() -> Path:
    """The shared library of this interpreter, which the stub links against."""
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    library = Path(sysconfig.get_config_var("LIBDIR") or "", name)
    if not library.is_file():
        raise LaunchError(
            f"this Python has no {name} (looked in {library.parent}), which Triton's Python "
            "backend needs; use a Python built with --enable-shared, such as the distribution's "
            "python3 with its libpython3 package"
        )
    return library


def _prepend(environment: dict[str, str], name: str, folders: list[str]) -> None:
    rest = [environment[name]] if environment.get(name) else []
    environment[name] = os.pathsep.join([*folders, *rest])


def _die_with(parent: int) -> Callable[[], None]:
    """For the child: get SIGTERM when this process dies, however it dies (Linux, prctl(2))."""
    libc = ctypes.CDLL(None, use_errno=True)

    def run() -> None:
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
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
