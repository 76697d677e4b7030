"""What listens where, and what one hostile request does to whom it reaches."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import grpc
import psutil
import pytest
from tritonclient.grpc import service_pb2

from tests.asking import conversation
from tests.commands import BIN, Command, assert_gone, named
from tests.conftest import LOCAL
from tests.ports import fixed
from triward import RewardClient
from triward.integrations.rows import RowScorer
from triward_server.errors import LaunchError
from triward_server.serving import endpoints
from triward_server.serving.endpoints import CHUNKS_FIXED, Endpoints, Tls
from triward_server.serving.launch import TritonServer
from triward_server.serving.triton_http import TritonHttp

LIMIT = 2 * 2**30  # of which it takes two thirds before anybody asks, mostly threads' stacks
CHUNKS = 600_000  # 3.6 MB; Triton 24.10 survives 200,000
WARNING = "triward-server: warning: whoever reaches HTTP"


def connects(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=10):
            return True
    except OSError:
        return False


def send_chunks(host: str, port: int) -> None:
    """A body of one byte a chunk, each of which Triton keeps 16 bytes of stack for."""
    with socket.create_connection((host, port), timeout=60) as connection:
        connection.sendall(
            b"POST /v2/models/reward/infer HTTP/1.1\r\nHost: server\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        try:
            connection.sendall(b"1\r\nA\r\n" * CHUNKS + b"0\r\n\r\n")
            connection.recv(100)
        except OSError:
            pass  # it fell


def bomb(size: int) -> bytes:
    """A request of `size` zeros."""
    request = service_pb2.ModelInferRequest(model_name="reward")
    request.raw_input_contents.append(bytes(size))
    return bytes(request.SerializeToString())


def send_compressed(url: str, data: bytes) -> grpc.StatusCode:
    """Send a request of which a thousandth travels."""
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(url, options=options) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        try:
            call(data, compression=grpc.Compression.Gzip, timeout=120)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def test_http_is_for_this_machine_and_the_rest_for_whom_it_was_asked(
    serve: Callable[..., Command], echo_repository: Path
) -> None:
    running = serve("--host=0.0.0.0")
    grpc_port = int(running.wait_for(r"ready\s+grpc\s+0\.0\.0\.0:(\d+)$")[1])
    http_port = int(running.wait_for(r"http\s+http://127\.0\.0\.1:(\d+)$")[1])
    metrics_port = int(running.wait_for(r"metrics\s+http://0\.0\.0\.0:(\d+)/metrics$")[1])
    family = running.family()
    tritonserver = named(family, "tritonserver")[0]
    listening = {
        (c.laddr.ip, c.laddr.port)
        for c in tritonserver.net_connections("inet")
        if c.status == psutil.CONN_LISTEN
    }
    # No `::` either, which an IPv4 firewall would not see.
    assert listening == {
        ("0.0.0.0", grpc_port), ("127.0.0.1", http_port), ("0.0.0.0", metrics_port)
    }  # fmt: skip
    elsewhere = "127.0.0.2"  # an address of this machine that is not HTTP's
    assert connects(elsewhere, grpc_port) and connects(elsewhere, metrics_port)
    assert not connects(elsewhere, http_port)
    assert not connects("::1", grpc_port)
    with RewardClient(f"{elsewhere}:{grpc_port}") as client:
        score = client.score(conversation(0))
        health = [BIN / "triward-server", "health", "--deep", "--repository", echo_repository]
        assert Command(*health, f"--http-port={http_port}").wait() == 0
        assert client.score(conversation(0)) == score
    assert WARNING not in running.output
    running.process.send_signal(signal.SIGTERM)
    assert running.wait() == 0
    assert "cannot drain" not in running.output
    assert_gone(family)


def test_http_for_others_is_warned_of_and_for_cause(serve: Callable[..., Command]) -> None:
    running = serve("--http-host=0.0.0.0")
    running.wait_for("ready  grpc")
    port = int(running.wait_for(r"http\s+http://0\.0\.0\.0:(\d+)$")[1])
    if tuple(map(int, TritonHttp("127.0.0.1", port).release().split("."))) >= CHUNKS_FIXED:
        assert WARNING not in running.output
        return
    assert running.output.count(WARNING) == 1
    assert "CVE-2025-23310" in running.output and "2.59.1" in running.output
    send_chunks("127.0.0.2", port)
    assert running.wait() == 1
    assert "tritonserver stopped by itself (signal SIGSEGV)" in running.output


def test_http_cannot_be_both_encrypted_and_elsewhere(echo_repository: Path, tmp_path: Path) -> None:
    tls = Tls(tmp_path / "certificate", tmp_path / "key")
    server = TritonServer(echo_repository, replace(LOCAL, http_host="0.0.0.0"), tls=tls)
    with pytest.raises(LaunchError, match=r"with TLS it cannot listen on 0\.0\.0\.0"), server:
        pass


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.0.0.9", True), ("localhost", True),
     ("0.0.0.0", False), ("10.1.2.3", False), ("box", False)],
)  # fmt: skip
def test_who_reaches_http(host: str, local: bool) -> None:
    assert Endpoints(http_host=host).http_is_local == local


@pytest.mark.parametrize(
    ("address", "shown"),
    [("0.0.0.0", "0.0.0.0"), ("::ffff:127.0.0.1", "127.0.0.1"), ("::", "[::]")],
)
def test_addresses_as_they_are_written(address: str, shown: str) -> None:
    assert endpoints._shown(address) == shown


@contextmanager
def restarted(
    start: Callable[[], TritonServer], deaths: list[str]
) -> Iterator[Callable[[], TritonServer]]:
    """Keeps a server running, as Docker's restart policy would; gives the one that runs now."""
    current: list[TritonServer] = []
    up, stop = threading.Event(), threading.Event()

    def check() -> None:
        if stop.is_set():
            raise LaunchError("enough")

    def run() -> None:
        while not stop.is_set():
            with start() as server:
                current[:] = [server]
                up.set()
                try:
                    server.wait(check, 0.2)
                except LaunchError as error:
                    up.clear()
                    deaths.append(str(error))

    def now() -> TritonServer:
        assert up.wait(120)
        return current[0]

    with ThreadPoolExecutor(1) as pool:
        runner = pool.submit(run)
        try:
            yield now
        finally:
            stop.set()
            runner.result(120)


def test_a_bomb_costs_a_restart_and_no_score(
    echo: RewardClient, echo_repository: Path, tmp_path: Path
) -> None:
    """gRPC unpacks a message before anything of ours could refuse it."""
    asked = [conversation(n) for n in range(6)]
    expected = echo.score_many(asked)
    endpoints = replace(LOCAL, grpc_port=fixed().grpc_port)
    deaths: list[str] = []
    rounds: list[list[float]] = []
    done = threading.Event()

    def ask(url: str) -> None:
        with RewardClient(url) as asking:
            patient = RowScorer(asking, messages="messages")
            while not done.is_set():
                scores, errors = patient.score_rows({"messages": asked})
                assert not any(errors)
                rounds.append([float(score) for score in scores])  # type: ignore[arg-type]

    def wait_for_a_round(caller: Future[None]) -> None:
        seen = len(rounds)
        while len(rounds) < seen + 2:  # the first may have begun before
            assert not caller.done(), caller.result()
            time.sleep(0.1)

    with (tmp_path / "triton.log").open("w") as log, ThreadPoolExecutor(1) as pool:

        def start() -> TritonServer:
            return TritonServer(echo_repository, endpoints, log=log, max_memory=LIMIT)

        with restarted(start, deaths) as now:
            check_limits(now().pid)
            caller = pool.submit(ask, endpoints.grpc)
            try:
                wait_for_a_round(caller)
                first = now().pid
                assert (
                    send_compressed(endpoints.grpc, bomb(700_000_000))
                    is grpc.StatusCode.UNAVAILABLE
                )
                while now().pid == first:
                    time.sleep(0.1)
                wait_for_a_round(caller)
            finally:
                done.set()
            caller.result(120)
    assert deaths == ["tritonserver stopped by itself (signal SIGABRT)", "enough"]
    for scores in rounds:
        assert scores == pytest.approx(expected, abs=1e-4)


@pytest.mark.soak
def test_sixteen_bombs_at_once(repository: Path, tmp_path: Path) -> None:
    """3 GB unpacked; tritonserver stays within its limit, or ends."""
    data = bomb(200_000_000)
    done = threading.Event()
    with (tmp_path / "triton.log").open("w") as log, ThreadPoolExecutor(17) as pool:
        with TritonServer(repository, LOCAL, log=log, max_memory=LIMIT) as server:
            peak = pool.submit(highest_memory, psutil.Process(server.pid), done)
            url = server.endpoints.grpc
            bombs = [pool.submit(send_compressed, url, data) for _ in range(16)]
            statuses = {each.result() for each in bombs}
            done.set()
        tritonserver, whole = peak.result()
    gib = 2**30
    print(f"tritonserver {tritonserver / gib:.2f} GiB of {LIMIT / gib:.0f}; all {whole / gib:.2f}")
    assert 0 < tritonserver < LIMIT
    assert statuses <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INVALID_ARGUMENT}


def highest_memory(server: psutil.Process, done: threading.Event) -> tuple[int, int]:
    """Most resident bytes of tritonserver, and of it with its models' processes, until `done`."""
    own = whole = 0
    models = server.children()
    while not done.wait(0.005):
        with suppress(psutil.NoSuchProcess):
            sizes = [process.memory_info().rss for process in (server, *models)]
            own, whole = max(own, sizes[0]), max(whole, sum(sizes))
    return own, whole


def check_limits(tritonserver: int) -> None:
    """It is bound, and its models' processes, which hold the weights, are not."""
    _, most = psutil.Process().rlimit(psutil.RLIMIT_DATA)
    process = psutil.Process(tritonserver)
    assert process.rlimit(psutil.RLIMIT_DATA) == (LIMIT, most)
    commands = {child: " ".join(child.cmdline()) for child in process.children()}
    models = [p for p, c in commands.items() if "model.py" in c and "draining" not in c]
    assert len(models) == 3
    assert {each.rlimit(psutil.RLIMIT_DATA) for each in models} == {(most, most)}
