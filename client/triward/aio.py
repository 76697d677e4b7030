"""AsyncRewardClient: `RewardClient` for asyncio."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

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
from triward.errors import DeadlineExceeded, ServerUnavailable, TriwardError, code_of
from triward.grouping import Group, grouped
from triward.patience import AsyncPatient
from triward.shelf import Shelf
from triward.tokens import TokenRequest, token_request
from triward.wire import read_scores

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from tritonclient.utils import InferenceServerException

T = TypeVar("T")


class _Transport(Protocol):
    """What of tritonclient's asyncio InferenceServerClient is used."""

    def infer(self, *, client_timeout: float, **arguments: Any) -> Awaitable[Any]: ...

    def is_server_live(self, **options: Any) -> Awaitable[bool]: ...

    def is_model_ready(self, model_name: str, **options: Any) -> Awaitable[bool]: ...

    def get_model_metadata(self, model_name: str, **options: Any) -> Awaitable[Any]: ...

    def get_server_metadata(self, **options: Any) -> Awaitable[Any]: ...

    def close(self) -> Awaitable[None]: ...


class AsyncRewardClient(BaseClient):
    """Asks Triward servers for rewards, without blocking the event loop.

    What is said of `RewardClient` holds: the same arguments, methods, results and errors. Media are
    read in threads. Each event loop connects for itself; close the client in the last of them.
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
        _transport: _Transport | None = None,
    ) -> None:
        super().__init__(
            url, timeout, model, tls, headers, max_attempts, wait_ready, transport=_transport
        )
        self._given = _transport
        self._starting: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Task[None]] = (
            WeakKeyDictionary()
        )
        self._transports: PerProcess[WeakKeyDictionary[asyncio.AbstractEventLoop, _Transport]] = (
            PerProcess(WeakKeyDictionary)
        )

    async def score(self, messages: Messages, *, timeout: float | None = None) -> float:
        """The reward of a conversation whose last message is the assistant's."""
        prompt, response = split_conversation(messages)
        return (await self.score_responses(prompt, [response], timeout=timeout))[0]

    async def score_responses(
        self, messages: Messages, responses: Sequence[str], *, timeout: float | None = None
    ) -> list[float]:
        """The rewards of N >= 1 candidate responses to one prompt, in their order."""
        deadline = await self._begin(timeout)
        request = await _in_thread(partial(build_request, messages, responses, deadline), deadline)
        return await self._infer(request, deadline)

    async def score_tokens(
        self,
        prompt_ids: ArrayLike,
        response_ids: Sequence[ArrayLike],
        *,
        media: Sequence[ArrayLike] = (),
        seconds_per_grid: ArrayLike = (),
        patch_size: int = 14,
        timeout: float | None = None,
    ) -> list[float]:
        """The rewards of N >= 1 responses whose token ids are known; see `RewardClient`."""
        deadline = self._deadline(timeout)
        read = partial(token_request, prompt_ids, response_ids, media, seconds_per_grid, patch_size)
        request = await _in_thread(read, deadline)
        return await self._infer_tokens(request, deadline)

    async def score_many(
        self,
        conversations: Iterable[Messages],
        *,
        timeout: float | None = None,
        concurrency: int = 32,
        on_error: OnError = "raise",
        progress: bool = False,
    ) -> list[Any]:
        """The rewards of conversations, in their order; see `RewardClient.score_many`."""
        outcomes = self.iter_scores(
            conversations,
            timeout=timeout,
            concurrency=concurrency,
            on_error=on_error,
            progress=progress,
        )
        return [outcome async for outcome in outcomes]

    def iter_scores(
        self,
        conversations: Iterable[Messages],
        *,
        timeout: float | None = None,
        concurrency: int = 32,
        on_error: OnError = "raise",
        progress: bool = False,
    ) -> AsyncIterator[Any]:
        """What `score_many` returns, one by one: for more conversations than fit into memory."""
        check_many(concurrency, on_error)
        self._deadline(timeout)  # raises for a wrong timeout even when there is no conversation
        return self._outcomes(conversations, timeout, concurrency, on_error, progress)

    async def rank(
        self, messages: Messages, responses: Sequence[str], *, timeout: float | None = None
    ) -> list[int]:
        """Indices of `responses`, best first; equal scores keep their order."""
        return ranked(await self.score_responses(messages, responses, timeout=timeout))

    async def compare(
        self, messages: Messages, a: str, b: str, *, timeout: float | None = None
    ) -> bool:
        """True when response `a` scores strictly higher than response `b`."""
        score_a, score_b = await self.score_responses(messages, [a, b], timeout=timeout)
        return score_a > score_b

    async def is_ready(self, timeout: float | None = None) -> bool:
        """True when the model can be asked; False when it is not reachable or not ready in time.

        Raises:
            ServerError: the server fails, or does not serve this model at all.
        """
        try:
            return await self._ready(self._deadline(timeout))
        except (ServerUnavailable, DeadlineExceeded):
            return False

    async def check_ready(self, timeout: float | None = None) -> None:
        """Raise an error that says why the model cannot be asked; see `RewardClient`."""
        deadline = await self._begin(timeout)
        if not await self._ready(deadline):
            transport = self._transport()  # which says so where there is no such model
            await self._ask(
                transport.get_model_metadata(self._model, **self._short(deadline)), deadline
            )
            raise self._not_ready()

    async def close(self) -> None:
        """Close this event loop's channel; calls in flight fail. Closing twice is fine."""
        self._closed = True
        transports = self._transports.take()
        mine = transports.pop(asyncio.get_running_loop(), None) if transports else None
        if mine is not None:
            await mine.close()

    async def __aenter__(self) -> AsyncRewardClient:
        """The client itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the client."""
        await self.close()

    def _transport(self) -> _Transport:
        # asyncio's channels belong to the event loop in which they are made.
        transports, loop = self._transports.get(), asyncio.get_running_loop()
        if loop not in transports:
            _check_not_forked()
            for other in [each for each in transports if each.is_closed()]:
                del transports[other]
            transports[loop] = self._given or self._connect()
        return transports[loop]

    def _connect(self) -> _Transport:
        from tritonclient.grpc.aio import InferenceServerClient

        transport: _Transport = AsyncPatient(self._address.connect(InferenceServerClient))
        return transport

    async def _begin(self, timeout: float | None) -> Deadline:
        """The deadline of a call. It begins when the server has started, if that is waited for."""
        if self._wait_ready and not self._closed and not self._contact.get().waited:
            loop = asyncio.get_running_loop()
            if loop not in self._starting:
                self._starting[loop] = asyncio.ensure_future(self._await_ready())
            await asyncio.shield(self._starting[loop])
        return self._deadline(timeout)

    async def _await_ready(self) -> None:
        """Ask until the model is ready; each time anew, since gRPC pauses between connections."""
        patience = Deadline(self._wait_ready)
        settings = {**self._settings(), "wait_ready": 0.0}
        try:
            while True:
                looking = type(self)(self._address.url, **settings, _transport=self._given)
                try:
                    async with looking:
                        return await looking.check_ready(min(patience.remaining(), self._timeout))
                except TriwardError as error:
                    if patience.left <= POLL:
                        raise self._waited(error) from error
                await asyncio.sleep(POLL)
        finally:
            self._contact.get().waited = True  # a server that did not start is not waited for again
            self._starting.pop(asyncio.get_running_loop(), None)

    async def _ready(self, deadline: Deadline) -> bool:
        self._wait(deadline)
        transport = self._transport()
        ready = await self._ask(
            transport.is_model_ready(self._model, **self._short(deadline)), deadline
        )
        self._contact.get().made = True
        return bool(ready)

    async def _meet(self, deadline: Deadline) -> None:
        """See that a server is there; see `RewardClient`."""
        from tritonclient.utils import InferenceServerException

        contact = self._contact.get()
        if contact.made:
            return
        deadline.begin(f"connecting to {self._address}")
        try:
            await self._unless_closed(self._transport().is_server_live(**self._short(deadline)))
        except InferenceServerException as error:
            if code_of(error) == "DEADLINE_EXCEEDED":
                raise deadline.exceeded() from error
            if lacks_connection(error):
                reason = await self._diagnose(error, deadline)
                if reason:
                    raise ServerUnavailable(reason) from error
                return  # the call's own attempts may find one
        contact.made = True

    async def _diagnose(self, error: InferenceServerException, deadline: Deadline) -> str | None:
        look = partial(diagnose, self._address, error.message(), deadline.left)
        return await asyncio.get_running_loop().run_in_executor(None, look)

    async def _ask(self, call: Awaitable[T], deadline: Deadline, model: str | None = None) -> T:
        """The call's result; this package's errors in place of tritonclient's."""
        from tritonclient.utils import InferenceServerException

        try:
            return await self._unless_closed(call)
        except InferenceServerException as error:
            raise await self._explained(error, deadline, model or self._model) from error

    async def _unless_closed(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except asyncio.CancelledError:
            if self._closed:  # gRPC's word for a channel that was closed meanwhile
                raise ServerUnavailable(f"{self._address}: the client was closed") from None
            raise

    async def _explained(
        self, error: InferenceServerException, deadline: Deadline, model: str
    ) -> TriwardError:
        """What callers see; what tritonclient's error leaves open is found out."""
        if lacks_connection(error):
            reason = await self._diagnose(error, deadline)
            if reason:
                return ServerUnavailable(reason)
        if lacks_tensors(error):
            with suppress(TriwardError):
                asked = self._transport().get_server_metadata(**self._short(deadline))
                about = await self._ask(asked, deadline, model)
                url = str(self._address)
                return refusal(error.message(), url=url, model=model, server=about.name)
        return self._translation(error, deadline, model)

    async def _infer(self, request: RewardRequest, deadline: Deadline) -> list[float]:
        await self._meet(deadline)
        arguments = self._arguments(request, deadline)
        result = await self._ask(self._transport().infer(**arguments), deadline)
        return read_scores(result, len(request.responses))

    async def _infer_tokens(self, request: TokenRequest, deadline: Deadline) -> list[float]:
        await self._meet(deadline)
        arguments = self._token_arguments(request, deadline)
        asked = self._transport().infer(**arguments)
        result = await self._ask(asked, deadline, arguments["model_name"])
        return read_scores(result, request.responses)

    async def _outcomes(
        self,
        conversations: Iterable[Messages],
        timeout: float | None,
        concurrency: int,
        on_error: OnError,
        progress: bool,
    ) -> AsyncIterator[Outcome]:
        """Requests under way in the order of their conversations, the first handed out first."""
        shelf, stop, slots = Shelf(), Stop(), asyncio.Semaphore(concurrency)
        readers = ThreadPoolExecutor(concurrency, thread_name_prefix="triward")
        pending: deque[asyncio.Task[list[Outcome]]] = deque()

        async def score(group: Group) -> list[Outcome]:
            async with slots:
                if stop.skips(group):
                    return []  # nobody looks: one before it has failed
                read = _Reading(shelf, readers)
                outcomes = await self._score_group(group, read, timeout, on_error)
                if on_error == "raise" and any_failed(outcomes):
                    stop.at(group.first)
                return outcomes

        async def first() -> list[Outcome]:
            outcomes = await pending[0]  # it stays there until it is done, to be cancelled
            pending.popleft()
            return bar.counting(checked(outcomes, on_error))

        with Progress(progress, conversations) as bar:
            try:
                for group in grouped(conversations):
                    if stop.is_set:
                        break
                    pending.append(asyncio.ensure_future(score(group)))
                    await asyncio.sleep(0)  # else a long iterable would keep the loop to itself
                    while pending and (pending[0].done() or len(pending) > AHEAD * concurrency):
                        for outcome in await first():
                            yield outcome
                while pending:
                    for outcome in await first():
                        yield outcome
            finally:
                for task in pending:
                    task.cancel()
                await asyncio.gather(*pending, return_exceptions=True)
                readers.shutdown(wait=False, cancel_futures=True)

    async def _score_group(
        self, group: Group, reading: _Reading, timeout: float | None, on_error: OnError
    ) -> list[Outcome]:
        """A score or an error for each of a group's conversations."""
        try:
            if group.error:
                raise group.error
            deadline = await self._begin(timeout)
            read = partial(group.request, partial(reading.shelf.read, deadline=deadline))
            if group.refs:
                request = await _in_thread(read, deadline, reading.threads)
            else:
                request = read()
            return list(await self._infer(request, deadline))
        except TriwardError as error:
            if stands_for_all(error, group):
                return failed(error, group)
        outcomes: list[Outcome] = []
        for single in group.alone():
            outcomes += await self._score_group(single, reading, timeout, on_error)
            if ends_singles(outcomes[-1], on_error):
                outcomes += failed(cause(outcomes[-1]), group, len(outcomes))
                break
        return outcomes


_OWNER: list[int] = []  # the process in which asyncio's gRPC was first used


def _check_not_forked() -> None:
    """Raise where a call would hang for ever: gRPC's asyncio half does not survive a fork."""
    if not _OWNER:
        _OWNER.append(os.getpid())
    elif [os.getpid()] != _OWNER:
        raise TriwardError(
            "an AsyncRewardClient was used before this process was forked, and gRPC cannot follow; "
            "start processes with 'spawn'"
        )


@dataclass(frozen=True)
class _Reading:
    """How the media of one call are read: as many at once as there are requests in flight."""

    shelf: Shelf
    threads: ThreadPoolExecutor


async def _in_thread(
    read: Callable[[], T],
    deadline: Deadline,
    threads: ThreadPoolExecutor | None = None,
) -> T:
    """A request that is made in one of `threads`, or of the event loop's own."""
    reading = asyncio.get_running_loop().run_in_executor(threads, read)
    try:
        return await asyncio.wait_for(reading, deadline.remaining())
    except TriwardError:
        raise
    except asyncio.TimeoutError:
        raise deadline.exceeded() from None
