"""Rewards for OpenRLHF: for a reward function in a file, and for its HTTP client.

    python -m triward.integrations.openrlhf --url rewards:8001 --port 5000

serves OpenRLHF's HTTP schema at /get_reward. A POST of
`{"query": [str], "prompts": [str], "labels": [...]}`, where `labels` may be missing, is answered
`{"rewards": [float]}`, or with status 4xx or 5xx and `{"error": {"status": int, "message": str}}`.

OpenRLHF hands over text: a prompt as the policy's chat template rendered it, and a query, which is
that prompt and the response, decoded with their special tokens. What is scored is this:

- The response is what the query has behind its prompt, without the token that ended it.
- The messages before it are those of the label, if that is a mapping, or the JSON of one, with the
  key `messages`. It is the only way in for images, and right for every chat template.
- Else they are taken out of the prompt, which has to be ChatML, as Qwen's templates render it.
  With `plain` in place of `chatml` the prompt is one message of the user's: for policies that are
  trained without a chat template.

Whatever does not fit raises `InvalidRequest`: no reward is made up.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import SimpleQueue
from typing import Any

from triward.client import RewardClient
from triward.conversation import Messages
from triward.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ServerUnavailable,
    TriwardError,
    located,
)
from triward.integrations.chatml import ENDS, PAD, Parse, chatml, plain, unended
from triward.rewards import RunningMoments, Shape, with_rules
from triward.stopping import stopping, wait_for

_PADS = re.compile(f"(?:{re.escape(PAD)})+")

MAX_BODY_BYTES = 64 * 2**20


def rewards(
    client: RewardClient,
    queries: Sequence[str],
    prompts: Sequence[str],
    labels: Sequence[Any],
    *,
    parse: Parse = chatml,
    ends: Sequence[str] = ENDS,
    shape: Shape | None = None,
    rules: Mapping[str, Sequence[float | None]] | None = None,
    weights: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return what OpenRLHF expects of `reward_func(queries, prompts, labels)`.

    Args:
        client: whom to ask.
        queries: each a prompt and its response.
        prompts: as the policy's chat template rendered them.
        labels: for each query anything, or its messages.
        parse: `chatml` or `plain`.
        ends: tokens of the policy that end a response.
        shape: what becomes of the model's scores.
        rules: rewards of your own by name, each [N], for OpenRLHF mixes none; None where a rule
            does not apply.
        weights: of each rule. The model's is in `shape`.

    Returns:
        `rewards` and `scores`, the same float32 tensor [N]; with rules also `extra_logs`, for
        OpenRLHF's log, with the model's own share as `model`.

    Raises:
        TriwardError: a query has no score; the message names it.
    """
    if weights and rules is None:
        raise InvalidRequest(f"weights: of {sorted(weights)}, but there are no rules")
    torch: Any = importlib.import_module("torch")
    own = score(client, queries, prompts, labels, parse=parse, ends=ends)
    own = shape(own) if shape else own
    if rules is None:
        found = torch.tensor(own)
        return {"rewards": found, "scores": found}
    found = torch.tensor(with_rules(own, rules, weights or {}))
    return {"rewards": found, "scores": found, "extra_logs": {"model": torch.tensor(own)}}


def score(
    client: RewardClient,
    queries: Sequence[str],
    prompts: Sequence[str],
    labels: Sequence[Any] | None = None,
    *,
    parse: Parse = chatml,
    ends: Sequence[str] = ENDS,
) -> list[float]:
    """Return the rewards for a request's body."""
    return client.score_many(conversations(queries, prompts, labels, parse=parse, ends=ends))


def conversations(
    queries: Sequence[str],
    prompts: Sequence[str],
    labels: Sequence[Any] | None = None,
    *,
    parse: Parse = chatml,
    ends: Sequence[str] = ENDS,
) -> list[Messages]:
    """Return what is scored: for each query its prompt's messages, and the response.

    Raises:
        InvalidRequest: one does not fit; the message names it.
    """
    labels = [None] * len(queries) if labels is None else labels
    if not len(queries) == len(prompts) == len(labels):
        counts = f"{len(queries)} queries, {len(prompts)} prompts and {len(labels)} labels"
        raise InvalidRequest(f"each query needs its prompt and label, got {counts}")
    found: list[Messages] = []
    for index, (query, prompt, label) in enumerate(zip(queries, prompts, labels, strict=True)):
        try:
            response = {"role": "assistant", "content": _response(query, prompt, ends)}
            found.append([*messages_of(prompt, label, parse), response])
        except InvalidRequest as error:
            raise located(error, f"queries[{index}]") from error
    return found


def messages_of(prompt: Any, label: Any, parse: Callable[[Any], Messages]) -> Messages:
    """Return the messages before a response: the label's, or else the prompt's."""
    if isinstance(label, str) and label.startswith("{"):
        with suppress(ValueError, RecursionError):  # then it is a label like others
            label = json.loads(label)
    if isinstance(label, Mapping) and label.get("messages") is not None:
        if not isinstance(label["messages"], (list, tuple)):
            raise InvalidRequest("the label's 'messages' must be a list")
        return list(label["messages"])
    return parse(prompt)


def _response(query: str, prompt: str, ends: Sequence[str]) -> str:
    # A processor has put as many placeholders for an image into the query as the image has tokens.
    end = 0
    for index, piece in enumerate(_PADS.split(prompt)):
        pads = _PADS.match(query, end) if index else None
        if (index and pads is None) or not query.startswith(piece, pads.end() if pads else end):
            raise InvalidRequest(
                "does not begin with its prompt; OpenRLHF cuts a prompt's beginning off when it "
                "does not fit beside the response"
            )
        end = (pads.end() if pads else end) + len(piece)
    return unended(query[end:], ends)


def read_json(body: bytes) -> dict[str, Any]:
    """Return the JSON object that a request's body holds.

    Raises:
        InvalidRequest: it holds something else.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise InvalidRequest("the body must be a JSON object")
    return request


def read_texts(request: Mapping[str, Any]) -> tuple[list[str], list[str], list[Any] | None]:
    """Return queries, prompts and labels of a request.

    Raises:
        InvalidRequest: one is missing, or is something else.
    """
    for key in ("query", "prompts"):
        texts = request.get(key)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InvalidRequest(f"{key}: must be a list of str")
    labels = request.get("labels")
    if labels is not None and not isinstance(labels, list):
        raise InvalidRequest("labels: must be a list")
    return request["query"], request["prompts"], labels


class RewardServer(ThreadingHTTPServer):
    """OpenRLHF's HTTP schema in front of a Triward server.

    It reads the images that labels name, from files too: listen where only trainers can connect.

    Args:
        address: host and port.
        client: whom to ask.
        parse: as for `rewards`.
        ends: as for `rewards`.
        shape: as for `rewards`; all trainers that ask this server share it.
    """

    daemon_threads = True
    request_queue_size = 128  # trainers connect for each rollout, and many at once

    def __init__(  # noqa: D107 - the class says it
        self,
        address: tuple[str, int],
        client: RewardClient,
        parse: Parse = chatml,
        ends: Sequence[str] = ENDS,
        shape: Shape | None = None,
    ) -> None:
        super().__init__(address, _Handler)
        self._client, self._parse, self._ends, self._shape = client, parse, ends, shape
        self._changed = threading.Condition()
        self._answers = 0

    def score(self, body: bytes) -> list[float]:
        """Return the rewards for a request's body.

        Raises:
            TriwardError: there are none.
        """
        found = score(
            self._client, *read_texts(read_json(body)), parse=self._parse, ends=self._ends
        )
        return self._shape(found) if self._shape else found

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Count an answer that is being made."""
        with self._changed:
            self._answers += 1
        try:
            yield
        finally:
            with self._changed:
                self._answers -= 1
                self._changed.notify_all()

    def serve_until(self, stops: SimpleQueue[int]) -> None:
        """Serve until something is put into the queue; then end the answers that were begun.

        Threads with a call of gRPC must end before the interpreter does, or it may wait for a lock
        that they held.
        """
        serving = threading.Thread(target=self.serve_forever, daemon=True)
        serving.start()
        wait_for(stops)
        self.shutdown()
        serving.join()
        self.server_close()  # new callers are refused, and not left waiting
        with self._changed:
            self._changed.wait_for(lambda: not self._answers)


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    protocol_version = "HTTP/1.1"
    timeout = 60  # a caller that stops sending does not hold its thread for ever

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path.partition("?")[0] != "/get_reward":
            self.send_error(HTTPStatus.NOT_FOUND, "the path is /get_reward")
        elif not length.isdecimal():
            self.send_error(HTTPStatus.LENGTH_REQUIRED, "a Content-Length is needed")
        elif int(length) > MAX_BODY_BYTES:
            message = f"the body has {length} bytes, the limit is {MAX_BODY_BYTES}"
            self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)
        else:
            body = self.rfile.read(int(length))
            with self.server.answering():
                self._answer(body)

    def _answer(self, body: bytes) -> None:
        try:
            found = self.server.score(body)
        except TriwardError as error:
            self.send_error(http_status(error), str(error))
        except Exception as error:  # an answer all the same, and never a reward
            name = type(error).__name__
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, f"{name}: {error}")
        else:
            self._reply(HTTPStatus.OK, {"rewards": found})

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        # Also for what the base class refuses. Part of the request may not be read.
        self.close_connection = True
        self.log_error("%d %s", code, message)
        description = message or HTTPStatus(code).phrase
        self._reply(code, {"error": {"status": int(code), "message": description}})

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Nothing: errors are logged, and rollouts are many."""

    def _reply(self, code: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


def http_status(error: TriwardError) -> HTTPStatus:
    """Return the status that says whose fault it is, and whether asking again helps."""
    if isinstance(error, InvalidRequest):
        return HTTPStatus.BAD_REQUEST
    if isinstance(error, ServerUnavailable):
        return HTTPStatus.SERVICE_UNAVAILABLE
    if isinstance(error, DeadlineExceeded):
        return HTTPStatus.GATEWAY_TIMEOUT
    return HTTPStatus.BAD_GATEWAY


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(
        "triward.integrations.openrlhf", description=RewardServer.__doc__
    )
    parser.add_argument(
        "--url", default="localhost:8001", help="the Triward server's gRPC endpoint"
    )
    parser.add_argument("--timeout", type=float, default=60, help="seconds for each query")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--prompts", choices=("chatml", "plain"), default="chatml")
    parser.add_argument("--end", action="append", help="a token that ends responses; repeatable")
    parser.add_argument("--standardise", action="store_true", help="by all rewards so far")
    parser.add_argument("--clip", type=float, nargs=2, metavar=("LOW", "HIGH"))
    options = parser.parse_args(arguments)
    running = RunningMoments() if options.standardise else None
    try:
        shape = Shape(running=running, clip=options.clip)
    except InvalidRequest as error:
        parser.error(str(error))
    parse = {"chatml": chatml, "plain": plain}[options.prompts]
    with stopping() as stops, RewardClient(options.url, timeout=options.timeout) as client:
        address = options.host, options.port
        with RewardServer(address, client, parse, options.end or ENDS, shape) as server:
            print(f"listening on http://{options.host}:{server.server_port}/get_reward", flush=True)
            server.serve_until(stops)


if __name__ == "__main__":
    main()
