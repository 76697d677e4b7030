"""Finds out that a running server no longer scores, which Triton's own readiness does not.

Triton 24.10 never restarts a model process that died, and stays ready. Each round looks at

    processes   the server's and its models': none stopped, none dead, none missing
    canary      a request through each whole ensemble, compared with its score at export; as many as
                its forward model has instances
    progress    a model that works shows so every forward pass or request; a hung one does not

What is found wrong is `Unhealthy`; the cure, a restart, is left to who runs the server.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil

from ..backend.metrics import WORKING
from ..errors import LaunchError, Unhealthy
from ..schema import REWARD, ModelNames
from .endpoints import Endpoints
from .instances import Page, answered, silent, wrong
from .repository import Canaries, served_models
from .triton_http import HttpError, Series, TritonHttp, read_metrics

CANARY_TIMEOUT = 4.0
_CALL_TIMEOUT = 2.0
_ASKS = 8  # canaries for each instance, until each has answered one
_STUB = "triton_python_b"  # the kernel keeps 15 characters


def ask_canary(
    triton: TritonHttp, canaries: Canaries, timeout: float, names: ModelNames = REWARD
) -> None:
    """Score a model's canary, that of the version that answers.

    Raises:
        HttpError: no answer; the server may be busy.
        Unhealthy: a wrong answer, or a failure that is not overload.
    """
    # Any version's will do to ask; what it should score depends on who answered.
    try:
        version, scores = triton.infer(canaries.served(names), timeout, names.ensemble)
    except HttpError as error:
        # Not for 400: a malformed request in the same batch may be to blame. One that stays is
        # noticed as any answer that stays away.
        if error.status == 500:
            raise Unhealthy(f"{names.ensemble}: the canary failed: {error}") from None
        raise
    problem = canaries.of(names, version).problem(scores)
    if problem:
        raise Unhealthy(f"{names.ensemble}: {problem} (version {version})")


def ask_canaries(
    triton: TritonHttp, canaries: Canaries, timeout: float, page: Page = list, asks: int = 1
) -> dict[ModelNames, HttpError | list[str]]:
    """Score every model's canary, all at once: no model waits for a busy one.

    Args:
        triton: whom to ask.
        canaries: of its models.
        timeout: seconds for one, and after which a model is asked no more.
        page: of metrics. A model is asked until each of its instances there has answered.
        asks: for each instance at most; Triton chooses who answers.

    Returns:
        Why a model gave no answer; or its instances that were free and did not answer.

    Raises:
        Unhealthy: as `ask_canary`, of any model; the instances that score wrongly are named.
    """

    def ask(names: ModelNames) -> HttpError | list[str]:
        end = time.monotonic() + timeout
        before = answered(page(), names)
        missing: list[str] = []
        try:
            for _ in range(max(1, asks * len(before))):
                ask_canary(triton, canaries, timeout, names)
                missing = silent(page(), before, names)
                if not missing or time.monotonic() > end:
                    break
        except HttpError as error:
            return error
        except Unhealthy as error:
            by = ", ".join(wrong(page(), canaries, names))
            raise Unhealthy(f"{error}; by {by}" if by else str(error)) from None
        return missing

    served = canaries.models()
    with ThreadPoolExecutor(len(served)) as pool:
        return dict(zip(served, pool.map(ask, served), strict=True))


@dataclass
class Watchdog:
    """Watches one server. It outlives the repository's folder: what it needs of it is kept.

    Args:
        triton: its HTTP endpoint, with the admin key.
        metrics_port: of its metrics endpoint.
        repository: what it serves; versions and models that come are read there.
        pid: of tritonserver.
        hang_timeout: seconds without progress of an instance that works, or of a whole model
            whose canary gets no answer.
    """

    triton: TritonHttp
    metrics_port: int
    repository: Path
    pid: int
    hang_timeout: float

    _canaries: Canaries = field(init=False)
    _names: dict[int, str] = field(init=False)
    _missing: int = field(init=False, default=0)
    _alive: dict[ModelNames, float] = field(init=False)

    def __post_init__(self) -> None:
        """Look around."""
        self._canaries = Canaries(self.repository)
        self._alive = dict.fromkeys(self._canaries.models(), time.monotonic())
        # While they live: a dead process no longer knows its name.
        self._names = {}
        with suppress(psutil.NoSuchProcess):  # one went while we looked; the first round names all
            self._names = {process.pid: _name(process) for process in self._processes()}

    def check(self) -> None:
        """Make one round.

        Raises:
            Unhealthy: why the server must be restarted.
        """
        self._check_processes()
        self._check_progress(ask_canaries(self.triton, self._canaries, CANARY_TIMEOUT, self._page))

    def _page(self) -> list[Series]:
        return _read_page(self.triton.host, self.metrics_port)

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
                if process.pid == self.pid:
                    return  # `TritonServer.wait` has its exit status, which says why
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

    def _check_progress(self, answers: Mapping[ModelNames, HttpError | list[str]]) -> None:
        """Judge by what the models show of their work, and by whether canaries got an answer."""
        now = time.monotonic()
        working = [m for m in self._page() if m.name == WORKING and m.value]
        for each in working:
            if now - each.value >= self.hang_timeout:
                idle = now - each.value
                raise Unhealthy(f"{each.labels['instance']} has got nothing done for {idle:.0f} s")
        at_work = {each.labels["model"] for each in working}
        for names, error in answers.items():
            # Not an instance that only had no canary: one that cannot answer fails what it gets.
            gone = isinstance(error, HttpError) and error.status == 404  # by its operator
            if not isinstance(error, HttpError) or gone or at_work & set(names.steps):
                self._alive[names] = now
            elif (idle := now - self._alive.setdefault(names, now)) >= self.hang_timeout:
                raise Unhealthy(
                    f"{names.ensemble} has done nothing for {idle:.0f} s; the canary: {error}"
                )


def _name(process: psutil.Process) -> str:
    """Whose process it is; a dead one no longer knows."""
    try:
        if not process.name().startswith(_STUB):
            return "tritonserver"
        # A stub's first argument is its model's file, <model>/<version>/model.py, and a later one
        # its instance, <model>_<group>_<number>.
        _, file, *rest = process.cmdline()
        model = Path(file).parts[-3]
        return next((each for each in rest if each.startswith(f"{model}_")), model)
    except (psutil.Error, IndexError, ValueError):
        return "a model"


def _read_page(host: str, port: int) -> list[Series]:
    """Return the metrics; none where there is no such page."""
    try:
        return read_metrics(host, port, _CALL_TIMEOUT)
    except HttpError:
        return []


def check_once(
    triton: TritonHttp,
    repository: Path | None,
    timeout: float,
    deep: bool = False,
    metrics_port: int = Endpoints.metrics_port,
) -> None:
    """Check once: the command `triward-server health`.

    Args:
        triton: whom to ask; no key is needed.
        repository: whose models must be ready; None asks for `reward` alone. Unlike the server's
            own watchdog this needs the folder, for the models' names and the canaries.
        timeout: seconds.
        deep: whether to score the canaries, too.
        metrics_port: where the instances of a model can be told apart.

    Raises:
        LaunchError: why it is not well. A server too busy for a canary but ready is well.
    """
    for names in _listed(repository) if repository else [REWARD]:
        if not triton.is_ready(names.ensemble, timeout):
            where = f"{triton.host}:{triton.port}"
            raise LaunchError(f"{names.ensemble} at {where} is not ready")
    if not (deep and repository):
        return
    page = partial(_read_page, triton.host, metrics_port)
    answers = ask_canaries(triton, Canaries(repository), timeout, page, _ASKS)
    for names, answer in answers.items():
        if isinstance(answer, HttpError) and answer.status != 503:
            raise LaunchError(f"{names.ensemble}: the canary: {answer}")
        if isinstance(answer, list) and answer:
            raise LaunchError(f"{', '.join(answer)}: free, and answers no canary")


def _listed(repository: Path) -> list[ModelNames]:
    try:
        return served_models(repository)
    except LaunchError as error:
        raise LaunchError(
            f"{error}; a health check reads there what to ask, whatever the server has loaded"
        ) from None
