"""What holds at every door: limits, errors, media, signals."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.client.helpers import png, refused
from tests.fakeserver import FakeServer, Fault

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from tests.tools.gateways import PROMPT, running, says, shows
from triward_tools.gateway.addresses import is_public, public_opener

OTHER = "<|im_start|>user\nAnd 2+2?<|im_end|>\n<|im_start|>assistant\n"
BODY = {"input": [PROMPT + "2", PROMPT + "Two."]}


def probs(answer):
    return [item["probs"][0] for item in answer["data"]]


def image(url):
    return {"messages": [shows(url), says("Red.")]}


@pytest.fixture
def door(server):
    with running(server.url) as doorway:
        yield doorway


@pytest.mark.parametrize(
    ("fault", "status", "kind"),
    [
        (Fault.INVALID_ARGUMENT, 400, "InvalidRequest"),
        (Fault.INTERNAL, 502, "ServerError"),
        (Fault.NAN, 502, "ServerError"),
        (Fault.WRONG_COUNT, 502, "ServerError"),
        (Fault.UNAVAILABLE, 503, "ServerUnavailable"),
    ],
)
def test_failures_are_statuses_and_never_rewards(door, server, fault, status, kind):
    server.fault = lambda call: fault
    for path, body in {
        "/classify": BODY,
        "/score": {"text_1": "a", "text_2": "b"},
        "/remote_rm": {"prompt": PROMPT, "response": "a"},
    }.items():
        got, answer, headers = door.send(path, body)
        assert (got, list(answer)) == (status, ["error"])
        assert (answer["error"]["status"], answer["error"]["type"]) == (status, kind)
        assert (headers.get("Retry-After") is not None) is (status == 503)


def test_the_timeout_runs_out():
    released = threading.Event()

    def late(call):
        assert released.wait(60)

    with FakeServer(fault=late) as server, running(server.url, timeout=0.5) as door:
        status, answer = door.ask("/classify", BODY)
        released.set()
    assert (status, answer["error"]["type"]) == (504, "DeadlineExceeded")


def test_a_killed_server_is_503_and_comes_back():
    with FakeServer() as server, running(server.url) as door:
        assert probs(door.ask("/classify", BODY)[1]) == [1.0, 4.0]
        assert door.ask("/health", method="GET", body=None) == (200, {"status": "ok"})
        server.__exit__()
        assert door.ask("/classify", BODY)[0] == 503
        assert door.ask("/health", method="GET", body=None)[0] == 503
        with FakeServer(port=server.port):
            statuses = (door.ask("/classify", BODY)[0] for _ in range(1000))
            assert 200 in statuses  # gRPC connects again within a second
            assert probs(door.ask("/classify", BODY)[1]) == [1.0, 4.0]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"[" * 100_000, b"[]", b'"text"', b"3", b'{"input": NaN}']
)
def test_bodies_that_are_no_requests(door, server, body):
    status, answer = door.ask("/classify", body)
    assert (status, list(answer)) == (400, ["error"])
    assert server.calls == 0


def test_a_body_is_bounded(server):
    with running(server.url, max_body_bytes=1000) as door:
        assert door.ask("/classify", BODY)[0] == 200
        status, answer = door.ask("/classify", b" " * 1001)
        assert (status, answer["error"]["message"]) == (
            413, "the body has 1001 bytes, the limit is 1000"
        )  # fmt: skip
        # Also where it says no length.
        chunked = iter([b" " * 600] * 2)
        connection = http.client.HTTPConnection("127.0.0.1", door.port, timeout=60)
        headers = {"Transfer-Encoding": "chunked"}
        connection.request("POST", "/classify", chunked, headers, encode_chunked=True)
        assert connection.getresponse().status == 413
        connection.close()
        assert door.gateway.counters.held_bytes == 0


def test_a_body_that_does_not_arrive(server):
    with running(server.url, timeout=0.3) as door:
        with socket.create_connection(("127.0.0.1", door.port), timeout=60) as connection:
            head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n"
            connection.sendall(head + b"{")
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
        assert door.gateway.counters.held_bytes == door.gateway.counters.running == 0


def test_a_caller_that_leaves(door, caplog):
    """Its request ends, and nothing of it stays."""
    with socket.create_connection(("127.0.0.1", door.port), timeout=60) as connection:
        head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n"
        connection.sendall(head + b"{")
        while not door.gateway.counters.held_bytes:
            time.sleep(0.01)
    counters = door.gateway.counters
    while not counters.requests:
        time.sleep(0.01)
    assert (counters.requests["vllm_classify", 400], counters.held_bytes) == (1, 0)
    assert counters.running == 0
    assert "Exception" not in caplog.text


@pytest.mark.parametrize("path", ["/classify", "/get_reward"])
def test_the_calls_of_a_caller_that_leaves_are_cancelled(path):
    """Of those that wait for their answer; others keep theirs."""
    asked, released = threading.Semaphore(0), threading.Event()

    def wait(call):
        asked.release()
        assert released.wait(60)

    body = json.dumps({**BODY, "query": [PROMPT + "2", OTHER + "4"], "prompts": [PROMPT, OTHER]})
    calls = 1 if path == "/classify" else 2  # one for each prompt
    with (
        FakeServer(fault=wait) as server,
        running(server.url, timeout=60.0) as door,
        ThreadPoolExecutor(1) as threads,
    ):
        stays = threads.submit(door.ask, "/classify", BODY)
        assert asked.acquire(timeout=60)
        counters = door.gateway.counters
        with socket.create_connection(("127.0.0.1", door.port), timeout=60) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body.encode())
            for _ in range(calls):
                assert asked.acquire(timeout=60)
            assert counters.running == 2
        while counters.running > 1:
            time.sleep(0.01)
        released.set()
        assert stays.result(60)[0] == 200
        while server.given_up < calls:
            time.sleep(0.01)
    found = {status: count for (_, status), count in counters.requests.items()}
    assert (found, counters.held_bytes) == ({499: 1, 200: 1}, 0)
    assert server.given_up == calls


def test_requests_at_once_are_bounded():
    arrived, released = threading.Semaphore(0), threading.Event()

    def wait(call):
        arrived.release()
        assert released.wait(60)

    with FakeServer(fault=wait) as server, running(server.url, max_requests=2) as door:
        with ThreadPoolExecutor(2) as threads:
            busy = [threads.submit(door.ask, "/classify", BODY) for _ in range(2)]
            for _ in busy:
                assert arrived.acquire(timeout=60)
            status, answer, headers = door.send("/classify", BODY)
            assert (status, headers["Retry-After"]) == (503, "1")
            assert "the limit" in answer["error"]["message"]
            assert door.ask("/metrics", None, method="GET")[0] == 200
            released.set()
            assert [each.result()[0] for each in busy] == [200, 200]
        assert door.ask("/classify", BODY)[0] == 200


def test_many_callers_at_once(server):
    """Each gets its own rewards, and all are with the server together."""
    together = threading.Barrier(16, timeout=60)
    server.fault = lambda call: (together.wait(), None)[1]

    def call(number):
        texts = [PROMPT + "x" * (number * 10 + n) for n in range(4)]
        return probs(door.ask("/classify", {"input": texts})[1])

    with running(server.url) as door, ThreadPoolExecutor(16) as threads:
        found = list(threads.map(call, range(16)))
    assert found == [[float(n * 10 + k) for k in range(4)] for n in range(16)]


def test_metrics(door, server):
    door.ask("/classify", BODY)
    door.ask("/classify", {"text": PROMPT + "a"})
    door.ask("/score", {})
    status, text = door.ask("/metrics", None, method="GET")
    assert status == 200
    for line in (
        'triward_gateway_requests_total{door="vllm_classify",status="200"} 1',
        'triward_gateway_requests_total{door="sglang_classify",status="200"} 1',
        'triward_gateway_requests_total{door="vllm_score",status="400"} 1',
        'triward_gateway_scores_total{door="vllm_classify"} 2',
        "triward_gateway_running 0",
        "triward_gateway_held_bytes 0",
    ):
        assert line in text.splitlines()


@pytest.mark.parametrize("path", ["/", "/get_rewards", "/docs", "/openapi.json"])
def test_other_paths(door, path):
    assert door.ask(path, BODY)[0] == 404


@pytest.mark.parametrize("url", ["/etc/passwd", "image.png", "file:///etc/passwd", "ftp://a/b", ""])
@pytest.mark.parametrize("key", ["image", "image_url", "video"])
def test_files_of_the_host_are_never_read(server, url, key):
    messages = [{"role": "user", "content": [{"type": key, key: url}]}, says("a")]
    with running(server.url, allow_urls=True) as door:
        status, answer = door.ask("/classify", {"messages": messages})
        assert (status, answer["error"]["type"]) == (400, "MediaError")
        frames = [{"role": "user", "content": [{"type": "video", "video": [url]}]}, says("a")]
        assert door.ask("/classify", {"messages": frames})[0] == 400
    assert server.calls == 0


@contextmanager
def web(answers, host="127.0.0.1"):
    """A web server; path -> (status, headers, body). Yields its port and what was asked of it."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            status, headers, body = answers[self.path]
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer((host, 0), Handler) as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield serving.server_port, asked
        finally:
            serving.shutdown()
            thread.join()


def test_urls_are_fetched_only_where_that_is_allowed(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # which is not asked
    with web({"/a.png": (200, {}, png())}) as (port, asked):
        url = f"http://127.0.0.1:{port}/a.png"
        with running(server.url) as door:
            status, answer = door.ask("/classify", image(url))
            assert (status, asked) == (400, [])
            assert "http(s) ones are not fetched here" in answer["error"]["message"]
        opener = public_opener(lambda address: address == "127.0.0.1")
        with running(server.url, opener, allow_urls=True) as door:
            body = {"messages": [shows(url), shows(url), says("Red.")]}
            assert probs(door.ask("/classify", body)[1]) == [4.0]
        assert asked == ["/a.png"]  # once


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433", "127.1"],
)
def test_private_addresses_are_not_asked(server, host):
    with web({"/": (200, {}, png())}) as (port, asked):
        with running(server.url, allow_urls=True) as door:
            status, answer = door.ask("/classify", image(f"http://{host}:{port}/"))
            assert (status, answer["error"]["type"]) == (400, "MediaError")
            assert "is not a public address" in answer["error"]["message"]
        assert asked == []
    assert server.calls == 0


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254", "10.0.0.1", "172.16.0.1", "192.168.0.1", "100.100.100.200",
        "[fd00:ec2::254]", "[fe80::1]", "[::ffff:169.254.169.254]", "[::169.254.169.254]",
        "[64:ff9b::a9fe:a9fe]", "[64:ff9b:1::a9fe:a9fe]", "2852039166", "0xa9fea9fe",
    ],
)  # fmt: skip
def test_metadata_of_clouds_and_private_networks_are_not_asked(server, host, monkeypatch):
    """No socket is opened, in whatever form the address is written."""
    opened = []
    with running(server.url, allow_urls=True) as door:
        real = socket.socket.connect
        monkeypatch.setattr(
            socket.socket, "connect",
            lambda self, place: (opened.append(place), real(self, place))[1],
        )  # fmt: skip
        status, answer = door.ask("/classify", image(f"http://{host}/latest/meta-data/"))
        assert (status, answer["error"]["type"]) == (400, "MediaError")
        assert "is not a public address" in answer["error"]["message"]
    assert {place[0] for place in opened} <= {"127.0.0.1"}  # the test's own
    assert server.calls == 0


@pytest.mark.parametrize(
    "target", ["http://127.0.0.2:{port}/secret", "http://169.254.169.254/latest/meta-data/",
               "http://localhost:{port}/secret", "http://10.0.0.1/a", "http://[fd00:ec2::254]/a",
        "http://[::ffff:169.254.169.254]/a", "file:///etc/passwd", "ftp://127.0.0.1/a"],
)  # fmt: skip
def test_redirects_to_private_addresses_are_not_followed(server, target):
    answers = {"/secret": (200, {}, png())}
    allowed = {"127.0.0.1"} if "localhost" not in target else set()
    seen = []

    def judge(address):
        seen.append(address)
        return address in allowed or len(seen) == 1  # the first hop is always let by

    with web(answers, host="0.0.0.0") as (port, asked):
        answers["/"] = (302, {"Location": target.format(port=port)}, b"")
        with running(server.url, public_opener(judge), allow_urls=True) as door:
            status, answer = door.ask("/classify", image(f"http://127.0.0.1:{port}/"))
            assert (status, answer["error"]["type"]) == (400, "MediaError")
            if target.startswith("http:"):  # it is not tried: the host is there or not
                assert "is not a public address" in answer["error"]["message"]
        assert asked == ["/"]
    assert server.calls == 0


def test_a_redirects_body_is_not_read(server):
    """It may never end."""
    with web({}) as (port, asked):
        endless = socketserver.ThreadingTCPServer(("127.0.0.1", 0), EndlessRedirect)
        endless.target = f"http://127.0.0.1:{port}/gone"
        endless.daemon_threads = True
        threading.Thread(target=endless.serve_forever, daemon=True).start()
        try:
            opener = public_opener(lambda address: True)
            with running(server.url, opener, allow_urls=True) as door:
                url = f"http://127.0.0.1:{endless.server_address[1]}/"
                status, answer = door.ask("/classify", image(url))
        finally:
            endless.shutdown()
            endless.server_close()
    assert (status, answer["error"]["type"]) == (400, "MediaError")
    assert asked == ["/gone"]


class EndlessRedirect(socketserver.StreamRequestHandler):
    def handle(self):
        self.rfile.readline()
        self.wfile.write(f"HTTP/1.1 302 Found\r\nLocation: {self.server.target}\r\n\r\n".encode())
        with suppress(OSError):  # until the caller hangs up
            while True:
                self.wfile.write(b"x" * 2**16)


def test_what_is_fetched_is_bounded(server, monkeypatch):
    """For all URLs of a request together."""
    monkeypatch.setattr("triward_tools.gateway.media.DOWNLOAD_LIMIT", 1000)
    answers = {f"/{n}": (200, {}, b"x" * 600) for n in range(2)}
    opener = public_opener(lambda address: True)
    with web(answers) as (port, _), running(server.url, opener, allow_urls=True) as door:
        urls = [f"http://127.0.0.1:{port}/{n}" for n in range(2)]
        assert door.ask("/classify", image(urls[0]))[0] == 200
        body = {"messages": [*map(shows, urls), says("a")]}
        status, answer = door.ask("/classify", body)
        assert status == 400
        assert "is larger than the limit of 400 bytes" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True), ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("10.0.0.1", False), ("172.16.0.1", False), ("192.168.1.1", False), ("127.0.0.1", False),
        ("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False),
        ("224.0.0.1", False), ("255.255.255.255", False), ("::1", False), ("::", False),
        ("fe80::1%eth0", False), ("fd00:ec2::254", False), ("ff02::1", False),
        ("::ffff:169.254.169.254", False), ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b::5db8:d70e", True), ("2002:7f00:1::", False), ("::10.0.0.1", False),
        ("192.0.0.192", False), ("168.63.129.16", False), ("100.100.100.200", False),
        ("3fff::1", False), ("64:ff9b:1::a00:1", False), ("fec0::1", False),
        ("2001:0:7f00:1::", False),
    ],
)  # fmt: skip
def test_public_addresses(address, public):
    assert is_public(address) is public


@contextmanager
def command(*options):
    """The command's process and port; it is killed at the end."""
    line = [sys.executable, "-m", "triward", "gateway", "--port", "0", *options]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = process.stdout.readline()
            yield process, int(re.fullmatch(r"listening on http://127.0.0.1:(\d+)\n", said)[1])
        finally:
            process.kill()


def post(port, path, body):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, json.dumps(body))
    try:
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_ends_what_it_has_begun(number):
    asked, answer = threading.Event(), threading.Event()

    def wait(call):
        asked.set()
        assert answer.wait(60)

    with FakeServer(fault=wait) as server, ThreadPoolExecutor(1) as threads:
        options = ["--url", server.url, "--prompts", "plain", "--end", "</s>"]
        with command(*options) as (process, port):
            body = {"query": ["1+1=2</s>"], "prompts": ["1+1="]}
            reward = threads.submit(post, port, "/get_reward", body)
            assert asked.wait(60)
            process.send_signal(number)
            refused(port)
            with pytest.raises(subprocess.TimeoutExpired):  # it waits for the answer
                process.wait(0.5)
            answer.set()
            assert reward.result(60) == {"rewards": [1.0]}
            assert process.wait(60) == 0


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = [sys.executable, "-m", "triward", "gateway", "--port", str(port)]
        ended = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert f"127.0.0.1:{port}: " in ended.stderr
