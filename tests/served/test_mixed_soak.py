"""Everything at once: damage, short deadlines, kills, switches, lost logs; and no wrong score.

A run is its seed: request n is the same in every run, and disturbances come at fixed numbers.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from tritonclient.grpc import service_pb2

from benchmarks import footprint
from tests import loadgen
from tests.conftest import Exit
from tests.fuzzer import FLAGS, SEED, Caller, Fuzzed, Fuzzer
from tests.supervisor import ADMIN_KEY, Supervised
from triward_server.errors import LaunchError
from triward_server.export.random_checkpoint import make_checkpoint
from triward_server.serving.switch import switch_version
from triward_server.serving.triton_http import HttpError, TritonHttp

CALLERS = 8
GOOD, HURRIED = 0.15, 0.10  # shares of requests whose score is known, with and without time
NOTICED_WITHIN = 20.0  # seconds that a fault may last before `serve` ends over it
SAMPLE_EVERY = 1_000  # requests
GROWTH = 1.10  # of the whole server's memory, in its longest life of the second half
# While the server is down, or is about to be, any of gRPC's own words for that will do.
DOWN = {"UNAVAILABLE", "INTERNAL", "CANCELLED", "DEADLINE_EXCEEDED", "NOT_FOUND"}


@dataclass
class Record:
    """What came back, by all callers.

    Attributes:
        statuses: by kind of request and status.
        wrong: scores that no version gives.
        odd: failures that are right only while the server is down: begin, end, what.
        done: requests that were answered.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    odd: list[tuple[float, float, str]] = field(default_factory=list)
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Soak:
    """One run.

    Args:
        server: with two versions of one model.
        fuzzer: makes the requests.
        expected: for each good request, what each version scores.
    """

    def __init__(
        self, server: Supervised, fuzzer: Fuzzer, expected: list[list[np.ndarray]]
    ) -> None:
        self._server = server
        self._fuzzer = fuzzer
        self._good = fuzzer.good()
        self._expected = expected
        self.record = Record()
        self.calm = threading.Event()  # no disturbance comes any more

    def send(self, caller: Caller, number: int, calm: bool) -> None:
        """Send one request when there is a server, and judge what comes back."""
        if calm:
            self.calm.wait(3600)
        self._server.ready.wait(300)
        rng = Random(f"{SEED}:soak:{number}")
        begun, share = time.monotonic(), rng.random()
        if share < GOOD + HURRIED:
            which = rng.randrange(len(self._good))
            hurried = share < HURRIED
            deadline = rng.uniform(0.001, 0.05) if hurried else 60.0
            fuzzed = Fuzzed("hurried" if hurried else "good", self._good[which], hurried, deadline)
            status, problem = self._known(caller, fuzzed, self._expected[which])
        else:
            fuzzed = self._fuzzer.request(number)
            status, problem = caller.judge(fuzzed)
        record = self.record
        with record.lock:
            record.done += 1
            record.statuses[f"{fuzzed.kind} {status}"] += 1
            if problem:
                text = f"request {number} ({fuzzed.kind}): {problem}"
                if status in DOWN:
                    record.odd.append((begun, time.monotonic(), text))
                else:
                    record.wrong.append(text)

    def _known(
        self, caller: Caller, fuzzed: Fuzzed, expected: list[np.ndarray]
    ) -> tuple[str, str | None]:
        try:
            scores = caller.scores(fuzzed.request, fuzzed.deadline)
        except grpc.RpcError as error:
            status = error.code().name
            fine = fuzzed.may_expire and status in DOWN
            return status, None if fine else f"{status}: {error.details()}"
        right = any(np.allclose(scores, each, rtol=1e-5, atol=1e-6) for each in expected)
        return "OK", None if right else f"scores {scores}, versions score {expected}"


def level(samples: list[tuple[int, int, float]]) -> tuple[float, float]:
    """Memory at the begin and the end of the longest life, its first requests left out.

    Args:
        samples: process, requests done, resident bytes.
    """
    lives: dict[int, list[tuple[int, float]]] = {}
    for pid, done, size in samples:
        lives.setdefault(pid, []).append((done, size))
    longest = max(lives.values(), key=lambda life: life[-1][0] - life[0][0])
    # Caches fill during the first requests; the rest must not grow.
    settled = longest[len(longest) // 4 :]
    return settled[0][1], settled[-1][1]


@pytest.fixture(scope="module")
def two_versions(
    build: Callable[..., Path],
    export: Callable[..., Exit],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    repository = build(*FLAGS)
    other = tmp_path_factory.mktemp("other") / "checkpoint"
    make_checkpoint("tiny", 7, other)
    result = export(
        "--checkpoint", other, "--output", repository, "--device=cpu", "--preprocess-instances=2",
        "--version=2", *FLAGS,
    )  # fmt: skip
    assert result.code == 0, result.stderr
    return repository


@pytest.mark.alone
@pytest.mark.parametrize("requests", [3_000, pytest.param(100_000, marks=pytest.mark.soak)])
def test_everything_at_once(
    requests: int, two_versions: Path, checkpoint: Path, tmp_path: Path
) -> None:
    print(f"seed {SEED}")
    fuzzer = Fuzzer(checkpoint)
    with Supervised(two_versions, tmp_path, NOTICED_WITHIN) as server:
        e = server.endpoints
        http = TritonHttp("127.0.0.1", e.http_port, ADMIN_KEY)
        options = [*loadgen.NO_LIMIT, ("grpc.max_reconnect_backoff_ms", 500)]
        with grpc.insecure_channel(e.grpc, options) as channel:
            caller = Caller(channel)
            expected: list[list[np.ndarray]] = [[] for _ in fuzzer.good()]
            for version in ("2", "1"):
                switch_version(http, two_versions, version, 300)
                for request, scores in zip(fuzzer.good(), expected, strict=True):
                    scores.append(caller.scores(_of_version(request, version)))
            soak = Soak(server, fuzzer, expected)
            samples = _run(
                soak, server, caller, requests, partial(_switch, server, http, two_versions)
            )
            assert server.ready.wait(300)
            for request, scores in zip(fuzzer.good(), expected, strict=True):
                _assert_one_of(caller.scores(request, patient=True), scores)
    record = soak.record
    print(f"{record.done} requests, {len(server.exits)} lives, exits {server.exits}")
    print("\n".join(f"{count:>8} {kind}" for kind, count in sorted(record.statuses.items())))
    untyped = [
        text
        for begin, end, text in record.odd
        if not any(outage.touches(begin, end) for outage in server.outages)
    ]
    assert not record.wrong, "\n".join(record.wrong[:20])
    assert not untyped, "\n".join(untyped[:20])
    assert record.done == requests
    assert record.statuses["good OK"] > 0.8 * GOOD * requests, "hardly anything scored"
    before, after = level(samples)
    print(f"memory {before / 1e6:.0f} MB, at the end {after / 1e6:.0f} MB")
    assert after <= GROWTH * before


def _of_version(request: Any, version: str) -> Any:
    """Return a direct call of a step for one version; without it Triton takes the highest."""
    asked = service_pb2.ModelInferRequest.FromString(request.SerializeToString())
    if asked.model_name != "reward":
        asked.model_version = version
    return asked


def _switch(server: Supervised, http: TritonHttp, repository: Path, version: str) -> None:
    """Switch, unless the server ends meanwhile: loading can end Triton 24.10 (`progress.py`)."""
    lives = len(server.exits)
    try:
        switch_version(http, repository, version, 300)
    except (HttpError, LaunchError) as error:
        end = time.monotonic() + NOTICED_WITHIN
        while len(server.exits) == lives:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
        print(f"the server ended while it switched: {error}")
        assert server.ready.wait(300)


def _assert_one_of(scores: np.ndarray, expected: list[np.ndarray]) -> None:
    assert any(np.allclose(scores, each, rtol=1e-5, atol=1e-6) for each in expected)


def _run(
    soak: Soak,
    server: Supervised,
    caller: Caller,
    requests: int,
    switch: Callable[[str], Any],
) -> list[tuple[int, int, float]]:
    """Send all of them; disturb during the first half, watch memory during the second."""
    disturbances = cycle([
        lambda: switch("2"),
        lambda: server.kill("reward_forward"),
        lambda: switch("1"),
        lambda: server.kill("reward_preprocess"),
        lambda: switch("2"),
        lambda: server.kill("tritonserver"),
        lambda: switch("1"),
    ])  # fmt: skip
    every = max(requests // 15, 400)
    samples: list[tuple[int, int, float]] = []
    with ThreadPoolExecutor(CALLERS) as pool:
        half = requests // 2
        calls = [pool.submit(soak.send, caller, n, n >= half) for n in range(requests)]
        disturbed, sampled = 0, 0
        try:
            while soak.record.done < requests:
                assert server.ready.wait(300), "it does not come back"
                done = soak.record.done
                if done >= half:
                    soak.calm.set()
                elif done >= disturbed + every:
                    disturbed = done
                    next(disturbances)()
                # While versions come and go, so does memory.
                if done > half and done >= sampled + min(SAMPLE_EVERY, requests // 20):
                    sampled = done
                    samples += _sample(server, done)
                time.sleep(0.05)  # between two looks
        except BaseException:  # those who wait for calm must not be waited for
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            soak.calm.set()
        for call in calls:
            call.result()
    return samples


def _sample(server: Supervised, done: int) -> list[tuple[int, int, float]]:
    try:
        pid = server.member("tritonserver").pid
        return [(pid, done, footprint.take(pid).flat()["total.rss"])]
    except (StopIteration, LookupError, OSError, psutil.Error):
        return []  # it goes down at this moment
