"""A transport without a server, and a web server on the loopback interface."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
from tritonclient.utils import deserialize_bytes_tensor

from tests.client.helpers import fake_process
from tests.fakeserver import FakeServer
from triward import RewardClient
from triward.deadline import Deadline


class Result:
    """Stands for tritonclient's InferResult."""

    def __init__(self, **arrays):
        self.arrays = arrays

    def as_numpy(self, name):
        value = self.arrays.get(name)
        if isinstance(value, Exception):
            raise value
        return value


class FakeTransport:
    """Scores a response by its length, unless told otherwise; remembers what was sent."""

    def __init__(self):
        self.calls = []
        self.closed = 0
        self.ready = True
        self.version = "1"
        self.reply = self.lengths

    def infer(self, **arguments):
        self.calls.append(arguments)
        return self.reply(arguments)

    def is_model_ready(self, model_name, **arguments):
        self.calls.append({"model_name": model_name, **arguments})
        if isinstance(self.ready, Exception):
            raise self.ready
        return self.ready

    def get_model_metadata(self, model_name, **arguments):
        self.calls.append({"model_name": model_name, **arguments})
        return SimpleNamespace(versions=[self.version])

    def close(self):
        self.closed += 1

    @staticmethod
    def sent(arguments):
        """Name -> (shape, list of bytes), decoded from what would go over the wire."""
        return {
            tensor.name(): (
                list(tensor.shape()),
                list(deserialize_bytes_tensor(tensor._get_content())),
            )
            for tensor in arguments["inputs"]
        }

    def lengths(self, arguments):
        responses = self.sent(arguments)["responses"][1]
        return self.result([float(len(response)) for response in responses])

    @staticmethod
    def result(scores):
        return Result(scores=np.array([scores], dtype=np.float32))

    @staticmethod
    def result_of(**arrays):
        return Result(**arrays)


@pytest.fixture
def server():
    """A server without a model; a response's score is its length."""
    with FakeServer() as running:
        yield running


@pytest.fixture
def transport():
    return FakeTransport()


@pytest.fixture
def client(transport):
    with RewardClient(timeout=30, _transport=transport) as client:
        yield client


@pytest.fixture
def deadline():
    return Deadline(30)


@pytest.fixture
def web(monkeypatch):
    """A function (path, answer) -> URL; answer is called with the request handler."""
    monkeypatch.setenv("no_proxy", "*")
    answers = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.close_connection = True
            answers[self.path](self)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def publish(path, answer):
        answers[path] = answer
        return f"http://127.0.0.1:{server.server_port}{path}"

    yield publish
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def deliver():
    """A function (body) -> an answer for `web` that sends it."""

    def answer_with(body, declared=None):
        def answer(handler):
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(body) if declared is None else declared))
            handler.end_headers()
            handler.wfile.write(body)

        return answer

    return answer_with


@pytest.fixture(scope="session")
def server_process():
    """The address of a `FakeServer` in a process of its own, for tests that fork or measure."""
    with fake_process() as (_, url):
        yield url
