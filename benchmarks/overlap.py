"""How long a GPU would wait for the host: a simulated one, and the engine's own host work.

    python -m benchmarks.overlap --output results.json

The device is a thread that sleeps as long as a pass of Qwen2.5-VL-7B takes at a given speed, and
computes nothing. Sorting, planning, packing and the prefix cache are the engine's own. In turns:
the next pass launched while one is computed, and each pass waited for. Copies to the device and
queueing kernels are not in it; `benchmarks.gpu` measures those where there is a GPU.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.commands import run_main
from benchmarks.measure import in_turns, machine, writable
from triward_server.config import ForwardConfig
from triward_server.engine import passes
from triward_server.engine.backbone import Clock
from triward_server.engine.geometry import Geometry
from triward_server.engine.packing import PackedBatch
from triward_server.engine.scoring import Scorer
from triward_server.export.random_checkpoint import make_checkpoint
from triward_server.schema import Features

FLOPS_A_TOKEN = 15.2e9  # of 7B's linear layers
IMAGE = (27, 37)  # tokens of a picture of 1024 x 768


class SleepingGpu:
    """In a model's place: each pass takes as long as its tokens do, and scores 0.

    Args:
        scorer: whose model.
        flops: a second.
        ahead: whether the host may launch a pass before the one before it is done.
    """

    def __init__(self, scorer: Scorer, flops: float, ahead: bool) -> None:
        self._seconds_a_token = FLOPS_A_TOKEN / flops
        self._ahead = ahead
        self._queue = ThreadPoolExecutor(1)
        self.busy = 0.0
        self.device, self.embeddings = scorer._model.device, scorer._model.embeddings

    def __call__(self, batch: PackedBatch, clock: PassInFlight, *_: Any) -> PassInFlight:
        """Queue a pass; its clock has its scores."""
        seconds = len(batch.input_ids) * self._seconds_a_token
        self.busy += seconds
        clock.done = self._queue.submit(time.sleep, seconds)
        clock.count, clock.ahead = len(batch.scored), self._ahead
        return clock


class PassInFlight(Clock):
    """A pass's clock and its scores."""

    done: Future[None]
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
        self.done.result()
        return torch.zeros(self.count)


def batch_of(groups: int, responses: int, geometry: Geometry, seed: int) -> list[Features]:
    """Make requests: an image, 60 tokens of text, and responses of 100 to 400 tokens."""
    rng = np.random.default_rng(seed)
    side = geometry.patch_size * geometry.merge_size
    requests = []
    for _ in range(groups):
        pixels = rng.integers(0, 256, (IMAGE[0] * side, IMAGE[1] * side, 3)).astype(np.uint8)
        pads = np.full(IMAGE[0] * IMAGE[1], geometry.image_token_id, np.int32)
        text = rng.integers(0, 200, 60).astype(np.int32)
        answers = tuple(
            rng.integers(0, 200, rng.integers(100, 400)).astype(np.int32) for _ in range(responses)
        )
        requests.append(Features(np.concatenate([pads, text]), answers, (pixels,)))
    return requests


WORKLOADS = {"1 group of 64": (1, 64), "8 groups of 8": (8, 8), "64 single": (64, 1)}


def measure(scorer: Scorer, flops: float, repeats: int) -> dict[str, Any]:
    """Take every workload in turns with and without a pass ahead."""
    rows: dict[str, Any] = {}
    for name, sizes in WORKLOADS.items():
        count = 2 * repeats + 2
        ready = [batch_of(*sizes, scorer.geometry, seed) for seed in range(count)]
        gpus = {side: SleepingGpu(scorer, flops, side == "ahead") for side in ("ahead", "waiting")}
        runs: dict[str, Callable[[], object]] = {
            side: partial(_score_next, scorer, gpu, ready) for side, gpu in gpus.items()
        }
        in_turns(runs, 1)
        for gpu in gpus.values():
            gpu.busy = 0.0
        times = in_turns(runs, repeats)
        rows[name] = {
            side: {
                "busy_s": round(gpus[side].busy, 4),
                "all_s": [round(s, 4) for s in taken],
                "idle_share": round(1 - gpus[side].busy / sum(taken), 4),
            }
            for side, taken in times.items()
        }
    return rows


def _score_next(scorer: Scorer, gpu: SleepingGpu, ready: list[list[Features]]) -> None:
    with patch.object(scorer._passes, "_model", gpu):
        scorer.score(ready.pop())


def main(
    tflops: Annotated[float, typer.Option(help="Speed of the simulated GPU.")] = 400,
    max_batch_tokens: Annotated[int, typer.Option(help="Tokens of one pass.")] = 8192,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    output: Annotated[Path | None, typer.Option(help="JSON file that gets the rows.")] = None,
) -> None:
    """Measure the host's work on this machine beside a GPU that only sleeps."""
    writable(output)
    with tempfile.TemporaryDirectory() as folder, patch.object(passes, "Clock", PassInFlight):
        checkpoint = Path(folder, "checkpoint")
        make_checkpoint("tiny", 0, checkpoint)
        config = ForwardConfig(
            dtype="float32", device="cpu", max_batch_tokens=max_batch_tokens, max_tokens=4096
        )
        rows = measure(Scorer(checkpoint, config), tflops * 1e12, repeats)
    table = Table(title="share of the time in which the GPU waits for the host")
    for column in ("batch", "next pass launched ahead", "each pass waited for"):
        table.add_column(column, justify="left" if column == "batch" else "right")
    for name, sides in rows.items():
        table.add_row(name, *(f"{sides[side]['idle_share']:.1%}" for side in ("ahead", "waiting")))
    Console().print(table)
    if output:
        settings = {"tflops": tflops, "max_batch_tokens": max_batch_tokens, "repeats": repeats}
        output.write_text(
            json.dumps({"machine": machine(), **settings, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    run_main(main)
