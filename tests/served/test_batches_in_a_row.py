"""Requests that wait while a batch is computed are computed next, without a pause."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests import loadgen
from tests.conftest import LOCAL
from triward import RewardClient
from triward_server.serving.launch import TritonServer

pytestmark = pytest.mark.alone

ROUNDS, REQUESTS = 10, 8
PAUSE = (0.4, 0.6)  # seconds; Triton looks again after half a second


def test_without_bounds_nothing_waits_for_triton_to_look_again(
    build: Callable[..., Path], tmp_path: Path
) -> None:
    """With bounds, about every second round has a pause."""
    repository = build("--dtype=float32", "--no-bound-forward-queue")
    with (
        (tmp_path / "triton.log").open("w") as log,
        TritonServer(repository, LOCAL, log=log) as server,
        RewardClient(server.endpoints.grpc, timeout=60) as client,
        ThreadPoolExecutor(REQUESTS) as pool,
    ):
        counter = partial(loadgen.counter, server.endpoints.metrics_port, model="reward_forward")
        idle = []
        for turn in range(ROUNDS):
            computed = counter("triward_language_model_seconds_total")
            begun = time.monotonic()
            texts = [f"{turn} {number} " + "a question " * 400 for number in range(REQUESTS)]
            list(pool.map(partial(_score, client), texts))
            taken = time.monotonic() - begun
            idle.append(taken - (counter("triward_language_model_seconds_total") - computed))
        assert counter("nv_inference_exec_count") > ROUNDS, "in every round one batch alone"
    assert sum(PAUSE[0] < seconds < PAUSE[1] for seconds in idle) <= 1, idle


def _score(client: RewardClient, text: str) -> float:
    (score,) = client.score_responses([{"role": "user", "content": text}], ["yes"])
    return score
