"""Many servers, and bad ones: real gRPC against servers without a model."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.certificates import write_certificates
from tests.client.helpers import ask, conversation, encrypted, fake_process, pause
from tests.fakeserver import FakeServer, Fault, read_log
from triward import (
    AsyncRewardClient,
    DeadlineExceeded,
    InvalidRequest,
    RewardClient,
    ServerError,
    ServerUnavailable,
    Tls,
    TriwardError,
    channel,
)
from triward.process import PerProcess

ROOT = Path(__file__).parents[2]


def apart(responses):
    """Conversations that do not travel together."""
    return [conversation(text, f"question {i}") for i, text in enumerate(responses)]


@pytest.fixture
def pair():
    with FakeServer() as first, FakeServer() as second:
        yield first, second


def urls(servers):
    return [server.url for server in servers]


def first_calls(count, fault):
    return lambda call: fault if call.number < count else None


# Several servers


def test_calls_go_to_all_servers_in_turn(pair):
    with RewardClient(urls(pair)) as client:
        client.score_many(apart(["r"] * 2), concurrency=1)  # both are connected now
        before = [server.calls for server in pair]
        client.score_many(apart(["r"] * 40), concurrency=1)
    assert [pair[place].calls - before[place] for place in (0, 1)] == [20, 20]


@pytest.mark.parametrize("url", ["dns:///localhost:{}", "localhost:{}", "ipv4:127.0.0.1:{}"])
def test_grpc_targets(server, url):
    with RewardClient(url.format(server.port)) as client:
        assert client.score(conversation("four")) == 4.0


def test_a_list_takes_names(pair):
    with RewardClient([f"localhost:{server.port}" for server in pair]) as client:
        assert client.score_many(apart(["r"] * 20)) == [1.0] * 20
    assert all(server.calls for server in pair)


def test_names_without_an_address(server):
    """One does no harm while there is another server."""
    gone = "no-such-host.invalid:1"
    with RewardClient([gone, server.url]) as client:
        assert client.score(conversation("four")) == 4.0
    with RewardClient([gone, "neither.invalid:1"], timeout=30) as client:
        with pytest.raises(ServerUnavailable, match=r"\.invalid:1: "):
            client.score(conversation("r"))
        assert client.is_ready() is False


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ([], "at least one"),
        ("http://host:8001", "without http://"),
        (["host:8001", "https://host:8001"], "without https://"),
        (["host:8001", "host:http"], "host:port"),
        ("host:http", "must be host:port"),
        ("host:8001/v2", "must be host:port"),
        ("", "must be host:port"),
        (["host:8001", "dns:///host:8001"], "host:port"),
    ],
)
def test_wrong_addresses(url, reason):
    with pytest.raises(ValueError, match=reason):
        RewardClient(url)


@pytest.mark.parametrize("attempts", [0, 6])
def test_wrong_attempts(attempts):
    with pytest.raises(ValueError, match="max_attempts"):
        RewardClient(max_attempts=attempts)


def test_one_of_two_servers_dies_under_load_and_returns(tmp_path):
    """Every call is answered, in time, by the survivor; the other one gets work when it is back."""
    log, again = tmp_path / "log", tmp_path / "again"
    stop, slowest = threading.Event(), [0.0]
    with FakeServer(delay=0.005) as survivor, ThreadPoolExecutor(8) as pool:
        with fake_process("--delay=0.005", "--log", log) as (process, url):
            port = url.rpartition(":")[2]
            client = RewardClient([survivor.url, url], timeout=20)

            def ask(thread):
                while not stop.is_set():
                    began = time.monotonic()
                    assert client.score(conversation("x" * thread)) == float(thread)
                    slowest[0] = max(slowest[0], time.monotonic() - began)

            asking = [pool.submit(ask, thread) for thread in range(8)]
            try:
                wait_for(lambda: survivor.calls > 50 and logged(log) > 50)
                process.kill()
                dead = survivor.calls
                wait_for(lambda: survivor.calls > dead + 200)
                with fake_process("--port", port, "--delay=0.005", "--log", again):
                    wait_for(lambda: logged(again) > 50)
                    stop.set()
                    for future in asking:
                        future.result(30)
            finally:
                stop.set()
        client.close()
    assert slowest[0] < 20


def test_a_call_to_a_server_that_stops_without_a_word_moves_on(monkeypatch):
    """Its connection stays open, and only keepalive can tell."""
    monkeypatch.setattr(channel, "_KEEPALIVE_MS", 1000)
    monkeypatch.setattr(channel, "_KEEPALIVE_TIMEOUT_MS", 500)
    with (
        fake_process() as (process, mute),
        FakeServer() as alive,
        RewardClient([alive.url, mute], timeout=60) as client,
    ):
        client.score_many(apart(["r"] * 8), concurrency=1)  # both are connected
        answered = alive.calls
        assert 0 < answered < 8
        pause(process)
        began = time.monotonic()
        assert client.score_many(apart(["r"] * 8), concurrency=8) == [1.0] * 8
        assert time.monotonic() - began < 40, "the timeout would have ended it at 60 s"
        assert alive.calls == answered + 8


def logged(path):
    return sum(read_log(path).values()) if path.exists() else 0


def wait_for(condition, seconds=30):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.01)


# Retries


@pytest.mark.parametrize("size", [1, 1_000_000])
def test_an_unavailable_server_is_asked_again(server, size):
    """Also with requests beyond 256 KiB, which gRPC by default does not keep."""
    server.fault = first_calls(2, Fault.UNAVAILABLE)
    with RewardClient(server.url) as client:
        assert client.score(conversation("x" * size)) == float(size)
    assert server.calls == 3


def test_pauses_are_random_and_grow(server):
    server.fault = lambda call: Fault.UNAVAILABLE
    began = time.monotonic()
    with RewardClient(server.url) as client, pytest.raises(ServerUnavailable):
        client.score(conversation("r"))
    assert server.calls == 5
    assert time.monotonic() - began > 0.7 * (0.2 + 0.6 + 1.8 + 5.4)


def test_retries_end_with_the_deadline(server):
    server.fault = lambda call: Fault.UNAVAILABLE
    began = time.monotonic()
    late = pytest.raises((DeadlineExceeded, ServerUnavailable))
    with RewardClient(server.url, timeout=1) as client, late:
        client.score(conversation("r"))
    assert time.monotonic() - began < 3
    assert server.calls < 5


@pytest.mark.parametrize("fault", [Fault.INTERNAL, Fault.INVALID_ARGUMENT, Fault.NAN])
def test_nothing_else_is_asked_again(server, fault):
    server.fault = lambda call: fault
    with RewardClient(server.url) as client, pytest.raises(TriwardError):
        client.score(conversation("r"))
    assert server.calls == 1


def test_without_retries(server):
    server.fault = lambda call: Fault.UNAVAILABLE
    with RewardClient(server.url, max_attempts=1) as client, pytest.raises(ServerUnavailable):
        client.score(conversation("r"))
    assert server.calls == 1


# Servers that fail: a typed error, on time, for both clients


FAULTS = {
    Fault.NAN: ServerError,
    Fault.WRONG_COUNT: ServerError,
    Fault.INTERNAL: ServerError,
    Fault.RESET: ServerUnavailable,
    Fault.UNAVAILABLE: ServerUnavailable,
    Fault.INVALID_ARGUMENT: InvalidRequest,
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_a_fault_is_a_typed_error(server, kind, fault):
    server.fault = lambda call: fault
    with pytest.raises(TriwardError) as caught:
        ask(kind, server.url, conversation("r"), timeout=20, max_attempts=2)
    assert type(caught.value) is FAULTS[fault]


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_a_server_that_never_answers(kind):
    """It accepts the connection and says nothing; later it answers HTTP/2 and no call."""
    with socket.socket() as silent, FakeServer(delay=5) as slow:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for url in (f"127.0.0.1:{silent.getsockname()[1]}", slow.url):
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                ask(kind, url, conversation("r"), timeout=0.5)
            assert time.monotonic() - began < 3


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_a_reset_is_retried(server, kind):
    server.fault = first_calls(1, Fault.RESET)
    assert ask(kind, server.url, conversation("four")) == 4.0
    assert server.calls == 2


# Encryption and headers


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    """Files of an authority, of a server at localhost, of a client, and of a stranger's client."""
    hosts = {
        "server": ["localhost", "127.0.0.1"],
        "client": ["trainer@localhost"],
        "stranger": ["trainer@localhost"],
    }
    return write_certificates(tmp_path_factory.mktemp("pki"), hosts, strangers=["stranger"])


def test_tls(pki):
    with encrypted(pki, "server") as one, encrypted(pki, "server") as other:
        tls = Tls(ca=pki / "ca.pem")
        for url in (f"localhost:{one.port}", [f"localhost:{s.port}" for s in (one, other)]):
            with RewardClient(url, tls=tls) as client:
                assert client.score(conversation("four")) == 4.0
        with RewardClient(one.url, max_attempts=1) as plain, pytest.raises(ServerUnavailable):
            plain.score(conversation("r"))
        with (
            RewardClient(one.url, tls=Tls(), max_attempts=1) as distrustful,
            pytest.raises(ServerUnavailable),
        ):
            distrustful.score(conversation("r"))
        wrong = Tls(ca=pki / "ca.pem", server_name="elsewhere")
        with (
            RewardClient(one.url, tls=wrong, max_attempts=1) as client,
            pytest.raises(ServerUnavailable),
        ):
            client.score(conversation("r"))


def test_mutual_tls(pki):
    with encrypted(pki, "server", mutual=True) as server:

        def ask(name):
            files = {"certificate": pki / f"{name}.pem", "key": pki / f"{name}.key"} if name else {}
            with RewardClient(
                server.url, tls=Tls(ca=pki / "ca.pem", **files), max_attempts=1
            ) as client:
                return client.score(conversation("four"))

        assert ask("client") == 4.0
        for name in ("stranger", None):
            with pytest.raises(ServerUnavailable):
                ask(name)


def test_a_certificate_needs_its_key():
    with pytest.raises(ValueError, match="together"):
        Tls(certificate="client.pem")


def test_headers_are_sent(server):
    seen = []
    server.fault = lambda call: seen.append(call.headers.get("triton-grpc-protocol-infer-key"))
    with RewardClient(server.url, headers={"triton-grpc-protocol-infer-key": "k"}) as client:
        client.score(conversation("r"))
        assert client.is_ready()
    assert seen == ["k"]


# Processes


PROCESSES = """
import multiprocessing, sys
from triward import RewardClient

def apart(count):
    for n in range(count):
        yield [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "x" * n}]

def ask(client, results):
    results.put(client.score_many(apart(8)))

if __name__ == "__main__":
    method, url = sys.argv[1:]
    context = multiprocessing.get_context(method)
    results = context.Queue()
    with RewardClient(url, timeout=20) as client:
        client.score_many(apart(3))
        children = [context.Process(target=ask, args=(client, results)) for _ in range(3)]
        for child in children:
            child.start()
        for child in children:
            assert results.get(timeout=60) == [float(n) for n in range(8)]
        for child in children:
            child.join(20)
            assert child.exitcode == 0
        assert client.score_many(apart(3)) == [0.0, 1.0, 2.0]
    print("done")
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_client_goes_to_another_process(server_process, method, tmp_path):
    """Children of a process that has asked already, and the parent afterwards.

    In a process of its own: gRPC forks only where no thread is in one of its calls, and here other
    tests' servers are.
    """
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES)
    done = subprocess.run(
        [sys.executable, script, method, server_process],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout == "done\n", done.stderr


FORKED_ASYNCIO = """
import asyncio, os, sys
from triward import AsyncRewardClient, TriwardError

url = sys.argv[1]
message = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "four"}]
client = AsyncRewardClient(url, timeout=5)
assert asyncio.run(client.score(message)) == 4.0
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
try:
    asyncio.run(client.score(message))
except TriwardError as error:
    os._exit(0 if "forked" in str(error) else 2)
os._exit(3)
"""


def test_asyncio_after_a_fork_is_an_error_and_does_not_hang(server_process):
    command = [sys.executable, "-c", FORKED_ASYNCIO, server_process]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_forks_threads_share_one_new_object():
    """The first thing that a worker does is often to ask with many threads."""
    made = []

    def make():
        time.sleep(0.01)
        made.append(object())
        return made[-1]

    each = PerProcess(make)
    parents = each.get()
    gc.collect()  # or the child might collect other tests' servers, which gRPC does not survive
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        assert each.get() is parents
        return
    with ThreadPoolExecutor(8) as pool:
        found = {id(thing) for thing in pool.map(lambda _: each.get(), range(64))}
    os._exit(0 if len(found) == 1 and id(parents) not in found else 1)


def test_what_event_loops_leave_is_dropped(server):
    client = AsyncRewardClient(server.url)
    for _ in range(5):
        assert asyncio.run(client.score(conversation("four"))) == 4.0
    assert len(client._looped.get()) == 1


def test_a_call_in_flight_when_the_async_client_is_closed(server):
    server.delay = 3

    async def ask():
        client = AsyncRewardClient(server.url)
        asking = asyncio.ensure_future(client.score(conversation("r")))
        while not server.calls:
            await asyncio.sleep(0.01)
        await client.close()
        with pytest.raises(ServerUnavailable, match="closed"):
            await asking

    asyncio.run(ask())


def test_settings_survive_pickling_and_copying(server):
    client = RewardClient(
        server.url, timeout=7, model="m", tls=None, headers={"a": "b"}, max_attempts=2
    )
    for other in (pickle.loads(pickle.dumps(client)), copy.copy(client)):
        assert other.__reduce__()[0].keywords == client.__reduce__()[0].keywords
        assert repr(other) == f"RewardClient('{server.url}')"
        with other:
            assert other.score(conversation("four")) == 4.0
    asking = pickle.loads(pickle.dumps(AsyncRewardClient(server.url)))
    assert type(asking) is AsyncRewardClient


def test_an_async_client_in_several_event_loops(server):
    client = AsyncRewardClient(server.url)
    for _ in range(3):
        assert asyncio.run(client.score(conversation("four"))) == 4.0
    asyncio.run(client.close())
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(client.score(conversation("r")))
