"""What several tests ask servers, and how they wait for what happens there."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil
import tritonclient.grpc as triton

from tests.commands import Command, named
from triward import RewardClient, TriwardError

ASK: list[dict[str, Any]] = [
    {"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "Yes."}
]  # fmt: skip


def conversation(number: int) -> list[dict[str, str]]:
    """A short one of which each has another score."""
    return [
        {"role": "user", "content": f"question {number}"},
        {"role": "assistant", "content": "An answer."},
    ]


def long_prompt(number: int) -> list[dict[str, Any]]:
    """About a second of a real model's work that no other prompt shares."""
    return [{"role": "user", "content": f"{number} " + "word " * 1500}]


def keep_asking(
    url: str, until: Callable[[], bool], model: str = "reward"
) -> list[float | TriwardError]:
    """Scores and errors of one caller, until an end that it does not know."""
    answers: list[float | TriwardError] = []
    with RewardClient(url, timeout=20, max_attempts=1, model=model) as client:
        while not until():
            try:
                answers.append(client.score(ASK))
            except TriwardError as error:
                answers.append(error)
    return answers


def ready(running: Command) -> str:
    """The address of a server that has just started."""
    return running.wait_for(r"ready\s+grpc\s+(127.0.0.1:\d+)")[1]


def accepted(raw: triton.InferenceServerClient, model: str = "reward_preprocess") -> int:
    """Requests that a model has answered, of the version that answered any."""
    found = raw.get_inference_statistics(model).model_stats
    return max(int(each.inference_stats.success.count) for each in found)


def wait_until(
    condition: Callable[[], bool], what: str = "it did not happen", timeout: float = 90.0
) -> None:
    """Look every hundredth of a second."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def model_processes(server: int, part: str = "") -> list[psutil.Process]:
    """Processes of the models of a `tritonserver` that have `part` among their arguments."""
    return named(psutil.Process(server).children(recursive=True), "triton_python_b", part)
