"""Scheduling of many conversations, without I/O: the clients bring threads or tasks.

`Schedule` says which request begins next and which one is handed out next, `ask_group` which
requests a group of conversations takes and what each conversation's outcome is.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from typing import Any, Generic, Literal, Protocol, TypeVar

from triward.conversation import Messages
from triward.errors import (
    DeadlineExceeded,
    InvalidRequest,
    MediaError,
    ServerError,
    ServerUnavailable,
    TriwardError,
    located,
)
from triward.grouping import Group, grouped, place

OnError = Literal["raise", "return"]
Outcome = float | TriwardError
Answer = list[float] | TriwardError

# Requests that are finished but not handed out, since an earlier one is not, for each in flight.
_AHEAD = 2


class _Future(Protocol):
    """The part of a thread's future or an asyncio task that a schedule uses."""

    def done(self) -> bool: ...


F = TypeVar("F", bound=_Future)


class Schedule(Generic[F]):
    """Requests under way in the order of their conversations.

    Args:
        conversations: taken one by one, as earlier ones finish.
        concurrency: requests in flight at once.
        on_error: "raise" ends the schedule at the first group that fails.

    Attributes:
        pending: futures that have been started and not handed out.

    Raises:
        ValueError: an argument cannot be used.
    """

    def __init__(  # noqa: D107 - the class says it
        self, conversations: Iterable[Messages], concurrency: int, on_error: OnError
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, got {concurrency}")
        if on_error not in ("raise", "return"):
            raise ValueError(f"on_error must be 'raise' or 'return', got {on_error!r}")
        self.concurrency = concurrency
        self.on_error = on_error
        self.conversations = conversations
        self.pending: deque[F] = deque()
        self._lock = threading.Lock()
        self._failed = float("inf")  # index of the first conversation of the first group that did

    def run(self, start: Callable[[Group], F]) -> Iterator[F | None]:
        """Start requests, and yield the future to hand out next, or None after each start.

        A future stays in `pending` until the next step. The driver may wait for it.
        """
        for group in grouped(self.conversations):
            if self._failed < float("inf"):
                break
            self.pending.append(start(group))
            yield None
            while self.pending and (
                self.pending[0].done() or len(self.pending) > _AHEAD * self.concurrency
            ):
                yield self.pending[0]
                self.pending.popleft()
        while self.pending:
            yield self.pending[0]
            self.pending.popleft()

    def skips(self, group: Group) -> bool:
        """Return True if a group before this one failed, so that nobody looks at its outcomes."""
        return group.first > self._failed

    def note(self, group: Group, outcomes: Sequence[Outcome]) -> None:
        """Take notice of a group's failure, if there is one and it ends the schedule."""
        if self.on_error == "raise" and any(isinstance(each, TriwardError) for each in outcomes):
            self._stop(group.first)

    def stop(self) -> None:
        """Skip every group that has not begun."""
        self._stop(-1)

    def _stop(self, first: float) -> None:
        with self._lock:
            self._failed = min(self._failed, first)

    def checked(self, outcomes: list[Outcome]) -> list[Outcome]:
        """Return the outcomes.

        Raises:
            TriwardError: the first error among them, if `on_error` says so.
        """
        if self.on_error == "raise":
            for outcome in outcomes:
                if isinstance(outcome, TriwardError):
                    raise outcome
        return outcomes


def ask_group(group: Group, on_error: OnError) -> Generator[Group, Answer, list[Outcome]]:
    """Yield the groups to ask for, take their answers, and return an outcome per conversation.

    A wrong input, or a score that is not finite, may be one conversation's alone; then each is
    asked for by itself.
    """
    answer = group.error or (yield group)
    if not isinstance(answer, TriwardError):
        return list(answer)
    if _stands_for_all(answer, group):
        return _failed(answer, group)
    outcomes: list[Outcome] = []
    for single in group.alone():
        answer = yield single
        if not isinstance(answer, TriwardError):
            outcomes += answer
        elif on_error == "raise" or isinstance(answer, (ServerUnavailable, DeadlineExceeded)):
            return outcomes + _failed(answer, group, len(outcomes))
        else:
            outcomes += _failed(answer, single)
    return outcomes


def _stands_for_all(error: TriwardError, group: Group) -> bool:
    """Return True if a group's error is the error of each of its conversations.

    Media that cannot be read are the prompt's, and a server that is away or late is so for all.
    """
    shared = isinstance(error, MediaError)
    return group.size == 1 or shared or not isinstance(error, (InvalidRequest, ServerError))


def _failed(error: TriwardError, group: Group, done: int = 0) -> list[Outcome]:
    """Return the error for each conversation of a group behind the first `done`."""
    return [located(error, place(group.first + offset)) for offset in range(done, group.size)]


def ranked(scores: Sequence[float]) -> list[int]:
    """Return indices, best first; equal scores keep their order."""
    return sorted(range(len(scores)), key=lambda index: -scores[index])


class ProgressBar:
    """A bar of tqdm's on standard error, or nothing.

    Args:
        wanted: show it.
        conversations: what is gone through; the bar knows its end if they have a length.
    """

    def __init__(self, wanted: bool, conversations: object) -> None:  # noqa: D107
        self._bar: Any = None
        if wanted:
            from tqdm.auto import tqdm

            total = len(conversations) if isinstance(conversations, Sized) else None
            self._bar = tqdm(total=total, unit="conversation")

    def counting(self, outcomes: list[Outcome]) -> list[Outcome]:
        """Count outcomes as done, and return them."""
        if self._bar is not None:
            self._bar.update(len(outcomes))
        return outcomes

    def __enter__(self) -> ProgressBar:
        """Return the bar."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
