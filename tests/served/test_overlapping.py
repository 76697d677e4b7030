"""`--overlap-batches` behind a real Triton: it hands over batches whose callers still wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2_grpc

from tests import loadgen
from tests.asking import wait_until
from tests.conftest import Served
from tests.conversations import RESPONSES, picture

BATCH = 4  # requests that the model takes at once
LONG = 6000  # tokens; a pass of them takes a fraction of a second


@pytest.fixture(scope="module")
def exact(served: Callable[..., Served]) -> Served:
    return served("exact", "--deterministic")


@pytest.fixture(scope="module")
def overlapping(served: Callable[..., Served]) -> Served:
    flags = ("--deterministic", "--overlap-batches", f"--forward-batch-size={BATCH}")
    return served("overlapping", *flags)


@pytest.fixture
def infer(overlapping: Served) -> Iterator[Any]:
    with grpc.insecure_channel(overlapping.server.endpoints.grpc, loadgen.NO_LIMIT) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer


def direct(number: int, tokens: int = 50, **parameters: int) -> Any:
    rng = Random(number)
    ids = [rng.randrange(500) for _ in range(tokens)]
    return loadgen.message(
        "overlapping_forward", loadgen.features(ids, [tokens - 3, 3]), **parameters
    )


def scored(call: Any) -> float:
    return float(loadgen.scores_of(call.result())[0, 0])


def test_scores_are_those_of_a_model_without_it(exact: Served, overlapping: Served) -> None:
    """Many callers at once, bit for bit, each its own."""
    conversations = [
        [
            {"role": "user", "content": [
                *([{"type": "image", "image": picture(84, 56, n)}] if n % 3 == 0 else []),
                {"type": "text", "text": f"question {n}"},
            ]},
            {"role": "assistant", "content": text},
        ]
        for n, text in enumerate([*RESPONSES.values()] * 2)
        if len(text) < 1000
    ]  # fmt: skip
    expected = exact.client.score_many(conversations, concurrency=16)
    assert overlapping.client.score_many(conversations, concurrency=16) == expected
    assert len(set(expected)) > len(conversations) // 2


def test_a_wrong_request_fails_alone(infer: Any) -> None:
    """Also where it comes between two batches of others."""
    expected = [scored(infer.future(direct(n))) for n in range(12)]
    wrong = loadgen.message("overlapping_forward", loadgen.features([1, 2, 3], [1, 1]))
    calls = [[infer.future(direct(n)), infer.future(wrong)] for n in range(12)]
    assert [scored(right) for right, _ in calls] == expected
    for _, call in calls:
        assert call.exception().code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "segment_lengths" in call.exception().details()


def test_who_gives_up_is_not_computed(overlapping: Served, infer: Any) -> None:
    port = overlapping.server.endpoints.metrics_port

    def counter(name: str) -> float:
        return loadgen.counter(port, name, "overlapping_forward")

    before = counter("triward_conversations_total")
    long = [infer.future(direct(100 + n, LONG)) for n in range(BATCH)]
    late = [infer.future(direct(200 + n, timeout=1)) for n in range(BATCH)]  # a microsecond
    assert all(np.isfinite(scored(call)) for call in long)
    codes = {call.exception().code() for call in late}
    assert codes <= {grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE}
    assert np.isfinite(scored(infer.future(direct(300))))
    assert counter("triward_conversations_total") - before == BATCH + 1


def test_unloading_waits_for_every_answer(overlapping: Served, infer: Any) -> None:
    port = overlapping.server.endpoints.metrics_port

    def taken() -> float:
        return loadgen.counter(port, "triward_instance_requests_total", "overlapping_forward")

    expected = [scored(infer.future(direct(n, LONG))) for n in range(2)]
    before = taken()
    calls = [infer.future(direct(n % 2, LONG)) for n in range(3 * BATCH)]
    wait_until(lambda: taken() >= before + BATCH + 1)  # one batch is computed, one is read
    with ThreadPoolExecutor(1) as pool:
        unloading = pool.submit(overlapping.server.http.unload, "overlapping_forward")
        assert [scored(call) for call in calls] == [*expected] * (3 * BATCH // 2)
        unloading.result()
