"""Why tritonserver ended, in one sentence, from its exit code and its log."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from ..errors import DEVICE_FAULT, LaunchError

_FAILURES = (
    # A model's own exception, as the Python backend reports it.
    re.compile(r"failed to load '(?P<model>[^']+)' version \d+: [\w ]+: (?P<reason>.+)"),
    # The same, from its process: all there is when Triton itself crashes over it.
    re.compile(r"Failed to initialize Python stub: (?P<reason>.+)"),
    re.compile(r"^error: (?P<reason>.+)"),
    re.compile(r"failed to start \w+ service: (?P<reason>.+)"),
    # Every start without a GPU has one of these that means nothing.
    re.compile(r"^E\d+ .*?\] (?P<reason>(?!\"CudaDriverHelper has not been initialized).+)"),
)
_PORT_TAKEN = re.compile(r"failed to start \w+ service: .*Socket '[^']+' already in use")


def why_it_ended(code: int, log: Sequence[str]) -> str:
    """Describe the end of a server that should run; a crash is told beside what led to it."""
    reason = _reason(log)
    if code >= 0 and reason:
        return reason
    crash = f"tritonserver: {describe_exit(code)}"
    return f"{reason}; {crash}" if reason else crash


@contextmanager
def explained(log: Iterable[str]) -> Iterator[None]:
    """Add to what is raised that a device faulted, where the log of the server says so.

    Args:
        log: the server's last lines, which may still be growing.
    """
    try:
        yield
    except LaunchError as error:
        reasons = [line[line.index(DEVICE_FAULT) :] for line in list(log) if DEVICE_FAULT in line]
        if not reasons:
            raise
        raise type(error)(f"{reasons[-1].strip()} ({error})") from None


def lost_a_port(log: Sequence[str]) -> bool:
    """Return True if Triton could not bind a port because another process has it."""
    return any(map(_PORT_TAKEN.search, log))


def describe_exit(code: int) -> str:
    """Name an exit code, or the signal behind a negative one."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _reason(log: Sequence[str]) -> str | None:
    for pattern in _FAILURES:
        for line in log:
            if match := pattern.search(line.strip()):
                groups = match.groupdict()
                reason = groups["reason"].strip().strip('"')
                return f"{groups['model']}: {reason}" if "model" in groups else reason
    return None
