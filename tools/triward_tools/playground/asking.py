"""Servers that the playground may ask, and what they answer: scores, tokens, time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from triward import protocol
from triward.base import Call, Steps
from triward.client import RewardClient
from triward.conversation import Messages, RewardRequest, build_request
from triward.deadline import Deadline
from triward.errors import InvalidRequest, ServerError, TriwardError
from triward.many import ranked
from triward.wire import infer_arguments, read_scores


@dataclass(frozen=True)
class Reply:
    """A server's answer to N responses to one prompt.

    Attributes:
        scores: N, in the order of the responses.
        tokens: N, of each conversation, prompt included.
        milliseconds: from sending the request to its scores; files were read before.
        prompt_tokens: of the prompt with its media and an empty response, which all N share but for
            the end of the turn (two tokens in ChatML); None if that was not asked, or has no
            answer.
        prompt_error: why there is no `prompt_tokens`; "" if it was not asked.
    """

    scores: tuple[float, ...]
    tokens: tuple[int, ...]
    milliseconds: float
    prompt_tokens: int | None = None
    prompt_error: str = ""

    @property
    def ranking(self) -> list[int]:
        """Indices of the responses, best first; equal scores keep their order."""
        return ranked(self.scores)


@dataclass
class Servers:
    """Servers of the command line; the page can ask no others.

    Attributes:
        client: whose address, limits, encryption and headers are used.
        http: address of Triton's HTTP of each server, for the `curl` that the page shows; or none.
        images: the folder below which an uploaded file may name images; None for nowhere.
    """

    client: RewardClient
    http: Sequence[str] = ()
    images: Path | None = None
    _clients: dict[str, CountingClient] = field(default_factory=dict, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    @property
    def urls(self) -> list[str]:
        """Addresses of gRPC, at least one."""
        return self.client._address.urls

    @property
    def model(self) -> str:
        """Name of the ensemble that is asked if no other is named."""
        return self.client.model

    @property
    def header_names(self) -> list[str]:
        """Names of the headers that are sent; their values may be secret."""
        return list(self.client._headers)

    def http_of(self, url: str) -> str:
        """Return the address of a server's HTTP: the one that was given, or Triton's own port."""
        scheme = "https" if self.client._address.tls else "http"
        given = dict(zip(self.urls, self.http, strict=False))
        return given.get(url) or f"{scheme}://{url.rpartition(':')[0]}:8000"

    def ask(
        self,
        messages: Messages,
        responses: Sequence[str],
        *,
        url: str = "",
        model: str = "",
        count_prompt: bool = False,
    ) -> Reply:
        """Return a server's answer. Threads may ask at once.

        Args:
            messages: the prompt, as for `RewardClient.score_responses`.
            responses: at least one.
            url: one of `urls`; the first by default.
            model: name of an ensemble; the command line's by default.
            count_prompt: find `prompt_tokens` by a second request, with an empty response.

        Raises:
            TriwardError: as `RewardClient.score_responses` does, with the same sentences.
        """
        with self._client(url or self.urls[0], model or self.model) as client:
            return _answer(client, messages, responses, count_prompt)

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            for client in self._clients.values():
                client.close()
            self._clients.clear()

    @contextmanager
    def _client(self, url: str, model: str) -> Iterator[CountingClient]:
        """Yield a client that is kept, or for a model that a visitor has named one that is not."""
        if url not in self.urls:
            raise InvalidRequest(f"server: must be one of {', '.join(self.urls)}, got {url!r}")
        if model != self.model:
            with closing(self._make(url, model)) as client:
                yield client
            return
        with self._lock:
            if url not in self._clients:
                self._clients[url] = self._make(url, model)
            client = self._clients[url]
        yield client

    def _make(self, url: str, model: str) -> CountingClient:
        settings = {**RewardClient._settings(self.client), "model": model}
        return CountingClient(url, **{**settings, "routing": "round_robin"})  # of one server


def _answer(
    client: CountingClient, messages: Messages, responses: Sequence[str], count_prompt: bool
) -> Reply:
    """Return a client's answer, with the prompt's tokens if they are to be counted."""
    try:
        reply = client.ask(messages, responses)
    except TriwardError:
        raise
    except OSError as error:  # a file of the encryption
        reason = error.strerror or str(error)
        raise InvalidRequest(f"{error.filename or 'input'}: {reason}") from error
    if not count_prompt:
        return reply
    try:
        return replace(reply, prompt_tokens=client.ask(messages, [""]).tokens[0])
    except TriwardError as error:  # a model may refuse an empty response; the scores stand
        return replace(reply, prompt_error=str(error))


class CountingClient(RewardClient):
    """Asks for the tokens of each conversation, too."""

    def ask(self, messages: Messages, responses: Sequence[str]) -> Reply:
        """Return scores, tokens and time; raise what `score_responses` does."""
        deadline = self._begin(None)
        request = build_request(messages, responses, deadline)
        self._run(self._check_ready(deadline))  # so that the time holds no connecting
        begun = perf_counter()
        scores = self._run(self._infer(request, deadline))
        milliseconds = 1e3 * (perf_counter() - begun)
        assert isinstance(scores, _Counted)
        return Reply(tuple(scores), tuple(scores.tokens), milliseconds)

    def _send(
        self,
        request: RewardRequest,
        deadline: Deadline,
        media: Any,
        server: str | None = None,
    ) -> Steps[list[float]]:
        from tritonclient.grpc import InferRequestedOutput

        self._wait(deadline)
        remaining = deadline.remaining()
        sent = infer_arguments(request, model=self._model, remaining=remaining, media=media)
        sent["outputs"] = [InferRequestedOutput(output.name) for output in protocol.OUTPUTS]
        result = yield from self._ask(
            Call("infer", {**sent, "headers": self._headers}, server), deadline
        )
        count = len(request.responses)
        return _Counted(read_scores(result, count), _read_tokens(result, count))


class _Counted(list[float]):
    """Scores with the tokens of their conversations."""

    def __init__(self, scores: Sequence[float], tokens: Sequence[int]) -> None:
        super().__init__(scores)
        self.tokens = tokens


def _read_tokens(result: Any, count: int) -> list[int]:
    name = protocol.TOKEN_COUNTS.name
    tokens = result.as_numpy(name)
    if tokens is None or tokens.shape != (1, count):
        got = "nothing" if tokens is None else list(tokens.shape)
        raise ServerError(f"the server's {name!r} must have the shape [1, {count}], got {got}")
    return [int(each) for each in tokens[0]]
