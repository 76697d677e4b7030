"""Fetching from public addresses alone, so that no caller reads what only this host can reach."""

from __future__ import annotations

import http.client
import ipaddress
import socket
from collections.abc import Callable
from typing import Any
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    Request,
)

from triward.errors import MediaError

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Clouds' own services, and documentation's addresses that older Pythons take for public ones.
_REFUSED = [
    ipaddress.ip_network(net)
    for net in ("192.0.0.0/24", "168.63.129.16/32", "100.100.100.200/32", "3fff::/20")
]

Allowed = Callable[[str], bool]


def is_public(address: str) -> bool:
    """Return True for an address of the public internet, in whatever form it is written.

    Private, loopback, link-local (so of clouds' metadata), site-local, reserved and multicast ones
    are not, nor IPv6 addresses that stand for such an IPv4 one.
    """
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour
        if inner is None and parsed in _NAT64:
            inner = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if parsed.is_site_local:
            return False
    if any(parsed in network for network in _REFUSED):
        return False
    # Reserved ones can stand for an IPv4 address, too, as ::10.0.0.1 and a network's own NAT64.
    return parsed.is_global and not parsed.is_multicast and not parsed.is_reserved


def public_opener(allowed: Allowed = is_public) -> Callable[..., Any]:
    """Return what opens URLs as `urlopen` does, but asks only addresses that are allowed.

    The address is judged behind the resolution of the name and is the one that is connected to, for
    each redirect anew. No proxy of the environment is used, and no scheme but http and https.
    """
    director = OpenerDirector()
    for handler in (
        _Http(allowed),
        _Https(allowed),
        _Redirects(),
        HTTPDefaultErrorHandler(),
        HTTPErrorProcessor(),
    ):
        director.add_handler(handler)

    def opened(request: Request, timeout: float) -> Any:
        response = director.open(request, timeout=timeout)
        if response is None:  # urllib's answer to a scheme that nobody handles
            raise MediaError("a redirect leads away from http and https")
        return response

    return opened


def _connect(allowed: Allowed) -> Callable[..., socket.socket]:
    def connect(address: tuple[str, int], timeout: float, source: Any = None) -> socket.socket:
        host, port = address
        failure: OSError | None = None
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, place in found:
            if not allowed(str(place[0])):
                raise MediaError(f"{host}: {place[0]} is not a public address")
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(timeout)
                connection.connect(place)
            except OSError as error:
                connection.close()
                failure = error
            else:
                return connection
        raise failure or OSError(f"{host}: has no address")

    return connect


def _connecting(
    kind: type[http.client.HTTPConnection], allowed: Allowed
) -> Callable[..., http.client.HTTPConnection]:
    def made(host: str, **settings: Any) -> http.client.HTTPConnection:
        connection = kind(host, **settings)
        connection._create_connection = _connect(allowed)  # type: ignore[attr-defined]
        return connection

    return made


class _Redirects(HTTPRedirectHandler):
    """Follows without reading a redirect's body, of which there may be no end."""

    def redirect_request(self, req: Request, fp: Any, *answer: Any) -> Request | None:
        fp.close()  # urllib would read all of it; what is closed reads as empty
        return super().redirect_request(req, fp, *answer)


class _Http(HTTPHandler):
    def __init__(self, allowed: Allowed) -> None:
        super().__init__()
        self._made = _connecting(http.client.HTTPConnection, allowed)

    def http_open(self, req: Request) -> Any:
        return self.do_open(self._made, req)


class _Https(HTTPSHandler):
    def __init__(self, allowed: Allowed) -> None:
        super().__init__()
        self._made = _connecting(http.client.HTTPSConnection, allowed)

    def https_open(self, req: Request) -> Any:
        return self.do_open(self._made, req)
