"""Deadlines that cancel nothing: the caller goes on in time, the call ends a little later.

gRPC cancels a request on the server when its deadline passes. Triton 24.10 sometimes keeps such a
request for ever, and the model that took it then never unloads; cancellations can also crash it
(its issue 7368). So gRPC's deadline is later than the caller's by `GRACE`; until then Triton drops
the request from its queues by the `timeout` that it is sent, or finishes it for nobody.
`benchmarks/deadlines.py` measures both ways.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

GRACE = 2.0  # seconds


class Patient:
    """`tritonclient.grpc.InferenceServerClient` whose `infer` leaves a late call alone.

    Args:
        client: does the work; all other attributes are its own.
    """

    def __init__(self, client: Any) -> None:  # noqa: D107 - the class says it
        self._client = client

    def __getattr__(self, name: str) -> Any:
        """Return anything but `infer` of the client."""
        return getattr(self._client, name)

    def infer(self, *, client_timeout: float, **arguments: Any) -> Any:
        """Return the result.

        Raises:
            InferenceServerException: the call failed, or had no answer after `client_timeout`
                seconds.
        """
        answered = threading.Event()
        answer: list[Any] = []

        def callback(result: Any, error: Exception | None) -> None:
            answer.extend((result, error))
            answered.set()

        self._client.async_infer(
            callback=callback, client_timeout=client_timeout + GRACE, **arguments
        )
        if not answered.wait(client_timeout):
            raise _late()
        result, error = answer
        if error is not None:
            raise error
        return result


class AsyncPatient:
    """`tritonclient.grpc.aio.InferenceServerClient` whose `infer` leaves a late call alone."""

    def __init__(self, client: Any) -> None:  # noqa: D107 - the class says it
        self._client = client
        self._calls: set[asyncio.Future[Any]] = set()

    def __getattr__(self, name: str) -> Any:
        """Return anything but `infer` of the client."""
        return getattr(self._client, name)

    async def infer(self, *, client_timeout: float, **arguments: Any) -> Any:
        """Return the result; raises as `Patient.infer` does. A cancelled task cancels its call."""
        import asyncio  # here, since blocking callers need none

        call = asyncio.ensure_future(
            self._client.infer(client_timeout=client_timeout + GRACE, **arguments)
        )
        try:
            done, _ = await asyncio.wait({call}, timeout=client_timeout)
        except asyncio.CancelledError:
            call.cancel()
            raise
        if done:
            return call.result()
        # The event loop holds tasks weakly, and complains of an exception that nobody looks at.
        self._calls.add(call)
        call.add_done_callback(self._forget)
        raise _late()

    def _forget(self, call: asyncio.Future[Any]) -> None:
        self._calls.discard(call)
        if not call.cancelled():
            call.exception()


def _late() -> Exception:
    from tritonclient.utils import InferenceServerException

    error: Exception = InferenceServerException(
        "Deadline Exceeded", status="StatusCode.DEADLINE_EXCEEDED"
    )
    return error
