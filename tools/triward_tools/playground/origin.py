"""Refusal of requests that pages of other sites make in a visitor's browser."""

from __future__ import annotations

from typing import Any


class SameOrigin:
    """Answers 403 where a request's Origin names another host or port than its Host.

    A browser sends the Origin with each request that is not GET, and with those whose answer a
    script of another site would read. What is no browser sends none.
    """

    def __init__(self, app: Any) -> None:  # noqa: D107 - ASGI, as Starlette adds it
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it before its body is read."""
        from starlette.datastructures import Headers
        from starlette.responses import PlainTextResponse

        if scope["type"] in ("http", "websocket"):
            headers = Headers(scope=scope)
            if not is_own(headers.get("origin"), headers.get("host", "")):
                said = "this page answers no other site; a proxy in front must keep the Host header"
                await PlainTextResponse(said, status_code=403)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def is_own(origin: str | None, host: str) -> bool:
    """Return True if there is no Origin, or it is of this Host, port included."""
    return origin is None or origin.partition("://")[2].lower() == host.lower() != ""
