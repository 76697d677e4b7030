"""Everything that a call to the server can raise.

    TriwardError
    ├── InvalidRequest      the input is wrong (also a ValueError); the same request fails again
    │   └── MediaError      an image or video cannot be read by the client
    ├── ServerUnavailable   overloaded, not reachable, or the model is not ready
    ├── DeadlineExceeded    the caller's timeout ran out (also a TimeoutError)
    └── ServerError         the server failed, or its answer is malformed or not finite

What tritonclient raised is never seen by the caller, except as the cause of one of these.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tritonclient.utils import InferenceServerException

# Triton's words for a model that it knows but has not loaded: it stops, or its operator changes it.
_UNLOADED = "has no available versions"

_UNKNOWN_REGION = "Unable to find shared memory region"

_ENSEMBLE_PREFIX = re.compile(r"^(?:in ensemble '[^']*', )+")


class TriwardError(Exception):
    """Base of all errors of this package."""


class InvalidRequest(TriwardError, ValueError):
    """The request cannot be scored, whoever asks and however often."""


class MediaError(InvalidRequest):
    """An image or video is missing, unreadable, or too large to fetch."""


class ServerUnavailable(TriwardError):
    """The server is overloaded, not reachable, or has no model ready. Asking later may succeed."""


class DeadlineExceeded(TriwardError, TimeoutError):
    """The timeout ran out while media was read or while the server worked."""


class ServerError(TriwardError):
    """The server failed, or answered with something that is no score."""


def located(error: TriwardError, place: str) -> TriwardError:
    """The same error, caused by it, with the place in the caller's input in front."""
    placed = type(error)(f"{place}: {error}")
    placed.__cause__ = error
    return placed


def from_triton(error: InferenceServerException, *, model: str, url: str) -> TriwardError:
    """Translate what tritonclient raised for a call of `model` at `url`."""
    code = str(error.status()).rpartition(".")[2]
    message = _ENSEMBLE_PREFIX.sub("", error.message() or f"no details, status {code}")
    if code == "INVALID_ARGUMENT":
        return InvalidRequest(message)
    if code == "DEADLINE_EXCEEDED":
        return DeadlineExceeded(message)
    # Also for one that waited too long in a queue: had the caller's own time run out, gRPC would
    # have said so first.
    # And for a call that the server cancels, as gRPC does when it shuts down.
    if code in ("UNAVAILABLE", "CANCELLED") or (code == "NOT_FOUND" and _UNLOADED in message):
        return ServerUnavailable(f"{url}: {message}")
    if code == "NOT_FOUND":
        return ServerError(f"{url} does not serve the model {model!r}: {message}")
    return ServerError(f"{code}: {message}")


def is_unknown_region(error: TriwardError) -> bool:
    """Whether the server says that it does not know a region of shared memory."""
    return _UNKNOWN_REGION in str(error)


@contextmanager
def triton_errors(*, model: str, url: str) -> Iterator[None]:
    """Raise this package's errors in place of tritonclient's, chained to them."""
    # Imported when something is asked, here and elsewhere: numpy and gRPC take longer to load than
    # all the rest.
    from tritonclient.utils import InferenceServerException

    try:
        yield
    except InferenceServerException as error:
        raise from_triton(error, model=model, url=url) from error
