"""A point in time that media fetching and the gRPC call share."""

from __future__ import annotations

import threading
from time import monotonic

from triward.errors import DeadlineExceeded


class Deadline:
    """`timeout` seconds from now, on a clock that never steps back.

    Args:
        timeout: seconds, above 0 and no longer than the platform can wait.

    Raises:
        ValueError: for any other timeout.
    """

    def __init__(self, timeout: float) -> None:  # noqa: D107 - the class says it
        if not 0 < timeout <= threading.TIMEOUT_MAX:
            raise ValueError(f"timeout must be above 0 seconds and finite, got {timeout!r}")
        self._timeout = timeout
        self._end = monotonic() + timeout

    def remaining(self) -> float:
        """Seconds left, above 0.

        Raises:
            DeadlineExceeded: none are left.
        """
        left = self._end - monotonic()
        if left <= 0:
            raise self.exceeded()
        return left

    def exceeded(self) -> DeadlineExceeded:
        """The error that says that this deadline passed."""
        return DeadlineExceeded(f"not done within the timeout of {self._timeout:g} s")
