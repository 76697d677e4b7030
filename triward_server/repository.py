"""The served repository on disk: its models, their versions, and which version each one serves.

All versions of a model's two steps are loaded side by side. Its ensemble names one of them, for
both steps alike, so that changing that one file changes tokenization and weights together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

from . import schema
from .errors import LaunchError
from .schema import REWARD, ModelNames

_DRAINING_VERSION = 2**31 - 1  # no export's


def models(repository: Path) -> list[ModelNames]:
    """The models that are served, by name.

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
    """A model's versions that are complete, oldest first."""
    folder = repository / names.ensemble
    there = [p.name for p in folder.iterdir() if p.name.isdecimal()] if folder.is_dir() else []
    return sorted(there, key=int)


def pinned(repository: Path, names: ModelNames = REWARD) -> str:
    """The version of a model that is served."""
    return str(_read(repository, names).ensemble_scheduling.step[0].model_version)


def pin(repository: Path, version: str, names: ModelNames = REWARD) -> None:
    """Make the public model use a version, from when it is loaded again.

    The file is replaced as a whole: whoever reads it sees the old or the new one.
    """
    config = _read(repository, names)
    config.version_policy.specific.versions[:] = [int(version)]
    for step in config.ensemble_scheduling.step:
        step.model_version = int(version)
    path = _path(repository, names)
    draft = path.with_suffix(".draft")
    draft.write_text(text_format.MessageToString(config))
    draft.replace(path)


def draining(repository: Path, names: ModelNames = REWARD) -> tuple[str, dict[str, bytes]]:
    """A configuration, as JSON, and files for Triton to load in place of a model's ensemble.

    It has a version of its own, so that Triton shows what becomes of the one that was served.
    """
    config = _read(repository, names)
    config.version_policy.specific.versions[:] = [_DRAINING_VERSION]
    del config.ensemble_scheduling.step[:]
    step = config.ensemble_scheduling.step.add(model_name=schema.DRAINING, model_version=-1)
    for spec in schema.REWARD_INPUTS:
        step.input_map[spec.name] = spec.name
    for spec in schema.REWARD_OUTPUTS:
        step.output_map[spec.name] = spec.name
    fields = json_format.MessageToDict(config, preserving_proto_field_name=True)
    return json.dumps(fields), {f"file:{_DRAINING_VERSION}/none": b""}


def serves_on_gpu(repository: Path) -> bool:
    """Whether every forward model is for a GPU."""
    configs = [_parse(repository / names.forward / "config.pbtxt") for names in models(repository)]
    return all(config.parameters["device"].string_value != "cpu" for config in configs)


def gpu_models(repository: Path) -> dict[str, tuple[int, ...]]:
    """The steps that need a GPU, each with the GPUs' numbers; none listed means all there are."""
    needed = {}
    for names in models(repository):
        for step in names.steps:
            for group in _parse(repository / step / "config.pbtxt").instance_group:
                if group.kind == group.KIND_GPU:
                    needed[step] = tuple(group.gpus)
    return needed


def _path(repository: Path, names: ModelNames) -> Path:
    return repository / names.ensemble / "config.pbtxt"


def _read(repository: Path, names: ModelNames) -> Any:
    return _parse(_path(repository, names))


def _parse(path: Path) -> Any:
    try:
        return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    except (OSError, text_format.ParseError) as error:
        raise LaunchError(f"{path}: {error}") from None
