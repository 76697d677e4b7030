"""A point in time that media fetching and the gRPC call share."""

from __future__ import annotations

import threading
from time import monotonic

from triward.errors import DeadlineExceeded

# Seconds that are not worth telling.
_BRIEF = 0.05

# What gRPC says when the time is over, and no server has said anything.
_GRPCS = "deadline exceeded"


class Deadline:
    """`timeout` seconds from now, on a clock that never steps back; and what they went into.

    Args:
        timeout: seconds, above 0 and no longer than the platform can wait.

    Raises:
        ValueError: for any other timeout.
    """

    def __init__(self, timeout: float) -> None:  # noqa: D107 - the class says it
        if not 0 < timeout <= threading.TIMEOUT_MAX:
            raise ValueError(f"timeout must be above 0 seconds and finite, got {timeout!r}")
        self._timeout = timeout
        start = monotonic()
        self._end = start + timeout
        self._steps = [("reading media", start)]

    def begin(self, step: str) -> None:
        """Say what the time goes into from here on."""
        self._steps.append((step, monotonic()))

    @property
    def left(self) -> float:
        """Seconds left; 0 when there are none."""
        return max(self._end - monotonic(), 0.0)

    def remaining(self) -> float:
        """Seconds left, above 0.

        Raises:
            DeadlineExceeded: none are left.
        """
        left = self.left
        if not left:
            raise self.exceeded()
        return left

    def exceeded(self, said: str = "") -> DeadlineExceeded:
        """Return the error that says that this deadline passed, and over what.

        Args:
            said: a server's own words.
        """
        ends = [*(start for _, start in self._steps[1:]), monotonic()]
        spent = [(step, end - start) for (step, start), end in zip(self._steps, ends, strict=True)]
        told = [each for each in spent[:-1] if each[1] >= _BRIEF] + spent[-1:]
        parts = ", ".join(f"{seconds:.1f} s {step}" for step, seconds in told)
        own = f"; {said}" if said and said.lower() != _GRPCS else ""
        return DeadlineExceeded(f"not done within the timeout of {self._timeout:g} s: {parts}{own}")
