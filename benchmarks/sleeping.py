"""A GPU that computes nothing: a pass takes as long as its tokens do at a given speed.

Its time is reckoned, not kept by a thread, which Python's lock would let run late: a pass begins
when it is launched or when the one before it ends, whichever is later.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from triward_server.backend.triton_io import ForwardBackend
from triward_server.engine import passes
from triward_server.engine.backbone import Clock
from triward_server.engine.geometry import Geometry
from triward_server.engine.packing import PackedBatch
from triward_server.engine.scoring import Scorer
from triward_server.schema import Features

FLOPS_A_TOKEN = 15.2e9  # of 7B's linear layers
IMAGE = (27, 37)  # tokens of a picture of 1024 x 768


@dataclass(frozen=True)
class Span:
    """When the device computed a pass, on `time.monotonic`'s clock, and of which batch."""

    batch: int
    begun: float
    ended: float


class SleepingGpu:
    """In a model's place: each pass takes as long as its tokens do, and scores 0.

    Args:
        scorer: whose model.
        flops: a second.
        ahead: whether the host may launch a pass before the one before it is done.
    """

    def __init__(self, scorer: Scorer, flops: float, ahead: bool = True) -> None:
        self._seconds_a_token = FLOPS_A_TOKEN / flops
        self._ahead = ahead
        self.batch = 0
        self.spans: list[Span] = []
        self.device, self.embeddings = scorer._model.device, scorer._model.embeddings

    @property
    def busy(self) -> float:
        """Seconds of all passes."""
        return sum(span.ended - span.begun for span in self.spans)

    def __call__(self, batch: PackedBatch, clock: PassInFlight, *_: Any) -> PassInFlight:
        """Queue a pass; its clock has its scores."""
        before = self.spans[-1].ended if self.spans else 0.0
        begun = max(time.monotonic(), before)
        ended = begun + len(batch.input_ids) * self._seconds_a_token
        self.spans.append(Span(self.batch, begun, ended))
        clock.ends, clock.count, clock.ahead = ended, len(batch.scored), self._ahead
        return clock


class PassInFlight(Clock):
    """A pass's clock and its scores."""

    ends: float
    count: int
    ahead: bool

    def is_past(self) -> bool:
        """Return whether the host waits now."""
        return not self.ahead

    def seconds(self) -> list[float]:
        """Nothing is measured on the device."""
        return [0.0, 0.0]

    def cpu(self) -> torch.Tensor:
        """Wait for the pass."""
        time.sleep(max(0.0, self.ends - time.monotonic()))
        return torch.zeros(self.count)


class SleepingBackend(ForwardBackend):
    """`reward_forward` whose model is a `SleepingGpu`.

    Args:
        args: what Triton passes to `initialize`.
        pb_utils: Triton's module.
        flops: of the GPU, a second.
        log: JSON file of the device's spans, written when the model is unloaded.
    """

    def __init__(self, args: dict[str, str], pb_utils: Any, flops: float, log: str) -> None:
        super().__init__(args, pb_utils)
        passes.Clock = PassInFlight  # type: ignore[attr-defined]
        self.gpu = SleepingGpu(self._scorer, flops)
        self._scorer._passes._model = self.gpu  # type: ignore[assignment]
        self._log = Path(log)

    def _compute(self, *batch: Any) -> list[Any]:
        self.gpu.batch += 1
        return super()._compute(*batch)

    def finalize(self) -> None:
        """Write down when the device computed."""
        super().finalize()
        self._log.write_text(json.dumps([asdict(span) for span in self.gpu.spans]))


def idle(spans: Sequence[Span], first: int = 1) -> dict[str, Any]:
    """Say how long a device waited between two batches, and between two passes of one.

    Args:
        spans: of its passes, in order.
        first: the batch with which counting begins.
    """
    counted = [span for span in spans if span.batch >= first]
    gaps: dict[bool, list[float]] = {True: [], False: []}
    for a, b in pairwise(counted):
        gaps[a.batch != b.batch].append(b.begun - a.ended)
    whole = counted[-1].ended - counted[0].begun
    return {
        "batches": len({span.batch for span in counted}),
        "all_s": round(whole, 4),
        "between_batches_ms": [round(1e3 * gap, 2) for gap in gaps[True]],
        "between_batches_share": round(sum(gaps[True]) / whole, 4),
        "between_passes_share": round(sum(gaps[False]) / whole, 4),
    }


def batch_of(groups: int, responses: int, geometry: Geometry, seed: int) -> list[Features]:
    """Make requests: an image, 60 tokens of text, and responses of 100 to 400 tokens."""
    rng = np.random.default_rng(seed)
    side = geometry.patch_size * geometry.merge_size
    requests = []
    for _ in range(groups):
        pixels = rng.integers(0, 256, (IMAGE[0] * side, IMAGE[1] * side, 3), np.uint8)
        pads = np.full(IMAGE[0] * IMAGE[1], geometry.image_token_id, np.int32)
        text = rng.integers(0, 200, 60).astype(np.int32)
        answers = tuple(
            rng.integers(0, 200, rng.integers(100, 400)).astype(np.int32) for _ in range(responses)
        )
        requests.append(Features(np.concatenate([pads, text]), answers, (pixels,)))
    return requests
