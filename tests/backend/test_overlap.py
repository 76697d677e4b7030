"""A batch that is read while the one before it is computed: same scores, same answers, no third."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.executing import Executing, Request
from tests.asking import wait_until
from tests.engine.test_engine import CPU, features
from tests.engine.test_passes import Device, Queue, requests
from triward_server.backend.metrics import WORKING, Metrics
from triward_server.config import ForwardConfig, from_strings
from triward_server.engine import passes
from triward_server.engine.scoring import Scorer
from triward_server.errors import ConfigError

SMALL = replace(CPU, max_batch_tokens=60)
SECONDS = 20  # until a test gives up


@pytest.fixture
def scorer(checkpoint: Path) -> Scorer:
    return Scorer(checkpoint, SMALL)


@pytest.fixture
def backend(scorer: Scorer) -> Iterator[Executing]:
    overlapping = Executing(scorer, overlaps=True)
    yield overlapping
    overlapping.finalize()


@pytest.fixture
def device(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """Passes run in a thread of their own, each when `gate` lets it."""
    simulated = Device(scorer)
    simulated.gate = threading.Semaphore(0)
    monkeypatch.setattr(scorer._passes, "_model", simulated)
    monkeypatch.setattr(passes, "Clock", Queue)
    yield simulated
    simulated.gate.release(10**6)
    simulated.close()


class Prepared:
    """Counts the batches that a scorer has prepared."""

    def __init__(self, scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
        self._count = threading.Semaphore(0)
        prepare = scorer.prepare

        def note(*batch: Any) -> Any:
            try:
                return prepare(*batch)
            finally:
                self._count.release()

        monkeypatch.setattr(scorer, "prepare", note)

    def wait(self) -> None:
        assert self._count.acquire(timeout=SECONDS), "no batch is read"


def answered(batch: list[Request]) -> list[Any]:
    """Wait until each request has its answer, and return these."""
    wait_until(lambda: all(request.answers for request in batch), timeout=SECONDS)
    assert all(len(request.answers) == 1 for request in batch)
    return [request.answers[0] for request in batch]


def errors(answers: list[Any]) -> list[str]:
    return [answer.error.code if hasattr(answer, "error") else "" for answer in answers]


def tensors(answers: list[Any]) -> list[bytes]:
    return [array.tobytes() for answer in answers for _, array in answer.output_tensors]


def test_the_same_answers_in_the_same_order(checkpoint: Path, scorer: Scorer) -> None:
    image = scorer.geometry.image_token_id or 0
    prompt = [(1, 2, 3, 4), ("image", 0), (5, 6)]
    batches = [
        [features(prompt, [[(n, 2)], [(n, 3)]], image), *requests(3, first=10 * n)]
        for n in range(4)
    ]  # later ones find the first one's prompt in the prefix cache
    alone, overlapping = (
        Executing(Scorer(checkpoint, SMALL), overlaps) for overlaps in (False, True)
    )
    expected = [tensors(alone.execute(alone.batch(batch)) or []) for batch in batches]
    sent = [overlapping.batch(batch) for batch in batches]
    assert [overlapping.execute(batch) for batch in sent] == [None] * len(sent)
    overlapping.finalize()
    found = [tensors(answered(batch)) for batch in sent]
    assert found == expected and len({*chain.from_iterable(found)}) > 12


def test_the_next_batch_is_read_while_one_is_computed_and_no_third(
    backend: Executing, scorer: Scorer, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Prepared(scorer, monkeypatch)
    first, second, third = (backend.batch(requests(2, first=10 * n)) for n in range(3))
    device.gate.release()  # all of the first batch but its last pass
    backend.execute(first)
    read.wait()
    with ThreadPoolExecutor(1) as triton:
        handing = triton.submit(backend.execute, second)
        read.wait()
        assert not first[0].answers, "the second batch was read behind the first one's last pass"
        # Nothing of the second batch reaches the device, whatever the host does meanwhile.
        assert len(device.log) == 2 and not handing.done()
        device.gate.release(2)
        answered(first)
        handing.result(SECONDS)
        assert not second[0].answers
        handing = triton.submit(backend.execute, third)
        read.wait()
        assert len(device.log) == 4 and not handing.done(), "a third batch is on its way"
        device.gate.release(10)
        handing.result(SECONDS)
    assert errors([*answered(second), *answered(third)]) == [""] * 4


def test_a_batch_that_fails_fails_its_own_callers(
    backend: Executing, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, prepare, calls = scorer.score_prepared, scorer.prepare, list[str]()

    def scoring(*batch: Any) -> Any:
        calls.append("score")
        if len(calls) == 4:
            raise RuntimeError("no kernel")
        return score(*batch)

    def preparing(*batch: Any) -> Any:
        calls.append("prepare")
        if len(calls) == 5:
            raise RuntimeError("no such thing")
        return prepare(*batch)

    monkeypatch.setattr(scorer, "score_prepared", scoring)
    monkeypatch.setattr(scorer, "prepare", preparing)
    batches = [backend.batch(requests(2, first=10 * n)) for n in range(4)]
    for batch in batches:
        backend.execute(batch)
        answered(batch)
    found = [errors(answered(batch)) for batch in batches]
    assert found == [["", ""], ["INTERNAL"] * 2, ["INTERNAL"] * 2, ["", ""]]
    assert "no kernel" in answered(batches[1])[0].error.message


def test_a_request_that_is_wrong_fails_alone(backend: Executing) -> None:
    batch = backend.batch(requests(3))
    batch[1].arrays["segment_lengths"] = np.array([[1, 1]], np.int32)  # of 44 tokens
    batch[2].arrays["input_ids"] = batch[2].arrays["input_ids"] + 10**6
    backend.execute(batch)
    assert errors(answered(batch)) == ["", "INVALID_ARGUMENT", "INVALID_ARGUMENT"]


def test_who_gives_up_while_the_batch_waits_is_not_computed(
    backend: Executing, scorer: Scorer, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Prepared(scorer, monkeypatch)
    first, second = (backend.batch(requests(2, first=10 * n)) for n in range(2))
    device.gate.release()
    backend.execute(first)
    read.wait()
    with ThreadPoolExecutor(1) as triton:
        handing = triton.submit(backend.execute, second)
        read.wait()
        second[0].is_cancelled = lambda: True  # type: ignore[method-assign]
        device.gate.release(10)
        handing.result(SECONDS)
    assert errors(answered(second)) == ["CANCELLED", ""]
    assert len(device.log) == 3


def test_closing_waits_for_what_was_handed_over(scorer: Scorer, device: Device) -> None:
    backend = Executing(scorer, overlaps=True)
    batch = backend.batch(requests(1))
    backend.execute(batch)
    with ThreadPoolExecutor(1) as triton:
        closing = triton.submit(backend.finalize)
        assert not batch[0].answers and not closing.done()
        device.gate.release()
        closing.result(SECONDS)
    assert errors(answered(batch)) == [""]


class Gauges:
    """A family of metrics that remembers what its series are set to."""

    COUNTER = GAUGE = 0

    def __init__(self, name: str = "", **_: Any) -> None:
        self._name = name

    def Metric(self, **_: Any) -> Gauges:
        return self

    def set(self, value: float) -> None:
        if self._name == WORKING:
            shown.append(value)


shown: list[float] = []


def test_work_is_under_way_until_the_last_batch_is_done() -> None:
    shown.clear()
    pb_utils = type("pb_utils", (), {"MetricFamily": Gauges})
    metrics = Metrics(pb_utils, {}, "0", {}, {}, ())
    one, two = metrics.working(), metrics.working()
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert len(shown) == 2 and min(shown) > 0, "the watchdog would not see the second one hang"
    two.__exit__(None, None, None)
    assert shown[2:] == [0]


def test_a_vision_step_is_refused() -> None:
    values = {"overlap_batches": "True", "device": "cpu"}
    assert from_strings(ForwardConfig, values).overlap_batches
    with pytest.raises(ConfigError, match="overlap_batches needs the vision tower in the model"):
        from_strings(ForwardConfig, {**values, "vision": "onnx"})
