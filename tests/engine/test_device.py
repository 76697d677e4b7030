"""The GPU's own rules, seen without one: which is current, and that a dead context ends all."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from triward_server.backend import triton_io
from triward_server.config import ForwardConfig
from triward_server.device import select
from triward_server.engine import scoring
from triward_server.engine.scoring import Scorer
from triward_server.errors import (
    DEVICE_FAULT,
    DeviceFault,
    LaunchError,
    Unhealthy,
    is_device_fault,
    is_out_of_memory,
)
from triward_server.intake.resizing import TorchResizer
from triward_server.schema import Features
from triward_server.serving.ending import explained

CPU = ForwardConfig(dtype="float32", device="cpu")
FAULT = "CUDA error: an illegal memory access was encountered"


def requests(*lengths: int) -> list[Features]:
    return [Features(np.arange(n, dtype=np.int32), (np.array([n, 3], np.int32),)) for n in lengths]


def test_the_device_is_current_before_anything_touches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)

    def load(*arguments: Any) -> Any:
        calls.append("load")
        raise LaunchError("far enough")

    monkeypatch.setattr(scoring, "load_model", load)
    with pytest.raises(LaunchError, match="far enough"):
        Scorer(tmp_path, replace(CPU, device="cuda:1"))
    assert calls == [torch.device("cuda:1"), "load"]


def test_the_process_keeps_the_device_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain `cuda` is whatever is current; there is nothing to choose among CPUs."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail(str(device)))
    assert select("cuda") == torch.device("cuda") and select("cpu") == torch.device("cpu")


def test_what_is_a_fault_and_what_is_not() -> None:
    assert is_device_fault(torch.AcceleratorError(FAULT))
    assert is_device_fault(DeviceFault(torch.AcceleratorError(FAULT)))
    exhausted = torch.AcceleratorError("CUDA error: out of memory")
    assert is_out_of_memory(exhausted) and not is_device_fault(exhausted)
    for other in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(FAULT), ValueError()):
        assert not is_device_fault(other)


@pytest.fixture
def faulty(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Scorer, list[int]]:
    """A scorer whose device faults with every pass, and how many conversations each pass had."""
    scorer, tried = Scorer(checkpoint, CPU), list[int]()

    def fault(ordered: Any, chosen: Sequence[int], *rest: Any) -> Any:
        tried.append(len(chosen))
        raise torch.AcceleratorError(FAULT)

    monkeypatch.setattr(scorer._passes, "launch", fault)
    return scorer, tried


def test_nothing_is_retried_on_a_dead_context(faulty: tuple[Scorer, list[int]]) -> None:
    scorer, tried = faulty
    with pytest.raises(DeviceFault, match="illegal memory access"):
        scorer.score(requests(5, 6, 7, 8))
    assert tried == [4], "a pass was tried after the fault"
    with pytest.raises(DeviceFault):
        scorer.warm_up()
    assert len(tried) == 2


def test_the_resizers_device_faults() -> None:
    resizer = TorchResizer(None, torch.device("cpu"))

    def fault(*_: Any) -> Any:
        tried.append(1)
        raise torch.AcceleratorError(FAULT)

    tried: list[int] = []
    resizer._resize = fault  # type: ignore[method-assign]
    for _ in range(3):
        resizer.submit(np.zeros((28, 28, 3), np.uint8), (56, 56))
    with pytest.raises(DeviceFault):
        resizer.flush()
    assert tried == [1]


def test_the_process_of_a_dead_context_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Ended(BaseException):
        pass

    def end(code: int) -> None:
        raise Ended(code)

    def fault() -> None:
        raise DeviceFault(torch.AcceleratorError(FAULT))

    monkeypatch.setattr(triton_io.os, "_exit", end)
    for function in (triton_io._alive, triton_io._capture):
        with caplog.at_level(logging.CRITICAL), pytest.raises(Ended) as caught:
            function(fault)
        assert caught.value.args == (1,)
        assert f"{DEVICE_FAULT}: AcceleratorError: {FAULT}" in caplog.messages[-1]


def test_serve_says_what_the_device_did() -> None:
    log = deque(
        [
            "I1126 model is ready\n",
            f"reward_forward: CRITICAL {DEVICE_FAULT}: AcceleratorError: {FAULT}\n",
            "Traceback (most recent call last):\n",
        ]
    )
    reason = f"{DEVICE_FAULT}: AcceleratorError: {FAULT} (process 7 of reward_forward is dead)"
    with pytest.raises(Unhealthy) as caught, explained(log):
        raise Unhealthy("process 7 of reward_forward is dead")
    assert str(caught.value) == reason
    with pytest.raises(LaunchError) as plain, explained(deque(["I1126 model is ready\n"])):
        raise LaunchError("tritonserver stopped by itself (exit code 1)")
    assert str(plain.value) == "tritonserver stopped by itself (exit code 1)"
