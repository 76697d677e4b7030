"""Whatever bytes arrive, the server stays up, answers each request, and does not grow."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest

from benchmarks import footprint
from tests import loadgen
from tests.conftest import LOCAL
from tests.fuzzer import ASK, DEADLINE, FLAGS, Caller, Fuzzer, Tally, conversations_of
from triward_server.serving.launch import TritonServer

MANY, FEW = 10_000, 1_000
WARM_UP = 0.2  # of all requests
CALLERS = 16
GROWTH = 1.10  # of each process's memory, from the end of the warm-up to the last request
LEFT_BEHIND = 4096  # bytes a request, on average of them all
GOOD_EVERY = 20  # fuzzed requests to one whose score is known


@pytest.fixture(scope="module")
def fuzzer(checkpoint: Path) -> Fuzzer:
    return Fuzzer(checkpoint)


@pytest.fixture(scope="module")
def target(
    build: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    repository = build(*FLAGS)
    log = tmp_path_factory.mktemp("log") / "triton.log"
    with log.open("w") as file, TritonServer(repository, LOCAL, log=file) as running:
        yield running


@pytest.fixture
def caller(target: TritonServer) -> Iterator[Caller]:
    with grpc.insecure_channel(target.endpoints.grpc, loadgen.NO_LIMIT) as channel:
        yield Caller(channel)


@pytest.mark.parametrize("requests", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_thousands_of_requests(
    requests: int, target: TritonServer, caller: Caller, fuzzer: Fuzzer
) -> None:
    good = fuzzer.good()
    expected = [caller.scores(request) for request in good]
    before = {p.pid for p in psutil.Process(target.pid).children(recursive=True)}
    tally, lock = Tally(), threading.Lock()

    def send(number: int) -> None:
        fuzzed = fuzzer.request(number)
        status, problem = caller.judge(fuzzed)
        with lock:
            tally.add(fuzzed.kind, status)
            if problem:
                tally.wrong.append(f"request {number} ({fuzzed.kind}): {problem}")
        if number % GOOD_EVERY == 0:
            which = number // GOOD_EVERY % len(good)
            np.testing.assert_allclose(caller.scores(good[which]), expected[which], rtol=1e-5)

    def send_all(numbers: range) -> footprint.Footprint:
        for _ in pool.map(send, numbers):
            pass
        return footprint.take(target.pid)

    begun = time.monotonic()
    with ThreadPoolExecutor(CALLERS) as pool:
        for _ in pool.map(partial(_scored, caller, fuzzer.large()), range(4 * CALLERS)):
            pass
        settled = int(WARM_UP * requests)
        warm = send_all(range(settled))
        done = send_all(range(settled, requests))
    print(f"{requests} requests in {time.monotonic() - begun:.0f} s")
    for kind, statuses in sorted(tally.statuses.items()):
        print(f"{kind:16}", dict(statuses))
    for name, value in done.flat().items():
        print(f"{name:32} {warm.flat().get(name, 0):>14,.0f} {value:>14,.0f}")

    assert not tally.wrong, "\n".join([f"{len(tally.wrong)} wrong answers:", *tally.wrong[:20]])
    assert {p.pid for p in psutil.Process(target.pid).children(recursive=True)} == before
    for request, scores in zip(good, expected, strict=True):
        np.testing.assert_allclose(caller.scores(request), scores, rtol=1e-5)
    assert target.http.is_ready()
    if requests == MANY:  # before, the heaps have not settled
        _does_not_grow(warm, done, requests - settled)
    assert done.shm_regions == warm.shm_regions
    _reaches_deep(tally)


def _does_not_grow(warm: footprint.Footprint, done: footprint.Footprint, requests: int) -> None:
    for name, value in warm.flat().items():
        if name.endswith(("rss", "shm.bytes")):
            assert done.flat()[name] <= GROWTH * value, name
    leaked = done.flat()["total.rss"] - warm.flat()["total.rss"]
    assert leaked <= LEFT_BEHIND * requests, "a little of each request is kept"


def _scored(caller: Caller, request: Any, _: int) -> None:
    assert caller.scores(request).shape[1] == conversations_of(request)


def _reaches_deep(tally: Tally) -> None:
    """Damage that is always noticed at the door would test the door alone."""
    for kind in ("json", "image", "text", "tensors", "values", "envelope"):
        answers = tally.statuses[kind]
        assert answers["OK"] >= 0.02 * answers.total(), f"{kind}: hardly anything scores"
        assert answers["INVALID_ARGUMENT"] >= 0.02 * answers.total(), f"{kind}: all is taken"


def test_a_length_that_lies_fails_alone(caller: Caller, fuzzer: Fuzzer) -> None:
    """Triton's Python backend refuses it with its whole batch, so it must be a batch of its own."""
    good = fuzzer.good()[0]
    expected = caller.scores(good)
    messages, responses, media = loadgen.conversation(ASK, [b"yes"])
    lying = replace(responses, raw=struct.pack("<I", 1000) + b"yes")
    bad = loadgen.message("reward", [messages, lying, media])
    gate = threading.Barrier(2 * CALLERS)

    def send(number: int) -> None:
        gate.wait(DEADLINE)
        if number % 4:
            np.testing.assert_allclose(caller.scores(good), expected, rtol=1e-5)
            return
        with pytest.raises(grpc.RpcError) as caught:
            caller.scores(bad)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "expecting string of length 1000" in caught.value.details()

    with ThreadPoolExecutor(2 * CALLERS) as pool:
        for _ in range(8):  # by chance they might miss each other's batches
            list(pool.map(send, range(2 * CALLERS)))


def test_a_request_is_its_number(fuzzer: Fuzzer, checkpoint: Path) -> None:
    """In another order, in another process, it is the same: what failed can be sent again."""
    numbers = range(300)
    again = Fuzzer(checkpoint)
    backwards = {number: again.request(number) for number in reversed(numbers)}
    assert [fuzzer.request(number) for number in numbers] == [backwards[n] for n in numbers]
