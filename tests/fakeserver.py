"""A reward server without a model, for tests of what calls one: real gRPC, made-up scores.

A response's score is its length in bytes, so a score in the wrong place is noticed. One of token
ids counts as the text that shows them: [12, 3] is "12 3".

    with FakeServer() as server:
        server.delay = 0.01                # seconds that each call takes
        server.capacity = 8                # more calls at once are answered UNAVAILABLE
        server.fault = lambda call: Fault.NAN if call.number == 3 else None
        ...                                # ask server.url
        server.scored["a response"]        # how often it was given a score
        server.peak                        # the most calls at once
        server.given_up                    # calls that were cancelled or late before their answer

`python -m tests.fakeserver --log FILE` is one in a process of its own, for callers that fork. It
prints `port N`, and `read_log(FILE)` is what it scored so far.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TextIO

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

# Without so_reuseport=0 two servers could share a port and each see half of the calls.
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)]


class Fault(Enum):
    """What a call is answered instead of its scores."""

    UNAVAILABLE = "UNAVAILABLE"
    INTERNAL = "INTERNAL"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NAN = "NAN"
    WRONG_COUNT = "WRONG_COUNT"
    RESET = "RESET"  # the caller's connection is cut


@dataclass(frozen=True)
class Call:
    """One ModelInfer, decoded. Numbers count from 0."""

    number: int
    model: str
    messages: bytes
    responses: list[bytes]
    media: list[bytes]
    headers: dict[str, str]
    outputs: tuple[str, ...] = ()  # that the caller wants


@dataclass
class FakeServer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Listens while it is entered; every field may be changed at any time."""

    port: int = 0
    threads: int = 64
    credentials: grpc.ServerCredentials | None = None
    log: TextIO | None = None
    ready: bool = True
    model: bool = True  # whether it is there, if it is not ready
    name: str = "triward-contract-1"
    delay: float = 0.0
    capacity: float = float("inf")
    fault: Callable[[Call], Fault | None] = lambda call: None
    calls: int = 0
    peak: int = 0
    given_up: int = 0
    scored: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> FakeServer:
        self._lock = threading.Lock()
        self._running = 0
        self._server = grpc.server(ThreadPoolExecutor(self.threads), options=OPTIONS)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        address = f"127.0.0.1:{self.port}"
        if self.credentials is None:
            self.port = self._server.add_insecure_port(address)
        else:
            self.port = self._server.add_secure_port(address, self.credentials)
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(grace=None).wait()

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.port}"

    def ServerLive(self, request: Any, context: grpc.ServicerContext) -> Any:
        return service_pb2.ServerLiveResponse(live=True)

    def ServerMetadata(self, request: Any, context: grpc.ServicerContext) -> Any:
        return service_pb2.ServerMetadataResponse(name=self.name)

    def ModelMetadata(self, request: Any, context: grpc.ServicerContext) -> Any:
        if not self.model:
            text = f"Request for unknown model: '{request.name}' is not found"
            context.abort(grpc.StatusCode.NOT_FOUND, text)
        return service_pb2.ModelMetadataResponse(name=request.name, versions=["1"])

    def ModelReady(self, request: Any, context: grpc.ServicerContext) -> Any:
        return service_pb2.ModelReadyResponse(ready=self.ready)

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._lock:
            number = self.calls
            self.calls += 1
            self._running += 1
            self.peak = max(self.peak, self._running)
            full = self._running > self.capacity
        try:
            if self.delay:
                time.sleep(self.delay)
            call = _decode(number, request, context)
            fault = Fault.UNAVAILABLE if full else self.fault(call)
            if not context.is_active():
                self.given_up += 1
            return self._answer(call, fault, context)
        finally:
            with self._lock:
                self._running -= 1

    def _answer(self, call: Call, fault: Fault | None, context: grpc.ServicerContext) -> Any:
        scores = [float(len(response)) for response in call.responses]
        if fault is None:
            self._count([response.decode() for response in call.responses])
        elif fault is Fault.NAN:
            scores[-1] = float("nan")
        elif fault is Fault.WRONG_COUNT:
            scores.append(0.0)
        elif fault is Fault.RESET:
            _cut(context.peer())
        else:
            context.abort(grpc.StatusCode[fault.name], f"call {call.number} was to fail")
        return _encode(call, scores)

    def _count(self, responses: list[str]) -> None:
        with self._lock:
            self.scored.update(responses)
            if self.log is not None:
                self.log.write(json.dumps(responses) + "\n")
                self.log.flush()


def read_log(path: Path) -> Counter[str]:
    """Response -> how often it was given a score, of a server that was started with --log."""
    with path.open() as lines:
        return Counter(response for line in lines for response in json.loads(line))


def _decode(number: int, request: Any, context: grpc.ServicerContext) -> Call:
    contents = request.raw_input_contents
    raw = {tensor.name: contents[index] for index, tensor in enumerate(request.inputs)}
    headers = {key: str(value) for key, value in context.invocation_metadata()}
    if "input_ids" in raw:
        prompt, *texts = _texts(raw["input_ids"], raw["segment_lengths"])
        return Call(number, request.model_name, prompt, texts, [raw["pixels"]], headers)
    (messages,) = _strings(raw["messages"])
    responses, media = _strings(raw["responses"]), _strings(raw["media"])
    outputs = tuple(output.name for output in request.outputs)
    return Call(
        number, request.model_name, messages, list(responses), list(media), headers, outputs
    )


def _texts(input_ids: bytes, lengths: bytes) -> list[bytes]:
    """The segments of token ids, shown."""
    ids = iter(struct.unpack(f"<{len(input_ids) // 4}i", input_ids))
    counts = struct.unpack(f"<{len(lengths) // 4}i", lengths)
    return [" ".join(str(next(ids)) for _ in range(count)).encode() for count in counts]


def _strings(raw: bytes) -> Iterator[bytes]:
    """The elements of a BYTES tensor; each has its length in front."""
    start = 0
    while start < len(raw):
        (length,) = struct.unpack_from("<I", raw, start)
        yield raw[start + 4 : start + 4 + length]
        start += 4 + length


def _encode(call: Call, scores: list[float]) -> Any:
    """The answer; a conversation has as many tokens as its messages and response have bytes."""
    response = service_pb2.ModelInferResponse(model_name=call.model, model_version="1")
    response.outputs.add(name="scores", datatype="FP32", shape=[1, len(scores)])
    response.raw_output_contents.append(struct.pack(f"<{len(scores)}f", *scores))
    if "token_counts" in call.outputs:
        tokens = [len(call.messages) + len(text) for text in call.responses]
        response.outputs.add(name="token_counts", datatype="INT32", shape=[1, len(tokens)])
        response.raw_output_contents.append(struct.pack(f"<{len(tokens)}i", *tokens))
    return response


def _cut(peer: str) -> None:
    """Shut the connection with `peer`, as ipv4:127.0.0.1:1234, down. gRPC has no call for it."""
    port = int(peer.rpartition(":")[2])
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not entry.readlink().name.startswith("socket:"):
                continue
            connection = socket.socket(fileno=os.dup(int(entry.name)))
        except OSError:  # closed since it was listed
            continue
        with connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and _peer(connection) == port:
                connection.shutdown(socket.SHUT_RDWR)


def _peer(connection: socket.socket) -> int | None:
    try:
        return int(connection.getpeername()[1])
    except OSError:  # it listens
        return None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--capacity", type=float, default=float("inf"))
    parser.add_argument("--log", type=argparse.FileType("a"))
    parser.add_argument("--fault", choices=[fault.name for fault in Fault])
    parser.add_argument("--every", type=int, default=1, metavar="N", help="the fault, 1 call in N")
    given = parser.parse_args()

    def fault(call: Call) -> Fault | None:
        due = given.fault is not None and call.number % given.every == 0
        return Fault[given.fault] if due else None

    with FakeServer(
        given.port, log=given.log, delay=given.delay, capacity=given.capacity, fault=fault
    ) as server:
        print(f"port {server.port}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
