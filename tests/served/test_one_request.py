"""One request of at most 10 MB, to any port that is open to the network, ends nothing.

HTTP is not among them: it listens on this machine alone, since one request can end Triton 24.10
through it (SECURITY.md).
"""

from __future__ import annotations

import json
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests import loadgen
from tests.commands import has_ended
from tests.conftest import brief
from triward_server.serving.launch import TritonServer

MB = 1_000_000
MOST = 10 * MB  # bytes of one request
MANY = 600_000
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, HEADERS, DATA, CONTINUATION, RESET, PING, WINDOW = 4, 1, 0, 9, 3, 6, 8
ASK = [{"role": "user", "content": "Is it so?"}]
NOISE = Random(0).randbytes(MOST)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One of HTTP/2's (RFC 9113, 4.1)."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def start(*frames: bytes) -> bytes:
    """A connection that begins as it should."""
    return PREFACE + frame(SETTINGS, 0, 0, b"") + b"".join(frames)


def literal(name: bytes, value: bytes) -> bytes:
    """A header that no table holds (RFC 7541, 6.2.2), lengths below 127."""
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


def call_headers() -> bytes:
    """Of a gRPC call that a body may follow."""
    return b"".join([
        literal(b":method", b"POST"), literal(b":scheme", b"http"),
        literal(b":path", b"/inference.GRPCInferenceService/ModelInfer"),
        literal(b":authority", b"x"), literal(b"content-type", b"application/grpc"),
        literal(b"te", b"trailers"),
    ])  # fmt: skip


def chunked(path: str, extra: str = "") -> bytes:
    """A body of very many chunks of one byte."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{extra}Transfer-Encoding: chunked\r\n\r\n"
    return head.encode() + b"1\r\nx\r\n" * MANY + b"0\r\n\r\n"


def nested(depth: int) -> bytes:
    """A protobuf message within a message within …, as field 5 of each."""
    payload = b""
    for _ in range(depth):
        payload = b"\x2a" + _varint(len(payload)) + payload
    return payload


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def http1(port: str) -> dict[str, bytes]:
    """For a port that speaks HTTP/1, or is asked as if it did."""
    path = "/metrics" if port == "metrics" else "/"
    return {
        "many chunks": chunked(path),
        "many chunks, said to be gzip": chunked(path, "Content-Encoding: gzip\r\n"),
        "a long path": b"GET /" + b"a" * (MOST - 100) + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        "a long header": b"GET " + path.encode() + b" HTTP/1.1\r\nA: " + b"a" * (MOST - 100)
        + b"\r\n\r\n",
        "many headers": b"GET " + path.encode() + b" HTTP/1.1\r\n" + b"a: b\r\n" * (MOST // 7)
        + b"\r\n",
        "many requests": b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n" * 20_000,
        "a huge length": b"POST " + path.encode()
        + b" HTTP/1.1\r\nContent-Length: 9223372036854775807\r\n\r\n" + NOISE[:MB],
        "a negative length": b"POST " + path.encode()
        + b" HTTP/1.1\r\nContent-Length: -1\r\n\r\n" + NOISE[:MB],
        "a huge chunk": b"POST " + path.encode()
        + b" HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n" + NOISE[:MB],
        "noise": NOISE,
        "zeros": bytes(MOST),
        "line ends": b"\r\n" * (MOST // 2),
    }  # fmt: skip


def resets(count: int) -> bytes:
    """Calls that are cancelled at once."""
    return start(*[
        frame(HEADERS, 4, 2 * n + 1, call_headers()) + frame(RESET, 0, 2 * n + 1, bytes(4))
        for n in range(count)
    ])  # fmt: skip


def http2() -> dict[str, bytes]:
    """For the gRPC port, below gRPC."""
    header_frame = frame(HEADERS, 4, 1, call_headers())
    return {
        "noise after the preface": start(NOISE[: MOST - 100]),
        "a frame that lies about its length": start(
            b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + NOISE
        ),
        "headers without end": start(
            frame(HEADERS, 0, 1, call_headers()),
            *[frame(CONTINUATION, 0, 1, literal(b"a", b"b" * 100) * 140)] * 600,
        ),
        "a table that is read again and again": start(
            frame(HEADERS, 0, 1, b"\x40\x01a\x7f\x21" + b"b" * 160),
            *[frame(CONTINUATION, 0, 1, b"\xbe" * 16_000)] * 600,
        ),
        "resets": resets(5_000),
        "pings": start(*[frame(PING, 0, 0, bytes(8))] * 500_000),
        "settings": start(*[frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 99))] * 500_000),
        "windows": start(*[frame(WINDOW, 0, 0, struct.pack(">I", 2**31 - 1))] * 600_000),
        "empty data": start(header_frame, *[frame(DATA, 0, 1, b"")] * 1_000_000),
        "tiny data": start(header_frame, *[frame(DATA, 0, 1, b"x")] * 900_000),
        "a message that is said to be huge": start(
            header_frame, frame(DATA, 0, 1, b"\x00\xff\xff\xff\xff" + NOISE[:16_000])
        ),
        "a message of gzip that is none": start(
            header_frame, frame(DATA, 1, 1, b"\x01" + struct.pack(">I", 16_000) + NOISE[:16_000])
        ),
    }  # fmt: skip


def messages() -> dict[str, bytes]:
    """Bytes in place of a ModelInferRequest."""
    good = loadgen.message("reward", loadgen.conversation(ASK, [b"yes"]))
    model = good.SerializeToString()

    def inputs(count: int) -> bytes:
        request = service_pb2.ModelInferRequest(model_name="reward")
        for number in range(count):
            request.inputs.add(name=f"i{number}", datatype="BYTES", shape=[1, 1])
        return bytes(request.SerializeToString())

    def shaped(*shape: int) -> bytes:
        request = loadgen.message("reward", loadgen.conversation(ASK, [b"yes"]))
        request.inputs[1].shape[:] = shape
        return bytes(request.SerializeToString())

    def text(messages_: bytes, *responses: bytes) -> bytes:
        tensors = loadgen.conversation(messages_, responses or [b"yes"])
        return bytes(loadgen.message("reward", tensors).SerializeToString())

    return {
        "noise": NOISE,
        "nesting": nested(100_000),
        "many inputs": inputs(300_000),
        "many contents": model + b"\x3a\x00" * (4 * MB),
        "many parameters": model + b"".join(
            b"\x22" + _varint(len(p)) + p
            for p in (b"\x0a\x06%06d\x12\x02\x10\x01" % n for n in range(500_000))
        ),
        "a shape with many dimensions": shaped(*[1] * 2_000_000),
        "a shape beyond 64 bits": shaped(2**62, 2**62),
        "a negative shape": shaped(-1, -1),
        "a long model name": service_pb2.ModelInferRequest(
            model_name="m" * (MOST - 100)
        ).SerializeToString(),
        "deep JSON": text(b"[" * 4 * MB),
        "wide JSON": text(b"[" + b"{}," * MB + b"{}]"),
        "a number of a million digits": text(b"[" + b"9" * MB + b"]"),
        "many responses": text(json.dumps(ASK).encode(), *[b""] * 2 * MB),
        "long text": text(json.dumps(ASK).encode(), b"a" * 9 * MB),
        "text that is one word": text(json.dumps(ASK).encode(), b"a" * 4 * MB),
        "text of spaces": text(json.dumps(ASK).encode(), b" " * 4 * MB),
    }  # fmt: skip


def packed(size: int) -> bytes:
    """A gRPC frame of zeros that are said to be compressed; `size` bytes come out of it."""
    press = zlib.compressobj(9, wbits=31)
    body = b"".join(press.compress(bytes(MB)) for _ in range(size // MB)) + press.flush()
    return b"\x01" + struct.pack(">I", len(body)) + body


@pytest.fixture(scope="module")
def ports(
    echo_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """A server whose ports are attacked, below anything that a model could see."""
    with brief(echo_repository, tmp_path_factory.mktemp("log") / "triton.log") as running:
        yield running


@pytest.fixture
def target(request: pytest.FixtureRequest) -> TritonServer:
    """Who is attacked: the real model, unless a test says otherwise."""
    running: TritonServer = request.getfixturevalue(getattr(request, "param", "server"))
    return running


at_ports = pytest.mark.parametrize("target", ["ports"], indirect=True)
at_the_model = pytest.mark.usefixtures("server")  # so that it belongs to the server's group


def running(server: TritonServer) -> set[int]:
    """Its models' processes and theirs."""
    family = psutil.Process(server.pid).children(recursive=True)
    return {process.pid for process in family if not has_ended(process)}


@pytest.fixture
def alive(target: TritonServer) -> Iterator[Callable[[str], None]]:
    """Says whether the server still is what it was; asked after each attempt."""
    processes = running(target)
    good = loadgen.message("reward", loadgen.conversation(ASK, [b"yes"]))
    with grpc.insecure_channel(target.endpoints.grpc) as channel:
        infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        expected = loadgen.scores_of(infer(good, timeout=120))

        def check(attempt: str) -> None:
            assert psutil.pid_exists(target.pid), f"{attempt}: tritonserver is gone"
            assert running(target) == processes, f"{attempt}: a model's process is gone"
            scores = loadgen.scores_of(infer(good, timeout=120, wait_for_ready=True))
            np.testing.assert_allclose(scores, expected, rtol=1e-5, err_msg=attempt)

        yield check


def send(port: int, data: bytes) -> None:
    """Send it all, as far as the other side listens, and read what comes until it is quiet."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 20):
                pass
        except OSError:
            pass  # it has hung up, or waits for more: both are an answer


@at_ports
@pytest.mark.parametrize("port", ["grpc", "metrics"])
def test_bytes(port: str, target: TritonServer, alive: Callable[[str], None]) -> None:
    number = getattr(target.endpoints, f"{port}_port")
    attempts = http1(port) | (http2() if port == "grpc" else {})
    for name, data in attempts.items():
        assert len(data) <= MOST + MB, name
        send(number, data[:MOST])
        alive(name)
    print(f"{port}: {len(attempts)} attempts")


@pytest.mark.slow  # half a minute of the server's time
@at_ports
def test_many_resets(target: TritonServer, alive: Callable[[str], None]) -> None:
    send(target.endpoints.grpc_port, resets(40_000))
    alive("resets")


@at_the_model
def test_messages(target: TritonServer, alive: Callable[[str], None]) -> None:
    with grpc.insecure_channel(target.endpoints.grpc, loadgen.NO_LIMIT) as channel:
        ask = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for name, data in messages().items():
            _typed(name, partial(ask, data, timeout=120))
            alive(name)


@pytest.mark.slow
@at_the_model
def test_streams(target: TritonServer, alive: Callable[[str], None]) -> None:
    with grpc.insecure_channel(target.endpoints.grpc, loadgen.NO_LIMIT) as channel:
        ask: Any = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        for name, data in messages().items():
            _typed(name, lambda data=data: list(ask(iter([data]), timeout=120)))
            alive(f"stream: {name}")


def _typed(name: str, call: Callable[[], Any]) -> None:
    """Triton ignores what is too much of some fields; whatever else comes is an error in time."""
    try:
        call()
    except grpc.RpcError as error:
        assert error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED, name


@at_ports
@pytest.mark.parametrize("size", [10 * MB, 200 * MB])
def test_compressed(size: int, target: TritonServer, alive: Callable[[str], None]) -> None:
    data = packed(size)
    headers = call_headers() + literal(b"grpc-encoding", b"gzip")
    parts = [data[at : at + 16_000] for at in range(0, len(data), 16_000)]
    last = len(parts) - 1
    frames = [frame(DATA, int(n == last), 1, part) for n, part in enumerate(parts)]
    send(target.endpoints.grpc_port, start(frame(HEADERS, 4, 1, headers), *frames))
    alive(f"{len(data)} bytes that become {size}")
