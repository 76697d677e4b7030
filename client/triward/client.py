"""RewardClient: conversation in, score out, over gRPC."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from triward import protocol
from triward.base import (
    AHEAD,
    BaseClient,
    OnError,
    Outcome,
    PerProcess,
    Progress,
    Stop,
    any_failed,
    cause,
    check_many,
    checked,
    ends_singles,
    failed,
    ranked,
    stands_for_all,
)
from triward.channel import MAX_ATTEMPTS, Tls, Url
from triward.conversation import Messages, RewardRequest, build_request, split_conversation
from triward.deadline import Deadline
from triward.errors import DeadlineExceeded, ServerUnavailable, TriwardError, is_unknown_region
from triward.grouping import Group, grouped
from triward.patience import Patient
from triward.shelf import Shelf
from triward.tokens import TokenRequest, token_request
from triward.wire import read_scores

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from triward.sharedmemory import Place, Region

_CLOSING = 5.0  # seconds, for a last word to a server that may not listen


class _Transport(Protocol):
    """What of tritonclient's InferenceServerClient is used."""

    def infer(self, *, client_timeout: float, **arguments: Any) -> Any: ...

    def is_model_ready(
        self, model_name: str, *, headers: Mapping[str, str], client_timeout: float
    ) -> bool: ...

    def register_system_shared_memory(
        self, name: str, key: str, byte_size: int, **options: Any
    ) -> None: ...

    def unregister_system_shared_memory(self, name: str, **options: Any) -> None: ...

    def get_system_shared_memory_status(self, **options: Any) -> Any: ...

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
        shared_memory_bytes: size of a region of /dev/shm through which media reach a server on this
            machine; 0 sends them over gRPC, as does a region that is full. Linux only. The server
            must see the same /dev/shm, be another process of the same user, and be the only one;
            `headers` must hold its admin key.
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
        shared_memory_bytes: int = 0,
        _transport: _Transport | None = None,
    ) -> None:
        super().__init__(url, timeout, model, tls, headers, max_attempts)
        self._transport: PerProcess[_Transport] = PerProcess(lambda: _transport or self._connect())
        if shared_memory_bytes < 0:
            raise ValueError(f"shared_memory_bytes must be at least 0, got {shared_memory_bytes}")
        if shared_memory_bytes and not isinstance(url, str):
            raise ValueError("shared_memory_bytes: only one server can share this machine's memory")
        self._shared_memory_bytes = shared_memory_bytes
        self._region: PerProcess[Region] = PerProcess(self._make_region)

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

    def score_tokens(
        self,
        prompt_ids: ArrayLike,
        response_ids: Sequence[ArrayLike],
        *,
        media: Sequence[ArrayLike] = (),
        seconds_per_grid: ArrayLike = (),
        patch_size: int = 14,
        timeout: float | None = None,
    ) -> list[float]:
        """The rewards of N >= 1 responses whose token ids are known: no preprocessing.

        Conversation i is `prompt_ids` followed by `response_ids[i]`, scored at its last token. A
        server knows ids and pixels only: whether they are the checkpoint's own chat template and
        processor is the caller's to see to.

        Args:
            prompt_ids: what all conversations begin with, each placeholder of an image or video
                expanded to one for each merged patch, as in a processor's `input_ids`.
            response_ids: what follows it in each conversation, at least one token.
            media: in the order of their placeholders, all in the prompt: images uint8 [H, W, 3] and
                videos uint8 [T, H, W, 3], resized to multiples of the merged patch (28 pixels).
                `pixels_of` makes them from a processor's `pixel_values`.
            seconds_per_grid: for each video, the seconds that a pair of its frames stands for
                (`second_per_grid_ts`).
            patch_size: pixels of a patch's side.
            timeout: seconds; the client's own by default.
        """
        deadline = self._deadline(timeout)
        request = token_request(prompt_ids, response_ids, media, seconds_per_grid, patch_size)
        return self._infer_tokens(request, deadline)

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
        transport, region = self._transport.take(), self._region.take()
        if transport is not None:
            if region is not None:
                with suppress(TriwardError), self._translated():  # a server that is gone forgot it
                    transport.unregister_system_shared_memory(
                        region.name, headers=self._headers, client_timeout=_CLOSING
                    )
            transport.close()
        if region is not None:
            region.close()

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

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "shared_memory_bytes": self._shared_memory_bytes}

    def _infer(self, request: RewardRequest, deadline: Deadline) -> list[float]:
        if not (self._shared_memory_bytes and request.media):
            return self._ask(request, deadline, None)
        region = self._region.get()
        try:
            return self._share(region, request, deadline)
        except TriwardError as error:
            if not is_unknown_region(error):
                raise
        # The server has been started again since the region was registered there.
        region.registered = False
        return self._share(region, request, deadline)

    def _share(self, region: Region, request: RewardRequest, deadline: Deadline) -> list[float]:
        self._register(region, deadline)
        with region.lend(request.media) as place:
            return self._ask(request, deadline, place)

    def _ask(self, request: RewardRequest, deadline: Deadline, media: Place | None) -> list[float]:
        arguments = self._arguments(request, deadline, media)
        with self._translated():
            result = self._transport.get().infer(**arguments)
        return read_scores(result, len(request.responses))

    def _infer_tokens(self, request: TokenRequest, deadline: Deadline) -> list[float]:
        arguments = self._token_arguments(request, deadline)
        with self._translated(arguments["model_name"]):
            result = self._transport.get().infer(**arguments)
        return read_scores(result, request.responses)

    def _connect(self) -> _Transport:
        from tritonclient.grpc import InferenceServerClient

        transport: _Transport = Patient(self._address.connect(InferenceServerClient))
        return transport

    def _make_region(self) -> Region:
        from triward.sharedmemory import Region

        size = self._shared_memory_bytes
        try:
            return Region(size)
        except OSError as error:
            raise TriwardError(f"shared memory of {size} bytes: {error.strerror}") from error

    def _register(self, region: Region, deadline: Deadline) -> None:
        """Tell the server about a region, and make it forget those that are gone."""
        from triward.sharedmemory import PREFIX, exists

        if not region.registering.acquire(timeout=deadline.remaining()):
            raise deadline.exceeded()
        try:
            if region.registered:
                return
            transport, headers = self._transport.get(), self._headers
            with self._translated():
                known = transport.get_system_shared_memory_status(
                    headers=headers, client_timeout=deadline.remaining()
                ).regions
                for name in known:
                    if name.startswith(PREFIX) and not exists(name):
                        transport.unregister_system_shared_memory(
                            name, headers=headers, client_timeout=deadline.remaining()
                        )
                if region.name not in known:
                    transport.register_system_shared_memory(
                        region.name,
                        f"/{region.name}",
                        region.size,
                        headers=headers,
                        client_timeout=deadline.remaining(),
                    )
            region.registered = True
        finally:
            region.registering.release()

    def _outcomes(
        self,
        conversations: Iterable[Messages],
        timeout: float | None,
        concurrency: int,
        on_error: OnError,
        progress: bool,
    ) -> Iterator[Outcome]:
        """Requests under way in the order of their conversations, the first handed out first."""
        shelf, stop = Shelf(), Stop()
        pending: deque[Future[list[Outcome]]] = deque()

        def score(group: Group) -> list[Outcome]:
            if stop.skips(group):
                return []  # nobody looks: one before it has failed
            outcomes = self._score_group(group, shelf, timeout, on_error)
            if on_error == "raise" and any_failed(outcomes):
                stop.at(group.first)
            return outcomes

        pool = ThreadPoolExecutor(concurrency, thread_name_prefix="triward")
        with Progress(progress, conversations) as bar:
            try:
                for group in grouped(conversations):
                    if stop.is_set:
                        break
                    pending.append(pool.submit(score, group))
                    while pending and (pending[0].done() or len(pending) > AHEAD * concurrency):
                        yield from bar.counting(checked(pending.popleft().result(), on_error))
                while pending:
                    yield from bar.counting(checked(pending.popleft().result(), on_error))
            finally:
                stop.at(-1)
                pool.shutdown(cancel_futures=True)

    def _score_group(
        self, group: Group, shelf: Shelf, timeout: float | None, on_error: OnError
    ) -> list[Outcome]:
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
        outcomes: list[Outcome] = []
        for single in group.alone():
            outcomes += self._score_group(single, shelf, timeout, on_error)
            if ends_singles(outcomes[-1], on_error):
                outcomes += failed(cause(outcomes[-1]), group, len(outcomes))
                break
        return outcomes
