"""The forward model's `execute` without Triton: a batch's tensors in, its answers out.

For what a batch costs the host beside the scorer: reading tensors, checks, answers, counting.
Triton's own part, which hands batches over, is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from triward_server.backend.codec import features_to_arrays
from triward_server.backend.metrics import ForwardMetrics
from triward_server.backend.overlap import Overlap
from triward_server.backend.triton_io import KEPT_BYTES, ForwardBackend
from triward_server.device import select
from triward_server.engine.scoring import Scorer
from triward_server.memory import Heap
from triward_server.schema import Array, Features

_STATUS = ("INVALID_ARGUMENT", "UNAVAILABLE", "INTERNAL", "CANCELLED", "UNIMPLEMENTED")
_LABELS = {"model": "reward_forward", "version": "1"}


class Request:
    """What Triton hands over of a request, and whom it is answered by.

    Args:
        features: the request's.
        patch_size: the model's.
    """

    def __init__(self, features: Features, patch_size: int) -> None:
        arrays = features_to_arrays(features, patch_size)
        self.arrays: dict[str, Array] = {s.name: array[None] for s, array in arrays.items()}
        self.answers: list[Any] = []

    def get_response_sender(self) -> Request:
        """Return what takes its answer."""
        return self

    def send(self, response: Any, flags: int) -> None:
        """Take an answer, which says that no other follows."""
        assert flags == 1
        self.answers.append(response)

    def parameters(self) -> str:
        """Return none."""
        return ""

    def request_id(self) -> str:
        """Return none."""
        return ""

    def timeout(self) -> int:
        """Return none."""
        return 0

    def is_cancelled(self) -> bool:
        """Nobody gives up."""
        return False


class _Family:
    """A family of metrics and each of its series, which count nothing."""

    COUNTER = GAUGE = 0

    def __init__(self, **_: Any) -> None: ...

    def Metric(self, **_: Any) -> _Family:  # Triton's name
        return self

    def increment(self, _: float) -> None: ...

    def set(self, _: float) -> None: ...


@dataclass(frozen=True)
class _Error:
    message: str
    code: str

    INVALID_ARG, UNAVAILABLE, INTERNAL, CANCELLED, UNSUPPORTED = _STATUS


class _Triton:
    """As much of `triton_python_backend_utils` as a batch needs."""

    MetricFamily = _Family
    InferenceResponse = SimpleNamespace
    TritonError = _Error

    @staticmethod
    def Tensor(name: str, array: Array) -> tuple[str, Array]:  # Triton's name
        return name, array

    @staticmethod
    def get_input_tensor_by_name(request: Request, name: str) -> Any:
        return SimpleNamespace(as_numpy=lambda: request.arrays[name])


class Executing(ForwardBackend):
    """`reward_forward` with a scorer that is there.

    Args:
        scorer: what scores.
        overlaps: whether a batch is read while the one before it is computed; each request's
            answer is then sent to it.
    """

    def __init__(self, scorer: Scorer, overlaps: bool = False) -> None:
        self._pb, self._config, self._scorer = _Triton, scorer._config, scorer
        self._heap = Heap(KEPT_BYTES)
        self._metrics = ForwardMetrics(_Triton, _LABELS, "reward_forward_0_0", _STATUS)
        self._overlap = None
        if overlaps:
            begin = partial(select, scorer._config.device)
            self._overlap = Overlap(self._compute, self._answer, self._work, begin)

    def batch(self, features: Sequence[Features]) -> list[Request]:
        """Make requests as Triton has them."""
        return [Request(each, self._scorer.geometry.patch_size) for each in features]
