"""Settings of tritonserver's process between fork and exec (Linux, x86-64; no C of ours)."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
from collections.abc import Callable

from .signals import STOP_SIGNALS

# prctl(2) and seccomp(2)
_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _FAIL_WITH = 0x7FFF0000, 0x00050000
_X86_64, _SOCKET = 0xC000003E, 41
_AF_INET6, _EAFNOSUPPORT = 10, 97


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def set_up_child(parent: int, ipv4_only: bool, max_memory: int | None) -> Callable[[], None]:
    """Set up the child: take signals, get SIGTERM when the parent dies, keep to some limits.

    Args:
        parent: the process that starts it.
        ipv4_only: it gets no IPv6 sockets. gRPC takes 0.0.0.0 for every address of both kinds
            where it can, past a firewall that was set up for IPv4.
        max_memory: bytes of its own memory, weights and shared memory not included; what goes
            beyond fails. Its models' processes lift it with `memory.lift_limit`.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    code = _no_ipv6()
    instructions = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.addressof(instructions))
    # On other processors system calls have other numbers; where it then listens is printed.
    filtered = ipv4_only and platform.machine() == "x86_64"

    def run() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)
        if max_memory is not None:
            hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
            resource.setrlimit(resource.RLIMIT_DATA, (max_memory, hard))
        if filtered:
            libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            # The buffer must live until here.
            assert instructions
            libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)

    return run


def _no_ipv6() -> bytes:
    """Return a filter by which socket(AF_INET6, …) fails as on a machine without IPv6."""

    def instruction(code: int, if_true: int, if_false: int, value: int) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, value)

    return b"".join((
        instruction(_LOAD, 0, 0, 4),  # the processor
        instruction(_JUMP_IF_EQUAL, 0, 5, _X86_64),
        instruction(_LOAD, 0, 0, 0),  # the system call
        instruction(_JUMP_IF_EQUAL, 0, 3, _SOCKET),
        instruction(_LOAD, 0, 0, 16),  # its first argument
        instruction(_JUMP_IF_EQUAL, 0, 1, _AF_INET6),
        instruction(_RETURN, 0, 0, _FAIL_WITH | _EAFNOSUPPORT),
        instruction(_RETURN, 0, 0, _ALLOW),
    ))  # fmt: skip
