"""What several tests of the client say, ask and read back."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import grpc
from PIL import Image
from tritonclient.utils import InferenceServerException

from tests.fakeserver import FakeServer
from triward import AsyncRewardClient, RewardClient

ROOT = Path(__file__).parents[2]


def conversation(response, prompt="q", image=None):
    """A prompt, with an image if one is given, and its response."""
    content = prompt
    if image is not None:
        content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": response}]


def png(color="red"):
    """The bytes of a small image file."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), color).save(buffer, "PNG")
    return buffer.getvalue()


def ask(kind, url, *arguments, method="score", **settings):
    """What a method of a `blocking` or an `asyncio` client returns."""
    if kind == "blocking":
        with RewardClient(url, **settings) as client:
            return getattr(client, method)(*arguments)

    async def asking():
        async with AsyncRewardClient(url, **settings) as client:
            return await getattr(client, method)(*arguments)

    return asyncio.run(asking())


def failure(code, message="no"):
    """An error as tritonclient raises it."""
    return InferenceServerException(message, status=f"StatusCode.{code}")


def raising(error):
    """A reply of the fake transport's that is an error."""

    def reply(arguments):
        raise error

    return reply


class AsyncTransport:
    """The fake transport for asyncio."""

    def __init__(self, transport):
        self.transport = transport

    async def infer(self, **arguments):
        return self.transport.infer(**arguments)

    async def close(self):
        self.transport.close()


def requests(transport):
    """Of each request to the fake transport: messages, responses, media files."""
    sent = [transport.sent(call) for call in transport.calls]
    return [
        (
            json.loads(inputs["messages"][1][0]),
            [response.decode() for response in inputs["responses"][1]],
            inputs["media"][1],
        )
        for inputs in sent
    ]


def refused(port):
    """Wait until nothing listens there."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.01)
    raise AssertionError(f"{port}: still listens")


def watched(server):
    """The calls that a `FakeServer` gets from here on."""
    seen = []
    server.fault = lambda call: seen.append(call)
    return seen


@contextmanager
def fake_process(*arguments):
    """A process with a `FakeServer`, and its address; it is killed at the end."""
    command = [sys.executable, "-m", "tests.fakeserver", *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, f"127.0.0.1:{process.stdout.readline().split()[1]}"
        finally:
            process.kill()


def pause(process):
    """Stop a child process, and wait until none of its threads runs: some may for a while."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)


def encrypted(pki, name, mutual=False):
    """A `FakeServer` with the certificate of this name."""
    pair = (pki / f"{name}.key").read_bytes(), (pki / f"{name}.pem").read_bytes()
    authority = (pki / "ca.pem").read_bytes() if mutual else None
    return FakeServer(credentials=grpc.ssl_server_credentials([pair], authority, mutual))
