"""The HTTP gateway while its server is killed under load and comes back."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.asking import conversation, wait_until
from tests.conftest import LOCAL
from triward_server.errors import LaunchError
from triward_server.serving.launch import TritonServer

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from tests.tools.gateways import running

CALLERS = 16


def test_a_killed_server_is_503_until_it_is_back(echo_repository: Path, tmp_path: Path) -> None:
    """Each answer is the right reward or a 503; none is made up, and none is missing."""
    stop, statuses, wrong = threading.Event(), Counter[int](), list[Any]()

    def start(log_name: str, port: int = 0) -> TritonServer:
        log = (tmp_path / log_name).open("w")
        return TritonServer(echo_repository, replace(LOCAL, grpc_port=port), log=log)

    with start("first.log") as mortal:
        port = mortal.endpoints.grpc_port
        with (
            running(mortal.endpoints.grpc, timeout=60.0) as door,
            ThreadPoolExecutor(CALLERS) as pool,
        ):

            def reward(number: int) -> tuple[int, Any]:
                status, answer = door.ask("/classify", {"messages": conversation(number)})
                return status, answer["data"][0]["probs"] if status == 200 else answer["error"]

            def ask(number: int, expected: Any) -> None:
                while not stop.is_set():
                    status, answer = reward(number)
                    statuses[status] += 1
                    if (status, answer) != (200, expected) and status != 503:
                        wrong.append((status, answer))

            expected = [reward(number)[1] for number in range(CALLERS)]
            assert len({str(each) for each in expected}) == CALLERS
            callers = [pool.submit(ask, n, each) for n, each in enumerate(expected)]
            try:
                wait_until(lambda: statuses[200] > 100, "nothing is answered")
                os.killpg(mortal.pid, signal.SIGKILL)
                with pytest.raises(LaunchError, match="SIGKILL"):
                    mortal.wait(lambda: None, 1.0)
                wait_until(lambda: statuses[503] > 100, "no 503 of a killed server")
                assert door.ask("/health", None, method="GET")[0] == 503
                mortal.stop()
                with start("again.log", port):
                    done = statuses[200]
                    wait_until(lambda: statuses[200] > done + 100, "it does not recover")
                    stop.set()
                    for caller in callers:
                        caller.result(60)
                    assert door.ask("/health", None, method="GET")[0] == 200
            finally:
                stop.set()
    assert wrong == []
    assert set(statuses) == {200, 503}
