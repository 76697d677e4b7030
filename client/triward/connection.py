"""Diagnosis of failed connections: one sentence in place of gRPC's words.

After a call has failed, a connection of our own asks the same address what it is. Nothing is
asked of a server that answers.
"""

from __future__ import annotations

import re
import socket
from enum import Enum
from typing import TYPE_CHECKING
from urllib.parse import unquote

from triward.protocol import GRPC_PORT, MODEL

if TYPE_CHECKING:
    from triward.channel import Address, Tls

# Seconds for a look at an address, which is on the way to it anyway.
_LOOK = 1.0

_FAILED = re.compile(
    r"failed to connect to all addresses|connections to all backends failing|errors resolving"
    r"|DNS resolution failed|Socket closed|Connection re(?:set|fused)|[Hh]andshake|empty address"
)
_LAST = re.compile(r"(?:.*last error: )?(?:[A-Z_]+: )?(.*)", re.DOTALL)
_NUMBER = re.compile(r"\bipv[46]:(\S+)")

_REQUEST = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def failed_to_connect(message: str) -> bool:
    """Return True if gRPC's words are about the connection, and not a server's own."""
    return _FAILED.search(message) is not None


def readable(message: str) -> str:
    """gRPC's words with addresses as people write them: ipv6:%5B::1%5D:80 is [::1]:80."""
    return _NUMBER.sub(lambda found: unquote(found[1]), message)


def last_error(message: str) -> str:
    """Return what is said of the last address that was tried."""
    found = _LAST.match(message)
    return readable(found[1] if found else message)


def diagnose(address: Address, message: str, seconds: float) -> str | None:
    """Return a sentence for a mistake that trying again cannot mend, or for an absent server.

    Args:
        address: of one server; nothing is known of several.
        message: gRPC's words.
        seconds: how long to look at most; a look takes a moment unless packets are lost.
    """
    place = address.single
    if place is None or seconds <= 0:
        return None
    host, port = place
    seconds = min(seconds, _LOOK)
    try:
        with socket.create_connection((host, port), seconds) as connection:
            connection.settimeout(seconds)
            return _certificate(address, message) or _protocol(address, connection)
    except socket.gaierror as error:
        return f"{address}: the host {host} is not known ({error.strerror})"
    except ConnectionRefusedError:
        other = f"Triward's gRPC port is {GRPC_PORT}"
        here = (
            "is `triward-server serve` running there? wait_ready (--wait-ready) waits for one that "
            "starts"
        )
        return f"nothing listens on {address}; {here if port == GRPC_PORT else other}"
    except OSError:  # it takes connections, or may do so later: gRPC's own words are all there is
        return None


def _certificate(address: Address, message: str) -> str | None:
    """Return gRPC's words on a server's certificate; its list of authorities is its own."""
    if "CERTIFICATE_VERIFY_FAILED" in message or "certificate verify failed" in message:
        signed = "is not signed by an authority that the client was given"
        return f"the certificate of {address} {signed}; name its file: tls=Tls(ca=…), --tls-ca"
    if "Hostname Verification" in message or "is not in peer certificate" in message:
        name = "Tls(server_name=…) says which name it holds"
        return f"the certificate of {address} is for another host name; {name}"
    return None


def _protocol(address: Address, connection: socket.socket) -> str | None:
    """Return the protocol that the server speaks, if it is not the client's."""
    if address.tls:
        return _encrypted(address, address.tls, _handshake(connection))
    answer = _answer(connection)
    if answer.startswith(b"HTTP/"):
        ports = f"Triton's HTTP port is 8000, its metrics port 8002; gRPC is {GRPC_PORT}"
        return f"{address} speaks HTTP, not gRPC: {ports}"
    if answer:
        return None
    host, port = connection.getpeername()[:2]  # hangs up, as a server does that wants TLS
    with socket.create_connection((host, port), connection.gettimeout()) as again:
        if _handshake(again) in (_Peer.TLS, _Peer.LEAVES):
            return f"{address} speaks TLS; connect with tls=Tls(…), --tls or --tls-ca"
    return None


def _encrypted(address: Address, tls: Tls, peer: _Peer) -> str | None:
    if peer is _Peer.PLAIN:
        return f"{address} does not speak TLS; connect without tls, or to the port that does"
    if peer is not _Peer.LEAVES:
        return None
    if tls.certificate:
        return f"{address} does not take the client's certificate: no authority of its signed it"
    options = "Tls(certificate=…, key=…), --tls-certificate and --tls-key"
    return f"{address} wants a client's certificate that its authority has signed: {options}"


def _answer(connection: socket.socket) -> bytes:
    """Return the answer to a request in HTTP/1.1; nothing from a server that hangs up."""
    try:
        connection.sendall(_REQUEST)
        return connection.recv(64)
    except ConnectionError:
        return b""


class _Peer(Enum):
    """Kinds of peers that a TLS client without a certificate meets."""

    TLS = "it speaks as gRPC's servers do, who have the first word"
    LEAVES = "it hangs up behind the handshake, as one that asks for a certificate"
    PLAIN = "it does not speak TLS"
    UNKNOWN = "it says nothing, or hangs up at once"


def _handshake(connection: socket.socket) -> _Peer:
    import ssl

    connection.settimeout(_LOOK)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is told
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(connection) as encrypted:
            return _Peer.TLS if encrypted.recv(1) else _Peer.LEAVES
    except ssl.SSLEOFError:
        return _Peer.UNKNOWN
    except ssl.SSLError as error:
        return _Peer.LEAVES if "CERTIFICATE" in str(error.reason) else _Peer.PLAIN
    except OSError:
        return _Peer.UNKNOWN


def missing_model(url: str, model: str) -> str:
    """For a name that no model has."""
    called = f"an export without --name calls its model {MODEL!r}"
    return f"{url} does not serve the model {model!r}; {called}, `triward-server models` lists all"
