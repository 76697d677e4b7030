"""A gateway in a thread, and what callers send it."""

from __future__ import annotations

import base64
import http.client
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass

from triward import AsyncRewardClient
from triward_tools.gateway.app import Gateway
from triward_tools.gateway.run import http_server
from triward_tools.gateway.settings import Settings
from triward_tools.listening import listen

SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"
PROMPT = SYSTEM + "<|im_start|>user\nWhat is\n1+1?<|im_end|>\n<|im_start|>assistant\n"
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is\n1+1?"},
]


@dataclass
class Doorway:
    """A gateway that runs."""

    gateway: Gateway
    port: int

    def send(self, path, body=None, method="POST", headers=(), timeout=60):
        """The status, the decoded answer and the headers of a request."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            kind = {"Content-Type": "application/json"}
            connection.request(method, path, data, {**kind, **dict(headers)})
            response = connection.getresponse()
            content = response.read().decode()
            is_json = response.headers["Content-Type"] == "application/json"
            return response.status, json.loads(content) if is_json else content, response.headers
        finally:
            connection.close()

    def ask(self, path, body, **settings):
        """The status and the answer."""
        return self.send(path, body, **settings)[:2]


@contextmanager
def running(url, opener=None, timeout=20.0, **settings):
    """A gateway in front of a server; it has ended behind the block."""
    given = Settings(timeout=timeout, **settings)
    client = AsyncRewardClient(url, timeout=timeout, max_attempts=1, model=given.models[0])
    gateway = Gateway(client, given, opener)
    server, listener = http_server(gateway, given), listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Doorway(gateway, listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def shows(url, text="What is it?"):
    """A user's message with an image, as OpenAI's clients send it."""
    image = {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}
    return {"role": "user", "content": [image, {"type": "text", "text": text}]}


def says(text):
    return {"role": "assistant", "content": text}
