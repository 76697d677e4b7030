"""The served repository on disk: its versions, and which of them the public model uses.

All versions of the two steps are loaded side by side. The ensemble `reward` names one of them, for
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

_DRAINING_VERSION = 2**31 - 1  # no export's


def versions(repository: Path) -> list[str]:
    """The versions that are complete, oldest first."""
    folder = repository / schema.ENSEMBLE
    names = [p.name for p in folder.iterdir() if p.name.isdecimal()] if folder.is_dir() else []
    return sorted(names, key=int)


def pinned(repository: Path) -> str:
    """The version that is served."""
    return str(_read(repository).ensemble_scheduling.step[0].model_version)


def pin(repository: Path, version: str) -> None:
    """Make the public model use a version, from when it is loaded again.

    The file is replaced as a whole: whoever reads it sees the old or the new one.
    """
    config = _read(repository)
    config.version_policy.specific.versions[:] = [int(version)]
    for step in config.ensemble_scheduling.step:
        step.model_version = int(version)
    path = _path(repository)
    draft = path.with_suffix(".draft")
    draft.write_text(text_format.MessageToString(config))
    draft.replace(path)


def draining(repository: Path) -> tuple[str, dict[str, bytes]]:
    """A configuration, as JSON, and files for Triton to load in place of the public model.

    It has a version of its own, so that Triton shows what becomes of the one that was served.
    """
    config = _read(repository)
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
    """Whether the forward model is for a GPU."""
    path = repository / schema.FORWARD / "config.pbtxt"
    return bool(_parse(path).parameters["device"].string_value != "cpu")


def _path(repository: Path) -> Path:
    return repository / schema.ENSEMBLE / "config.pbtxt"


def _read(repository: Path) -> Any:
    return _parse(_path(repository))


def _parse(path: Path) -> Any:
    try:
        return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    except (OSError, text_format.ParseError) as error:
        raise LaunchError(f"{path}: {error}") from None
