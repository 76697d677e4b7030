"""AsyncRewardClient: `RewardClient` for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from triward import protocol
from triward.base import POLL, BaseClient, Call, Step, Steps
from triward.channel import MAX_ATTEMPTS, Tls, Url
from triward.conversation import Messages, build_request, split_conversation
from triward.deadline import Deadline
from triward.errors import DeadlineExceeded, ServerUnavailable, TriwardError
from triward.grouping import Group
from triward.many import Answer, OnError, Outcome, ProgressBar, Schedule, ask_group, ranked
from triward.patience import AsyncPatient
from triward.process import PerProcess, check_not_forked
from triward.routing import Channels, Pause, Routing
from triward.shelf import Shelf
from triward.tokens import token_request

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

T = TypeVar("T")


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
        routing: Routing = "round_robin",
        _transport: Any = None,
    ) -> None:
        super().__init__(
            url, timeout, model, tls, headers, max_attempts, wait_ready, routing, _transport
        )
        self._given = _transport
        self._starting: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Task[None]] = (
            WeakKeyDictionary()
        )
        self._looped: PerProcess[WeakKeyDictionary[asyncio.AbstractEventLoop, Channels[Any]]] = (
            PerProcess(WeakKeyDictionary)
        )

    @classmethod
    def like(cls, client: BaseClient) -> AsyncRewardClient:
        """Return a client with the servers and settings of another, blocking or not."""
        return cls(client._address.url, **BaseClient._settings(client))

    async def score(self, messages: Messages, *, timeout: float | None = None) -> float:
        """Return the reward of a conversation whose last message is the assistant's."""
        prompt, response = split_conversation(messages)
        return (await self.score_responses(prompt, [response], timeout=timeout))[0]

    async def score_responses(
        self, messages: Messages, responses: Sequence[str], *, timeout: float | None = None
    ) -> list[float]:
        """Return the rewards of N >= 1 candidate responses to one prompt, in their order."""
        deadline = await self._begin(timeout)
        request = await _in_thread(partial(build_request, messages, responses, deadline), deadline)
        return await self._run(self._infer(request, deadline))

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
        """Return the rewards of N >= 1 responses whose token ids are known; see `RewardClient`."""
        deadline = self._deadline(timeout)
        read = partial(token_request, prompt_ids, response_ids, media, seconds_per_grid, patch_size)
        request = await _in_thread(read, deadline)
        return await self._run(self._infer_tokens(request, deadline))

    async def score_many(
        self,
        conversations: Iterable[Messages],
        *,
        timeout: float | None = None,
        concurrency: int = 32,
        on_error: OnError = "raise",
        progress: bool = False,
    ) -> list[Any]:
        """Return the rewards of conversations, in their order; see `RewardClient.score_many`."""
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
        """Yield the outcomes of `score_many`, for more conversations than fit into memory."""
        schedule: Schedule[asyncio.Task[list[Outcome]]]
        schedule = Schedule(conversations, concurrency, on_error)
        self._deadline(timeout)  # raises for a wrong timeout even when there is no conversation
        return self._outcomes(schedule, timeout, progress)

    async def rank(
        self, messages: Messages, responses: Sequence[str], *, timeout: float | None = None
    ) -> list[int]:
        """Return indices of `responses`, best first; equal scores keep their order."""
        return ranked(await self.score_responses(messages, responses, timeout=timeout))

    async def compare(
        self, messages: Messages, a: str, b: str, *, timeout: float | None = None
    ) -> bool:
        """Return True if response `a` scores strictly higher than response `b`."""
        score_a, score_b = await self.score_responses(messages, [a, b], timeout=timeout)
        return score_a > score_b

    async def is_ready(self, timeout: float | None = None) -> bool:
        """Return True if the model can be asked; False if it is not reachable or not ready in time.

        Raises:
            ServerError: the server fails, or does not serve this model at all.
        """
        try:
            return await self._run(self._ready(self._deadline(timeout)))
        except (ServerUnavailable, DeadlineExceeded):
            return False

    async def check_ready(self, timeout: float | None = None) -> None:
        """Raise an error that says why the model cannot be asked; see `RewardClient`."""
        await self._run(self._check_ready(await self._begin(timeout)))

    async def close(self) -> None:
        """Close this event loop's channels; calls in flight fail. Closing twice is fine."""
        self._closed = True
        looped = self._looped.take()
        mine = looped.pop(asyncio.get_running_loop(), None) if looped else None
        for channel in mine.made() if mine else []:
            await channel.close()

    async def __aenter__(self) -> AsyncRewardClient:
        """Return the client itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the client."""
        await self.close()

    def _channels(self) -> Channels[Any]:
        # asyncio's channels belong to the event loop in which they are made.
        looped, loop = self._looped.get(), asyncio.get_running_loop()
        if loop not in looped:
            check_not_forked()
            for other in [each for each in looped if each.is_closed()]:
                del looped[other]
            looped[loop] = Channels(self._connect)
        return looped[loop]

    def _connect(self, server: str | None) -> Any:
        from tritonclient.grpc.aio import InferenceServerClient

        return self._given or AsyncPatient(self._address.at(server).connect(InferenceServerClient))

    async def _begin(self, timeout: float | None) -> Deadline:
        """Wait for the server, if that is wanted, and begin the call's deadline."""
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

    async def _run(self, steps: Steps[T]) -> T:
        """Carry out a call's steps, and return its result."""
        try:
            step = next(steps)
            while True:
                try:
                    answer = await self._carry_out(step)
                except Exception as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            steps.close()

    async def _carry_out(self, step: Step) -> Any:
        if isinstance(step, Call):
            method = getattr(self._channels().get(step.server), step.method)
            return await self._unless_closed(method(**step.arguments))
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        return await asyncio.get_running_loop().run_in_executor(None, step)

    async def _unless_closed(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except asyncio.CancelledError:
            if self._closed:  # gRPC's word for a channel that was closed meanwhile
                raise ServerUnavailable(f"{self._address}: the client was closed") from None
            raise

    async def _outcomes(
        self,
        schedule: Schedule[asyncio.Task[list[Outcome]]],
        timeout: float | None,
        progress: bool,
    ) -> AsyncIterator[Outcome]:
        """Hand out outcomes in the order of their conversations."""
        slots = asyncio.Semaphore(schedule.concurrency)
        readers = ThreadPoolExecutor(schedule.concurrency, thread_name_prefix="triward")
        reading = _Reading(Shelf(), readers)

        async def score(group: Group) -> list[Outcome]:
            async with slots:
                if schedule.skips(group):
                    return []
                outcomes = await self._score_group(group, reading, timeout, schedule.on_error)
                schedule.note(group, outcomes)
                return outcomes

        with ProgressBar(progress, schedule.conversations) as bar:
            try:
                for task in schedule.run(lambda group: asyncio.ensure_future(score(group))):
                    if task is None:
                        await asyncio.sleep(0)  # a long iterable must not keep the loop to itself
                        continue
                    for outcome in bar.counting(schedule.checked(await task)):
                        yield outcome
            finally:
                for task in schedule.pending:
                    task.cancel()
                await asyncio.gather(*schedule.pending, return_exceptions=True)
                readers.shutdown(wait=False, cancel_futures=True)

    async def _score_group(
        self, group: Group, reading: _Reading, timeout: float | None, on_error: OnError
    ) -> list[Outcome]:
        """Return a score or an error for each of a group's conversations."""
        asking = ask_group(group, on_error)
        try:
            wanted = next(asking)
            while True:
                wanted = asking.send(await self._answer(wanted, reading, timeout))
        except StopIteration as end:
            outcomes: list[Outcome] = end.value
            return outcomes

    async def _answer(self, group: Group, reading: _Reading, timeout: float | None) -> Answer:
        try:
            deadline = await self._begin(timeout)
            read = partial(group.request, partial(reading.shelf.read, deadline=deadline))
            if group.refs:
                request = await _in_thread(read, deadline, reading.threads)
            else:
                request = read()
            return await self._run(self._infer(request, deadline))
        except TriwardError as error:
            return error


@dataclass(frozen=True)
class _Reading:
    """Shared reading of one call's media, as many at once as there are requests in flight."""

    shelf: Shelf
    threads: ThreadPoolExecutor


async def _in_thread(
    read: Callable[[], T],
    deadline: Deadline,
    threads: ThreadPoolExecutor | None = None,
) -> T:
    """Make a request in one of `threads`, or of the event loop's own."""
    reading = asyncio.get_running_loop().run_in_executor(threads, read)
    try:
        return await asyncio.wait_for(reading, deadline.remaining())
    except TriwardError:
        raise
    except (TimeoutError, asyncio.TimeoutError):  # one and the same from Python 3.11 on
        raise deadline.exceeded() from None
