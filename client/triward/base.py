"""The part of a client that is the same with threads and in asyncio: everything that does not wait.

A call is a generator of steps, as in httpx's authentication: it yields what is to be asked, gets
the answer or the exception, and returns the call's result. The clients carry the steps out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from triward import protocol
from triward.channel import Address, Tls, Url
from triward.connection import diagnose, failed_to_connect
from triward.contract import is_refusal, refusal
from triward.conversation import RewardRequest
from triward.deadline import Deadline
from triward.errors import ServerUnavailable, TriwardError, code_of, from_triton
from triward.process import PerProcess
from triward.routing import (
    Pause,
    Router,
    Routing,
    check_routing,
    prompt_key,
    routed,
    tokens_key,
)
from triward.tokens import TokenRequest
from triward.wire import infer_arguments, read_scores, token_arguments

if TYPE_CHECKING:
    from tritonclient.utils import InferenceServerException

    from triward.sharedmemory import Place

T = TypeVar("T")

POLL = 0.5  # seconds between two looks at a server that starts


@dataclass(frozen=True)
class Call:
    """A call of tritonclient's.

    Attributes:
        method: of its client: `infer`, or one that asks about servers, models or shared memory.
        arguments: of the method.
        server: who is asked; None leaves it to gRPC.
    """

    method: str
    arguments: Mapping[str, Any]
    server: str | None = None


# A call, a pause, or a function that may block for a moment.
Step = Call | Pause | Callable[[], Any]
Steps = Generator[Step, Any, T]


class Contact:
    """State of this process's contact with the servers.

    Attributes:
        made: True if one has answered; or if several are named, of which one may be away. Then a
            call that finds none is worth trying again.
        waited: True if the time for servers that start is over.
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
        routing: Routing,
        transport: object,
    ) -> None:
        Deadline(timeout)  # raises for a timeout that no call could use
        if not 0 <= wait_ready <= threading.TIMEOUT_MAX:
            raise ValueError(f"wait_ready must be 0 or more seconds and finite, got {wait_ready!r}")
        check_routing(routing, url)
        self._address = Address(url, tls, max_attempts)
        self._routing: Routing = routing
        self._router = PerProcess(lambda: Router(self._address.urls))
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
        """Pickle the settings; connections stay behind."""
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
            "routing": self._routing,
        }

    def __repr__(self) -> str:
        """Names the class and the servers."""
        return f"{type(self).__name__}({str(self._address)!r})"

    def _deadline(self, timeout: float | None) -> Deadline:
        if self._closed:
            raise RuntimeError(f"this {type(self).__name__} is closed")
        return Deadline(self._timeout if timeout is None else timeout)

    def _infer(self, request: RewardRequest, deadline: Deadline) -> Steps[list[float]]:
        """Ask for a request's scores."""
        yield from self._meet(deadline)
        send = partial(self._send, request, deadline, None)
        return (yield from self._routed(partial(prompt_key, request), deadline, send))

    def _routed(
        self,
        key: Callable[[], bytes],
        deadline: Deadline,
        send: Callable[[str | None], Steps[list[float]]],
    ) -> Steps[list[float]]:
        """Ask whoever the routing chooses; the key of a prompt takes a moment."""
        if self._routing == "round_robin":
            return (yield from send(None))
        attempts, router = self._address.max_attempts, self._router.get()
        return (
            yield from routed(router, (yield key), deadline, attempts, send, lambda: self._closed)
        )

    def _send(
        self,
        request: RewardRequest,
        deadline: Deadline,
        media: Place | None,
        server: str | None = None,
    ) -> Steps[list[float]]:
        """Ask a server that is there; `media` if they are in shared memory."""
        self._wait(deadline)
        remaining = deadline.remaining()
        sent = infer_arguments(request, model=self._model, remaining=remaining, media=media)
        call = Call("infer", {**sent, "headers": self._headers}, server)
        result = yield from self._ask(call, deadline)
        return read_scores(result, len(request.responses))

    def _infer_tokens(self, request: TokenRequest, deadline: Deadline) -> Steps[list[float]]:
        """Ask the forward model for a request's scores."""
        yield from self._meet(deadline)
        send = partial(self._send_tokens, request, deadline)
        return (yield from self._routed(partial(tokens_key, request), deadline, send))

    def _send_tokens(
        self, request: TokenRequest, deadline: Deadline, server: str | None
    ) -> Steps[list[float]]:
        self._wait(deadline)
        version = yield from self._served_version(deadline, server)
        sent = token_arguments(request, model=self._model, remaining=deadline.remaining())
        arguments = {**sent, "model_version": version, "headers": self._headers}
        call = Call("infer", arguments, server)
        result = yield from self._ask(call, deadline, sent["model_name"])
        return read_scores(result, request.responses)

    def _served_version(self, deadline: Deadline, server: str | None) -> Steps[str]:
        """Return the version that the public model uses.

        Its forward model may have others loaded, before and after a change of versions, and Triton
        would take the highest. Asked each time, since it may change between two calls.

        Raises:
            ServerUnavailable: no server that is asked takes new requests.
        """
        asked = self._address.at(server)
        for _ in range(asked.max_attempts):  # several servers take turns
            call = self._short(deadline, "get_model_metadata", model_name=self._model)
            about = yield from self._ask(replace(call, server=server), deadline)
            if about.versions[0] != protocol.DRAINING_VERSION:
                return str(about.versions[0])
        raise ServerUnavailable(f"{asked}: the server is shutting down")

    def _ready(self, deadline: Deadline) -> Steps[bool]:
        self._wait(deadline)
        call = self._short(deadline, "is_model_ready", model_name=self._model)
        ready = yield from self._ask(call, deadline)
        self._contact.get().made = True
        return bool(ready)

    def _check_ready(self, deadline: Deadline) -> Steps[None]:
        if not (yield from self._ready(deadline)):
            # Which says so where there is no such model.
            call = self._short(deadline, "get_model_metadata", model_name=self._model)
            yield from self._ask(call, deadline)
            raise ServerUnavailable(f"{self._address}: the model {self._model!r} is not ready")

    def _meet(self, deadline: Deadline) -> Steps[None]:
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
            yield self._short(deadline, "is_server_live")
        except InferenceServerException as error:
            if code_of(error) == "DEADLINE_EXCEEDED":
                raise deadline.exceeded() from error
            if lacks_connection(error):
                reason = yield self._diagnosis(error, deadline)
                if reason:
                    raise ServerUnavailable(reason) from error
                return  # the call's own attempts may find one
        contact.made = True

    def _ask(self, call: Call, deadline: Deadline, model: str | None = None) -> Steps[Any]:
        """Return the call's result; raise this package's errors in place of tritonclient's.

        Args:
            call: what is asked.
            deadline: of the whole.
            model: who is asked; None for the client's own.
        """
        # Imported when something is asked, here and elsewhere: numpy and gRPC take longer to load
        # than all the rest.
        from tritonclient.utils import InferenceServerException

        try:
            return (yield call)
        except InferenceServerException as error:
            asked = self._address.at(call.server)
            explained = yield from self._explained(error, deadline, model or self._model, asked)
            raise explained from error

    def _explained(
        self, error: InferenceServerException, deadline: Deadline, model: str, asked: Address
    ) -> Steps[TriwardError]:
        """Return what callers see; find out what tritonclient's error leaves open."""
        message, url = error.message() or "", str(asked)
        if lacks_connection(error) and asked is self._address:
            reason = yield self._diagnosis(error, deadline)
            if reason:
                return ServerUnavailable(reason)
        if code_of(error) == "INVALID_ARGUMENT" and is_refusal(message):
            with suppress(TriwardError):
                call = self._short(deadline, "get_server_metadata")
                about = yield from self._ask(call, deadline, model)
                return refusal(message, url=url, model=model, server=about.name)
        if code_of(error) == "DEADLINE_EXCEEDED":
            return deadline.exceeded(message)
        return from_triton(error, model=model, url=url)

    def _diagnosis(self, error: InferenceServerException, deadline: Deadline) -> Step:
        return partial(diagnose, self._address, error.message(), deadline.left)

    def _short(self, deadline: Deadline, method: str, **arguments: Any) -> Call:
        """Return a call other than `infer`."""
        options = {"headers": self._headers, "client_timeout": deadline.remaining()}
        return Call(method, {**arguments, **options})

    def _wait(self, deadline: Deadline) -> None:
        """Say that from here on the server has the time."""
        deadline.begin(f"waiting for {self._address} (its queue and its work)")

    def _waited(self, last: TriwardError) -> ServerUnavailable:
        """Return the error for servers that did not start in time."""
        waited = f"waited {self._wait_ready:g} s for the model {self._model!r}"
        return ServerUnavailable(f"{waited}; at last: {last}")


def lacks_connection(error: InferenceServerException) -> bool:
    """Return True if no server has answered."""
    return code_of(error) == "UNAVAILABLE" and failed_to_connect(error.message() or "")
