"""An HTTP server of one of the tools, from its socket to a signal."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from queue import SimpleQueue

import uvicorn
from triward.errors import InvalidRequest, TriwardError
from triward.stopping import stopping, wait_for


def serve_until_signal(
    server: uvicorn.Server,
    host: str,
    port: int,
    *,
    greeting: str = "listening on",
    before_stop: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGINT or SIGTERM, and end the answers that were begun.

    Args:
        server: yet to be run.
        host: where to listen.
        port: likewise; 0 takes a free one. The first line on standard output names it.
        greeting: what stands in front of the address.
        before_stop: ends answers that would never end by themselves.

    Raises:
        InvalidRequest: nothing can listen there.
        TriwardError: the server of HTTP ended by itself.
    """
    listener = listen(host, port)
    with stopping() as stops:
        # uvicorn takes signals over in the main thread alone, and raises them again at its end.
        thread = threading.Thread(target=_run, args=(server, listener, stops), daemon=True)
        thread.start()
        named = f"[{host}]" if ":" in host else host
        print(f"{greeting} http://{named}:{listener.getsockname()[1]}", flush=True)
        wait_for(stops)
        ended = not thread.is_alive()
        before_stop()
        server.should_exit = True
        thread.join()
    if ended:
        raise TriwardError("the HTTP server ended by itself; its log says why")


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
