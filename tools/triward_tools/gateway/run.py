"""Serving the application until a signal."""

from __future__ import annotations

import uvicorn
from triward.aio import AsyncRewardClient
from triward.base import BaseClient

from triward_tools.gateway.app import Gateway, web_application
from triward_tools.gateway.settings import Settings
from triward_tools.listening import serve_until_signal

# Connections beyond so many times the requests that may run are refused with 503 by uvicorn.
_CONNECTIONS = 8


def serve(client: BaseClient, settings: Settings, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM, and end the answers that were begun.

    Args:
        client: whose servers are asked, in connections of the gateway's own.
        settings: see there.
        host: where to listen.
        port: likewise; 0 takes a free one. The first line on standard output names it.

    Raises:
        InvalidRequest: nothing can listen there.
        TriwardError: the server of HTTP ended by itself.
    """
    gateway = Gateway(AsyncRewardClient.like(client), settings)
    serve_until_signal(http_server(gateway, settings), host, port)


def http_server(gateway: Gateway, settings: Settings) -> uvicorn.Server:
    """Return a server of HTTP that is yet to be run, with the settings' limits."""
    return uvicorn.Server(
        uvicorn.Config(
            web_application(gateway),
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=_CONNECTIONS * settings.max_requests,
            timeout_graceful_shutdown=int(settings.timeout) + 1,
            lifespan="on",
        )
    )
