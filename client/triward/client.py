"""RewardClient: conversation in, score out, over one gRPC channel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, Protocol

from tritonclient.grpc import InferenceServerClient

from triward import protocol
from triward.conversation import Messages, build_request, split_conversation
from triward.deadline import Deadline
from triward.errors import (
    DeadlineExceeded,
    ServerUnavailable,
    TriwardError,
    located,
    triton_errors,
)
from triward.wire import infer_arguments, read_scores


class _Transport(Protocol):
    """What of tritonclient's InferenceServerClient is used."""

    def infer(self, **arguments: Any) -> Any: ...

    def is_model_ready(self, model_name: str, *, client_timeout: float) -> bool: ...

    def close(self) -> None: ...


class RewardClient:
    """Asks one Triward server for rewards. Safe to share between threads; close it when done.

    A conversation is the model card's list of messages. An image is a path, bytes, a data:, file://
    or http(s) URL, or a PIL image. Nothing that is passed in is changed. No call makes up a score:
    it returns finite numbers from the server, or raises a `TriwardError`:

    - `InvalidRequest` (`MediaError` for an image or video): this input cannot be scored.
    - `ServerUnavailable`: overloaded, not reachable, or not ready.
    - `DeadlineExceeded`: the timeout ran out.
    - `ServerError`: the server failed.

    Args:
        url: host:port of Triton's gRPC endpoint, without a scheme.
        timeout: seconds for each conversation, from reading its media to its scores. The methods
            take another one for one call. A timeout that is not above 0 is a ValueError.
        model: name of the ensemble.
    """

    def __init__(  # noqa: D107 - the class says it
        self,
        url: str = "localhost:8001",
        *,
        timeout: float = 60.0,
        model: str = protocol.MODEL,
        _transport: _Transport | None = None,
    ) -> None:
        Deadline(timeout)  # raises for a timeout that no call could use
        self._url = url
        self._timeout = timeout
        self._model = model
        # Several threads may share it: unlike streams, its unary calls keep no state of their own.
        self._transport = InferenceServerClient(url) if _transport is None else _transport
        self._closed = False

    def score(self, messages: Messages, *, timeout: float | None = None) -> float:
        """The reward of a conversation whose last message is the assistant's."""
        deadline = self._deadline(timeout)
        prompt, response = split_conversation(messages)
        return self._infer(prompt, [response], deadline)[0]

    def score_responses(
        self, messages: Messages, responses: Sequence[str], *, timeout: float | None = None
    ) -> list[float]:
        """The rewards of N >= 1 candidate responses to one prompt, in their order.

        One request: the prompt and its media are sent once.
        """
        return self._infer(messages, responses, self._deadline(timeout))

    def score_many(
        self,
        conversations: Iterable[Messages],
        *,
        timeout: float | None = None,
        concurrency: int = 32,
    ) -> list[float]:
        """The rewards of conversations, in their order.

        Args:
            conversations: each as for `score`; taken one by one, as earlier ones finish.
            timeout: seconds for each conversation from when it is taken up.
            concurrency: how many are in flight at once. The server batches them.

        Raises:
            TriwardError: as for `score`, for the first conversation that fails; the message names
                it. No conversation is taken up after that, and those in flight are waited for.
            ValueError: concurrency is below 1.
        """
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, got {concurrency}")
        self._deadline(timeout)  # raises for a wrong timeout even when there is no conversation
        scores: list[Future[float]] = []
        running: set[Future[float]] = set()
        with ThreadPoolExecutor(concurrency, thread_name_prefix="triward") as pool:
            for index, conversation in enumerate(conversations):
                if len(running) == concurrency:
                    running = _reap(running)
                future = pool.submit(self._score_at, index, conversation, timeout)
                scores.append(future)
                running.add(future)
            while running:
                running = _reap(running)
        return [future.result() for future in scores]

    def rank(
        self, messages: Messages, responses: Sequence[str], *, timeout: float | None = None
    ) -> list[int]:
        """Indices of `responses`, best first; equal scores keep their order."""
        scores = self.score_responses(messages, responses, timeout=timeout)
        return sorted(range(len(scores)), key=lambda index: -scores[index])

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
            with triton_errors(model=self._model, url=self._url):
                ready = self._transport.is_model_ready(self._model, client_timeout=remaining)
        except (ServerUnavailable, DeadlineExceeded):
            return False
        return bool(ready)

    def close(self) -> None:
        """Close the channel; calls in flight fail. Closing twice is fine."""
        if not self._closed:
            self._closed = True
            self._transport.close()

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

    def _deadline(self, timeout: float | None) -> Deadline:
        if self._closed:
            raise RuntimeError("this RewardClient is closed")
        return Deadline(self._timeout if timeout is None else timeout)

    def _infer(
        self, messages: Messages, responses: Sequence[str], deadline: Deadline
    ) -> list[float]:
        request = build_request(messages, responses, deadline)
        arguments = infer_arguments(request, model=self._model, remaining=deadline.remaining())
        with triton_errors(model=self._model, url=self._url):
            result = self._transport.infer(**arguments)
        return read_scores(result, len(request.responses))

    def _score_at(self, index: int, conversation: Messages, timeout: float | None) -> float:
        try:
            return self.score(conversation, timeout=timeout)
        except TriwardError as error:
            raise located(error, f"conversations[{index}]") from error


def _reap(running: set[Future[float]]) -> set[Future[float]]:
    """Wait until one is done; raise if it failed; the others go on."""
    done, rest = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
    return rest
