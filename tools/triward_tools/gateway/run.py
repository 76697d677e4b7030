"""Serving the application until a signal."""

from __future__ import annotations

import socket
import threading
from queue import SimpleQueue

import uvicorn
from triward.aio import AsyncRewardClient
from triward.base import BaseClient
from triward.errors import InvalidRequest, TriwardError
from triward.stopping import stopping, wait_for

from triward_tools.gateway.app import Gateway, web_application
from triward_tools.gateway.settings import Settings

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
    listener = listen(host, port)
    server = http_server(Gateway(AsyncRewardClient.like(client), settings), settings)
    with stopping() as stops:
        # uvicorn takes signals over in the main thread alone, and raises them again at its end.
        thread = threading.Thread(target=_run, args=(server, listener, stops), daemon=True)
        thread.start()
        shown = f"[{host}]" if ":" in host else host
        print(f"listening on http://{shown}:{listener.getsockname()[1]}", flush=True)
        wait_for(stops)
        ended = not thread.is_alive()
        server.should_exit = True
        thread.join()
    if ended:
        raise TriwardError("the HTTP server ended by itself; its log says why")


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


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        InvalidRequest: nothing can listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise InvalidRequest(f"{host}:{port}: {error.strerror or error}") from error


def _run(server: uvicorn.Server, listener: socket.socket, stops: SimpleQueue[int]) -> None:
    try:
        server.run(sockets=[listener])
    finally:
        stops.put(0)
