"""Passes overlap with the host's work, and their indices travel together; no score shows either."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.test_engine import CPU, features
from tests.features import scores_of
from triward_server.engine import arena, passes
from triward_server.engine.arena import Arena
from triward_server.engine.backbone import Clock
from triward_server.engine.scoring import Scorer
from triward_server.errors import ForwardError, NonFiniteScore
from triward_server.schema import Features
from triward_server.testing.oracle import fp32_budget

SMALL = replace(CPU, max_batch_tokens=60)


class Device:
    """A thread that computes passes one behind the other, as a GPU does.

    A pass waits for `gate`; `log` has what the host did and when passes began.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._model = scorer._model
        self._thread = ThreadPoolExecutor(1)
        self.log: list[str] = []
        self.gate = threading.Semaphore(10**6)
        self.device, self.embeddings = self._model.device, self._model.embeddings

    def __call__(self, batch: Any, clock: Queue, *rest: Any) -> Queue:
        self.log.append(f"launch {len(self.log)}")

        def compute() -> torch.Tensor:
            self.gate.acquire()
            return self._model(batch, Clock(self.device), *rest)

        clock.scores = self._thread.submit(compute)
        return clock

    def close(self) -> None:
        self._thread.shutdown()


class Queue(Clock):
    """The clock and the scores of a pass that a `Device` computes; other passes' clock as well."""

    scores: Future[torch.Tensor] | None = None

    def is_past(self) -> bool:
        return self.scores is None  # the host never finds out before it waits

    def seconds(self) -> list[float]:
        return [0.0, 0.0] if self.scores else super().seconds()

    def cpu(self) -> torch.Tensor:
        assert self.scores
        return self.scores.result(60)


@pytest.fixture
def scorer(checkpoint: Path) -> Scorer:
    return Scorer(checkpoint, SMALL)


@pytest.fixture
def device(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """Makes the scorer's passes run in a thread of their own."""
    simulated = Device(scorer)
    collect = scorer._passes.collect

    def note(launched: Any) -> Any:
        simulated.log.append("collect")
        return collect(launched)

    monkeypatch.setattr(scorer._passes, "_model", simulated)
    monkeypatch.setattr(scorer._passes, "collect", note)
    monkeypatch.setattr(passes, "Clock", Queue)
    yield simulated
    simulated.gate.release(10**6)
    simulated.close()


def requests(count: int, first: int = 0) -> list[Features]:
    """Requests that share nothing, each a pass of its own."""
    return [features([(first + n, *range(40))], [[(1, 2, 3)]], 0) for n in range(count)]


def kinds(log: Sequence[str]) -> str:
    return "".join(entry[0] for entry in log)


def test_the_next_pass_is_launched_while_one_is_computed(
    scorer: Scorer, device: Device, checkpoint: Path
) -> None:
    batch = requests(4)
    results = scorer.score(batch)
    assert kinds(device.log) == "llclclcc", "one pass ahead, and never two"
    for result, alone in zip(results, Scorer(checkpoint, CPU).score(batch), strict=True):
        np.testing.assert_allclose(scores_of(result), scores_of(alone), rtol=1e-5, atol=1e-5)


def test_the_host_waits_for_no_pass_to_launch_the_next(scorer: Scorer, device: Device) -> None:
    """The device stands still until two passes are in its queue."""
    device.gate = threading.Semaphore(0)
    done = ThreadPoolExecutor(1).submit(scorer.score, requests(3))
    while kinds(device.log) != "llc":
        assert not done.done()
    device.gate.release(3)
    assert all(np.isfinite(scores_of(result)).all() for result in done.result(60))


def test_a_cpu_ends_each_pass_before_the_next(scorer: Scorer) -> None:
    """Nothing would overlap, and the watchdog would hear of a pass when the next is done."""
    order: list[str] = []
    launch = scorer._passes.launch

    def note(*chosen: Any) -> Any:
        order.append("launch")
        return launch(*chosen)

    scorer._passes.launch = note  # type: ignore[method-assign]
    scorer.score(requests(3), observe=lambda _: order.append("done"))
    assert order == ["launch", "done"] * 3


def test_a_pass_that_fails_behind_the_hosts_back(
    scorer: Scorer, device: Device, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one may have found its keys and values in the prefix cache: it runs again."""
    prompt = [(5, 6, 7, 8) * 10]
    batch = [features(prompt, [[(n, 2, 3)] for n in range(12)], 0)]
    expected = scores_of(Scorer(checkpoint, CPU).score(batch)[0])
    compute, calls = device._model, list[int]()

    def failing(packed: Any, *rest: Any) -> Any:
        calls.append(len(packed.slots))
        if len(calls) == 1:
            raise RuntimeError("no kernel")
        return compute(packed, *rest)

    monkeypatch.setattr(device, "_model", failing)
    scores = scores_of(scorer.score(batch)[0])
    assert calls[1] == 40, "the second pass reads what the first should have left"
    for score, right in zip(scores, expected, strict=True):
        assert abs(score - right) <= fp32_budget(right)


def test_what_is_not_finite_reaches_no_other_pass(
    scorer: Scorer, device: Device, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = [(5, 6, 7, 8) * 10]
    first, second = (
        features(prompt, [[(n, 2, 3)] for n in numbers], 0) for numbers in ((0, 1), (200, 201))
    )
    (expected,) = Scorer(checkpoint, CPU).score([second])
    compute, calls = device._model, list[int]()

    def poisoned(packed: Any, clock: Any, join: Any, *rest: Any) -> Any:
        calls.append(len(packed.slots))
        if len(calls) == 1:  # as a fault of the memory would: what it leaves is not finite
            return compute(packed, clock, lambda n, own: join(n, own.fill_(torch.nan)), *rest)
        return compute(packed, clock, join, *rest)

    monkeypatch.setattr(device, "_model", poisoned)
    monkeypatch.setattr("triward_server.engine.scoring.plan", lambda ordered, *_: [[0, 1], [2, 3]])
    lost, fine = scorer.score([first, second])
    assert isinstance(lost, NonFiniteScore)
    assert calls[1] == 40, "the second pass has seen what the first one left"
    np.testing.assert_allclose(scores_of(fine), scores_of(expected), rtol=1e-5, atol=1e-5)


def test_a_pass_that_cannot_be_launched_harms_none_before_it(
    scorer: Scorer, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, calls = scorer._passes.launch, list[int]()

    def failing(ordered: Any, chosen: Sequence[int]) -> Any:
        calls.append(chosen[0])
        if chosen[0] == 1:
            raise RuntimeError("no kernel")
        return launch(ordered, chosen)

    monkeypatch.setattr(scorer._passes, "launch", failing)
    results = scorer.score(requests(3))
    assert calls == [0, 1, 2] and isinstance(results[1], ForwardError)
    assert all(np.isfinite(scores_of(results[i])).all() for i in (0, 2))


class Gathering(Arena):
    """An arena that copies, as for a GPU, between two places of a CPU."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, gathers=True)
        made.append(self)


made: list[Gathering] = []


def test_an_arena_copies_once_and_keeps_types_and_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = [
        np.arange(7, dtype=np.int32), np.arange(12, dtype=np.int64).reshape(3, 4).T,
        np.empty(0, np.int64), np.arange(5, dtype=np.float32) / 3, np.array([[250]], np.uint8),
    ]  # fmt: skip
    gathering, sent = Arena(torch.device("cpu"), gathers=True), list[int]()
    send = arena._Chunk.send
    monkeypatch.setattr(arena._Chunk, "send", lambda chunk: (sent.append(1), send(chunk)))
    tensors = [gathering.add(array) for array in arrays]
    gathering.send()
    gathering.send()
    assert sent == [1]
    for array, tensor in zip(arrays, tensors, strict=True):
        assert tensor.shape == array.shape and tensor.is_contiguous()
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_an_arena_takes_what_is_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "_CHUNK_BYTES", 64)
    gathering = Arena(torch.device("cpu"), gathers=True)
    arrays = [np.arange(n, dtype=np.int64) for n in (3, 5, 40, 1, 8, 2)]
    tensors = [gathering.add(array) for array in arrays]
    gathering.send()
    for array, tensor in zip(arrays, tensors, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_passes_of_an_arena_score_the_same(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every array of a pass, the vision tower's included, is sent before it is read."""
    plain = Scorer(checkpoint, SMALL)
    image = plain.geometry.image_token_id or 0
    batch = [*requests(3), features([(1, 2), ("image", 0), (3,)], [[(4, 5)], [(6,)]], image)] * 2
    expected = [scores_of(result) for result in plain.score(batch)]
    for module in ("passes", "vision", "backbone"):
        monkeypatch.setattr(f"triward_server.engine.{module}.Arena", Gathering)
    made.clear()
    gathered = Scorer(checkpoint, SMALL)
    for _ in range(2):  # the second time from the prefix cache
        for result, right in zip(gathered.score(batch), expected, strict=True):
            np.testing.assert_allclose(scores_of(result), right, rtol=1e-5, atol=1e-5)
    assert made and not any(each._chunks for each in made), "something was not sent"
