"""The waits that a plan states, against a simulation of the queue."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from triward_server.sizing.queueing import Queue

REQUESTS = 100_000
P99 = 0.99


@dataclass(frozen=True)
class Waits:
    """Seconds of each request until a server begins, and until it is answered."""

    begun: NDArray[np.float64]
    answered: NDArray[np.float64]


def simulate(queue: Queue, batch: int, seed: int = 0) -> Waits:
    """Poisson arrivals, gamma service times; a free server takes up to `batch` that wait.

    All of a batch are answered when its last one is computed.
    """
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / queue.rate, REQUESTS))
    if queue.variation:
        shape = queue.variation**-2
        services = rng.gamma(shape, queue.seconds / shape, REQUESTS)
    else:
        services = np.full(REQUESTS, queue.seconds)
    times, costs = [*arrivals.tolist(), math.inf], services.tolist()
    begun, answered = np.empty(REQUESTS), np.empty(REQUESTS)
    free = [0.0] * queue.servers
    first = 0
    while first < REQUESTS:
        start = max(heapq.heappop(free), times[first])
        last = first + 1
        while last < first + batch and times[last] <= start:
            last += 1
        end = start + sum(costs[first:last])
        begun[first:last], answered[first:last] = start, end
        heapq.heappush(free, end)
        first = last
    return Waits(begun - arrivals, answered - arrivals)


def simulated(
    utilisations: Sequence[float], variations: Sequence[float], servers: Sequence[int]
) -> list[tuple[Queue, Waits]]:
    queues = [
        Queue(utilisation * n, 1.0, variation, n)
        for utilisation in utilisations
        for variation in variations
        for n in servers
    ]
    return [(queue, simulate(queue, 1)) for queue in queues]


@pytest.fixture(scope="module")
def runs() -> list[tuple[Queue, Waits]]:
    return simulated((0.5, 0.7, 0.85), (0.0, 0.5, 1.0), (1, 2, 4))


class TestOneByOne:
    """Requests that are computed one at a time, as the formulas have it."""

    FACTOR = 1.25

    def test_the_mean_wait(self, runs: list[tuple[Queue, Waits]]) -> None:
        for queue, waits in runs:
            ratio = queue.mean_wait / waits.begun.mean()
            assert 1 / self.FACTOR < ratio < self.FACTOR, (queue, ratio)

    def test_the_tail(self, runs: list[tuple[Queue, Waits]]) -> None:
        for queue, waits in runs:
            ratio = queue.wait(P99) / np.quantile(waits.begun, P99)
            assert 1 / self.FACTOR < ratio < self.FACTOR, (queue, ratio)

    def test_a_formula_that_forgets_the_variation_would_be_noticed(
        self, runs: list[tuple[Queue, Waits]]
    ) -> None:
        wrong = [
            replace(queue, variation=0.0).mean_wait / waits.begun.mean()
            for queue, waits in runs
            if queue.variation == 1
        ]
        assert max(wrong) < 1 / self.FACTOR


class TestBatches:
    """Requests that are taken together and answered together, as Triton hands them over."""

    # A free server takes all that wait, whatever the others would have taken: less exact there.
    @pytest.mark.parametrize(("servers", "least", "most"), [(1, 1.0, 1.3), (2, 0.85, 1.4)])
    def test_answers(self, servers: int, least: float, most: float) -> None:
        for utilisation in (0.3, 0.5, 0.7, 0.85):
            for variation in (0.0, 0.5, 1.0):
                queue = Queue(utilisation * servers, 1.0, variation, servers)
                waits = simulate(queue, 64 // servers)
                ratio = queue.answer(P99) / np.quantile(waits.answered, P99)
                assert least < ratio < most, (queue, ratio)


class TestFormulas:
    def test_one_server_is_pollaczek_khinchin(self) -> None:
        queue = Queue(0.7, 1.0, 0.5)
        assert queue.mean_wait == pytest.approx(0.7 / 0.3 * (1 + 0.25) / 2)

    def test_erlang_c_of_the_textbooks(self) -> None:
        """Two servers at half: a third waits, 1 / 3 of a service time on average."""
        queue = Queue(1.0, 1.0, 1.0, 2)
        assert queue.waiting_share == pytest.approx(1 / 3)
        assert queue.mean_wait == pytest.approx(1 / 3)

    def test_nobody_waits_at_an_idle_server(self) -> None:
        queue = Queue(1e-9, 1.0, 0.5)
        assert queue.wait(P99) == 0
        assert queue.answer(P99) == pytest.approx(2.51, rel=0.02), "of a gamma distribution"

    def test_a_queue_that_grows_without_end_waits_without_end(self) -> None:
        assert Queue(1.0, 1.0, 0.5).mean_wait == math.inf
        assert Queue(1.5, 1.0, 0.5).wait(P99) == math.inf
