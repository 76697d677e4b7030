"""The two models of an echo repository: numpy alone, so that their processes start in no time.

They keep the tensor contract, the checks of parameters and callers, and the metrics of the real
models. A score is a digest of the checkpoint, the prompt and the response: it differs for any two
conversations, so an answer that went to the wrong caller shows.

Files in the folder `<repository>.faults`, beside the repository, make the forward model fail at
its next batch; `echo.fault` writes them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .. import schema
from ..backend.metrics import PREPROCESS_COUNTERS, ForwardMetrics, Metrics
from ..config import ForwardConfig, PreprocessConfig, from_parameters
from ..contract import check_caller, check_repository
from ..errors import InvalidRequest, NonFiniteScore, TriwardError
from ..memory import lift_limit
from ..schema import Array, Features, Int32Array, TensorSpec

SETTINGS = "echo.json"  # in the forward model's version folder: {"checkpoint": its digest}
CODES = {
    "INVALID_ARGUMENT": "INVALID_ARG",
    "UNAVAILABLE": "UNAVAILABLE",
    "INTERNAL": "INTERNAL",
    "UNIMPLEMENTED": "UNSUPPORTED",
}

logger = logging.getLogger(__name__)


def digest_features(
    messages: bytes, responses: Sequence[bytes], media: Sequence[bytes]
) -> Features:
    """Eight token ids for the prompt and eight for each response: their digests.

    Raises:
        InvalidRequest: `messages` are no JSON array, or there is no response.
    """
    try:
        if not isinstance(json.loads(messages), list):
            raise InvalidRequest("messages", "no array")
    except ValueError as error:
        raise InvalidRequest("messages", f"Invalid JSON: {error}") from None
    if not responses:
        raise InvalidRequest("responses", "none were given")
    return Features(_ids(messages, *media), tuple(_ids(response) for response in responses))


def digest_score(checkpoint: str, prompt: Int32Array, response: Int32Array) -> float:
    """Return a number within +-10; another input has another one."""
    digest = hashlib.sha256(checkpoint.encode() + prompt.tobytes() + b"|" + response.tobytes())
    return 20 * int.from_bytes(digest.digest()[:4], "little") / 2**32 - 10


def _ids(*parts: bytes) -> Int32Array:
    digests = b"".join(hashlib.sha256(part).digest() for part in parts)
    return np.frombuffer(hashlib.sha256(digests).digest(), np.int32) & 0x7FFF


class PreprocessBackend:
    """`reward_preprocess` of an echo repository.

    Args:
        args: what Triton passes to `initialize`.
        pb_utils: Triton's module.
    """

    def __init__(self, args: dict[str, str], pb_utils: Any) -> None:
        _begin(args, PreprocessConfig)
        self._metrics = Metrics(
            pb_utils, _labels(args), args["model_instance_name"], PREPROCESS_COUNTERS, {}, CODES
        )
        self._pb = pb_utils

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer each request for itself."""
        with self._metrics.working(), self._metrics.timed("preprocess_seconds"):
            return [_answer(self._pb, self._metrics, self._respond, each) for each in requests]

    def finalize(self) -> None:
        """Leave nothing that outlives Triton."""
        self._metrics.close()

    def _respond(self, request: Any) -> dict[TensorSpec, Array]:
        check_caller(request.parameters())
        messages, responses, media = (_row(self._pb, request, s) for s in schema.REWARD_INPUTS)
        found = digest_features(messages[0], list(responses), list(media))
        segments = [found.prompt_ids, *found.response_ids]
        return {
            schema.INPUT_IDS: np.concatenate(segments),
            schema.SEGMENT_LENGTHS: np.array([len(each) for each in segments], np.int32),
            schema.PIXELS: np.empty(0, np.uint8),
            schema.GRIDS: np.empty((0, 3), np.int32),
            schema.SECONDS_PER_GRID: np.empty(0, np.float32),
        }


class ForwardBackend:
    """`reward_forward` of an echo repository.

    Args:
        args: what Triton passes to `initialize`.
        pb_utils: Triton's module.
    """

    def __init__(self, args: dict[str, str], pb_utils: Any) -> None:
        _begin(args, ForwardConfig)
        folder = Path(args["model_repository"])
        settings = json.loads((folder / args["model_version"] / SETTINGS).read_text())
        self._checkpoint = str(settings["checkpoint"])
        self._faults = folder.parent.with_name(f"{folder.parent.name}.faults")
        self._instance = args["model_instance_name"]
        self._metrics = ForwardMetrics(pb_utils, _labels(args), args["model_instance_name"], CODES)
        self._pb = pb_utils

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer each request for itself, after the delay that `delay` asks for each."""
        self._metrics.took(len(requests))
        with self._metrics.working():
            if self._fault("hang") is not None:
                threading.Event().wait()
            if self._fault("crash") is not None:
                os.abort()
            self._metrics.add(forward_passes=1)
            return [_answer(self._pb, self._metrics, self._respond, each) for each in requests]

    def finalize(self) -> None:
        """Leave nothing that outlives Triton."""
        self._metrics.close()

    def _respond(self, request: Any) -> dict[TensorSpec, Array]:
        check_caller(request.parameters())
        time.sleep(float(self._fault("delay") or 0))
        self._metrics.progress()
        ids, lengths = (_row(self._pb, request, s) for s in schema.FORWARD_INPUTS[:2])
        prompt, *responses = np.split(ids, np.cumsum(lengths)[:-1])
        scores = [digest_score(self._checkpoint, prompt, response) for response in responses]
        if (message := self._fault("error")) is not None:
            raise RuntimeError(message)
        canary = request.request_id() == schema.CANARY_ID
        if self._fault("nan") is not None:
            if canary:
                self._metrics.checked([float("nan")])
            raise NonFiniteScore("the model's score is nan")
        drifted = np.array(scores, np.float32) + np.float32(self._fault("drift") or 0)
        if canary:
            self._metrics.checked(drifted.tolist())
        else:
            self._metrics.observe(scores)
        return {
            schema.SCORES: drifted,
            schema.TOKEN_COUNTS: (len(prompt) + lengths[1:]).astype(np.int32),
        }

    def _fault(self, name: str) -> str | None:
        for file in (f"{name}@{self._instance}", name):
            with suppress(FileNotFoundError):
                return (self._faults / file).read_text()
        return None


def _begin(args: dict[str, str], kind: type[PreprocessConfig] | type[ForwardConfig]) -> None:
    """As the real models do: lift the limit, log, and refuse parameters that do not fit."""
    lift_limit()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    logger.warning("%s is an ECHO for tests: its scores are digests", args["model_name"])
    from_parameters(kind, check_repository(json.loads(args["model_config"])["parameters"]))


def _labels(args: dict[str, str]) -> dict[str, str]:
    return {"model": args["model_name"], "version": args["model_version"]}


def _row(pb_utils: Any, request: Any, spec: TensorSpec) -> Array:
    array: Array = pb_utils.get_input_tensor_by_name(request, spec.name).as_numpy()
    row: Array = array[0]
    return row


def _answer(
    pb_utils: Any,
    metrics: Metrics,
    respond: Callable[[Any], dict[TensorSpec, Array]],
    request: Any,
) -> Any:
    """One request's answer; an exception is its alone."""
    try:
        arrays = respond(request)
    except Exception as error:
        code = error.code if isinstance(error, TriwardError) else "INTERNAL"
        metrics.error(code)
        kind = getattr(pb_utils.TritonError, CODES[code])
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), kind))
    tensors = [pb_utils.Tensor(spec.name, array[None]) for spec, array in arrays.items()]
    return pb_utils.InferenceResponse(output_tensors=tensors)
