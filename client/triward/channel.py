"""Addresses -> one gRPC channel over all of them: balanced, kept alive, retried.

All of it is gRPC's own: `round_robin` sends each call to the next server that is connected, and a
call that is UNAVAILABLE is sent again, within its deadline, after a pause that grows and is random,
so that callers do not come back all at once. Scoring changes nothing on a server, so that sending a
request twice is harmless.
"""

from __future__ import annotations

import ipaddress
import json
import os
import random
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from triward.errors import ServerUnavailable
from triward.protocol import GRPC_PORT

if TYPE_CHECKING:
    import grpc

Url = str | Sequence[str]
Path = str | os.PathLike[str]

# gRPC counts a message's bytes in a signed 32-bit integer.
_MAX_MESSAGE_BYTES = 2**31 - 1

# Pauses of 0.2, 0.6, 1.8 and 5.4 s, each 20 % more or less: gRPC sends a call five times at most.
MAX_ATTEMPTS = 5
_FIRST_PAUSE, _LONGEST_PAUSE, _GROWTH = 0.2, 10.0, 3.0

# How gRPC's targets begin that need no //.
_SCHEMES = ("dns", "ipv4", "ipv6", "unix", "unix-abstract", "vsock", "xds")

# A server that is gone without a word is noticed after 30 s, if a call waits for it.
_KEEPALIVE_MS, _KEEPALIVE_TIMEOUT_MS = 20_000, 10_000
# gRPC's own is two minutes: too long for a server that has just restarted to wait for work.
_MAX_RECONNECT_MS = 10_000


@dataclass(frozen=True)
class Tls:
    """Encryption of the channel; PEM files.

    Attributes:
        ca: who must have signed the server's certificate; None takes gRPC's own list.
        certificate: the client's, with its chain, for a server that asks for one.
        key: its private key.
        server_name: the name that the certificate must hold, where it is not the host's.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        """Check that a certificate has its key.

        Raises:
            ValueError: one of the two is missing.
        """
        if (self.certificate is None) != (self.key is None):
            raise ValueError("a client's certificate and its key are given together")

    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel.

        Raises:
            OSError: a file cannot be read.
        """
        import grpc

        return grpc.ssl_channel_credentials(
            _read(self.ca), private_key=_read(self.key), certificate_chain=_read(self.certificate)
        )


@dataclass(frozen=True)
class Address:
    """Addresses of the servers, and how to reach them.

    Attributes:
        url: host:port of one server, a gRPC target such as dns:///rewards:8001 that names many, or
            a list of host:port. Port 8001 where none is named.
        tls: encryption; None is plain text.
        max_attempts: how often a call is sent at most.
    """

    url: Url
    tls: Tls | None = None
    max_attempts: int = MAX_ATTEMPTS

    def __post_init__(self) -> None:
        """Check what can be checked without a network.

        Raises:
            ValueError: no channel can be made of it.
        """
        if not self.urls:
            raise ValueError("url: needs at least one address")
        if len(self.urls) > 1:
            for url in self.urls:
                _split(url)
        if not 1 <= self.max_attempts <= MAX_ATTEMPTS:
            raise ValueError(
                f"max_attempts must be 1 to {MAX_ATTEMPTS}, gRPC's limit, got {self.max_attempts}"
            )

    def __str__(self) -> str:
        """For messages."""
        return ", ".join(self.urls)

    @property
    def urls(self) -> list[str]:
        """All addresses, each with its port."""
        given = [self.url] if isinstance(self.url, str) else self.url
        return [_with_port(url) for url in given]

    @property
    def single(self) -> tuple[str, int] | None:
        """Host and port of the one server; None for several, and for gRPC's other targets."""
        [url, *more] = self.urls
        return None if more or _scheme(url) else _split(url)

    def at(self, server: str | None) -> Address:
        """Return the address of one server alone, which is asked once a call; of all for None."""
        return replace(self, url=server, max_attempts=1) if server else self

    def connect(self, client: Any) -> Any:
        """Return one of tritonclient's clients, blocking or asyncio.

        Args:
            client: its class.

        Raises:
            ServerUnavailable: no host of a list has an address.
            OSError: a file of `tls` cannot be read.
        """
        credentials = self.tls.credentials() if self.tls else None
        return client(self._target(), creds=credentials, channel_args=self._options())

    def _target(self) -> str:
        urls = self.urls
        if len(urls) == 1:
            return urls[0]
        # gRPC takes a list of numbers, but no list of names.
        found: dict[int, list[str]] = {}
        missing: ServerUnavailable | None = None
        for url in urls:
            try:
                family, place = _resolve(*_split(url))
                found.setdefault(family, []).append(place)
            except ServerUnavailable as error:
                missing = error  # the others may do
        if missing and not found:
            raise missing
        if len(found) > 1:
            raise ServerUnavailable(f"{self}: some have IPv4 addresses only, some IPv6")
        [(family, places)] = found.items()
        return f"{'ipv6' if family == socket.AF_INET6 else 'ipv4'}:{','.join(places)}"

    def _options(self) -> list[tuple[str, Any]]:
        # tritonclient drops its own options, the message sizes too, when it is given any.
        options: list[tuple[str, Any]] = [
            ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            # A message that does not fit here is not sent again; gRPC's default is 256 KiB.
            ("grpc.per_rpc_retry_buffer_size", _MAX_MESSAGE_BYTES),
            ("grpc.service_config", json.dumps(self._service_config())),
            ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
            # Newer gRPC waits for the answer to a ping for a time of its own, a minute by default.
            ("grpc.http2.ping_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.max_reconnect_backoff_ms", _MAX_RECONNECT_MS),
            # Else clients of one process share connections, and a new one fails at once where
            # another of them waits before it tries again.
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if self.tls and self.tls.server_name:
            options.append(("grpc.ssl_target_name_override", self.tls.server_name))
        elif len(self.urls) > 1:
            options.append(("grpc.default_authority", _split(self.urls[0])[0]))
        return options

    def _service_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
        if self.max_attempts > 1:
            config["methodConfig"] = [
                {
                    "name": [{"service": "inference.GRPCInferenceService", "method": "ModelInfer"}],
                    "retryPolicy": {
                        "maxAttempts": self.max_attempts,
                        "initialBackoff": f"{_FIRST_PAUSE}s",
                        "maxBackoff": f"{_LONGEST_PAUSE}s",
                        "backoffMultiplier": _GROWTH,
                        "retryableStatusCodes": ["UNAVAILABLE"],
                    },
                }
            ]
        return config


def pauses(attempts: int) -> Iterator[float]:
    """Yield the seconds between two of so many attempts, as gRPC pauses."""
    for retry in range(attempts - 1):
        longest = min(_FIRST_PAUSE * _GROWTH**retry, _LONGEST_PAUSE)
        yield longest * random.uniform(0.8, 1.2)


def _scheme(url: str) -> str:
    """Return a gRPC target's scheme; "" for host:port, also if the host is named like a scheme."""
    if "://" in url:
        return url.partition("://")[0].lower()
    scheme, colon, rest = url.partition(":")
    return scheme if colon and scheme in _SCHEMES and not rest.isdecimal() else ""


def _with_port(url: str) -> str:
    """Return an address with Triward's port if it names none.

    Raises:
        ValueError: it is no address.
    """
    scheme = _scheme(url)
    if scheme in ("http", "https", "grpc", "grpcs"):
        raise ValueError(f"url: must be host:port without {scheme}://, got {url!r}")
    if scheme not in ("", "dns"):
        return url
    start = len(scheme) + 1 if scheme else 0
    if url.startswith("//", start):  # dns://server/name, where the server is mostly left out
        start = max(url.find("/", start + 2) + 1, start + 2)
    target, place = url[:start], url[start:]
    try:
        return f"{target}[{ipaddress.IPv6Address(place)}]:{GRPC_PORT}"
    except ValueError:
        pass  # which most are not
    if place.endswith("]") or (place and not set(place) & set(":/")):
        return f"{target}{place}:{GRPC_PORT}"
    host, _, port = place.rpartition(":")
    if not (host and port.isdecimal() and "/" not in place):
        raise ValueError(f"url: must be host:port, got {url!r}")
    return url


def _split(url: str) -> tuple[str, int]:
    host, colon, port = url.rpartition(":")
    if not (colon and host and port.isdecimal() and "/" not in url):
        raise ValueError(f"url: each of several addresses must be host:port, got {url!r}")
    return host.strip("[]"), int(port)


def _resolve(host: str, port: int) -> tuple[int, str]:
    """Family and number of a host, IPv4 where it has one."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ServerUnavailable(f"{host}:{port}: {error.strerror or error}") from error
    family, _, _, _, place = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    address = ipaddress.ip_address(place[0])
    return family, f"{address}:{port}" if address.version == 4 else f"[{address}]:{port}"


def _read(path: Path | None) -> bytes | None:
    if path is None:
        return None
    with open(path, "rb") as file:  # noqa: PTH123 - any kind of path
        return file.read()
