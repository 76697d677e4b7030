"""A port that somebody takes between its choice and Triton's bind, which comes seconds later."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.conftest import LOCAL
from tests.ports import fixed
from triward import RewardClient
from triward_server.errors import LaunchError
from triward_server.serving import launch
from triward_server.serving.ending import lost_a_port
from triward_server.serving.installation import Installation, find_triton
from triward_server.serving.launch import Endpoints, TritonServer

LOST = (
    'E1126 18:20:58.706632 27518 main.cc:245] "failed to start {} service: Unavailable - '
    "Socket '127.0.0.1:60789' already in use \""
)


class Ready(BaseHTTPRequestHandler):
    """Another server, which serves a model of the same name."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def take(port: int, stack: ExitStack) -> None:
    taken = stack.enter_context(socket.socket())
    taken.bind(("127.0.0.1", port))
    taken.listen()


def answer(port: int, stack: ExitStack) -> None:
    other = stack.enter_context(HTTPServer(("127.0.0.1", port), Ready))
    thread = threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    stack.callback(thread.join)
    stack.callback(other.shutdown)


Theft = Callable[[Endpoints, ExitStack], None]


def rob(server: TritonServer, thefts: list[Theft], monkeypatch: pytest.MonkeyPatch) -> ExitStack:
    """Take ports of a server that are chosen and not bound, another one at each start."""
    stack = ExitStack()

    def find(cleanup: ExitStack) -> Installation:
        if thefts:
            thefts.pop(0)(server.endpoints, stack)
        return find_triton(cleanup)

    monkeypatch.setattr(launch, "find_triton", find)
    return stack


def test_another_port_is_chosen(
    echo_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "triton.log"
    with log.open("w") as file:
        server = TritonServer(echo_repository, LOCAL, log=file)
        thefts: list[Theft] = [
            lambda endpoints, stack: answer(endpoints.http_port, stack),
            lambda endpoints, stack: take(endpoints.metrics_port, stack),
        ]
        with rob(server, thefts, monkeypatch), server:
            assert server.listening().keys() == {"grpc", "http", "metrics"}
            with RewardClient(server.endpoints.grpc) as client:
                assert client.is_ready()
    assert log.read_text().count("already in use") >= 2
    assert log.read_text().count("it is started again") == 2


def test_a_port_that_was_asked_for_is_not_replaced(
    echo_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = replace(LOCAL, grpc_port=fixed().grpc_port)
    with (tmp_path / "triton.log").open("w") as file:
        server = TritonServer(echo_repository, asked, log=file)
        with (
            rob(server, [lambda endpoints, s: take(endpoints.grpc_port, s)], monkeypatch),
            pytest.raises(LaunchError, match=rf"^grpc port {asked.grpc_port} on 127.0.0.1: .*in"),
            server,
        ):
            pass


@pytest.mark.parametrize("service", ["GRPC", "HTTP", "Metrics"])
def test_how_triton_says_it(service: str) -> None:
    assert lost_a_port(["I1126 18:20:58 9 a.cc:1] ready", LOST.format(service)])
    assert not lost_a_port(["error: creating server: Internal - failed to load all models"])


def test_fixed_ports_are_no_other_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor may an outgoing connection get them."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    of_workers = []
    for worker in ("gw0", "gw1"):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        ports = [fixed() for _ in range(400)]
        of_workers.append({e.grpc_port for e in ports} | {e.metrics_port for e in ports})
    assert of_workers[0].isdisjoint(of_workers[1])
    assert max(set.union(*of_workers)) < lowest
