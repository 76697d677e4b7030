"""RewardClient: conversation in, score out, over gRPC."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from time import sleep
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from triward import protocol
from triward.base import POLL, BaseClient, Call, Step, Steps
from triward.channel import MAX_ATTEMPTS, Tls, Url
from triward.conversation import Messages, RewardRequest, build_request, split_conversation
from triward.deadline import Deadline
from triward.errors import DeadlineExceeded, ServerUnavailable, TriwardError
from triward.grouping import Group
from triward.many import Answer, OnError, Outcome, ProgressBar, Schedule, ask_group, ranked
from triward.patience import Patient
from triward.process import PerProcess
from triward.routing import Channels, Pause, Routing
from triward.shelf import Shelf
from triward.tokens import token_request

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from triward.sharedmemory import Region

T = TypeVar("T")

_CLOSING = 5.0  # seconds, for a last word to a server that may not listen


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
        routing: "round_robin", in turn; or for a list "prompt": requests that begin with the same
            messages, up to the first of the user's, go to the same server, which may have computed
            them. Where that is full or away they go to the next, the same one for all; then
            `max_attempts` is how often each server is asked.
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
        routing: Routing = "round_robin",
        shared_memory_bytes: int = 0,
        _transport: Any = None,
    ) -> None:
        super().__init__(
            url, timeout, model, tls, headers, max_attempts, wait_ready, routing, _transport
        )
        self._given = _transport
        self._channels: PerProcess[Channels[Any]] = PerProcess(lambda: Channels(self._connect))
        if shared_memory_bytes < 0:
            raise ValueError(f"shared_memory_bytes must be at least 0, got {shared_memory_bytes}")
        if shared_memory_bytes and not isinstance(url, str):
            raise ValueError("shared_memory_bytes: only one server can share this machine's memory")
        self._shared_memory_bytes = shared_memory_bytes
        self._region: PerProcess[Region] = PerProcess(self._make_region)

    def score(self, messages: Messages, *, timeout: float | None = None) -> float:
        """Return the reward of a conversation whose last message is the assistant's."""
        deadline = self._begin(timeout)
        prompt, response = split_conversation(messages)
        return self._score(build_request(prompt, [response], deadline), deadline)[0]

    def score_responses(
        self, messages: Messages, responses: Sequence[str], *, timeout: float | None = None
    ) -> list[float]:
        """Return the rewards of N >= 1 candidate responses to one prompt, in their order.

        One request: the prompt and its media are sent once.
        """
        deadline = self._begin(timeout)
        return self._score(build_request(messages, responses, deadline), deadline)

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
        """Return the rewards of N >= 1 responses whose token ids are known: no preprocessing.

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
        return self._run(self._infer_tokens(request, deadline))

    def score_many(
        self,
        conversations: Iterable[Messages],
        *,
        timeout: float | None = None,
        concurrency: int = 32,
        on_error: OnError = "raise",
        progress: bool = False,
    ) -> list[Any]:
        """Return the rewards of conversations, in their order.

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
        """Yield the outcomes of `score_many`, for more conversations than fit into memory."""
        schedule: Schedule[Future[list[Outcome]]] = Schedule(conversations, concurrency, on_error)
        self._deadline(timeout)  # raises for a wrong timeout even when there is no conversation
        return self._outcomes(schedule, timeout, progress)

    def rank(
        self, messages: Messages, responses: Sequence[str], *, timeout: float | None = None
    ) -> list[int]:
        """Return indices of `responses`, best first; equal scores keep their order."""
        return ranked(self.score_responses(messages, responses, timeout=timeout))

    def compare(self, messages: Messages, a: str, b: str, *, timeout: float | None = None) -> bool:
        """Return True if response `a` scores strictly higher than response `b`."""
        score_a, score_b = self.score_responses(messages, [a, b], timeout=timeout)
        return score_a > score_b

    def is_ready(self, timeout: float | None = None) -> bool:
        """Return True if the model can be asked; False if it is not reachable or not ready in time.

        Raises:
            ServerError: the server fails, or does not serve this model at all.
        """
        try:
            return self._run(self._ready(self._deadline(timeout)))
        except (ServerUnavailable, DeadlineExceeded):
            return False

    def check_ready(self, timeout: float | None = None) -> None:
        """Raise an error that says why the model cannot be asked, if it cannot.

        Raises:
            ServerUnavailable: nobody listens there, or the model is not ready.
            DeadlineExceeded: there was no answer in time.
            ServerError: the server fails, or does not serve this model.
        """
        self._run(self._check_ready(self._begin(timeout)))

    def close(self) -> None:
        """Close the channel; calls in flight fail. Closing twice is fine."""
        self._closed = True
        channels, region = self._channels.take(), self._region.take()
        if channels is not None:
            if region is not None:
                with suppress(TriwardError):  # a server that is gone has forgotten it
                    self._run(self._unregister(region), channels)
            for channel in channels.made():
                channel.close()
        if region is not None:
            region.close()

    def __enter__(self) -> RewardClient:
        """Return the client itself."""
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
        """Wait for the server, if that is wanted, and begin the call's deadline."""
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

    def _run(self, steps: Steps[T], channels: Channels[Any] | None = None) -> T:
        """Carry out a call's steps, and return its result."""
        with closing(steps):
            try:
                step = next(steps)
                while True:
                    try:
                        answer = self._carry_out(step, channels)
                    except Exception as error:
                        step = steps.throw(error)
                    else:
                        step = steps.send(answer)
            except StopIteration as end:
                result: T = end.value
                return result

    def _carry_out(self, step: Step, channels: Channels[Any] | None) -> Any:
        if isinstance(step, Call):
            channel = (channels or self._channels.get()).get(step.server)
            return getattr(channel, step.method)(**step.arguments)
        return sleep(step.seconds) if isinstance(step, Pause) else step()

    def _score(self, request: RewardRequest, deadline: Deadline) -> list[float]:
        if not (self._shared_memory_bytes and request.media):
            return self._run(self._infer(request, deadline))
        return self._run(self._share(request, deadline))

    def _share(self, request: RewardRequest, deadline: Deadline) -> Steps[list[float]]:
        from triward.sharedmemory import sharing

        yield from self._meet(deadline)
        deadline.begin(f"registering shared memory with {self._address}")
        ask = partial(self._ask_short, deadline)
        send = partial(self._send, request, deadline)
        return (yield from sharing(self._region.get(), request.media, deadline, ask, send))

    def _ask_short(self, deadline: Deadline, method: str, **arguments: Any) -> Steps[Any]:
        return (yield from self._ask(self._short(deadline, method, **arguments), deadline))

    def _unregister(self, region: Region) -> Steps[None]:
        last = Deadline(_CLOSING)
        yield from self._ask_short(last, "unregister_system_shared_memory", name=region.name)

    def _connect(self, server: str | None) -> Any:
        from tritonclient.grpc import InferenceServerClient

        return self._given or Patient(self._address.at(server).connect(InferenceServerClient))

    def _make_region(self) -> Region:
        from triward.sharedmemory import Region

        size = self._shared_memory_bytes
        try:
            return Region(size)
        except OSError as error:
            raise TriwardError(f"shared memory of {size} bytes: {error.strerror}") from error

    def _outcomes(
        self, schedule: Schedule[Future[list[Outcome]]], timeout: float | None, progress: bool
    ) -> Iterator[Outcome]:
        """Hand out outcomes in the order of their conversations."""
        shelf = Shelf()

        def score(group: Group) -> list[Outcome]:
            if schedule.skips(group):
                return []
            outcomes = self._score_group(group, shelf, timeout, schedule.on_error)
            schedule.note(group, outcomes)
            return outcomes

        pool = ThreadPoolExecutor(schedule.concurrency, thread_name_prefix="triward")
        with ProgressBar(progress, schedule.conversations) as bar:
            try:
                for future in schedule.run(lambda group: pool.submit(score, group)):
                    if future is not None:
                        yield from bar.counting(schedule.checked(future.result()))
            finally:
                schedule.stop()
                pool.shutdown(cancel_futures=True)

    def _score_group(
        self, group: Group, shelf: Shelf, timeout: float | None, on_error: OnError
    ) -> list[Outcome]:
        """Return a score or an error for each of a group's conversations."""
        asking = ask_group(group, on_error)
        try:
            wanted = next(asking)
            while True:
                wanted = asking.send(self._answer(wanted, shelf, timeout))
        except StopIteration as end:
            outcomes: list[Outcome] = end.value
            return outcomes

    def _answer(self, group: Group, shelf: Shelf, timeout: float | None) -> Answer:
        try:
            deadline = self._begin(timeout)
            return self._score(group.request(partial(shelf.read, deadline=deadline)), deadline)
        except TriwardError as error:
            return error
