"""Ports for tests that must know them before a server binds them."""

from __future__ import annotations

import itertools
import os
from contextlib import suppress

from triward_server.errors import LaunchError
from triward_server.serving.endpoints import Endpoints

# Below those that Linux gives to outgoing connections and to servers that ask for any (32768).
_FIRST, _OF_EACH_WORKER, _WORKERS = 20_000, 1_000, 12
_numbers = itertools.count(os.getpid())  # another session on this machine begins elsewhere


def fixed() -> Endpoints:
    """Addresses on this machine that are free and stay so: no other worker gets these ports."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _WORKERS
    while True:
        port = _FIRST + _OF_EACH_WORKER * worker + 3 * (next(_numbers) % (_OF_EACH_WORKER // 3))
        with suppress(LaunchError):  # somebody else's
            return Endpoints("127.0.0.1", port, port + 1, port + 2).with_ports()
