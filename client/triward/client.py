"""RewardClient: conversation in, score out, over gRPC."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, Protocol

from tritonclient.grpc import InferenceServerClient

from triward import protocol
from triward.base import (
    AHEAD,
    BaseClient,
    OnError,
    Outcome,
    PerProcess,
    Progress,
    any_failed,
    check_many,
    checked,
    failed,
    ranked,
    stands_for_all,
)
from triward.channel import MAX_ATTEMPTS, Tls, Url
from triward.conversation import Messages, RewardRequest, build_request, split_conversation
from triward.deadline import Deadline
from triward.errors import DeadlineExceeded, ServerUnavailable, TriwardError
from triward.grouping import Group, grouped
from triward.shelf import Shelf
from triward.wire import read_scores


class _Transport(Protocol):
    """What of tritonclient's InferenceServerClient is used."""

    def infer(self, **arguments: Any) -> Any: ...

    def is_model_ready(
        self, model_name: str, *, headers: Mapping[str, str], client_timeout: float
    ) -> bool: ...

    def close(self) -> None: ...


class RewardClient(BaseClient):
    """Asks Triward servers for rewards.

    Threads may share it. It connects when it first asks, each process for itself, so it can be
    pickled and used after a fork. Close it when done.

    A conversation is the model card's list of messages. An image is a path, bytes, a data:, file://
    or http(s) URL, or a PIL image. Nothing that is passed in is changed. No call makes up a score:
    it returns finite numbers from a server, or raises a `TriwardError`:

    - `InvalidRequest` (`MediaError` for an image or video): this input cannot be scored.
    - `ServerUnavailable`: overloaded, not reachable, or not ready.
    - `DeadlineExceeded`: the timeout ran out.
    - `ServerError`: the server failed.

    Args:
        url: host:port of Triton's gRPC endpoint; a gRPC target that names many servers, as
            dns:///rewards:8001; or a list of host:port. Calls go to all that answer, in turn.
        timeout: seconds for each conversation, from reading its media to its scores. The methods
            take another one for one call. A timeout that is not above 0 is a ValueError.
        model: name of the ensemble.
        tls: encrypts the channel.
        headers: sent with every call.
        max_attempts: how often a request is sent while it is UNAVAILABLE and its timeout lasts, 1
            to 5, with pauses that grow from 0.2 to 5.4 s.
    """

    def __init__(  # noqa: D107 - the class says it
        self,
        url: Url = "localhost:8001",
        *,
        timeout: float = 60.0,
        model: str = protocol.MODEL,
        tls: Tls | None = None,
        headers: Mapping[str, str] | None = None,
        max_attempts: int = MAX_ATTEMPTS,
        _transport: _Transport | None = None,
    ) -> None:
        super().__init__(url, timeout, model, tls, headers, max_attempts)
        self._transport: PerProcess[_Transport] = PerProcess(
            lambda: _transport or self._address.connect(InferenceServerClient)
        )

    def score(self, messages: Messages, *, timeout: float | None = None) -> float:
        """The reward of a conversation whose last message is the assistant's."""
        deadline = self._deadline(timeout)
        prompt, response = split_conversation(messages)
        return self._infer(build_request(prompt, [response], deadline), deadline)[0]

    def score_responses(
        self, messages: Messages, responses: Sequence[str], *, timeout: float | None = None
    ) -> list[float]:
        """The rewards of N >= 1 candidate responses to one prompt, in their order.

        One request: the prompt and its media are sent once.
        """
        deadline = self._deadline(timeout)
        return self._infer(build_request(messages, responses, deadline), deadline)

    def score_many(
        self,
        conversations: Iterable[Messages],
        *,
        timeout: float | None = None,
        concurrency: int = 32,
        on_error: OnError = "raise",
        progress: bool = False,
    ) -> list[Any]:
        """The rewards of conversations, in their order.

        Args:
            conversations: each as for `score`; taken one by one, as earlier ones finish.
                Neighbours with one prompt travel in one request, and a media file or PIL image
                that several show is read once: sort by prompt if you can.
            timeout: seconds for each request from when it is taken up.
            concurrency: how many requests are in flight at once. The server batches them.
            on_error: "raise" or "return".
            progress: show a bar on standard error.

        Returns:
            floats; with `on_error="return"` a `TriwardError` in the place of each conversation
            that has no score.

        Raises:
            TriwardError: as for `score`, for the first conversation that fails; the message names
                it. No request is sent after that, and those in flight are waited for. Not with
                `on_error="return"`.
            ValueError: an argument cannot be used.
        """
        outcomes = self.iter_scores(
            conversations,
            timeout=timeout,
            concurrency=concurrency,
            on_error=on_error,
            progress=progress,
        )
        return list(outcomes)

    def iter_scores(
        self,
        conversations: Iterable[Messages],
        *,
        timeout: float | None = None,
        concurrency: int = 32,
        on_error: OnError = "raise",
        progress: bool = False,
    ) -> Iterator[Any]:
        """What `score_many` returns, one by one: for more conversations than fit into memory."""
        check_many(concurrency, on_error)
        self._deadline(timeout)  # raises for a wrong timeout even when there is no conversation
        return self._outcomes(conversations, timeout, concurrency, on_error, progress)

    def rank(
        self, messages: Messages, responses: Sequence[str], *, timeout: float | None = None
    ) -> list[int]:
        """Indices of `responses`, best first; equal scores keep their order."""
        return ranked(self.score_responses(messages, responses, timeout=timeout))

    def compare(self, messages: Messages, a: str, b: str, *, timeout: float | None = None) -> bool:
        """True when response `a` scores strictly higher than response `b`."""
        score_a, score_b = self.score_responses(messages, [a, b], timeout=timeout)
        return score_a > score_b

    def is_ready(self, timeout: float | None = None) -> bool:
        """True when the model can be asked; False when it is not reachable or not ready in time.

        Raises:
            ServerError: the server fails, or does not serve this model at all.
        """
        remaining = self._deadline(timeout).remaining()
        try:
            with self._translated():
                ready = self._transport.get().is_model_ready(
                    self._model, headers=self._headers, client_timeout=remaining
                )
        except (ServerUnavailable, DeadlineExceeded):
            return False
        return bool(ready)

    def close(self) -> None:
        """Close the channel; calls in flight fail. Closing twice is fine."""
        self._closed = True
        transport = self._transport.take()
        if transport is not None:
            transport.close()

    def __enter__(self) -> RewardClient:
        """The client itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the client."""
        self.close()

    def _infer(self, request: RewardRequest, deadline: Deadline) -> list[float]:
        arguments = self._arguments(request, deadline)
        with self._translated():
            result = self._transport.get().infer(**arguments)
        return read_scores(result, len(request.responses))

    def _outcomes(
        self,
        conversations: Iterable[Messages],
        timeout: float | None,
        concurrency: int,
        on_error: OnError,
        progress: bool,
    ) -> Iterator[Outcome]:
        """Requests under way in the order of their conversations, the first handed out first."""
        shelf, stop = Shelf(), threading.Event()
        pending: deque[Future[list[Outcome]]] = deque()

        def score(group: Group) -> list[Outcome]:
            if stop.is_set():
                return []  # nobody looks: one before it has failed
            outcomes = self._score_group(group, shelf, timeout)
            if on_error == "raise" and any_failed(outcomes):
                stop.set()
            return outcomes

        pool = ThreadPoolExecutor(concurrency, thread_name_prefix="triward")
        with Progress(progress, conversations) as bar:
            try:
                for group in grouped(conversations):
                    if stop.is_set():
                        break
                    pending.append(pool.submit(score, group))
                    while pending and (pending[0].done() or len(pending) > AHEAD * concurrency):
                        yield from bar.counting(checked(pending.popleft().result(), on_error))
                while pending:
                    yield from bar.counting(checked(pending.popleft().result(), on_error))
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)

    def _score_group(self, group: Group, shelf: Shelf, timeout: float | None) -> list[Outcome]:
        """A score or an error for each of a group's conversations."""
        try:
            if group.error:
                raise group.error
            deadline = self._deadline(timeout)
            request = group.request(partial(shelf.read, deadline=deadline))
            return list(self._infer(request, deadline))
        except TriwardError as error:
            if stands_for_all(error, group):
                return failed(error, group)
        singles = (self._score_group(single, shelf, timeout) for single in group.alone())
        return [outcome for outcomes in singles for outcome in outcomes]
