"""Serve another version of a model, with no request failing on the way."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..errors import LaunchError
from ..schema import REWARD, ModelNames
from .canary import Canary
from .integrity import Verify, check_version
from .repository import candidate, loading, pin, pinned, served_models, step_folders, versions
from .triton_http import HttpError, TritonHttp

_CANARY_TIMEOUT = 30.0


def switch_version(
    triton: TritonHttp,
    repository: Path,
    version: str,
    timeout: float,
    names: ModelNames = REWARD,
    verify: Verify = Verify.SAMPLED,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Load a version beside the one that is served, try it, and change over.

    Callers get nothing of it before its canary was right, asked through a public model of another
    name. The ensemble that was served finishes what it has taken. The old version's models stay
    loaded, so that going back is immediate; those of versions before it go. Other models of the
    repository are not touched.

    Args:
        triton: the server, with the admin key.
        repository: its repository, writable.
        version: which one to serve.
        timeout: seconds for loading.
        names: of which model.
        verify: how its files are compared with its manifest first.
        say: takes a line that says what that took.

    Returns:
        The version that was served before.

    Raises:
        LaunchError: it is not there, broken, cannot be loaded, or its canary is wrong; what was
            served is served still, and the version is unloaded again.
        HttpError: the server does not answer.
    """
    _check_arguments(repository, version, names)
    before = pinned(repository, names)
    if verify is not Verify.OFF:
        try:
            checked = check_version(repository, names, version, verify)
            say(f"{names.ensemble}: version {version}: {checked}")
        except LaunchError as error:
            raise LaunchError(
                f"{names.ensemble}: version {version} is broken and was not loaded: {error}"
            ) from None
    steps = step_folders(repository, names)
    try:
        _load(triton, repository, steps, {before, version}, timeout)
        for model in steps:
            _wait_until_loaded(triton, model, version, timeout)
        _try(triton, repository, version, timeout, names)
        _change_over(triton, repository, names, before, version, timeout)
    except BaseException as error:
        _load(triton, repository, steps, {before}, timeout)
        if isinstance(error, (HttpError, LaunchError, OSError)):
            problem = f"version {version}: {error}; version {before} is served still"
            raise LaunchError(f"{names.ensemble}: {problem}") from None
        raise
    return before


def _check_arguments(repository: Path, version: str, names: ModelNames) -> None:
    known = served_models(repository)
    if names not in known:
        others = ", ".join(each.ensemble for each in known)
        raise LaunchError(f"{repository} has no model {names.ensemble!r}, only {others}")
    there = versions(repository, names)
    if version not in there:
        raise LaunchError(f"{repository} has no version {version}, only {', '.join(there)}")
    for folder in (names.ensemble, *step_folders(repository, names)):
        if not os.access(repository / folder, os.W_OK):
            raise LaunchError(
                f"{repository / folder} cannot be written, where the version that is served is kept"
            )


def _load(
    triton: TritonHttp,
    repository: Path,
    steps: Sequence[str],
    wanted: Iterable[str],
    timeout: float,
) -> None:
    """Have these versions of the steps loaded, and no others; what stays is not loaded again."""
    for model in steps:
        triton.load(model, timeout, loading(repository, model, wanted))


def _try(
    triton: TritonHttp, repository: Path, version: str, timeout: float, names: ModelNames
) -> None:
    """Ask a version's canary where no caller asks."""
    canary = Canary.of(repository, version, names)
    model, config, files = candidate(repository, names, version)
    triton.load(model, timeout, config, files)
    try:
        _, scores = triton.infer(canary, _CANARY_TIMEOUT, model)
    finally:
        triton.unload(model)
    problem = canary.problem(scores)
    if problem:
        raise LaunchError(problem)


def _change_over(
    triton: TritonHttp,
    repository: Path,
    names: ModelNames,
    before: str,
    version: str,
    timeout: float,
) -> None:
    """Change the public model; the folder can be served at every moment."""
    try:
        pin(repository, version, names, beside=[before])
        triton.load(names.ensemble, timeout)
        _wait_until_alone(triton, names.ensemble, version, timeout)
    except BaseException:
        pin(repository, before, names, beside=[version])
        triton.load(names.ensemble, timeout)
        pin(repository, before, names)
        raise
    # Not loaded again: a restart loads what is served, the running server keeps both.
    pin(repository, version, names)


def _wait_until_alone(triton: TritonHttp, model: str, version: str, timeout: float) -> None:
    """Wait until no other version gets requests: Triton gives them to the highest that is ready.

    It says that the new one is loaded before it takes the old one away.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if {m.version for m in triton.index() if (m.name, m.state) == (model, "READY")} == {
            version
        }:
            return
        time.sleep(0.02)
    raise LaunchError(f"{model}: not only version {version} is ready after {timeout:g} s")


def _wait_until_loaded(triton: TritonHttp, model: str, version: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        states = {m.version: m.state for m in triton.index() if m.name == model}
        if states.get(version) == "READY":
            return
        if states.get(version) in (None, "UNAVAILABLE"):
            raise LaunchError(
                f"{model} version {version} cannot be loaded; the server's log says why"
            )
        time.sleep(0.1)
    raise LaunchError(f"{model} version {version} is not loaded after {timeout:g} s")
