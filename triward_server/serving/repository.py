"""The served repository on disk: its models, their versions, and which version each one serves.

A model's ensemble names one version, for its steps alike, so that changing that one file changes
tokenization and weights together. The steps' `version_policy` names what is loaded: that version
alone, so that what is wrong with another one stops nobody; while versions change, both.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

from .. import schema
from ..errors import LaunchError
from ..schema import REWARD, ModelNames
from .canary import Canary
from .log import LineWriter

DRAINING_VERSION = 2**31 - 1  # no export's


def served_models(repository: Path) -> list[ModelNames]:
    """Return the models that are served, by name.

    Raises:
        LaunchError: there is none.
    """
    folders = sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))
    named = [ModelNames(folder) for folder in folders]
    # What has no steps of ours is somebody else's.
    served = [names for names in named if set(names.steps) <= set(folders)]
    if not served:
        raise LaunchError(f"{repository} is not a repository (no model's config.pbtxt)")
    return served


def versions(repository: Path, names: ModelNames = REWARD) -> list[str]:
    """Return a model's versions that are complete, oldest first."""
    folder = repository / names.ensemble
    there = [p.name for p in folder.iterdir() if p.name.isdecimal()] if folder.is_dir() else []
    return sorted(there, key=int)


def pinned(repository: Path, names: ModelNames = REWARD) -> str:
    """Return the version of a model that is served."""
    return str(_read(repository, names).ensemble_scheduling.step[0].model_version)


def step_folders(repository: Path, names: ModelNames) -> list[str]:
    """Return the folders behind a public name, in the order in which they are loaded."""
    return [step for step in (names.vision, *names.steps) if (repository / step).is_dir()]


def pin(
    repository: Path, version: str, names: ModelNames = REWARD, beside: Iterable[str] = ()
) -> None:
    """Make a model use a version, from when it is loaded again.

    Each file is replaced as a whole, the public model's last. To change from version 1 to 2 first
    pin 2 beside 1, then 2 alone: then the folder can be served at every moment on the way.

    Args:
        repository: writable.
        version: which one the public model names.
        names: of which model.
        beside: other versions that its steps load, too.

    Raises:
        OSError: it cannot be written.
    """
    for step in step_folders(repository, names):
        config = _parse(repository / step / "config.pbtxt")
        _load_only(config, {version, *beside})
        _write(repository / step / "config.pbtxt", config)
    config = _read(repository, names)
    _name_version(config, version)
    _write(_path(repository, names), config)


def loads_all(repository: Path, names: ModelNames) -> bool:
    """Return True if its steps load versions that nobody serves, as an earlier release wrote it."""
    steps = step_folders(repository, names)
    configs = [_parse(repository / step / "config.pbtxt") for step in steps]
    return any(not config.version_policy.HasField("specific") for config in configs)


def loading(repository: Path, step: str, versions: Iterable[str]) -> str:
    """Return a step's configuration, as JSON, that loads these versions; the folder stays as it is.

    Triton 24.10 neither loads again nor interrupts what is loaded and stays in the list.
    """
    config = _parse(repository / step / "config.pbtxt")
    _load_only(config, versions)
    return _json(config)


def candidate(
    repository: Path, names: ModelNames, version: str
) -> tuple[str, str, dict[str, bytes]]:
    """Describe a public model of another name that uses a version.

    Returns its name, and what Triton takes for it. Nobody but `switch` knows it; it has no folder,
    so no watchdog sees it.
    """
    config = _read(repository, names)
    config.name = names.candidate
    _name_version(config, version)
    return names.candidate, _json(config), {f"file:{version}/none": b""}


def draining(repository: Path, names: ModelNames = REWARD) -> tuple[str, dict[str, bytes]]:
    """Return a configuration, as JSON, and files for Triton to load in place of a model's ensemble.

    It has a version of its own, so that Triton shows what becomes of the one that was served.
    """
    config = _read(repository, names)
    config.version_policy.specific.versions[:] = [DRAINING_VERSION]
    del config.ensemble_scheduling.step[:]
    step = config.ensemble_scheduling.step.add(model_name=schema.DRAINING, model_version=-1)
    for spec in schema.REWARD_INPUTS:
        step.input_map[spec.name] = spec.name
    for spec in schema.REWARD_OUTPUTS:
        step.output_map[spec.name] = spec.name
    return _json(config), {f"file:{DRAINING_VERSION}/none": b""}


def serves_on_gpu(repository: Path) -> bool:
    """Return True if every forward model is for a GPU."""
    configs = [
        _parse(repository / names.forward / "config.pbtxt") for names in served_models(repository)
    ]
    return all(config.parameters["device"].string_value != "cpu" for config in configs)


def gpu_models(repository: Path) -> dict[str, tuple[int, ...]]:
    """Return the steps that need a GPU, each with the GPUs' numbers; none listed: all of them."""
    needed = {}
    for names in served_models(repository):
        for step in names.steps:
            for group in _parse(repository / step / "config.pbtxt").instance_group:
                if group.kind == group.KIND_GPU:
                    needed[step] = tuple(group.gpus)
    return needed


class Canaries:
    """Canaries of a repository's models, kept for when its folder is gone.

    One is read when its version is there at the start or first answers, and then not again.

    Args:
        repository: where they are.

    Raises:
        LaunchError: it has no model, or one has no canary.
    """

    def __init__(self, repository: Path) -> None:
        self._repository = repository
        self._served: dict[ModelNames, Canary] = {}
        self._known: dict[tuple[ModelNames, str], Canary] = {}
        self._unread: set[tuple[ModelNames, str]] = set()
        for names in served_models(repository):
            self._learn(names)

    def models(self) -> list[ModelNames]:
        """All that have been there; one that is just being copied comes when it is complete."""
        with suppress(LaunchError):  # the folder is gone
            for names in served_models(self._repository):
                if names not in self._served:
                    with suppress(LaunchError):
                        self._learn(names)
        return list(self._served)

    def served(self, names: ModelNames) -> Canary:
        """Return the canary of the version that answered last, to ask with."""
        return self._served[names]

    def of(self, names: ModelNames, version: str) -> Canary:
        """Return the canary of the version that answered, to judge with.

        Without scores if its file went before it could be read: then any finite ones will do.
        """
        key = names, version
        if key not in self._known:
            try:
                self._known[key] = Canary.of(self._repository, version, names)
            except LaunchError as error:
                if key not in self._unread:
                    line = f"{names.ensemble}: of version {version} only finite scores are asked"
                    LineWriter(None).write(f"triward-server: {line}: {error}\n")
                self._unread.add(key)
                return replace(self._served[names], scores=None)
        self._served[names] = self._known[key]
        return self._known[key]

    def _learn(self, names: ModelNames) -> None:
        version = pinned(self._repository, names)
        canary = Canary.of(self._repository, version, names)
        self._known[names, version] = self._served[names] = canary


def _path(repository: Path, names: ModelNames) -> Path:
    return repository / names.ensemble / "config.pbtxt"


def _read(repository: Path, names: ModelNames) -> Any:
    return _parse(_path(repository, names))


def _parse(path: Path) -> Any:
    try:
        return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    except (OSError, text_format.ParseError) as error:
        raise LaunchError(f"{path}: {error}") from None


def _name_version(config: Any, version: str) -> None:
    _load_only(config, [version])
    for step in config.ensemble_scheduling.step:
        step.model_version = int(version)


def _load_only(config: Any, versions: Iterable[str]) -> None:
    config.version_policy.specific.versions[:] = sorted({int(version) for version in versions})


def _json(config: Any) -> str:
    return json.dumps(json_format.MessageToDict(config, preserving_proto_field_name=True))


def _write(path: Path, config: Any) -> None:
    """Replace a file: whoever reads it sees the old or the new one. An equal one is left alone."""
    if config == _parse(path):
        return
    draft = path.with_suffix(".draft")
    try:
        draft.write_text(text_format.MessageToString(config))
        draft.replace(path)
    except OSError:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
