"""Triton requests <-> the dataclasses, and the one place where exceptions become answers.

Two backends, one for each `model_repository/*/1/model.py`, which hands over Triton's
`triton_python_backend_utils` module (it exists only inside Triton's stub process).
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from .. import schema
from ..config import ForwardConfig, PreprocessConfig, from_parameters, on_instance
from ..contract import check_caller, check_repository
from ..device import select
from ..engine.passes import Pass
from ..engine.scoring import Prepared, Scorer
from ..errors import (
    DeviceFault,
    InvalidRequest,
    NonFiniteScore,
    TriwardError,
    Unavailable,
    is_out_of_memory,
)
from ..intake.preprocess import Opened, Preprocessor
from ..intake.workers import close_all
from ..memory import Heap, lift_limit
from ..schema import Array, Features, Scores, TensorSpec
from .codec import arrays_to_features, features_to_arrays
from .metrics import PREPROCESS_COUNTERS, ForwardMetrics, Metrics
from .onnx_vision import remote_tower
from .overlap import Overlap

logger = logging.getLogger(__name__)

CHECKPOINT_DIRECTORY = "checkpoint"
KEPT_BYTES = 1024**3  # of free memory, which the forward model's process does not give back at once
_MAX_MESSAGE = 500  # characters; gRPC sends them as a header
T = TypeVar("T")
ConfigT = TypeVar("ConfigT", PreprocessConfig, ForwardConfig)


class PreprocessBackend:
    """`reward_preprocess`: wire tensors in, `Features` as tensors out.

    Args:
        args: what Triton passes to `initialize`.
        pb_utils: Triton's module.
    """

    def __init__(self, args: dict[str, str], pb_utils: Any) -> None:
        lift_limit()
        _log_to_stderr(args["model_name"])
        self._metrics = Metrics(
            pb_utils, _labels(args), _instance(args), PREPROCESS_COUNTERS, {}, _codes(pb_utils)
        )
        # Several instances share the machine, one thread each; images are resized in it.
        torch.set_num_threads(1)
        self._pb = pb_utils
        self._preprocessor = Preprocessor(
            _checkpoint(args), _config(PreprocessConfig, args), self._metrics.progress
        )
        self._preprocessor.warm_up()
        self._heap = Heap()
        gc.freeze()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer a dynamic batch, each request for itself; images are resized together."""
        self._heap.tidy()
        with self._metrics.working(), self._metrics.timed("preprocess_seconds"):
            opened = [_capture(partial(self._open, request)) for request in requests]
            _alive(self._preprocessor.flush)
            return [
                _answer(self._pb, self._metrics, partial(self._respond, result))
                for result in opened
            ]

    def finalize(self) -> None:
        """Leave nothing that outlives Triton."""
        close_all()
        self._metrics.close()

    def _open(self, request: Any) -> Opened:
        self._metrics.progress()
        check_caller(request.parameters())
        messages, responses, media = (
            _row(self._pb, request, spec) for spec in schema.REWARD_INPUTS
        )
        return self._preprocessor.open(messages[0], list(responses), list(media))

    def _respond(self, opened: Opened | Exception) -> Any:
        if isinstance(opened, Exception):
            raise opened
        self._metrics.progress()
        features = self._preprocessor.finish(opened)
        return _response(self._pb, features_to_arrays(features, self._preprocessor.patch_size))


@dataclass(frozen=True)
class _Batch:
    """A batch that is ready for its device.

    Attributes:
        parsed: each request's features, or what is wrong with it.
        callers: the requests that have features.
        prepared: of these.
        begun: when Triton handed it over.
    """

    parsed: Sequence[Features | Exception]
    callers: Sequence[Any]
    prepared: Prepared
    begun: float


class ForwardBackend:
    """`reward_forward`: `Features` as tensors in, scores out.

    Args:
        args: what Triton passes to `initialize`.
        pb_utils: Triton's module.
    """

    def __init__(self, args: dict[str, str], pb_utils: Any) -> None:
        lift_limit()
        _log_to_stderr(args["model_name"])
        self._pb = pb_utils
        self._config = _config(ForwardConfig, args)
        encoder = None
        if self._config.vision == "onnx":
            vision = schema.ModelNames.of(args["model_name"]).vision
            encoder = remote_tower(_checkpoint(args), pb_utils, vision, args["model_version"])
        self._heap = Heap(KEPT_BYTES)
        self._scorer = Scorer(_checkpoint(args), self._config, encoder)
        self._overlap = None
        if self._config.overlap_batches:
            # The current device, and what libraries keep for it, are a thread's own.
            begin = partial(select, self._config.device)
            self._overlap = Overlap(self._compute, self._answer, self._work, begin)
            self._overlap.call(self._scorer.warm_up)
        else:
            self._scorer.warm_up()
        self._metrics = ForwardMetrics(pb_utils, _labels(args), _instance(args), _codes(pb_utils))
        gc.freeze()  # what is loaded stays; later collections need not walk it

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """Answer a dynamic batch with one call of the scorer; None: the answers are sent later."""
        self._heap.tidy()
        self._metrics.took(len(requests))
        if self._overlap:
            self._overlap.execute(requests, self._read)
            return None
        with self._metrics.working():
            results = self._compute(self._read(requests))
            return [self._answer(result) for result in results]

    def finalize(self) -> None:
        """Leave nothing that outlives Triton."""
        if self._overlap:
            self._overlap.close()
        self._metrics.close()

    def _work(self) -> AbstractContextManager[None]:
        return self._metrics.working()

    def _read(self, requests: Sequence[Any]) -> _Batch:
        begun = time.monotonic()
        parsed = [_capture(partial(self._parse, request)) for request in requests]
        pairs = zip(requests, parsed, strict=True)
        callers = [request for request, item in pairs if isinstance(item, Features)]
        features = [item for item in parsed if isinstance(item, Features)]
        return _Batch(parsed, callers, self._scorer.prepare(features), begun)

    def _compute(
        self, batch: _Batch, launched: Callable[[], None] = lambda: None
    ) -> list[Scores | Exception]:
        def gone(index: int) -> bool:
            return _has_given_up(batch.callers[index], batch.begun)

        score = partial(self._scorer.score_prepared, batch.prepared, gone, self._observe, launched)
        scored = _alive(score)
        self._count(batch.callers, scored)
        answers = iter(scored)
        return [next(answers) if isinstance(item, Features) else item for item in batch.parsed]

    def _answer(self, result: Scores | Exception) -> Any:
        return _answer(self._pb, self._metrics, partial(self._respond, result))

    def _parse(self, request: Any) -> Features:
        check_caller(request.parameters())
        arrays = [_row(self._pb, request, spec) for spec in schema.FORWARD_INPUTS]
        features = arrays_to_features(*arrays, geometry=self._scorer.geometry)
        return replace(features, probe=request.request_id() == schema.CANARY_ID)

    def _observe(self, done: Pass) -> None:
        self._metrics.progress()
        if done.out_of_memory:
            self._metrics.add(oom_retries=1)
            return
        self._metrics.add(
            tokens_computed=done.tokens,
            tokens_saved=done.tokens_saved,
            prefix_tokens_reused=done.tokens_reused,
            prefix_tokens_evicted=done.tokens_evicted,
            forward_passes=1,
            forward_capacity_tokens=self._config.max_batch_tokens,
            images_encoded=done.images - done.images_cached,
            images_cached=done.images_cached,
            vision_seconds=done.vision_seconds,
            language_model_seconds=done.language_model_seconds,
        )
        self._metrics.set("triward_embedding_cache_bytes", done.cache_bytes)
        self._metrics.set("triward_prefix_cache_bytes", done.prefix_bytes)

    def _count(self, callers: Sequence[Any], scored: Sequence[Scores | TriwardError]) -> None:
        scores = []
        for caller, result in zip(callers, scored, strict=True):
            canary = caller.request_id() == schema.CANARY_ID
            if isinstance(result, Scores) and not canary:
                scores.append(result.scores.tolist())
            elif isinstance(result, Scores):
                self._metrics.checked(result.scores.tolist())
            elif isinstance(result, NonFiniteScore) and canary:
                self._metrics.checked([float("nan")])
        self._metrics.observe(chain.from_iterable(scores))

    def _respond(self, result: Scores | Exception) -> Any:
        if isinstance(result, Exception):
            raise result
        return _response(
            self._pb, {schema.SCORES: result.scores, schema.TOKEN_COUNTS: result.token_counts}
        )


def _alive(function: Callable[[], T]) -> T:
    """Return what it returns; a device that faults in it ends the process.

    Triton keeps a process that fails, and on a dead context every request would. It answers the
    callers of one that is gone with an error, and `serve` sees that it is gone.
    """
    try:
        return function()
    except DeviceFault as fault:
        _end(fault)


def _end(fault: DeviceFault) -> NoReturn:
    logger.critical("%s", fault, exc_info=fault)
    for handler in logging.getLogger().handlers:
        handler.flush()
    os._exit(1)  # the context's own clean-up could hang, or crash once more


def _row(pb_utils: Any, request: Any, spec: TensorSpec) -> Array:
    """One input without its leading dimension, which must be 1."""
    array: Array = pb_utils.get_input_tensor_by_name(request, spec.name).as_numpy()
    if array.shape[0] != 1:
        raise InvalidRequest(spec.name, f"{array.shape[0]} rows were given, a request is 1 row")
    row: Array = array[0]
    return row


def _response(pb_utils: Any, arrays: dict[TensorSpec, Array]) -> Any:
    tensors = [pb_utils.Tensor(spec.name, array[None]) for spec, array in arrays.items()]
    return pb_utils.InferenceResponse(output_tensors=tensors)


def _capture(function: Callable[[], T]) -> T | Exception:
    try:
        return _alive(function)
    except Exception as error:
        return error


def _answer(pb_utils: Any, metrics: Metrics, respond: Callable[[], Any]) -> Any:
    """Run one request's part; an exception answers that request alone."""
    result = _capture(respond)
    if not isinstance(result, Exception):
        return result
    if is_out_of_memory(result):
        result = Unavailable(f"the machine lacks memory for this request: {result}")
    code = "INTERNAL"
    if isinstance(result, TriwardError):
        code = result.code
        message = str(result)
    else:
        logger.error("a request failed", exc_info=result)
        message = f"internal error: {type(result).__name__}: {result}"
    if len(message) > _MAX_MESSAGE:  # it may quote what the caller sent
        message = message[:_MAX_MESSAGE] + "…"
    metrics.error(code)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, _codes(pb_utils)[code]))


def _has_given_up(request: Any, begun: float) -> bool:
    """Return True if the caller has cancelled or its timeout has passed since `begun`.

    Inside an ensemble Triton 24.10 reports no cancellation, but hands the caller's timeout on. That
    began before the batch did: what is late here is late for the caller.
    """
    timeout = request.timeout() / 1e6  # 0: none
    return bool(request.is_cancelled() or 0 < timeout < time.monotonic() - begun)


def _codes(pb_utils: Any) -> dict[str, Any]:
    error = pb_utils.TritonError
    return {
        "INVALID_ARGUMENT": error.INVALID_ARG,
        "UNAVAILABLE": error.UNAVAILABLE,
        "INTERNAL": error.INTERNAL,
        "CANCELLED": error.CANCELLED,
        "UNIMPLEMENTED": error.UNSUPPORTED,
    }


def _config(config_type: type[ConfigT], args: dict[str, str]) -> ConfigT:
    parameters = check_repository(json.loads(args["model_config"])["parameters"])
    config = from_parameters(config_type, parameters)
    return replace(config, device=on_instance(config.device, args["model_instance_device_id"]))


def _labels(args: dict[str, str]) -> dict[str, str]:
    return {"model": args["model_name"], "version": args["model_version"]}


def _instance(args: dict[str, str]) -> str:
    return args["model_instance_name"]


def _checkpoint(args: dict[str, str]) -> Path:
    return Path(args["model_repository"], args["model_version"], CHECKPOINT_DIRECTORY)


def _log_to_stderr(name: str) -> None:
    """Triton's stub shows what a model writes to stderr; Python's default shows warnings only."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format=f"{name}: %(levelname)s %(message)s"
    )
    for noisy in ("httpx", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
