"""The soak's verdict: a leak is one, noise and single moments are none."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from benchmarks.soak import slope, trends, verdict

OUTCOMES = Counter(
    {
        f"single/{outcome}": 1
        for outcome in ("scored", "invalid", "unavailable", "late", "cancelled")
    }
)
MB = 2.0**20


def samples(**growth_per_hour: float) -> list[dict[str, float]]:
    """Twenty minutes, each ten seconds, as a server's look: a start, noise, a few peaks."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(120):
        hours = index / 360
        start = 1 - np.exp(-index / 5)  # the warm-up
        peak = 200 * MB if index % 17 == 0 else 0
        memory = 500 * MB * start + rng.normal(0, 3 * MB) + peak
        fds = 80.0 + (index % 13 == 0)
        rows.append({
            "seconds": 3600 * hours,
            "total.anon": memory + growth_per_hour.get("anon", 0) * hours,
            "total.fds": fds + round(growth_per_hour.get("fds", 0) * hours),
            "shm.bytes": 24 * MB + growth_per_hour.get("shm", 0) * hours,
        })  # fmt: skip
    return rows


def test_level() -> None:
    rows = samples()
    assert verdict(trends(rows, 3), OUTCOMES, rows) == []


@pytest.mark.parametrize(
    ("growth", "name"),
    [
        ({"anon": 60 * MB}, "total.anon"),
        ({"fds": 20}, "total.fds"),
        ({"shm": 50 * MB}, "shm.bytes"),
    ],
)
def test_leaks(growth: dict[str, float], name: str) -> None:
    rows = samples(**growth)
    [problem] = verdict(trends(rows, 3), OUTCOMES, rows)
    assert problem.startswith(f"{name} grows by ")


def test_an_error_a_lost_process_and_a_missing_kind_of_load_are_no_pass() -> None:
    rows = samples()
    assert verdict(trends(rows, 3), OUTCOMES | {"single/error: INTERNAL": 2}, rows)
    assert verdict(trends(rows, 3), OUTCOMES - Counter(["single/late"]), rows)
    assert verdict(trends(rows[:-1], 3), OUTCOMES, [*rows[:-1], {"seconds": 1.0}])
    dead = [*rows[:5], {"seconds": 60.0}]
    assert verdict(trends(dead, 3), OUTCOMES, dead)


def test_slope_ignores_a_quarter_of_the_samples() -> None:
    times = list(map(float, range(40)))
    values = [2 * t + (1000 if t % 4 == 0 else 0) for t in times]
    assert slope(times, values) == pytest.approx(2)
