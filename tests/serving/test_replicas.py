"""Two servers behind one client: one is killed under load and comes back."""

from __future__ import annotations

import os
import signal
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import pytest

from tests.asking import conversation, wait_until
from tests.conftest import LOCAL
from tests.ports import fixed
from triward import RewardClient, ServerUnavailable, TriwardError
from triward_server.errors import LaunchError
from triward_server.serving.launch import TritonServer

CALLERS = 6
TIMEOUT = 60.0


def served(server: TritonServer) -> float:
    """Requests that the ensemble of a server has answered with scores."""
    url = f"http://127.0.0.1:{server.endpoints.metrics_port}/metrics"
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            lines = response.read().decode().splitlines()
    except URLError:  # Triton opens this port a moment after it is ready
        return 0.0
    name = 'nv_inference_request_success{model="reward",'
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def test_a_server_that_is_killed_under_load_and_returns(
    echo_server: TritonServer, echo: RewardClient, echo_repository: Path, tmp_path: Path
) -> None:
    expected = echo.score_many([conversation(n) for n in range(CALLERS)])
    stop, wrong = threading.Event(), list[str]()
    answered = [0] * CALLERS

    def start(log_name: str, port: int = 0) -> TritonServer:
        log = (tmp_path / log_name).open("w")
        return TritonServer(echo_repository, replace(LOCAL, grpc_port=port), log=log)

    with start("first.log") as mortal:
        port = mortal.endpoints.grpc_port
        asking = RewardClient([echo_server.endpoints.grpc, mortal.endpoints.grpc], timeout=TIMEOUT)

        def ask(number: int) -> None:
            while not stop.is_set():
                begun = time.monotonic()
                try:
                    score = asking.score(conversation(number))
                    if abs(score - expected[number]) > 1e-6:
                        wrong.append(f"{score} instead of {expected[number]}")
                    answered[number] += 1
                except TriwardError as error:  # typed, but a survivor was there to ask
                    wrong.append(repr(error))
                if time.monotonic() - begun > TIMEOUT + 1:
                    wrong.append(f"{time.monotonic() - begun:.1f} s")

        with asking, ThreadPoolExecutor(CALLERS) as pool:
            callers = [pool.submit(ask, number) for number in range(CALLERS)]
            try:
                before = served(echo_server)
                wait_until(lambda: served(mortal) > 20, "the second server gets no work")
                assert served(echo_server) > before
                os.killpg(mortal.pid, signal.SIGKILL)
                with pytest.raises(LaunchError, match="SIGKILL"):
                    mortal.wait(lambda: None, 1.0)
                done = served(echo_server)
                wait_until(
                    lambda: served(echo_server) > done + 30, "the survivor does not take over"
                )
                mortal.stop()
                with start("again.log", port) as returned:
                    wait_until(lambda: served(returned) > 20, "it gets no work when it is back")
                    stop.set()
                    for caller in callers:
                        caller.result(TIMEOUT)
            finally:
                stop.set()
    assert wrong == []
    assert all(answered)


def test_no_server_is_left(free_ports: list[int]) -> None:
    urls = [f"127.0.0.1:{port}" for port in free_ports]
    with RewardClient(urls, timeout=20, max_attempts=2) as client:
        with pytest.raises(ServerUnavailable, match=urls[0]):
            client.score(conversation(0))
        assert not client.is_ready()


@pytest.fixture
def free_ports() -> list[int]:
    return [fixed().grpc_port for _ in range(2)]
