"""Sizing: measured points -> a number of replicas."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Points = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Objective:
    """Load and objective that the service must bear.

    Attributes:
        p99_ms: milliseconds within which 99 of 100 requests must be answered.
        peak: requests per second at the busiest time, of all callers together.
        headroom: factor on the peak for what was not foreseen, and for uneven spread.
    """

    p99_ms: float
    peak: float
    headroom: float = 1.3


def capacity(closed: Points) -> float | None:
    """Return the highest closed-loop throughput, in requests per second; None without a success."""
    return max((point["requests_per_s"] for point in closed if not point["error"]), default=None)


def meets(point: Mapping[str, Any], p99_ms: float) -> bool:
    """Return True if a replica under this load keeps the objective, and would go on keeping it."""
    if point["error"] or point["failed"] or point["overloaded"] or not point["latency_ms"]:
        return False
    return bool(point["latency_ms"]["p99"] <= p99_ms)


def replicas(open_loop: Points, objective: Objective) -> dict[str, Any]:
    """Replicas by the open loop: closed-loop callers wait when the server is slow, users do not.

    Args:
        open_loop: points of one mix.
        objective: what to bear.

    Returns:
        `rate_per_s` that one replica bears and `p99_ms` there, `working` replicas that the peak
        takes and `replicas` with one to spare; None for all if no point meets the objective.
    """
    best: Mapping[str, Any] | None = None
    for point in sorted(open_loop, key=lambda p: float(p["value"])):
        if not meets(point, objective.p99_ms):
            break  # a higher load that meets it again was lucky
        best = point
    if best is None:
        return dict.fromkeys(("rate_per_s", "p99_ms", "working", "replicas"))
    rate = best["arrivals_per_s"]
    working = math.ceil(objective.peak * objective.headroom / rate)
    p99 = best["latency_ms"]["p99"]
    return {"rate_per_s": rate, "p99_ms": p99, "working": working, "replicas": working + 1}


def sizing(mixes: Mapping[str, Any], objective: Objective) -> dict[str, Any]:
    """Return the `objective` of a results file and `sizing` of each mix with an open loop."""
    opened = {name: mix["open"] for name, mix in mixes.items() if mix["open"]}
    return {
        "objective": asdict(objective),
        "sizing": {name: replicas(points, objective) for name, points in opened.items()},
    }
