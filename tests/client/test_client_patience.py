"""A caller whose time is over goes on, and cancels nothing: Triton keeps cancelled requests."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.fakeserver import Fault
from triward import AsyncRewardClient, DeadlineExceeded, RewardClient, ServerError, patience

LATE = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "late"}]


@pytest.fixture
def server(server):
    server.delay = 0.5
    return server


def until_answered(server):
    end = time.monotonic() + 30
    while not server.scored["late"] and not server.given_up:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(("grace", "given_up"), [(patience.GRACE, 0), (0.0, 1)])
def test_a_late_call_is_left_alone(server, monkeypatch, grace, given_up):
    monkeypatch.setattr(patience, "GRACE", grace)
    with RewardClient(server.url) as client:
        with pytest.raises(DeadlineExceeded):
            client.score(LATE, timeout=0.1)
        until_answered(server)
    assert server.given_up == given_up


@pytest.mark.parametrize(("grace", "given_up"), [(patience.GRACE, 0), (0.0, 1)])
def test_a_late_call_of_the_async_client(server, monkeypatch, grace, given_up):
    monkeypatch.setattr(patience, "GRACE", grace)

    async def run():
        async with AsyncRewardClient(server.url) as client:
            with pytest.raises(DeadlineExceeded):
                await client.score(LATE, timeout=0.1)
            await asyncio.to_thread(until_answered, server)

    asyncio.run(run())
    assert server.given_up == given_up


def test_what_fails_late_disturbs_nobody(server, caplog):
    """Nobody waits for its exception, and asyncio must not complain of that."""
    server.fault = lambda call: Fault.INTERNAL if call.number == 0 else None

    async def run():
        async with AsyncRewardClient(server.url) as client:
            with pytest.raises(DeadlineExceeded):
                await client.score(LATE, timeout=0.1)
            assert await client.score(LATE) == 4.0

    asyncio.run(run(), debug=True)
    assert "never retrieved" not in caplog.text


def test_a_failure_in_time_is_raised(server):
    server.delay, server.fault = 0.0, lambda call: Fault.INTERNAL
    with RewardClient(server.url) as client, pytest.raises(ServerError, match="was to fail"):
        client.score(LATE)
