"""The gateway as an application: bounded requests in, rewards or errors out.

An error is `{"error": {"status": int, "type": str, "message": str}}` with that status:

    400  wrong input                 404  another model
    408  the body did not arrive     413  a body that is too long
    502  the Triward server failed, or gave no finite number
    503  it is overloaded or away, or too many requests run at once; trainers ask again
    504  the timeout ran out

A caller that leaves before its answer ends its calls to the server; the counters have it as 499.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from time import monotonic
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.requests import ClientDisconnect
from triward.aio import AsyncRewardClient
from triward.conversation import Messages
from triward.deadline import Deadline
from triward.errors import TriwardError
from triward.integrations.openrlhf import http_status, read_json

from triward_tools.gateway import sglang, trainers, vllm
from triward_tools.gateway.addresses import public_opener
from triward_tools.gateway.asking import ask, by_prompt
from triward_tools.gateway.counters import Counters
from triward_tools.gateway.media import MediaReader
from triward_tools.gateway.settings import Door, Settings, UnknownModel

DOORS = (trainers.OPENRLHF, trainers.LLAMAFACTORY, trainers.SLIME, vllm.SCORE, vllm.POOLING)

# Bodies of all requests together hold at most so many times the bytes of the longest one.
_HELD = 16
_GONE = 499  # as nginx counts callers that have left
_READERS = 8  # threads that parse bodies and decode or fetch media

Opener = Callable[..., Any]
T = TypeVar("T")


class Gone(Exception):
    """The caller has left before its answer."""


class Refused(Exception):
    """A request that is not looked into."""

    def __init__(self, status: HTTPStatus, message: str) -> None:  # noqa: D107
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class _Read:
    door: Door
    request: dict[str, Any]
    conversations: list[Messages]
    order: list[int]


class Gateway:
    """The work of the application's routes.

    Args:
        client: whom to ask.
        settings: see there.
        opener: opens URLs of images, if they are allowed; by default those of public addresses.
    """

    def __init__(  # noqa: D107 - the class says it
        self, client: AsyncRewardClient, settings: Settings, opener: Opener | None = None
    ) -> None:
        self._client = client
        self._settings = settings
        self._opener = (opener or public_opener()) if settings.allow_urls else None
        self._threads = ThreadPoolExecutor(_READERS, "triward-gateway")
        self.counters = Counters()

    async def classify(self, request: Request) -> Response:
        """Answer /classify, by the fields of whose body SGLang and vLLM are told apart."""
        return await self._answered(request, (sglang.CLASSIFY, vllm.CLASSIFY))

    async def answer(self, door: Door, request: Request) -> Response:
        """Answer a request to one door."""
        return await self._answered(request, (door,))

    async def health(self, request: Request) -> Response:
        """Return 200 if the Triward server can be asked, else 503."""
        try:
            await self._client.check_ready(timeout=min(5.0, self._settings.timeout))
        except TriwardError as error:
            return _failure(HTTPStatus.SERVICE_UNAVAILABLE, error)
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """Return the counters."""
        return PlainTextResponse(self.counters.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        """Return OpenAI's list of models."""
        data = [{"id": name, "object": "model"} for name in self._settings.models]
        return JSONResponse({"object": "list", "data": data})

    async def close(self) -> None:
        """Close the client."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._client.close()

    async def _answered(self, request: Request, doors: tuple[Door, ...]) -> Response:
        counters, began = self.counters, monotonic()
        if counters.running >= self._settings.max_requests:
            message = f"{counters.running} requests are running, which is the limit"
            busy = Refused(HTTPStatus.SERVICE_UNAVAILABLE, message)
            response = _failure(busy.status, busy)
        else:
            counters.running += 1
            try:
                response = await self._tried(request, doors)
            finally:
                counters.running -= 1
        # Which of /classify's doors it was is known only behind the body.
        door = getattr(request.state, "door", doors[-1]).name
        counters.requests[door, response.status_code] += 1
        if response.status_code == HTTPStatus.OK:
            counters.seconds[door] += monotonic() - began  # type: ignore[assignment]
        return response

    async def _tried(self, request: Request, doors: tuple[Door, ...]) -> Response:
        deadline = Deadline(self._settings.timeout)
        try:
            body = await self._body(request, deadline)
            try:
                return await self._scored(request, body, doors, deadline)
            finally:
                self.counters.held_bytes -= len(body)
        except Refused as error:
            return _failure(error.status, error)
        except UnknownModel as error:
            return _failure(HTTPStatus.NOT_FOUND, error)
        except Gone:
            return Response(status_code=_GONE)  # which nobody reads
        except TriwardError as error:
            return _failure(http_status(error), error)

    async def _body(self, request: Request, deadline: Deadline) -> bytes:
        """Read a body; `held_bytes` counts it from here on."""
        body = bytearray()
        try:
            await asyncio.wait_for(self._fill(body, request), deadline.left)
        except BaseException as error:
            self.counters.held_bytes -= len(body)
            if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
                message = f"the body did not arrive within {self._settings.timeout:g} s"
                raise Refused(HTTPStatus.REQUEST_TIMEOUT, message) from None
            if isinstance(error, ClientDisconnect):
                message = f"the body broke off after {len(body)} bytes"
                raise Refused(HTTPStatus.BAD_REQUEST, message) from None
            raise
        return bytes(body)

    async def _fill(self, body: bytearray, request: Request) -> None:
        limit = self._settings.max_body_bytes
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise _too_long(f"has {declared}", limit)
        async for chunk in request.stream():
            body += chunk
            self.counters.held_bytes += len(chunk)
            if len(body) > limit:
                raise _too_long("is longer", limit)
            if self.counters.held_bytes > _HELD * limit:
                message = f"the bodies of all requests hold {_HELD * limit} bytes, the limit"
                raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, message)

    async def _scored(
        self, request: Request, body: bytes, doors: tuple[Door, ...], deadline: Deadline
    ) -> Response:
        work = self._worked(request, body, doors, deadline)
        read, scores = await _unless_gone(request, work)
        self.counters.scores[read.door.name] += len(scores)
        return JSONResponse(read.door.answer(read.request, scores, self._settings))

    async def _worked(
        self, request: Request, body: bytes, doors: tuple[Door, ...], deadline: Deadline
    ) -> tuple[_Read, list[float]]:
        """Return what was asked and its scores."""
        reading = partial(self._read, request, body, doors, deadline)
        loop = asyncio.get_running_loop()
        read = await _within(loop.run_in_executor(self._threads, reading), deadline)
        asking = ask(self._client, read.conversations, read.order, deadline.remaining())
        return read, await _within(asking, deadline)

    def _read(
        self, request: Request, body: bytes, doors: tuple[Door, ...], deadline: Deadline
    ) -> _Read:
        """Return what is to be scored; in a thread, since media are decoded or fetched."""
        fields = read_json(body)
        native = "text" in fields or "input_ids" in fields
        door = doors[0] if native or len(doors) == 1 else doors[-1]
        request.state.door = door
        asked = door.read(fields, self._settings)
        order = by_prompt(asked)
        media = MediaReader(deadline, self._opener)
        return _Read(door, fields, [media.carried(messages) for messages in asked], order)


def web_application(gateway: Gateway) -> FastAPI:
    """Return the application, which closes the gateway at its end."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await gateway.close()

    app = FastAPI(title="Triward gateway", lifespan=lifespan, openapi_url=None)
    plain: dict[str, Any] = {"response_model": None}
    for door in DOORS:
        for path in door.paths:
            app.add_api_route(path, _route(gateway, door), methods=["POST"], **plain)
    app.add_api_route("/classify", gateway.classify, methods=["POST", "PUT"], **plain)
    app.add_api_route("/v1/classify", gateway.classify, methods=["POST"], **plain)
    app.add_api_route("/health", gateway.health, methods=["GET"], **plain)
    app.add_api_route("/metrics", gateway.metrics, methods=["GET"], **plain)
    app.add_api_route("/v1/models", gateway.models, methods=["GET"], **plain)
    return app


def _route(gateway: Gateway, door: Door) -> Callable[..., Any]:
    async def route(request: Request) -> Response:
        return await gateway.answer(door, request)

    return route


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Wait for work, which is cancelled once the caller has left.

    Raises:
        Gone: it has.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    """Wait until the caller of a request whose body is read has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _within(work: Any, deadline: Deadline) -> Any:
    """Wait for work, at most until the deadline."""
    try:
        return await asyncio.wait_for(work, deadline.remaining())
    except TriwardError:
        raise
    except (TimeoutError, asyncio.TimeoutError):  # one and the same from Python 3.11 on
        raise deadline.exceeded() from None


def _failure(status: HTTPStatus, error: Exception) -> Response:
    told = {"status": int(status), "type": type(error).__name__, "message": str(error)}
    headers = {"Retry-After": "1"} if status == HTTPStatus.SERVICE_UNAVAILABLE else None
    return JSONResponse({"error": told}, status, headers)


def _too_long(what: str, limit: int) -> Refused:
    message = f"the body {what} bytes, the limit is {limit}"
    return Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)
