"""Too much load is refused, quickly and typed; what nobody waits for is not computed.

One server with one slow model: each request of the load takes it a substantial fraction of a
second, so that five times its capacity is little to send.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from PIL import Image
from tritonclient.grpc import service_pb2_grpc

from tests import loadgen
from tests.asking import model_processes
from tests.conftest import LOCAL, encode
from triward_server.serving.launch import TritonServer

pytestmark = pytest.mark.alone

FORWARD, PREPROCESS = "reward_forward", "reward_preprocess"
QUEUE = 16  # requests that may wait for each model
QUEUE_SECONDS = 2.0  # that each may wait there
# Triton looks for expired requests when a batch ends or a timer of its own rings, each half second.
LOOK_SECONDS = 1.0
MANY_TIMES = 5.0
CAPACITY_SECONDS = 8.0  # in which it is measured
MINUTE = 60.0  # a deadline that no request here reaches


@pytest.fixture(scope="module")
def target(
    build: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    repository = build(
        "--dtype=float32", "--threads=1", "--preprocess-instances=1",
        f"--max-queue-size={QUEUE}", f"--queue-timeout-ms={1000 * QUEUE_SECONDS:.0f}",
    )  # fmt: skip
    log = tmp_path_factory.mktemp("log") / "triton.log"
    with log.open("w") as file, TritonServer(repository, LOCAL, log=file) as running:
        yield running


@dataclass(frozen=True)
class Caller:
    """Sends requests, and reads the server's counters.

    Attributes:
        infer: gRPC's ModelInfer.
        counter: reads one from the metrics page, by name and model.
        stubs: the models' processes.
    """

    infer: Any
    counter: Callable[[str, str], float]
    stubs: dict[str, psutil.Process]

    def score(self, request: Any) -> float:
        return float(loadgen.scores_of(self.infer(request, timeout=MINUTE))[0, 0])

    def computed(self) -> float:
        """Conversations that were scored since the start."""
        return self.counter("triward_conversations_total", FORWARD)

    def send_and_wait_until_it_runs(self, request: Any, model: str) -> Any:
        """The call, once the model's process works on it."""
        stub = self.stubs[model]
        idle = _worked(stub)
        call = self.infer.future(request, timeout=MINUTE)
        end = time.monotonic() + 20
        while _worked(stub) < idle + 0.1:
            assert time.monotonic() < end and not call.done(), "it does not run"
        return call

    def wait_until_waiting(self, model: str, count: int) -> None:
        """Until so many requests wait for a model, none of them in its batch."""
        end = time.monotonic() + 20
        while time.monotonic() < end:
            if self.counter("nv_inference_pending_request_count", model) == count:
                return
        raise AssertionError(f"never did {count} requests wait for {model}")


@pytest.fixture
def caller(target: TritonServer) -> Iterator[Caller]:
    with grpc.insecure_channel(target.endpoints.grpc, loadgen.NO_LIMIT) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        port = target.endpoints.metrics_port
        models = {
            name: process
            for name in (FORWARD, PREPROCESS)
            for process in model_processes(target.pid, f"/{name}/")
        }
        yield Caller(stub.ModelInfer, partial(loadgen.counter, port), models)


def _worked(stub: psutil.Process) -> float:
    """Seconds that a model has used, with the processes that decode for it."""
    return sum(p.cpu_times().user for p in (stub, *stub.children(recursive=True)))


# --- overload


def heavy(number: int) -> Any:
    """About 700 tokens that no other request begins with."""
    rng = Random(number)
    words = (f"{rng.choice('abcdefgh')}{rng.randrange(100)}" for _ in range(200))
    text = f"{number} {' '.join(words)}"
    messages = [{"role": "user", "content": text}]
    return loadgen.message("reward", loadgen.conversation(messages, [b"yes"]))


@dataclass(frozen=True)
class Answer:
    """What came back for one request.

    Attributes:
        seconds: from when it was due to the answer.
        late: of them, until it was sent.
        status: gRPC's.
        text: the error's, or nothing.
    """

    seconds: float
    late: float
    status: str
    text: str = ""


async def _ask(infer: Any, number: int, due: float) -> Answer:
    await asyncio.sleep(due - time.monotonic())
    sent = time.monotonic()
    try:
        loadgen.scores_of(await infer(heavy(number), timeout=MINUTE))
    except grpc.aio.AioRpcError as error:
        seconds = time.monotonic() - due
        return Answer(seconds, sent - due, error.code().name, error.details() or "")
    return Answer(time.monotonic() - due, sent - due, "OK")


async def _at_once(url: str, numbers: range) -> list[Answer]:
    async with grpc.aio.insecure_channel(url) as channel:
        infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        now = time.monotonic()
        return await asyncio.gather(*(_ask(infer, number, now) for number in numbers))


async def _one_after_the_other(url: str, callers: int, seconds: float) -> float:
    """Requests that are answered per second when so many callers each wait for their answer."""
    begun = time.monotonic()
    answered = 0

    async def ask_on(infer: Any, first: int) -> None:
        nonlocal answered
        while time.monotonic() < begun + seconds:
            answer = await _ask(infer, first, time.monotonic())
            first, answered = first + callers, answered + (answer.status == "OK")

    async with grpc.aio.insecure_channel(url) as channel:
        infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        await asyncio.gather(*(ask_on(infer, 1000 + n) for n in range(callers)))
    return answered / (time.monotonic() - begun)


async def _at_a_rate(url: str, rate: float, seconds: float) -> tuple[list[Answer], float]:
    """Poisson arrivals, whatever becomes of earlier ones. Returns when the last was due, too."""
    rng = np.random.default_rng(0)
    begun = time.monotonic() + 0.1
    due = begun + np.cumsum(rng.exponential(1 / rate, int(rate * seconds)))
    async with grpc.aio.insecure_channel(url) as channel:
        infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        tasks = [asyncio.create_task(_ask(infer, 10**6 + n, t)) for n, t in enumerate(due)]
        return await asyncio.gather(*tasks), float(due[-1])


REFUSALS = (
    r"in ensemble 'reward', "
    r"(\[request id: <id_unknown>\] Exceeds maximum queue size|Request timeout expired)"
)


def _percentile(values: Sequence[float], share: float) -> float:
    return float(np.quantile(values, share)) if len(values) else 0.0


@pytest.mark.parametrize("seconds", [15, pytest.param(60, marks=pytest.mark.soak)])
def test_five_times_the_capacity(seconds: int, target: TritonServer, caller: Caller) -> None:
    url, single = target.endpoints.grpc, heavy(0)
    expected = caller.score(single)
    alone = [_timed(caller, single, expected) for _ in range(10)]
    # What may wait for a model is what it can find in its next batch: with that much company a
    # request takes this long, from arrival to answer, when nothing waits before it.
    asyncio.run(_at_once(url, range(100, 100 + QUEUE)))
    together = [asyncio.run(_at_once(url, range(n, n + QUEUE))) for n in (200, 300)]
    service = max(answer.seconds for answers in together for answer in answers)
    capacity = asyncio.run(_one_after_the_other(url, QUEUE // 2, CAPACITY_SECONDS))

    before = caller.computed()
    answers, last_due = asyncio.run(_at_a_rate(url, MANY_TIMES * capacity, seconds))
    accepted = [answer for answer in answers if answer.status == "OK"]
    refused = [answer for answer in answers if answer.status != "OK"]
    computed = caller.computed() - before
    while time.monotonic() < last_due + 5:
        caller.score(single)
    left = [caller.counter("nv_inference_pending_request_count", m) for m in caller.stubs]
    recovered = [_timed(caller, single, expected) for _ in range(10)]

    texts = Counter(answer.text for answer in refused)
    print(
        f"alone {max(alone):.3f} s, {QUEUE} at once {service:.2f} s, capacity {capacity:.1f}/s; "
        f"{len(answers) / seconds:.0f}/s sent, {len(accepted) / seconds:.1f}/s accepted: "
        f"p50 {_percentile([a.seconds for a in accepted], 0.5):.2f} "
        f"p99 {_percentile([a.seconds for a in accepted], 0.99):.2f} s; refused after "
        f"p50 {_percentile([a.seconds for a in refused], 0.5):.3f} "
        f"p99 {_percentile([a.seconds for a in refused], 0.99):.2f} s: {dict(texts)}; "
        f"sent late by p99 {_percentile([a.late for a in answers], 0.99):.3f} s; "
        f"afterwards {median(recovered):.3f} s"
    )
    # Each model's queue, and then a full batch.
    assert _percentile([a.seconds for a in accepted], 0.99) <= 2 * QUEUE_SECONDS + service
    assert {answer.status for answer in refused} == {"UNAVAILABLE"}
    assert all(re.fullmatch(REFUSALS, text) for text in texts), texts
    assert _percentile([a.seconds for a in refused], 0.99) <= QUEUE_SECONDS + LOOK_SECONDS + service
    assert _percentile([a.seconds for a in refused], 0.5) <= 0.5, "most are refused at the door"
    assert len(accepted) >= 0.5 * capacity * seconds, "overload must not eat the capacity"
    assert computed == len(accepted), "what is refused is not computed"
    assert _percentile([a.late for a in answers], 0.99) < 1.0, "the load itself kept its rate"
    # One that finds the queues full waits for all of them: `service` and more.
    assert left == [0, 0] and median(recovered) <= service / 3


def _timed(caller: Caller, request: Any, expected: float) -> float:
    begun = time.monotonic()
    assert caller.score(request) == pytest.approx(expected, rel=1e-5)
    return time.monotonic() - begun


# --- waiting in vain


def small(number: int, **parameters: int) -> Any:
    """A request of the public model that takes next to nothing."""
    messages = [{"role": "user", "content": f"{number}?"}]
    return loadgen.message("reward", loadgen.conversation(messages, [b"yes"]), **parameters)


def direct(number: int, tokens: int = 50, **parameters: int) -> Any:
    """The same of the forward model."""
    rng = Random(number)
    ids = [rng.randrange(500) for _ in range(tokens)]
    return loadgen.message(FORWARD, loadgen.features(ids, [tokens - 3, 3]), **parameters)


def long_forward() -> Any:
    """One that keeps the forward model busy for seconds: two conversations, as long as may be."""
    rng = Random(0)
    ids = [rng.randrange(500) for _ in range(24_000)]
    return loadgen.message(FORWARD, loadgen.features(ids, [8_000] * 3))


def long_preprocess() -> Any:
    """One that keeps preprocessing busy for seconds, and is never scored: its last image is cut."""
    picture = encode(Image.new("RGB", (5000, 5000)))
    parts = [{"type": "image", "min_pixels": 784, "max_pixels": 3136}] * 21
    media = [*[picture] * 20, picture[: len(picture) // 2]]
    messages = [{"role": "user", "content": parts}]
    return loadgen.message("reward", loadgen.conversation(messages, [b"yes"], media))


@dataclass(frozen=True)
class Wait:
    """Requests that wait behind a long one.

    Attributes:
        before: makes the long one.
        request: makes one that waits, from a number and parameters.
        model: whose queue they wait in.
        scored: conversations of the long one.
        place: in front of Triton's own messages.
    """

    before: Callable[[], Any]
    request: Callable[..., Any]
    model: str
    scored: int
    place: str


ENSEMBLE = "in ensemble 'reward', "
WAITS = {
    "forward, called directly": Wait(long_forward, direct, FORWARD, 2, ""),
    "forward, in the ensemble": Wait(long_forward, small, FORWARD, 2, ENSEMBLE),
    "preprocess, in the ensemble": Wait(long_preprocess, small, PREPROCESS, 0, ENSEMBLE),
}
OF_EACH = 4  # kinds of waiting


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_in_vain_is_not_computed(name: str, caller: Caller) -> None:
    """Cancelled, out of its own time, or out of the queue's: all behind one long request."""
    wait = WAITS[name]
    caller.score(wait.request(1))  # nothing that happens once shall happen below
    conversations = caller.computed()
    long = caller.send_and_wait_until_it_runs(wait.before(), wait.model)

    def send(first: int, **parameters: int) -> list[Any]:
        requests = (wait.request(first + n, **parameters) for n in range(OF_EACH))
        return [caller.infer.future(request, timeout=MINUTE) for request in requests]

    cancelled, patient, hurried = send(100), send(200), send(300, timeout=1_000_000)
    caller.wait_until_waiting(wait.model, 3 * OF_EACH)
    for call in cancelled:
        call.cancel()
    late = f"UNAVAILABLE: {wait.place}Request timeout expired"
    assert Counter(map(_answer, cancelled)) == {"cancelled": OF_EACH}
    assert Counter(map(_answer, hurried)) == {late: OF_EACH}
    assert not any(call.done() for call in patient), "their own time was over, the queue's not"
    assert Counter(map(_answer, patient)) == {late: OF_EACH}
    assert not long.done(), "the long one was too short for this test"
    _answer(long)
    caller.score(wait.request(2))  # whatever was queued before it is done
    assert caller.computed() - conversations == wait.scored + 1


def _answer(call: Any) -> str:
    try:
        loadgen.scores_of(call.result())
    except grpc.FutureCancelledError:
        return "cancelled"
    except grpc.RpcError as error:
        return f"{error.code().name}: {error.details()}"
    return "scores"
