"""The models' `config.pbtxt`, as the options of an export have them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from .. import contract, schema
from ..backend.onnx_runner import VISION_FILE
from ..config import ForwardConfig, PreprocessConfig, VisionConfig
from ..schema import ModelNames
from .options import OnnxBackend, Options
from .placement import placement

# By a parameter that only one model has. What an earlier export did not write has its default.
_CONFIGS: dict[str, type[PreprocessConfig | ForwardConfig]] = {
    "resize": PreprocessConfig,
    "dtype": ForwardConfig,
}


def configure(draft: Path, names: ModelNames, options: Options) -> None:
    """Fill in names, limits, instances and queues of the ensemble and its steps."""
    path = draft / names.preprocess / "config.pbtxt"
    model = _read_config(path)
    model.name = names.preprocess
    _set_parameters(model, asdict(options.preprocess))
    _set_parameters(model, {contract.PARAMETER: schema.CONTRACT_VERSION})
    model.max_batch_size = options.triton.preprocess_batch_size
    placement(options.preprocess.device).apply(model, options.triton.preprocess_instances)
    _bound_queue(model, options)
    _write_config(path, model)

    path = draft / names.ensemble / "config.pbtxt"
    model = _read_config(path)
    model.name = names.ensemble
    for step, name in zip(model.ensemble_scheduling.step, names.steps, strict=True):
        step.model_name = name
    sizes = options.triton.preprocess_batch_size, options.triton.forward_batch_size
    model.max_batch_size = min(sizes)  # at most its steps'
    _write_config(path, model)

    path = draft / names.forward / "config.pbtxt"
    model = _read_config(path)
    model.name = names.forward
    _set_parameters(model, asdict(options.forward))
    _set_parameters(model, {contract.PARAMETER: schema.CONTRACT_VERSION})
    options.placement.apply(model, options.placement.count)
    model.max_batch_size = options.triton.forward_batch_size
    model.dynamic_batching.max_queue_delay_microseconds = options.triton.queue_delay_us
    if options.triton.bound_forward_queue:
        _bound_queue(model, options)
    _write_config(path, model)


def configure_vision(
    draft: Path, names: ModelNames, patch: int, width: int, options: Options
) -> None:
    """Describe the vision tower's graph.

    Args:
        draft: of the repository.
        names: of the model.
        patch: values of a patch.
        width: of an embedding.
        options: the export's.
    """
    path = draft / names.vision / "config.pbtxt"
    model = _read_config(path)
    model.name = names.vision
    # Triton's backend compares these with the graph's own.
    model.input[0].dims[:] = [-1, patch]
    model.output[0].dims[:] = [-1, width]
    if options.triton.vision_backend is OnnxBackend.PYTHON:
        _set_parameters(model, asdict(VisionConfig(threads=options.forward.threads)))
    else:
        model.backend = OnnxBackend.ONNXRUNTIME.value
        model.default_model_filename = VISION_FILE
        options.placement.apply(model, options.placement.count)
    _write_config(path, model)


def _bound_queue(model: Any, options: Options) -> None:
    policy = model.dynamic_batching.default_queue_policy
    policy.max_queue_size = options.triton.max_queue_size
    policy.timeout_action = policy.REJECT
    policy.default_timeout_microseconds = options.triton.queue_timeout_ms * 1000
    policy.allow_timeout_override = True  # a caller's shorter timeout counts


def _read_config(path: Path) -> Any:
    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


def comparable(path: Path) -> Any:
    """Read a configuration as today's export writes it, without what differs by version."""
    model = _read_config(path)
    model.ClearField("version_policy")
    for mark, config in _CONFIGS.items():
        if mark in model.parameters:
            written = {**asdict(config()), contract.PARAMETER: contract.UNNAMED}
            names = written.keys() - model.parameters.keys()
            _set_parameters(model, {name: written[name] for name in names})
    return model


def _write_config(path: Path, model: Any) -> None:
    path.write_text(text_format.MessageToString(model))


def _set_parameters(model: Any, values: dict[str, Any]) -> None:
    for key, value in values.items():
        model.parameters[key].string_value = str(value)
