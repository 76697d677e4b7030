"""Addresses where a server listens, and the encryption of its callers' connections."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from ipaddress import IPv6Address, ip_address
from pathlib import Path

import psutil

from ..errors import LaunchError

ANY = "0.0.0.0"
LOOPBACK = "127.0.0.1"
# Releases below 25.07 end at one chunked HTTP request of many tiny chunks (CVE-2025-23310).
CHUNKS_FIXED = (2, 59, 1)

_ALL_OPEN = 10.0  # seconds


@dataclass(frozen=True)
class Endpoints:
    """Addresses of the server. A port of 0 asks for a free one; `with_ports` finds it.

    Attributes:
        host: for gRPC and metrics; an IPv4 address, 0.0.0.0 for all that the machine has.
        http_host: for HTTP, which only this machine's commands need.
    """

    host: str = ANY  # Triton's own default: a container serves its network
    grpc_port: int = 8001
    http_port: int = 8000
    metrics_port: int = 8002
    http_host: str = LOOPBACK

    @property
    def client_host(self) -> str:
        """An address by which this machine reaches gRPC and metrics."""
        return _reachable(self.host)

    @property
    def http_client_host(self) -> str:
        """An address by which this machine reaches HTTP."""
        return _reachable(self.http_host)

    @property
    def grpc(self) -> str:
        """Address for a `RewardClient` on this machine."""
        return f"{self.client_host}:{self.grpc_port}"

    @property
    def http_is_local(self) -> bool:
        """True if other machines cannot reach HTTP."""
        try:
            return ip_address(self.http_host).is_loopback
        except ValueError:
            return self.http_host == "localhost"

    def with_ports(self) -> Endpoints:
        """Replace ports of 0 by free ones, and check that every other port is free.

        Raises:
            LaunchError: a port is in use, or the address is not this machine's.
        """
        with ExitStack() as sockets:
            return replace(
                self,
                grpc_port=_claim(sockets, "grpc", self.host, self.grpc_port),
                http_port=_claim(sockets, "http", self.http_host, self.http_port),
                metrics_port=_claim(sockets, "metrics", self.host, self.metrics_port),
            )

    def listening(self, pid: int) -> dict[str, str]:
        """Return where a process really listens, as the kernel has it: `grpc` -> `0.0.0.0:8001`.

        Args:
            pid: of a tritonserver that is ready. It opens the metrics port a moment later. One
                that has ended, and was not waited for, listens nowhere.
        """
        deadline = time.monotonic() + _ALL_OPEN
        while len(found := self._open(pid)) < 3 and time.monotonic() < deadline:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return {}
            time.sleep(0.05)
        return found

    def _open(self, pid: int) -> dict[str, str]:
        names = {self.grpc_port: "grpc", self.http_port: "http", self.metrics_port: "metrics"}
        found: dict[str, str] = {}
        for each in psutil.Process(pid).net_connections("tcp"):
            name = names.get(each.laddr.port)
            if each.status == psutil.CONN_LISTEN and name:
                address = f"{_shown(each.laddr.ip)}:{each.laddr.port}"
                # Several sockets for one port: all of them are told.
                found[name] = f"{found[name]} {address}" if name in found else address
        return found


def _reachable(host: str) -> str:
    return LOOPBACK if host == ANY else host


def _shown(address: str) -> str:
    """Format an address as an operator writes it: gRPC listens on IPv4 through an IPv6 socket."""
    parsed = ip_address(address)
    if not isinstance(parsed, IPv6Address):
        return address
    return str(parsed.ipv4_mapped) if parsed.ipv4_mapped else f"[{address}]"


def _claim(sockets: ExitStack, name: str, host: str, port: int) -> int:
    probe = sockets.enter_context(socket.socket())
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind((host, port))
        # A bound port alone may be shared by a second REUSEADDR socket; a listening one not.
        probe.listen()
    except OSError as error:
        raise LaunchError(f"{name} port {port} on {host}: {error.strerror}") from None
    return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Tls:
    """Encryption of the gRPC endpoint; PEM files.

    Attributes:
        certificate: the server's, with its chain.
        key: its private key.
        client_ca: who must have signed the callers' certificates; None asks them for none.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def flags(self) -> list[str]:
        """Return the flags for tritonserver.

        Raises:
            LaunchError: a file cannot be read; Triton would stop without a reason.
        """
        files = [self.certificate, self.key, *([self.client_ca] if self.client_ca else [])]
        for file in files:
            try:
                file.read_bytes()
            except OSError as error:
                raise LaunchError(f"{file}: {error.strerror}") from None
        flags = [
            "--grpc-use-ssl=1", f"--grpc-server-cert={self.certificate}",
            f"--grpc-server-key={self.key}",
        ]  # fmt: skip
        if self.client_ca:
            flags += [f"--grpc-root-cert={self.client_ca}", "--grpc-use-ssl-mutual=1"]
        return flags
