"""A GPU that sleeps, the forward model's `execute` without Triton, and what lies between passes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks import overlap
from benchmarks.executing import Executing
from benchmarks.sleeping import PassInFlight, SleepingGpu, Span, batch_of, idle
from tests.engine.test_engine import features
from tests.features import scores_of
from triward_server.config import ForwardConfig
from triward_server.engine import passes
from triward_server.engine.scoring import Scorer

CPU = ForwardConfig(dtype="float32", device="cpu", max_batch_tokens=4096, max_tokens=4096)
FLOPS = 2e15


@pytest.fixture(scope="module")
def scorer(checkpoint: Path) -> Scorer:
    return Scorer(checkpoint, CPU)


@pytest.fixture
def gpu(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> Iterator[SleepingGpu]:
    monkeypatch.setattr(passes, "Clock", PassInFlight)
    sleeping = SleepingGpu(scorer, FLOPS)
    monkeypatch.setattr(scorer._passes, "_model", sleeping)
    yield sleeping


def test_what_lies_between_passes_and_between_batches() -> None:
    spans = [
        Span(1, 0.0, 1.0), Span(1, 1.5, 2.0),
        Span(2, 3.0, 4.0), Span(2, 4.0, 5.0), Span(2, 5.25, 6.0),
        Span(3, 6.5, 10.0),
    ]  # fmt: skip
    assert idle(spans) == {
        "batches": 3, "all_s": 10.0, "between_batches_ms": [1000.0, 500.0],
        "between_batches_share": 0.15, "between_passes_share": 0.075,
    }  # fmt: skip
    assert idle(spans, first=2) == {
        "batches": 2, "all_s": 7.0, "between_batches_ms": [500.0],
        "between_batches_share": 0.0714, "between_passes_share": 0.0357,
    }  # fmt: skip


def test_a_sleeping_gpu_computes_one_pass_behind_the_other(
    scorer: Scorer, gpu: SleepingGpu
) -> None:
    begun = time.monotonic()
    scorer.score(batch_of(8, 1, scorer.geometry, 0))
    first, *later = gpu.spans
    assert later and begun <= first.begun
    assert all(a.ended <= b.begun for a, b in zip(gpu.spans, later, strict=False))
    assert later[0].begun == first.ended, "the second was launched while the first was computed"
    assert time.monotonic() >= gpu.spans[-1].ended, "the scores were there before the pass"


def test_execute_without_triton_answers_as_the_scorer(scorer: Scorer) -> None:
    batch = [features([(1, 2), (n, *range(40))], [[(n, 2)], [(3,)]], 0) for n in range(3)]
    backend = Executing(scorer)
    answers = backend.execute(backend.batch(batch))
    for answer, expected in zip(answers, scorer.score(batch), strict=True):
        (_, scores), (_, counts) = answer.output_tensors
        np.testing.assert_allclose(scores[0], scores_of(expected), rtol=1e-5, atol=1e-5)
        assert counts.tolist() == [[45, 44]]


def test_batches_in_a_row(
    scorer: Scorer, gpu: SleepingGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "BETWEEN", {"two": (2, 1, 4)})
    row = overlap.between_batches(scorer, FLOPS)["two"]
    assert row["batches"] == 3 and len(row["between_batches_ms"]) == 2
    assert min(row["between_batches_ms"]) > 0 and 0 < row["between_batches_share"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--overlap-batches",)], ids=str)
def test_batches_behind_a_real_triton(
    flags: tuple[str, ...], checkpoint: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "BETWEEN", {"two": (2, 1, 6)})
    row = overlap.behind_triton(
        checkpoint, scorer.geometry, FLOPS, "--max-batch-tokens=8192", *flags
    )["two"]
    assert row["batches"] >= 4 and min(row["between_batches_ms"]) > 0
