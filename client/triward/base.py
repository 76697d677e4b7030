"""What the blocking and the asyncio client share: everything that does not wait."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence, Sized
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar
from weakref import WeakSet

from triward.channel import Address, Tls, Url
from triward.connection import failed_to_connect
from triward.contract import is_refusal
from triward.conversation import RewardRequest
from triward.deadline import Deadline
from triward.errors import (
    DeadlineExceeded,
    InvalidRequest,
    MediaError,
    ServerError,
    ServerUnavailable,
    TriwardError,
    code_of,
    from_triton,
    located,
)
from triward.grouping import Group, place
from triward.tokens import TokenRequest
from triward.wire import infer_arguments, token_arguments

if TYPE_CHECKING:
    from tritonclient.utils import InferenceServerException

    from triward.sharedmemory import Place

OnError = Literal["raise", "return"]
Outcome = float | TriwardError
T = TypeVar("T")

POLL = 0.5  # seconds between two looks at a server that starts

# Requests that are finished but not handed out, since an earlier one is not, for each in flight.
AHEAD = 2


class PerProcess(Generic[T]):
    """Something that belongs to one process: made when it is first asked for, anew after a fork.

    Args:
        make: makes it.
    """

    def __init__(self, make: Callable[[], T]) -> None:  # noqa: D107 - the class says it
        self._make = make
        self._lock = threading.Lock()
        self._made: list[T] = []
        _FORGETFUL.add(self)

    def get(self) -> T:
        """The process's own."""
        with self._lock:
            if not self._made:
                self._made.append(self._make())
            return self._made[0]

    def take(self) -> T | None:
        """What was made in this process, if anything; the next `get` makes another."""
        with self._lock:
            return self._made.pop() if self._made else None

    def forget(self) -> None:
        """In a fork's child: what is here is the parent's, and so may be the lock."""
        # Not dropped: a channel that is closed in a child waits for threads of its parent.
        _ABANDONED.append(self._made)
        self._lock, self._made = threading.Lock(), []


_FORGETFUL: WeakSet[PerProcess[Any]] = WeakSet()
_ABANDONED: list[object] = []


def _after_fork() -> None:
    for each in list(_FORGETFUL):
        each.forget()


if hasattr(os, "register_at_fork"):  # where there is a fork
    os.register_at_fork(after_in_child=_after_fork)


class Contact:
    """What this process knows of the servers.

    Attributes:
        made: whether one has answered; or several are named, of which one may be away. Then a call
            that finds none is worth trying again.
        waited: whether the time for servers that start is over.
        lock: of those who wait.
    """

    def __init__(self, made: bool) -> None:  # noqa: D107 - the class says it
        self.made = made
        self.waited = False
        self.lock = threading.Lock()


class BaseClient:
    """Settings of a client. Pickled or copied, they make a client that connects for itself."""

    def __init__(  # noqa: D107 - the class says it
        self,
        url: Url,
        timeout: float,
        model: str,
        tls: Tls | None,
        headers: Mapping[str, str] | None,
        max_attempts: int,
        wait_ready: float,
        transport: object,
    ) -> None:
        Deadline(timeout)  # raises for a timeout that no call could use
        if not 0 <= wait_ready <= threading.TIMEOUT_MAX:
            raise ValueError(f"wait_ready must be 0 or more seconds and finite, got {wait_ready!r}")
        self._address = Address(url, tls, max_attempts)
        self._timeout = timeout
        self._model = model
        self._headers = dict(headers or {})
        self._wait_ready = wait_ready
        self._closed = False
        known = transport is not None or self._address.single is None
        self._contact = PerProcess(lambda: Contact(known))

    @property
    def model(self) -> str:
        """Name of the ensemble."""
        return self._model

    def __reduce__(self) -> tuple[Any, ...]:
        """The settings; connections stay behind."""
        return partial(type(self), self._address.url, **self._settings()), ()

    def _settings(self) -> dict[str, Any]:
        """Arguments beside the address that make an equal client."""
        return {
            "timeout": self._timeout,
            "model": self._model,
            "tls": self._address.tls,
            "headers": self._headers,
            "max_attempts": self._address.max_attempts,
            "wait_ready": self._wait_ready,
        }

    def __repr__(self) -> str:
        """Names the class and the servers."""
        return f"{type(self).__name__}({str(self._address)!r})"

    def _deadline(self, timeout: float | None) -> Deadline:
        if self._closed:
            raise RuntimeError(f"this {type(self).__name__} is closed")
        return Deadline(self._timeout if timeout is None else timeout)

    def _arguments(
        self, request: RewardRequest, deadline: Deadline, media: Place | None = None
    ) -> dict[str, Any]:
        """Of `infer`, for what is left of the deadline."""
        self._wait(deadline)
        remaining = deadline.remaining()
        arguments = infer_arguments(request, model=self._model, remaining=remaining, media=media)
        return {**arguments, "headers": self._headers}

    def _token_arguments(self, request: TokenRequest, deadline: Deadline) -> dict[str, Any]:
        """The same for the forward model."""
        self._wait(deadline)
        remaining = deadline.remaining()
        arguments = token_arguments(request, model=self._model, remaining=remaining)
        return {**arguments, "headers": self._headers}

    def _wait(self, deadline: Deadline) -> None:
        """Say that from here on the server has the time."""
        deadline.begin(f"waiting for {self._address} (its queue and its work)")

    def _short(self, deadline: Deadline) -> dict[str, Any]:
        """Of calls other than `infer`."""
        return {"headers": self._headers, "client_timeout": deadline.remaining()}

    def _translation(
        self, error: InferenceServerException, deadline: Deadline, model: str
    ) -> TriwardError:
        """What callers see in place of tritonclient's error, if nothing more is to be found out."""
        if code_of(error) == "DEADLINE_EXCEEDED":
            return deadline.exceeded(error.message() or "")
        return from_triton(error, model=model, url=str(self._address))

    def _not_ready(self) -> ServerUnavailable:
        return ServerUnavailable(f"{self._address}: the model {self._model!r} is not ready")

    def _waited(self, last: TriwardError) -> ServerUnavailable:
        """For servers that did not start in time."""
        waited = f"waited {self._wait_ready:g} s for the model {self._model!r}"
        return ServerUnavailable(f"{waited}; at last: {last}")


def lacks_connection(error: InferenceServerException) -> bool:
    """Whether no server has answered."""
    return code_of(error) == "UNAVAILABLE" and failed_to_connect(error.message() or "")


def lacks_tensors(error: InferenceServerException) -> bool:
    """Whether Triton has found that the model has other tensors."""
    return code_of(error) == "INVALID_ARGUMENT" and is_refusal(error.message() or "")


def check_many(concurrency: int, on_error: OnError) -> None:
    """Raise ValueError for what `score_many` cannot use."""
    if concurrency < 1:
        raise ValueError(f"concurrency must be at least 1, got {concurrency}")
    if on_error not in ("raise", "return"):
        raise ValueError(f"on_error must be 'raise' or 'return', got {on_error!r}")


def stands_for_all(error: TriwardError, group: Group) -> bool:
    """Whether a group's error is the error of each of its conversations.

    A wrong input, or a score that is not finite, may be one conversation's alone; then each is
    asked for by itself. Media that cannot be read are the prompt's, and a server that is away or
    late is so for all.
    """
    shared = isinstance(error, MediaError)
    return group.size == 1 or shared or not isinstance(error, (InvalidRequest, ServerError))


def failed(error: TriwardError, group: Group, done: int = 0) -> list[Outcome]:
    """An error for each conversation of a group behind the first `done`, its place in front."""
    places = (place(group.first + offset) for offset in range(done, group.size))
    return [located(error, where) for where in places]


def cause(outcome: Outcome) -> TriwardError:
    """What an error with a place in front was made from."""
    assert isinstance(outcome, TriwardError)
    return outcome.__cause__ if isinstance(outcome.__cause__, TriwardError) else outcome


def ends_singles(outcome: Outcome, on_error: OnError) -> bool:
    """Whether the conversations behind one that was asked for alone need not be asked for."""
    if isinstance(outcome, (ServerUnavailable, DeadlineExceeded)):
        return True
    return on_error == "raise" and isinstance(outcome, TriwardError)


class Stop:
    """The first group that failed: what comes behind it is not needed."""

    def __init__(self) -> None:  # noqa: D107 - the class says it
        self._lock = threading.Lock()
        self._first = float("inf")

    @property
    def is_set(self) -> bool:
        """Whether one failed."""
        return self._first < float("inf")

    def at(self, first: float) -> None:
        """The group whose first conversation has this index failed."""
        with self._lock:
            self._first = min(self._first, first)

    def skips(self, group: Group) -> bool:
        """Whether a group lies behind it."""
        return group.first > self._first


def any_failed(outcomes: Sequence[Outcome]) -> bool:
    """Whether an error is among them."""
    return any(isinstance(outcome, TriwardError) for outcome in outcomes)


def checked(outcomes: list[Outcome], on_error: OnError) -> list[Outcome]:
    """The outcomes.

    Raises:
        TriwardError: the first error among them, if `on_error` says so.
    """
    if on_error == "raise":
        for outcome in outcomes:
            if isinstance(outcome, TriwardError):
                raise outcome
    return outcomes


def ranked(scores: Sequence[float]) -> list[int]:
    """Indices, best first; equal scores keep their order."""
    return sorted(range(len(scores)), key=lambda index: -scores[index])


class Progress:
    """A bar of tqdm's on standard error, or nothing.

    Args:
        wanted: whether to show it.
        conversations: what is gone through; the bar knows its end if they have a length.
    """

    def __init__(self, wanted: bool, conversations: object) -> None:  # noqa: D107
        self._bar: Any = None
        if wanted:
            from tqdm.auto import tqdm

            total = len(conversations) if isinstance(conversations, Sized) else None
            self._bar = tqdm(total=total, unit="conversation")

    def counting(self, outcomes: list[Outcome]) -> list[Outcome]:
        """The same outcomes, which are counted as done."""
        if self._bar is not None:
            self._bar.update(len(outcomes))
        return outcomes

    def __enter__(self) -> Progress:
        """The bar itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
