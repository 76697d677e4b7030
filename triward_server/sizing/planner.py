"""From a load to replicas and budgets: every figure of `triward-server plan`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..errors import ConfigError
from .budgets import Budgets, budgets_for
from .demand import Demand, RequestWork, work_of
from .footprint import DeviceMemory, Flags, HostMemory, device_memory, host_memory
from .models import Subject
from .queueing import Queue
from .request import check_shape, footing
from .speed import Speed

P99 = 0.99


@dataclass(frozen=True)
class CapacityPlan:
    """The whole answer.

    Attributes:
        subject: the model.
        speed: of one device.
        demand: what was asked.
        work: of one request.
        working: replicas that bear the peak.
        between: replicas with one to spare, at the fastest and at the slowest assumed speed.
        queue: of one of them at the peak.
        budgets: flags of the export.
        device: memory of each device.
        host: memory of each replica.
        given: devices that there are; None: it was not said.
    """

    subject: Subject
    speed: Speed
    demand: Demand
    work: RequestWork
    working: int
    between: tuple[int, int]
    queue: Queue
    budgets: Budgets
    device: DeviceMemory
    host: HostMemory
    given: int | None

    @property
    def replicas(self) -> int:
        """Replicas, with one that stands in for another."""
        return self.working + 1

    @property
    def missing(self) -> int:
        """Devices that are needed and were not given."""
        return 0 if self.given is None else max(0, self.replicas * self.demand.devices - self.given)


def make_plan(subject: Subject, speed: Speed, demand: Demand, given: int | None) -> CapacityPlan:
    """Plan the replicas of one model.

    Raises:
        ConfigError: a value that makes no sense; a request that the model, a pass or the device
            cannot take; or an objective that no number of replicas meets.
    """
    demand.check()
    place = footing(demand.shape, subject.geometry)
    check_shape(demand.shape, place, subject.geometry, subject.forward)
    work = work_of(subject, demand, place, speed.flops)
    memory = device_memory(
        subject, speed.memory, work.single, work.largest, bool(demand.shape.images)
    )
    working = replicas_for(demand, work)
    fastest, slowest = (
        replicas_for(demand, replace(work, seconds=work.flops / rate), strict=False) + 1
        for rate in reversed(speed.bounds)
    )
    budgets = budgets_for(subject, speed, demand, work, memory, working)
    flags = Flags(
        waiting=int(budgets.max_queue_size.value),
        preprocessors=int(budgets.preprocess_instances.value),
        batch=int(budgets.forward_batch_size.value),
    )
    host = host_memory(memory, demand.devices, work, flags)
    queue = _queue(demand, work, working)
    between = (fastest, slowest)
    return CapacityPlan(
        subject, speed, demand, work, working, between, queue, budgets, memory, host, given
    )


def replicas_for(demand: Demand, work: RequestWork, strict: bool = True) -> int:
    """Return the fewest replicas whose utilisation and p99 are kept.

    Args:
        demand: with both.
        work: of a request.
        strict: whether an objective that nothing meets is an error; else utilisation counts alone.

    Raises:
        ConfigError: a request by itself takes longer than the objective.
    """
    fewest = max(
        1, math.ceil(demand.rate * work.seconds / (demand.devices * demand.utilisation) - 1e-9)
    )
    alone = replace(_queue(demand, work, 1), rate=0.0).answer(P99)
    if alone > demand.p99:
        if not strict:
            return fewest
        raise ConfigError(
            f"--p99 {demand.p99:g} s: one request in a hundred takes {alone:.3g} s on an idle "
            "device, which no number of replicas changes; fewer --responses in a request, shorter "
            "ones, smaller images, or a faster GPU"
        )
    low, high = fewest, fewest
    while _queue(demand, work, high).answer(P99) > demand.p99:
        low, high = high + 1, 2 * high
    while low < high:
        middle = (low + high) // 2
        if _queue(demand, work, middle).answer(P99) > demand.p99:
            low = middle + 1
        else:
            high = middle
    return high


def _queue(demand: Demand, work: RequestWork, replicas: int) -> Queue:
    return Queue(demand.rate / replicas, work.seconds, work.variation, demand.devices)
