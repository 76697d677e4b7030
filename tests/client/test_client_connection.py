"""Mistakes in connecting: each is one sentence that says what to do, and comes at once."""

from __future__ import annotations

import asyncio
import http.server
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from tests.certificates import write_certificates
from tests.client.helpers import ask, encrypted
from tests.fakeserver import FakeServer, Fault
from triward import (
    AsyncRewardClient,
    DeadlineExceeded,
    RewardClient,
    ServerError,
    ServerUnavailable,
    Tls,
    protocol,
)
from triward.channel import Address
from triward.connection import readable

ROOT = Path(__file__).parents[2]
CONVERSATION = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "four"}]
AT_ONCE = 3.0  # seconds; five attempts take 7.5

both = pytest.mark.parametrize("kind", ["blocking", "asyncio"])


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """Without a proxy that answers in a server's place."""
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


def failing(kind, url, error=ServerUnavailable, method="score", **settings):
    """The sentence, and the seconds until it came."""
    began = time.monotonic()
    with pytest.raises(error) as caught:
        ask(kind, url, *([CONVERSATION] if method == "score" else []), method=method, **settings)
    return str(caught.value), time.monotonic() - began


async def result(value):
    """What a blocking or an asyncio client's method returns."""
    return await value if asyncio.iscoroutine(value) else value


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# Nothing listens


@both
def test_nothing_listens(kind):
    url = f"localhost:{free_port()}"
    sentence, seconds = failing(kind, url)
    assert sentence == f"nothing listens on {url}; Triward's gRPC port is 8001"
    assert seconds < AT_ONCE
    assert failing(kind, url, method="check_ready")[0] == sentence
    assert ask(kind, url, method="is_ready") is False


def test_nothing_listens_on_the_usual_port(monkeypatch):
    port = free_port()
    monkeypatch.setattr("triward.connection.GRPC_PORT", port)
    sentence, _ = failing("blocking", f"localhost:{port}")
    assert sentence.startswith(f"nothing listens on localhost:{port}; is `triward-server serve`")


def test_each_of_many_calls_fails_at_once():
    began = time.monotonic()
    with RewardClient(f"127.0.0.1:{free_port()}") as client:
        outcomes = client.score_many([CONVERSATION] * 40, on_error="return")
    assert {type(outcome) for outcome in outcomes} == {ServerUnavailable}
    assert time.monotonic() - began < AT_ONCE


def test_a_host_that_is_not_known():
    sentence, seconds = failing("blocking", "no-such-host.invalid:8001")
    assert sentence.startswith("no-such-host.invalid:8001: the host no-such-host.invalid is not")
    assert seconds < AT_ONCE


@both
def test_several_addresses_are_tried_again(kind):
    """One may be about to start; nothing is said of addresses that only gRPC can read."""
    ports = free_port(), free_port()
    sentence, seconds = failing(kind, [f"127.0.0.1:{port}" for port in ports], max_attempts=2)
    assert seconds > 0.1, "the pause before the second attempt"
    assert sentence.startswith(f"127.0.0.1:{ports[0]}, 127.0.0.1:{ports[1]}: no connection: ")
    assert "refused" in sentence
    assert "ipv4:" not in sentence and "%" not in sentence


@both
def test_a_server_that_was_there_is_waited_for(kind):
    """As while it is started again."""
    port = free_port()

    def again():
        time.sleep(1.0)
        return FakeServer(port).__enter__()

    async def asking(client):
        with FakeServer(port):
            assert await result(client.score(CONVERSATION)) == 4.0
        returned = asyncio.get_running_loop().run_in_executor(None, again)
        assert await result(client.score(CONVERSATION, timeout=60)) == 4.0
        (await returned).__exit__()
        await result(client.close())

    client = (RewardClient if kind == "blocking" else AsyncRewardClient)(f"127.0.0.1:{port}")
    asyncio.run(asking(client))


@both
def test_a_new_client_does_not_wait_as_others_do(kind):
    """Another client of this process has found no server, and pauses before it looks again."""
    port = free_port()

    async def asking(waiting, fresh):
        assert await result(waiting.is_ready()) is False
        with FakeServer(port):
            assert await result(fresh.is_ready()) is True
            assert await result(fresh.score(CONVERSATION)) == 4.0
        for client in (waiting, fresh):
            await result(client.close())

    make = RewardClient if kind == "blocking" else AsyncRewardClient
    asyncio.run(asking(*(make(f"127.0.0.1:{port}", max_attempts=1) for _ in range(2))))


def test_addresses_as_people_write_them():
    words = "last error: UNKNOWN: ipv6:%5B::1%5D:18099: Failed to connect; ipv4:1.2.3.4:5: no"
    written = "last error: UNKNOWN: [::1]:18099: Failed to connect; 1.2.3.4:5: no"
    assert readable(words) == written


# Servers that start


@contextmanager
def starting(port, after, **settings):
    """A server that begins to listen some time from now."""
    made = []

    def start():
        made.append(FakeServer(port, **settings).__enter__())

    timer = threading.Timer(after, start)
    timer.start()
    try:
        yield made
    finally:
        timer.join()
        made[0].__exit__()


@both
def test_wait_ready(kind):
    """The call's own timeout begins when the server is there."""
    port = free_port()
    with starting(port, 1.5):
        assert ask(kind, f"127.0.0.1:{port}", CONVERSATION, wait_ready=60, timeout=20) == 4.0


@both
def test_wait_ready_waits_for_the_model(kind):
    port = free_port()
    with starting(port, 0.1, ready=False) as made:
        ready = threading.Timer(1.5, lambda: setattr(made[0], "ready", True))
        ready.start()
        assert ask(kind, [f"127.0.0.1:{port}", "127.0.0.1:1"], CONVERSATION, wait_ready=60) == 4.0
        ready.join()


@both
def test_wait_ready_ends(kind):
    url = f"127.0.0.1:{free_port()}"
    sentence, seconds = failing(kind, url, wait_ready=1.2)
    assert sentence.startswith("waited 1.2 s for the model 'reward'; at last: nothing listens on")
    assert seconds < 1.2 + AT_ONCE


def test_wait_ready_waits_once():
    with RewardClient(f"127.0.0.1:{free_port()}", wait_ready=1) as client:
        outcomes = client.score_many([CONVERSATION] * 3, on_error="return")
        began = time.monotonic()
        outcomes += client.score_many([CONVERSATION] * 3, on_error="return")
    assert {type(outcome) for outcome in outcomes} == {ServerUnavailable}
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf")])
def test_wrong_wait_ready(seconds):
    with pytest.raises(ValueError, match="wait_ready must be"):
        RewardClient(wait_ready=seconds)


# Something else listens


@pytest.fixture
def web_port():
    """An HTTP server, as Triton has two beside gRPC."""
    handler = http.server.BaseHTTPRequestHandler
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running.server_port
        running.shutdown()
        thread.join()


@both
def test_a_port_that_speaks_http(kind, web_port, capfd):
    sentence, seconds = failing(kind, f"localhost:{web_port}")
    assert sentence == (
        f"localhost:{web_port} speaks HTTP, not gRPC: Triton's HTTP port is 8000, its metrics port "
        "8002; gRPC is 8001"
    )
    assert seconds < AT_ONCE


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    hosts = {name: [name] for name in ("localhost", "elsewhere", "stranger")}
    return write_certificates(tmp_path_factory.mktemp("pki"), hosts, strangers=["stranger"])


@both
def test_plain_text_to_tls(kind, pki):
    with encrypted(pki, "localhost") as running:
        url = f"localhost:{running.port}"
        sentence, seconds = failing(kind, url)
        assert sentence == f"{url} speaks TLS; connect with tls=Tls(…), --tls or --tls-ca"
        assert seconds < AT_ONCE


@both
def test_tls_to_plain_text(kind, pki, server):
    url = f"localhost:{server.port}"
    sentence, seconds = failing(kind, url, tls=Tls(ca=pki / "ca.pem"))
    assert sentence.startswith(f"{url} does not speak TLS; connect without tls")
    assert seconds < AT_ONCE


def test_certificates(pki):
    trusting = Tls(ca=pki / "ca.pem")

    def told(running, tls):
        # By number: of a name with two addresses gRPC reports whichever it has tried last.
        named = replace(tls, server_name="localhost")
        return failing("blocking", f"127.0.0.1:{running.port}", tls=named)[0]

    with encrypted(pki, "localhost") as running:
        assert "not signed by an authority" in told(running, Tls())
    with encrypted(pki, "elsewhere") as running:
        assert "for another host name" in told(running, trusting)
    with encrypted(pki, "localhost", mutual=True) as running:
        assert "wants a client's certificate" in told(running, trusting)
        mine = Tls(pki / "ca.pem", pki / "stranger.pem", pki / "stranger.key")
        assert "does not take the client's" in told(running, mine)


# Addresses without a port


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("localhost", "localhost:8001"),
        ("10.0.0.7", "10.0.0.7:8001"),
        ("::1", "[::1]:8001"),
        ("[::1]", "[::1]:8001"),
        ("[::1]:9", "[::1]:9"),
        ("host:9", "host:9"),
        ("dns", "dns:8001"),
        ("dns:9", "dns:9"),
        ("dns:host", "dns:host:8001"),
        ("dns:///host", "dns:///host:8001"),
        ("dns:///host:9", "dns:///host:9"),
        ("dns://1.1.1.1/host", "dns://1.1.1.1/host:8001"),
        ("ipv4:127.0.0.1:9", "ipv4:127.0.0.1:9"),
        ("unix:///tmp/socket", "unix:///tmp/socket"),
    ],
)
def test_a_missing_port_is_8001(url, target):
    assert protocol.GRPC_PORT == 8001
    assert str(Address(url)) == target
    assert str(Address(["a", "b:2"])) == "a:8001, b:2"


# Wrong models, slow servers


@both
def test_a_model_that_is_not_there(kind, server):
    server.ready = server.model = False
    sentence, _ = failing(kind, server.url, ServerError, method="check_ready", model="nope")
    assert sentence.startswith(f"{server.url} does not serve the model 'nope'; an export without")
    server.model = True
    sentence, _ = failing(kind, server.url, method="check_ready")
    assert sentence == f"{server.url}: the model 'reward' is not ready"


@both
def test_a_deadline_says_what_the_time_went_into(kind, server):
    server.delay = 3
    sentence, _ = failing(kind, server.url, DeadlineExceeded, timeout=0.5)
    waiting = f"0.5 s waiting for {server.url} (its queue and its work)"
    assert sentence == f"not done within the timeout of 0.5 s: {waiting}"
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        sentence, _ = failing(kind, url, DeadlineExceeded, timeout=0.5)
    assert sentence == f"not done within the timeout of 0.5 s: 0.5 s connecting to {url}"


@both
def test_media_that_take_long(kind, server, web, deliver):
    """Half of the time goes into a picture, the rest into the server."""
    server.delay = 3

    def slow(handler):
        time.sleep(0.4)
        deliver(b"picture")(handler)

    picture = {"type": "image", "image": web("/slow.png", slow)}
    messages = [{"role": "user", "content": [picture]}, *CONVERSATION[1:]]

    async def asking():
        async with AsyncRewardClient(server.url) as client:
            await client.score(messages, timeout=1)

    with pytest.raises(DeadlineExceeded) as caught:
        if kind == "asyncio":
            asyncio.run(asking())
        else:
            with RewardClient(server.url) as client:
                client.score(messages, timeout=1)
    assert " s reading media, " in str(caught.value)
    assert f" s waiting for {server.url} " in str(caught.value)


# Other versions of the wire contract

REFUSAL = "expected 3 inputs but got 2 inputs for model 'reward'"


def refusing(server):
    """As Triton does for tensors that a model does not have."""

    def infer(request, context):
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, REFUSAL)

    server.ModelInfer = infer


@both
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("triward-contract-2", "the server version 2; upgrade the client. "),
        ("triward-contract-0", "the server version 0; upgrade the server. "),
        ("triton", "the server tells none: it is older, or no Triward server; "),
        ("triward-contract-1", "as the server does, but its model 'reward' has other tensors"),
    ],
)
def test_tensors_that_the_server_does_not_have(kind, name, why):
    server = FakeServer(name=name)
    refusing(server)
    with server:
        sentence, _ = failing(kind, server.url, ServerError)
    mine = "the client speaks version 1 of the wire contract"
    assert sentence.startswith(f"{server.url}: {mine}, {why}")
    assert sentence.endswith(f"Triton says: {REFUSAL}")


def test_a_contract_that_the_server_refuses():
    """Its own sentence comes through; it is no single request's fault."""
    words = "contract_version: the client speaks version 2 of the wire contract, this server 1"

    def infer(request, context):
        context.abort(grpc.StatusCode.UNIMPLEMENTED, f"in ensemble 'reward', {words}")

    server = FakeServer()
    server.ModelInfer = infer
    with server:
        assert failing("blocking", server.url, ServerError)[0] == words


def test_what_is_refused_for_another_reason_stays_invalid(server):
    server.fault = lambda call: Fault.INVALID_ARGUMENT
    assert "was to fail" in failing("blocking", server.url, ValueError)[0]


def test_a_process_that_asks_nobody_loads_no_ssl():
    code = "import sys, triward, triward.cli; print('ssl' in sys.modules, 'grpc' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[1] == "False"
