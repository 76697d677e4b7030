"""RewardClient: conversation in, score out, over gRPC."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from time import sleep
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from triward import protocol
from triward.base import (
    AHEAD,
    POLL,
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
    lacks_connection,
    lacks_tensors,
    ranked,
    stands_for_all,
)
from triward.channel import MAX_ATTEMPTS, Tls, Url
from triward.connection import diagnose
from triward.contract import refusal
from triward.conversation import Messages, RewardRequest, build_request, split_conversation
from triward.deadline import Deadline
from triward.errors import (
    DeadlineExceeded,
    ServerUnavailable,
    TriwardError,
    code_of,
    is_unknown_region,
)
from triward.grouping import Group, grouped
from triward.patience import Patient
from triward.shelf import Shelf
from triward.tokens import TokenRequest, token_request
from triward.wire import read_scores

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from tritonclient.utils import InferenceServerException

    from triward.sharedmemory import Place, Region

_CLOSING = 5.0  # seconds, for a last word to a server that may not listen


class _Transport(Protocol):
    """What of tritonclient's InferenceServerClient is used."""

    def infer(self, *, client_timeout: float, **arguments: Any) -> Any: ...

    def is_server_live(self, **options: Any) -> bool: ...

    def is_model_ready(self, model_name: str, **options: Any) -> bool: ...

    def get_model_metadata(self, model_name: str, **options: Any) -> Any: ...

    def get_server_metadata(self, **options: Any) -> Any: ...

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
            dns:///rewards:8001; or a list of host:port. Calls go to all that answer, in turn. Port
            8001 where none is named.
        timeout: seconds for each conversation, from reading its media to its scores. The methods
            take another one for one call. A timeout that is not above 0 is a ValueError.
        model: name of the ensemble.
        tls: encrypts the channel.
        headers: sent with every call.
        max_attempts: how often a request is sent while it is UNAVAILABLE and its timeout lasts, 1
            to 5, with pauses that grow from 0.2 to 5.4 s. Not where nothing listens and nothing
            has before: that is an error at once, unless several servers are named.
        wait_ready: seconds for which the first call waits for a server that is starting, before
            its own timeout begins.
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
        wait_ready: float = 0.0,
        shared_memory_bytes: int = 0,
        _transport: _Transport | None = None,
    ) -> None:
        super().__init__(
            url, timeout, model, tls, headers, max_attempts, wait_ready, transport=_transport
        )
        self._given = _transport
        self._transport: PerProcess[_Transport] = PerProcess(lambda: _transport or self._connect())
        if shared_memory_bytes < 0:
            raise ValueError(f"shared_memory_bytes must be at least 0, got {shared_memory_bytes}")
        if shared_memory_bytes and not isinstance(url, str):
            raise ValueError("shared_memory_bytes: only one server can share this machine's memory")
        self._shared_memory_bytes = shared_memory_bytes
        self._region: PerProcess[Region] = PerProcess(self._make_region)

    def score(self, messages: Messages, *, timeout: float | None = None) -> float:
        """The reward of a conversation whose last message is the assistant's."""
        deadline = self._begin(timeout)
        prompt, response = split_conversation(messages)
        return self._infer(build_request(prompt, [response], deadline), deadline)[0]

    def score_responses(
        self, messages: Messages, responses: Sequence[str], *, timeout: float | None = None
    ) -> list[float]:
        """The rewards of N >= 1 candidate responses to one prompt, in their order.

        One request: the prompt and its media are sent once.
        """
        deadline = self._begin(timeout)
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
        deadline = self._begin(timeout)
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
        try:
            return self._ready(self._deadline(timeout))
        except (ServerUnavailable, DeadlineExceeded):
            return False

    def check_ready(self, timeout: float | None = None) -> None:
        """Raise an error that says why the model cannot be asked, if it cannot.

        Raises:
            ServerUnavailable: nobody listens there, or the model is not ready.
            DeadlineExceeded: there was no answer in time.
            ServerError: the server fails, or does not serve this model.
        """
        deadline = self._begin(timeout)
        if not self._ready(deadline):
            with self._asking(deadline):  # which says so where there is no such model
                self._transport.get().get_model_metadata(self._model, **self._short(deadline))
            raise self._not_ready()

    def close(self) -> None:
        """Close the channel; calls in flight fail. Closing twice is fine."""
        self._closed = True
        transport, region = self._transport.take(), self._region.take()
        if transport is not None:
            if region is not None:
                closing = Deadline(_CLOSING)
                with suppress(TriwardError), self._asking(closing):  # one that is gone forgot it
                    transport.unregister_system_shared_memory(region.name, **self._short(closing))
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

    def _begin(self, timeout: float | None) -> Deadline:
        """The deadline of a call. It begins when the server has started, if that is waited for."""
        if self._wait_ready and not self._closed:
            contact = self._contact.get()
            with contact.lock:
                if not contact.waited:
                    try:
                        self._await_ready()
                    finally:
                        contact.waited = True  # a server that did not start is not waited for again
        return self._deadline(timeout)

    def _await_ready(self) -> None:
        """Ask until the model is ready; each time anew, since gRPC pauses between connections."""
        patience = Deadline(self._wait_ready)
        settings = {**self._settings(), "wait_ready": 0.0}
        while True:
            try:
                with type(self)(self._address.url, **settings, _transport=self._given) as looking:
                    return looking.check_ready(min(patience.remaining(), self._timeout))
            except TriwardError as error:
                if patience.left <= POLL:
                    raise self._waited(error) from error
            sleep(POLL)

    def _ready(self, deadline: Deadline) -> bool:
        self._wait(deadline)
        with self._asking(deadline):
            ready = self._transport.get().is_model_ready(self._model, **self._short(deadline))
        self._contact.get().made = True
        return bool(ready)

    def _meet(self, deadline: Deadline) -> None:
        """See that a server is there, before gRPC tries for seconds to find one.

        Raises:
            ServerUnavailable: there is none, and there was none before.
        """
        from tritonclient.utils import InferenceServerException

        contact = self._contact.get()
        if contact.made:
            return
        deadline.begin(f"connecting to {self._address}")
        try:
            self._transport.get().is_server_live(**self._short(deadline))
        except InferenceServerException as error:
            if code_of(error) == "DEADLINE_EXCEEDED":
                raise deadline.exceeded() from error
            if lacks_connection(error):
                reason = diagnose(self._address, error.message(), deadline.left)
                if reason:
                    raise ServerUnavailable(reason) from error
                return  # the call's own attempts may find one
        contact.made = True

    @contextmanager
    def _asking(self, deadline: Deadline, model: str | None = None) -> Iterator[None]:
        """Raises this package's errors in place of tritonclient's; `model` is None for the own."""
        # Imported when something is asked, here and elsewhere: numpy and gRPC take longer to load
        # than all the rest.
        from tritonclient.utils import InferenceServerException

        try:
            yield
        except InferenceServerException as error:
            raise self._explained(error, deadline, model or self._model) from error

    def _explained(
        self, error: InferenceServerException, deadline: Deadline, model: str
    ) -> TriwardError:
        """What callers see; what tritonclient's error leaves open is found out."""
        if lacks_connection(error):
            reason = diagnose(self._address, error.message(), deadline.left)
            if reason:
                return ServerUnavailable(reason)
        if lacks_tensors(error):
            with suppress(TriwardError), self._asking(deadline, model):
                about = self._transport.get().get_server_metadata(**self._short(deadline))
                url = str(self._address)
                return refusal(error.message(), url=url, model=model, server=about.name)
        return self._translation(error, deadline, model)

    def _infer(self, request: RewardRequest, deadline: Deadline) -> list[float]:
        self._meet(deadline)
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
        with self._asking(deadline):
            result = self._transport.get().infer(**arguments)
        return read_scores(result, len(request.responses))

    def _infer_tokens(self, request: TokenRequest, deadline: Deadline) -> list[float]:
        self._meet(deadline)
        arguments = self._token_arguments(request, deadline)
        with self._asking(deadline, arguments["model_name"]):
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
        from triward.sharedmemory import is_gone

        deadline.begin(f"registering shared memory with {self._address}")
        if not region.registering.acquire(timeout=deadline.remaining()):
            raise deadline.exceeded()
        try:
            if region.registered:
                return
            transport = self._transport.get()
            with self._asking(deadline):
                known = transport.get_system_shared_memory_status(**self._short(deadline)).regions
                for other in known.values():
                    if is_gone(other.key):
                        transport.unregister_system_shared_memory(
                            other.name, **self._short(deadline)
                        )
                if region.name not in known:
                    transport.register_system_shared_memory(
                        region.name, region.key, region.size, **self._short(deadline)
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
            deadline = self._begin(timeout)
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
