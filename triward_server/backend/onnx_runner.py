"""`reward_vision` where Triton has no `onnxruntime` backend: the same file, run from Python.

The same name and tensors as that backend would have, so that which one runs it is a line of the
model's configuration. Imports neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import schema
from ..config import VisionConfig, from_parameters
from ..errors import CheckpointError, ConfigError
from ..memory import lift_limit

VISION_FILE = "vision.onnx"


class VisionBackend:
    """The vision tower's graph in ONNX Runtime, on the CPU.

    Args:
        args: what Triton passes to `initialize`.
        pb_utils: Triton's module.
    """

    def __init__(self, args: dict[str, str], pb_utils: Any) -> None:
        lift_limit()
        self._pb = pb_utils
        parameters = json.loads(args["model_config"])["parameters"]
        self._session = open_session(
            Path(args["model_repository"], args["model_version"], VISION_FILE),
            from_parameters(VisionConfig, parameters),
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Run the graph for each request."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        pb = self._pb
        try:
            arrays = {
                spec.name: pb.get_input_tensor_by_name(request, spec.name).as_numpy()
                for spec in schema.VISION_INPUTS
            }
            [embeddings] = self._session.run([schema.EMBEDDINGS.name], arrays)
            tensors = [pb.Tensor(schema.EMBEDDINGS.name, embeddings)]
            return pb.InferenceResponse(output_tensors=tensors)
        except Exception as error:  # answers this request alone
            return pb.InferenceResponse(error=pb.TritonError(f"{type(error).__name__}: {error}"))


def open_session(file: Path, config: VisionConfig) -> Any:
    """Return an `onnxruntime.InferenceSession` of the vision tower's graph.

    Raises:
        ConfigError: ONNX Runtime is not installed.
        CheckpointError: the file is missing, or it is no such graph.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError(
            "onnxruntime is not installed, which runs this model's graph; pip install "
            "'triward-server[onnx]', or export with --vision-backend=onnxruntime"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = config.threads
    try:
        session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # each kind of failure is a class of its own there
        raise CheckpointError(f"{file}: not a graph that ONNX Runtime runs: {error}") from None
    found = {tensor.name for tensor in (*session.get_inputs(), *session.get_outputs())}
    expected = {spec.name for spec in (*schema.VISION_INPUTS, schema.EMBEDDINGS)}
    if found != expected:
        raise CheckpointError(
            f"{file}: a graph of {sorted(found)}; the vision tower's has {sorted(expected)}"
        )
    return session
