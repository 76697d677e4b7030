"""The simulated servers queue and forget as real ones do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.routing import LOADS, Server, Traffic, arrivals, simulate

SHORT = Traffic(responses=8, utilisation=0.8, warm_up=20.0, seconds=20.0, median=4.0)


def test_a_server_computes_one_request_after_the_other() -> None:
    load = replace(SHORT, miss=1.0, hit=0.25)
    server = Server(load)
    assert server.take(10.0, 1) == (10.0, 11.0, False)
    assert server.take(10.5, 1) == (11.0, 11.25, True), "the first one is done before it"
    assert server.take(20.0, 2) == (20.0, 21.0, False)


def test_a_server_forgets_the_prompt_that_was_used_longest_ago() -> None:
    server = Server(replace(SHORT, prompts=2))
    hits = [server.take(float(n), prompt)[2] for n, prompt in enumerate([1, 2, 1, 3, 1, 2])]
    assert hits == [False, False, True, False, True, False]


def test_requests_come_as_often_as_the_load_says() -> None:
    for servers in (1, 8):
        requests = arrivals(SHORT, servers, 0)
        times = [time for time, _ in requests]
        assert times == sorted(times)
        settled = [time for time in times if 20 <= time < 40]
        assert len(settled) / 20 == pytest.approx(servers * 0.8 / SHORT.miss, rel=0.15)


def test_one_server_is_one_whatever_the_policy() -> None:
    assert simulate(SHORT, 1, "round robin", 0) == simulate(SHORT, 1, "by prompt", 0)


def test_by_prompt_only_the_first_response_is_a_miss() -> None:
    found = {policy: simulate(SHORT, 8, policy, 0) for policy in ("round robin", "by prompt")}
    assert found["by prompt"]["hit_rate"] == pytest.approx(7 / 8, abs=0.02)
    assert found["round robin"]["hit_rate"] < 0.4
    assert found["by prompt"]["wait_p99_ms"] < found["round robin"]["wait_p99_ms"]


def test_what_never_comes_again_is_never_remembered() -> None:
    once = next(load for load in LOADS.values() if load.responses == 1)
    load = replace(once, warm_up=20.0, seconds=20.0)
    assert simulate(load, 4, "by prompt", 0)["hit_rate"] == 0
