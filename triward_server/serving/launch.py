"""Run `tritonserver` on a repository, say in one sentence why it ended, leave nothing behind."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, NoReturn

from .. import schema
from ..backend.metrics import WORKING
from ..errors import LaunchError, Unhealthy
from ..schema import ModelNames
from .child import set_up_child
from .ending import describe_exit, explained, lost_a_port, why_it_ended
from .endpoints import ANY, CHUNKS_FIXED, Endpoints, Tls
from .gpu import check_gpus
from .installation import Installation, find_triton
from .integrity import Verify, check_served
from .log import LineWriter, LogPump
from .progress import Progress
from .repository import DRAINING_VERSION, draining, gpu_models, served_models
from .signals import STOP_SIGNALS, signals_ignored
from .triton_http import ADMIN_HEADER, HttpError, TritonHttp, read_metrics

__all__ = ["STOP_SIGNALS", "Endpoints", "Tls", "TritonServer"]

_SHARED_MEMORY = Path("/dev/shm")  # Triton's Python backend keeps its regions there
_EXIT_TIMEOUT = 40.0  # Triton's own is 30 s
_DRAINED_EXIT_TIMEOUT = 15.0  # nothing is lost any more, whatever Triton still waits for
_STARTS = 3
_CRASHES = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)
_PENDING = "nv_inference_pending_request_count"
_QUIET_LOOKS = 20  # a tenth of a second apart: longer than a request is between two steps
# glibc raises its threshold for memory maps with what is freed, up to 32 MB; then tensors of all
# sizes come from one heap, which they leave full of holes. A fixed threshold keeps them apart.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1048576"}
# What changes or shows the server itself, and no caller needs.
_ADMIN_PROTOCOLS = "model-repository,model-config,shared-memory,trace,logging"


class _Transient(LaunchError):
    """A failed start after which the next one may succeed.

    Triton ended or stood still by a fault of its own while models were loading, as it does on an
    overloaded machine (`progress.py`), or somebody took a port between its choice and Triton's
    bind, which comes when all models are loaded. What is wrong with a model comes again.
    """


@dataclass
class TritonServer:
    """A running Triton, as a context manager: ready on entry, gone on exit.

    Enter it in a thread that lives as long as the server should: the kernel stops the server when
    that thread ends, so that even a killed launcher leaves none behind.

    Args:
        repository: what `triward-server export` wrote.
        endpoints: where to listen.
        flags: further flags for tritonserver.
        log: where its output goes; standard error by default.
        startup_timeout: seconds until all models must be ready.
        drain_timeout: seconds that requests in flight get to finish when it is stopped.
        admin_key: opens the restricted protocols; a random one by default, so that nobody else
            can. Triton takes it on its command line, where other processes of the user see it.
        tls: encrypts gRPC. HTTP, which Triton cannot encrypt, must then stay on this machine.
        trace_endpoint: an OpenTelemetry collector's URL for OTLP over HTTP.
        max_memory: bytes that tritonserver itself may take, its models' processes not included;
            beyond it ends. None: no limit but the machine's.
        verify: how files are compared with their manifests before they are loaded.
    """

    repository: Path
    endpoints: Endpoints = field(default_factory=Endpoints)
    flags: Sequence[str] = ()
    log: IO[str] | None = None
    startup_timeout: float = 900.0
    drain_timeout: float = 30.0
    admin_key: str = field(default_factory=partial(secrets.token_hex, 16), repr=False)
    tls: Tls | None = None
    trace_endpoint: str | None = None
    max_memory: int | None = None
    verify: Verify = Verify.OFF

    # Names this server's regions in /dev/shm, so that it can remove its own and no other's.
    _shm_prefix: str = field(init=False, default="")
    # What answers while it stops: the folder may be gone by then.
    _stand_ins: dict[ModelNames, tuple[str, dict[str, bytes]]] = field(
        init=False, default_factory=dict
    )
    _ready: bool = field(init=False, default=False)
    _cleanup: ExitStack = field(init=False, default_factory=ExitStack)
    _process: subprocess.Popen[str] | None = field(init=False, default=None)
    _pump: LogPump | None = field(init=False, default=None)
    _writer: LineWriter = field(init=False, repr=False)

    def __enter__(self) -> TritonServer:
        """Start and wait until every model is ready.

        Raises:
            LaunchError: one sentence that says why it did not start.
        """
        self._read_stand_ins()
        if self.tls and not self.endpoints.http_is_local:
            host = self.endpoints.http_host
            raise LaunchError(f"HTTP cannot be encrypted: with TLS it cannot listen on {host}")
        asked = self.endpoints
        self.endpoints = asked.with_ports()
        self._writer = LineWriter(self.log)
        if used := check_gpus(gpu_models(self.repository)):
            self._say(f"uses {', '.join(map(str, used))}")
        check_served(self.repository, self.verify, self._say)
        for _ in range(_STARTS - 1):
            try:
                self._start()
                return self
            except _Transient as failure:
                self._say(f"{failure}; it is started again")
                self.endpoints = asked.with_ports()
        self._start()
        return self

    def _start(self) -> None:
        self._shm_prefix = f"triward-{os.getpid()}-{secrets.token_hex(4)}-"
        try:
            self._cleanup.callback(self._remove_shared_memory)
            self._wait_until_ready(self._spawn(find_triton(self._cleanup)), list(self._stand_ins))
            self._ready = True
            self._warn_of_chunks()
        except BaseException:
            self.stop()
            raise

    @property
    def http(self) -> TritonHttp:
        """Its HTTP endpoint, for this machine, with the admin key."""
        e = self.endpoints
        return TritonHttp(e.http_client_host, e.http_port, self.admin_key)

    @property
    def pid(self) -> int:
        """The process of tritonserver."""
        assert self._process, "it runs inside the with block"
        return self._process.pid

    def listening(self) -> dict[str, str]:
        """Where it really listens: `grpc`, `http` and `metrics` -> addresses."""
        return self.endpoints.listening(self.pid)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop; at once if it is `Unhealthy`: nothing in flight there can be trusted."""
        if isinstance(error, Unhealthy):
            self._kill()
        self.stop()

    def wait(self, check: Callable[[], None], interval: float) -> None:
        """Wait until the server ends by itself, or is found to be unhealthy.

        Args:
            check: raises when it is.
            interval: seconds between two checks.

        Raises:
            LaunchError: always, saying how it ended; a server that is told to stop is stopped
                with `stop`, from a signal handler that raises, say.
        """
        assert self._process and self._pump, "wait is called inside the with block"
        with explained(self._pump.tail):
            while True:
                try:
                    code = self._process.wait(interval)
                except subprocess.TimeoutExpired:
                    if not self._pump.signalled:
                        check()
                        continue
                    break
                self._pump.join()
                if self._pump.signalled and code == 0:
                    break
                raise LaunchError(f"tritonserver stopped by itself ({describe_exit(code)})")
        self._wait_for_others_stop(self._process)

    def _wait_for_others_stop(self, process: subprocess.Popen[str]) -> NoReturn:
        """Somebody told tritonserver itself to stop. It can no longer be drained: say so."""
        self._say(
            f"somebody sent a signal to tritonserver (process {process.pid}), which drops requests "
            f"between its models; send it to triward-server (process {os.getpid()}), which drains"
        )
        with suppress(subprocess.TimeoutExpired):
            process.wait(_EXIT_TIMEOUT)
        self._kill()
        raise LaunchError("tritonserver was told to stop, but not by triward-server")

    def stop(self) -> None:
        """Let requests in flight finish, refuse new ones, and end the server.

        After `drain_timeout`, or when it does not answer, it ends with what is in flight.
        """
        with signals_ignored():
            if self._process:
                if self._ready and self._process.poll() is None:
                    drained = self._drain()
                    self._process.terminate()
                    with suppress(subprocess.TimeoutExpired):
                        self._process.wait(_DRAINED_EXIT_TIMEOUT if drained else _EXIT_TIMEOUT)
                # Stubs are in the server's process group; what is left of it goes now.
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
                self._process = None
            if self._pump:
                self._pump.join()
            self._cleanup.close()

    def _drain(self) -> bool:
        """Put what refuses everything behind the public names; wait for who came before.

        Triton, told to stop, drops requests that are between an ensemble's steps. It says when the
        last one is done, but not reliably: of requests that their callers cancelled Triton 24.10
        keeps some for ever. So models that have nothing to do for a while are done, too.

        Returns:
            Whether nothing is in flight any more.
        """
        deadline = time.monotonic() + self.drain_timeout
        with suppress(LaunchError):  # what the folder no longer says was read at the start
            self._read_stand_ins()
        for names in self._stand_ins:
            self._refuse(names, deadline)
        quiet = 0
        while time.monotonic() < deadline:
            quiet = 0 if self._works() else quiet + 1
            if quiet == _QUIET_LOOKS or self._is_unloaded():
                return True
            time.sleep(0.1)
        self._say(f"requests are still in flight after {self.drain_timeout:g} s")
        return False

    def _read_stand_ins(self) -> None:
        """Of every model that is there now; raises `LaunchError` if none is."""
        for names in served_models(self.repository):
            self._stand_ins[names] = draining(self.repository, names)

    def _refuse(self, names: ModelNames, deadline: float) -> None:
        """One model; that it cannot be drained must not keep the others from it."""
        config, files = self._stand_ins[names]
        try:
            self.http.load(names.ensemble, max(deadline - time.monotonic(), 0.1), config, files)
        except HttpError as error:
            # Triton 24.10 loads it and complains if another model's folder is gone.
            if not self.http.is_ready(names.ensemble, version=DRAINING_VERSION):
                self._say(f"cannot drain {names.ensemble}: {error}")

    def _works(self) -> bool:
        """Whether a request waits for a model or is computed."""
        host, port = self.endpoints.client_host, self.endpoints.metrics_port
        try:
            metrics = read_metrics(host, port, timeout=5.0)
        except HttpError:  # too busy to say so
            return True
        return any(each.name in (_PENDING, WORKING) and each.value for each in metrics)

    def _is_unloaded(self) -> bool:
        """Whether Triton says that the public models have no request; never without a folder."""
        public = {names.ensemble for names in self._stand_ins}
        if not all((self.repository / name).is_dir() for name in public):
            return False
        try:
            index = self.http.index()
        except HttpError:  # too busy to say so
            return False
        return "UNLOADING" not in {model.state for model in index if model.name in public}

    def _kill(self) -> None:
        if self._process:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _say(self, line: str) -> None:
        self._writer.write(f"triward-server: {line}\n")

    def _spawn(self, installation: Installation) -> subprocess.Popen[str]:
        e = self.endpoints
        command = [
            installation.executable,
            f"--model-repository={self.repository.resolve()}",
            # What a client asks when Triton itself refuses its tensors.
            f"--id=triward-contract-{schema.CONTRACT_VERSION}",
            *installation.flags,
            f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}",
            "--disable-auto-complete-config",
            "--model-control-mode=explicit", "--load-model=*",
            f"--grpc-restricted-protocol={_ADMIN_PROTOCOLS}:{ADMIN_HEADER}={self.admin_key}",
            f"--http-restricted-api={_ADMIN_PROTOCOLS}:{ADMIN_HEADER}={self.admin_key}",
            f"--grpc-address={e.host}", f"--grpc-port={e.grpc_port}",
            f"--http-address={e.http_host}", f"--http-port={e.http_port}",
            f"--metrics-address={e.host}", f"--metrics-port={e.metrics_port}",
            # Clients ping every 20 s while a call waits; Triton would take that for an attack.
            "--grpc-http2-min-recv-ping-interval-without-data=10000",
            *(self.tls.flags() if self.tls else []),
            *(_trace_flags(self.trace_endpoint) if self.trace_endpoint else []),
            *self.flags,
        ]  # fmt: skip
        # A signal between the fork and the assignment would lose sight of the process.
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._process = process = subprocess.Popen(
                command,
                env=_ALLOCATOR | installation.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C in a terminal is the launcher's to handle
                preexec_fn=set_up_child(os.getpid(), e.host == ANY, self.max_memory),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        assert process.stdout
        self._pump = LogPump(process.stdout, self._writer)
        return process

    def _wait_until_ready(
        self, process: subprocess.Popen[str], served: Sequence[ModelNames]
    ) -> None:
        deadline = time.monotonic() + self.startup_timeout
        progress = Progress(process.pid)
        while time.monotonic() < deadline:
            code = process.poll()
            if code is not None:
                raise self._ended(code)
            if (
                all(self.http.is_ready(names.ensemble) for names in served)
                # Else another server answers on a port that was free a moment ago.
                and "http" in self.endpoints.listening(process.pid)
                and process.poll() is None
            ):
                return
            if progress.stands_still():
                raise _Transient("tritonserver stands still" + self._where_the_log_is())
            time.sleep(0.1)
        waited = f"not ready after {self.startup_timeout:.0f} s; the log says why"
        raise LaunchError(waited + self._where_the_log_is())

    def _ended(self, code: int) -> LaunchError:
        assert self._pump
        self._pump.join()
        log = self._pump.tail
        kind = _Transient if -code in _CRASHES or lost_a_port(log) else LaunchError
        return kind(why_it_ended(code, log) + self._where_the_log_is())

    def _where_the_log_is(self) -> str:
        """Nothing for standard error: there it stands above."""
        name = getattr(self.log, "name", None)
        return f" (log: {name})" if isinstance(name, str) else ""

    def _warn_of_chunks(self) -> None:
        """Say what is wrong with HTTP that other machines can reach, in this release of Triton."""
        if self.endpoints.http_is_local:
            return
        release = self.http.release()
        if tuple(map(int, release.split(".")[:3])) < CHUNKS_FIXED:
            self._say(
                f"warning: whoever reaches HTTP on {self.endpoints.http_host} can end this "
                f"tritonserver ({release}) with one request of many tiny chunks (CVE-2025-23310, "
                "fixed in 2.59.1, the container of 25.07); without --http-host nobody else does"
            )

    def _remove_shared_memory(self) -> None:
        for region in _SHARED_MEMORY.glob(self._shm_prefix + "*"):
            region.unlink(missing_ok=True)


def _trace_flags(endpoint: str) -> list[str]:
    return [
        "--trace-config=mode=opentelemetry", f"--trace-config=opentelemetry,url={endpoint}",
        "--trace-config=level=TIMESTAMPS", "--trace-config=rate=1",
    ]  # fmt: skip
