"""Finds out that a running server no longer scores, which Triton's own readiness does not.

Triton 24.10 never restarts a model process that died, and stays ready. Each round looks at

    processes   the server's and its models': none stopped, none dead, none missing
    canary      one request through the whole ensemble, compared with its score at export
    progress    a model that works shows so every forward pass or request; a hung one does not

What is found wrong is `Unhealthy`; the cure, a restart, is left to who runs the server.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from . import schema
from .canary import Canary
from .errors import LaunchError, Unhealthy
from .metrics import WORKING
from .repository import pinned
from .triton_http import HttpError, TritonHttp, read_metrics

CANARY_TIMEOUT = 4.0
_CALL_TIMEOUT = 2.0
_STUB = "triton_python_b"  # the kernel keeps 15 characters


def ask_canary(triton: TritonHttp, repository: Path, timeout: float) -> None:
    """Score the canary of the version that answers.

    Raises:
        HttpError: no answer; the server may be busy.
        Unhealthy: a wrong answer, or a failure that is not overload.
    """
    # Any version's will do to ask; what it should score depends on who answered.
    canary = Canary.of(repository, pinned(repository))
    try:
        version, scores = triton.infer(canary, timeout)
    except HttpError as error:
        # Not for 400: a malformed request in the same batch may be to blame. One that stays is
        # noticed as any answer that stays away.
        if error.status == 500:
            raise Unhealthy(f"the canary failed: {error}") from None
        raise
    problem = Canary.of(repository, version).problem(scores)
    if problem:
        raise Unhealthy(f"{problem} (version {version})")


@dataclass
class Watchdog:
    """Watches one server.

    Args:
        triton: its HTTP endpoint, with the admin key.
        metrics_port: of its metrics endpoint.
        repository: what it serves.
        pid: of tritonserver.
        hang_timeout: seconds without progress of a model that works, or of any where the canary
            gets no answer.
    """

    triton: TritonHttp
    metrics_port: int
    repository: Path
    pid: int
    hang_timeout: float

    _names: dict[int, str] = field(init=False)
    _missing: int = field(init=False, default=0)
    _alive: float = field(init=False, default_factory=lambda: time.monotonic())

    def __post_init__(self) -> None:
        """Look around."""
        # While they live: a dead process no longer knows its name.
        self._names = {process.pid: _name(process) for process in self._processes()}

    def check(self) -> None:
        """One round.

        Raises:
            Unhealthy: why the server must be restarted.
        """
        self._check_processes()
        reason = None
        try:
            ask_canary(self.triton, self.repository, CANARY_TIMEOUT)
        except HttpError as error:
            if error.status != 404:  # unloaded by its operator
                reason = f"the canary: {error}"
        self._check_progress(reason)

    def _check_processes(self) -> None:
        try:
            processes = self._processes()
            states = [(process, process.status()) for process in processes]
        except psutil.NoSuchProcess:
            return  # one went while we looked: if it was to stay, the next round finds it missing
        for process, state in states:
            name = self._names.setdefault(process.pid, _name(process))
            if state in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
                raise Unhealthy(f"process {process.pid} of {name} is stopped")
            if state in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                raise Unhealthy(f"process {process.pid} of {name} is dead")
        try:
            expected = self._expected_stubs()
        except HttpError:
            return  # the canary's to judge
        # One that is being unloaded may go between the two looks; it is not missed twice.
        stubs = len(processes) - 1
        self._missing = self._missing + 1 if stubs < expected else 0
        if self._missing > 1:
            raise Unhealthy(f"only {stubs} of {expected} model processes are left")

    def _processes(self) -> list[psutil.Process]:
        """Tritonserver's and its models'."""
        server = psutil.Process(self.pid)
        stubs = [p for p in server.children(recursive=True) if p.name().startswith(_STUB)]
        return [server, *stubs]

    def _expected_stubs(self) -> int:
        count = 0
        for model in self.triton.index(_CALL_TIMEOUT):
            if model.state != "READY":
                continue
            config = self.triton.config(model.name, model.version, _CALL_TIMEOUT)
            if config.get("backend") == "python":
                count += sum(
                    group["count"] * max(1, len(group.get("gpus", [])))
                    for group in config["instance_group"]
                )
        return count

    def _check_progress(self, reason: str | None) -> None:
        """Judge by what the models show of their work, and by whether the canary got an answer."""
        now = time.monotonic()
        try:
            metrics = read_metrics(self.triton.host, self.metrics_port, _CALL_TIMEOUT)
        except HttpError:
            metrics = []
        working = {m.labels["instance"]: m.value for m in metrics if m.name == WORKING and m.value}
        for instance, since in working.items():
            if now - since >= self.hang_timeout:
                raise Unhealthy(f"{instance} has got nothing done for {now - since:.0f} s")
        if reason is None or working:
            self._alive = now
        elif now - self._alive >= self.hang_timeout:
            raise Unhealthy(f"nothing has been done for {now - self._alive:.0f} s; {reason}")


def _name(process: psutil.Process) -> str:
    """Whose process it is; a dead one no longer knows."""
    try:
        # A stub's first argument is its model's file, <model>/<version>/model.py.
        arguments = process.cmdline()
        return Path(arguments[1]).parts[-3] if process.name().startswith(_STUB) else "tritonserver"
    except (psutil.Error, IndexError):
        return "a model"


def check_once(triton: TritonHttp, repository: Path | None, timeout: float) -> None:
    """What `triward-server health` does.

    Args:
        triton: whom to ask; no key is needed.
        repository: for a deep check, where the canary is.
        timeout: seconds.

    Raises:
        LaunchError: why it is not well. A server too busy for the canary but ready is well.
    """
    if not triton.is_ready(timeout=timeout):
        where = f"{triton.host}:{triton.port}"
        raise LaunchError(f"{schema.ENSEMBLE} at {where} is not ready")
    if repository is None:
        return
    try:
        ask_canary(triton, repository, timeout)
    except HttpError as error:
        if error.status != 503:
            raise LaunchError(f"the canary: {error}") from None
