"""The options of the export's commands, generated from the configurations that they fill in."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import typer
from pydantic import Field
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from .. import schema
from ..config import ForwardConfig, PreprocessConfig, from_strings
from ..errors import ConfigError
from .placement import Placement, placement

Size = Literal["tiny", "small", "7b"]  # of a checkpoint with random weights
TextModel = Literal[
    "llama", "gemma2", "qwen2", "qwen2-score", "qwen2-reward", "qwen3", "mistral", "internlm2"
]  # fmt: skip
# Of ONNX's operators: the first that has attention as one operator, from which runtimes choose a
# fused kernel; ONNX Runtime takes it from 1.22 on.
OPSET = 23


class OnnxBackend(str, Enum):
    """Triton's backend for the vision tower's graph."""

    ONNXRUNTIME = "onnxruntime"
    PYTHON = "python"


class Weights(str, Enum):
    """Ways for weight files into the repository."""

    LINK = "link"
    COPY = "copy"


class Template(str, Enum):
    """Chat templates that an export can use."""

    CHECKPOINT = "checkpoint"
    POLAR = "polar"


@dataclass(frozen=True)
class TritonConfig:
    """Settings of `config.pbtxt` beside a model's parameters."""

    devices: Annotated[
        str | None,
        Field(
            description="In place of --device: a forward process on each of cuda:0,cuda:1; on all "
            "GPUs; or several on the CPU: cpu,cpu."
        ),
    ] = None
    preprocess_instances: Annotated[
        int,
        Field(
            ge=1,
            description="Processes that decode, resize and tokenize; 4 for each device named.",
        ),
    ] = 4
    preprocess_batch_size: Annotated[
        int,
        Field(
            ge=1,
            le=schema.MAX_BATCH_SIZE,
            description="Requests of one preprocessing batch; 1 keeps a malformed tensor to its "
            "request.",
        ),
    ] = schema.MAX_BATCH_SIZE
    forward_batch_size: Annotated[
        int,
        Field(
            ge=1,
            le=schema.MAX_BATCH_SIZE,
            description="Requests that one forward process takes at once; 64 divided by the "
            "devices named, at least 8.",
        ),
    ] = schema.MAX_BATCH_SIZE
    queue_delay_us: Annotated[
        int, Field(ge=0, description="How long the forward model waits to fill a batch.")
    ] = 1000
    max_queue_size: Annotated[
        int, Field(ge=1, description="Requests that wait for each model; more are UNAVAILABLE.")
    ] = 1024
    queue_timeout_ms: Annotated[
        int, Field(ge=1, description="How long one waits for each model, unless it allows less.")
    ] = 30_000
    bound_forward_queue: Annotated[
        bool,
        Field(
            description="Both hold for the forward model, which may then idle for half a second "
            "between two batches (docs/operations.md)."
        ),
    ] = True
    vision_backend: Annotated[
        OnnxBackend, Field(description="Who runs that model; python needs onnxruntime there.")
    ] = OnnxBackend.ONNXRUNTIME


@dataclass(frozen=True)
class ExportConfig:
    """Source, destination and checks of an export."""

    checkpoint: Annotated[str, Field(description="Local folder or Hugging Face id.")]
    output: Annotated[
        Path, Field(description="Folder to create, or a repository to add this model to.")
    ]
    name: Annotated[
        str,
        Field(description="What callers will call the model; another one adds a model."),
    ] = schema.ENSEMBLE
    lora: Annotated[
        Path | None, Field(description="Folder of a PEFT adapter of LoRA, which is merged in.")
    ] = None
    template: Annotated[
        Template | None,
        Field(
            description="checkpoint: its own chat template, the default; polar: POLAR's, with a "
            "reference answer in each request."
        ),
    ] = None
    revision: Annotated[str | None, Field(description="Branch, tag or commit on the hub.")] = None
    version: Annotated[
        int,
        Field(
            ge=1,
            description="Of the model: a new one is added. (Of this tool: triward-server "
            "--version.)",
        ),
    ] = 1
    canary: Annotated[
        bool, Field(description="Score one request, for deep health checks to compare.")
    ] = True
    verify: Annotated[
        bool,
        Field(description="Compare a few scores with the reference's before anything is written."),
    ] = True
    calibration: Annotated[
        Path | None,
        Field(
            description="JSONL of messages and responses that --dtype float8 must order as float32 "
            "does; without it a built-in set."
        ),
    ] = None
    weights: Annotated[
        Weights, Field(description="Hard-link weight files (same file system) or copy them.")
    ] = Weights.LINK
    force: Annotated[
        bool,
        Field(
            description="Replace the model of this name with all its versions; others are left "
            "alone."
        ),
    ] = False


@dataclass(frozen=True)
class Options:
    """All that the command `export` was told."""

    export: ExportConfig
    forward: ForwardConfig
    preprocess: PreprocessConfig
    triton: TritonConfig

    @property
    def placement(self) -> Placement:
        """Devices of the forward model's processes."""
        return placement(self.triton.devices or self.forward.device)


# Both models have a device. Fields of the same name that mean the same are one option.
_RENAMED: dict[tuple[type, str], str] = {(PreprocessConfig, "device"): "preprocess_device"}
_UNSAID: dict[str, Any] = {  # the devices decide
    "compile": None, "device": None, "preprocess_instances": None, "forward_batch_size": None
}  # fmt: skip
_LEAST_BATCH = 8  # of requests: as many tokens as make matrix products efficient


def export_parameters() -> list[Parameter]:
    """Return the parameters of the command `export`: a field with a description is an option."""
    found: dict[str, Parameter] = {}
    for config in (ExportConfig, ForwardConfig, PreprocessConfig, TritonConfig):
        for field, info in _fields(config).items():
            name = _RENAMED.get((config, field), field)
            if info.description and name not in found:
                found[name] = _parameter(name, info)
    return list(found.values())


def read_options(values: Mapping[str, Any]) -> Options:
    """Return the options of what the command got, by the names of `export_parameters`.

    Raises:
        ConfigError: a value that does not fit, by name.
    """
    if values["calibration"] and values["dtype"] != "float8":
        raise ConfigError(
            f"--calibration {values['calibration']}: --dtype {values['dtype']} is not calibrated, "
            "only float8 is"
        )
    placed = _placement(values["device"], values["devices"])
    derived: dict[str, Any] = {
        "device": values["device"] or placed.device,
        "resize": "pillow" if values["preprocess_device"] == "cpu" else "torch",
    }
    if values["compile"] is None:
        derived["compile"] = str(placed.device != "cpu")
    if values["preprocess_instances"] is None:
        derived["preprocess_instances"] = TritonConfig.preprocess_instances * placed.named
    if values["forward_batch_size"] is None:
        # One process would take what waits for all, and the others would have nothing to do.
        share = schema.MAX_BATCH_SIZE // placed.named
        derived["forward_batch_size"] = max(_LEAST_BATCH, share)
    given = {**values, **derived}

    def of(config: type) -> dict[str, Any]:
        return {field: given[_RENAMED.get((config, field), field)] for field in _fields(config)}

    def strings(config: type) -> dict[str, str]:
        return {field: str(value) for field, value in of(config).items()}

    return Options(
        ExportConfig(**of(ExportConfig)),
        from_strings(ForwardConfig, strings(ForwardConfig)),
        from_strings(PreprocessConfig, strings(PreprocessConfig)),
        TritonConfig(**of(TritonConfig)),
    )


def _placement(device: str | None, devices: str | None) -> Placement:
    if device and devices:
        raise ConfigError(f"--device {device} and --devices {devices}: give one of them")
    return placement(devices or "cuda") if not device else Placement(device)


def _fields(config: Any) -> dict[str, FieldInfo]:
    fields: dict[str, FieldInfo] = config.__pydantic_fields__
    return fields


def _parameter(name: str, info: FieldInfo) -> Parameter:
    default = Parameter.empty if info.is_required() else _UNSAID.get(name, info.default)
    kind: Any = str if get_origin(info.annotation) is Literal else info.annotation
    flag = f"--{name.replace('_', '-')}"
    if kind is bool and default is not False:
        flag += f"/--no-{name.replace('_', '-')}"
    least, most = (
        next((getattr(each, bound) for each in info.metadata if hasattr(each, bound)), None)
        for bound in ("ge", "le")
    )
    option = typer.Option(flag, min=least, max=most, help=info.description)
    if default is None:
        kind |= None
    annotated: Any = Annotated[kind, option]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotated)
