"""Errors that a call to the server can raise.

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
from typing import TYPE_CHECKING

from triward.connection import failed_to_connect, last_error, missing_model

if TYPE_CHECKING:
    from tritonclient.utils import InferenceServerException

# Triton's words for a model that it knows but has not loaded: it stops, or its operator changes it.
_UNLOADED = "has no available versions"
_VERSION_GONE = re.compile(r"version \d+ is not found")  # only calls of a served one name any

_UNKNOWN_REGION = "Unable to find shared memory region"

# Triton's words for a request that stood in a queue for longer than that, or the caller, allows.
_QUEUED_TOO_LONG = "Request timeout expired"

# How the server begins when it refuses another version of the wire contract.
_CONTRACT = "contract_version: "

_ENSEMBLE_PREFIX = re.compile(r"^(?:in ensemble '[^']*', )+")


class TriwardError(Exception):
    """Base of all errors of this package.

    Attributes:
        place: in the caller's input, with which the message begins; "" for none.
    """

    place: str = ""

    @property
    def reason(self) -> str:
        """The message without the place."""
        return str(self).removeprefix(f"{self.place}: ") if self.place else str(self)


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
    """Return the same error, caused by it, with the place in the caller's input in front."""
    placed = type(error)(f"{place}: {error}")
    placed.place, placed.__cause__ = place, error
    return placed


def relocated(error: TriwardError, place: str = "") -> TriwardError:
    """Return the same error, caused by it, with another place than its own, or none."""
    bare = type(error)(error.reason)
    bare.__cause__ = error
    return located(bare, place) if place else bare


def from_triton(error: InferenceServerException, *, model: str, url: str) -> TriwardError:
    """Translate what tritonclient raised for a call of `model` at `url`."""
    code = code_of(error)
    message = _ENSEMBLE_PREFIX.sub("", error.message() or f"no details, status {code}")
    if code == "INVALID_ARGUMENT":
        return InvalidRequest(message)
    if code == "DEADLINE_EXCEEDED":
        return DeadlineExceeded(message)
    # Also for one that waited too long in a queue: had the caller's own time run out, gRPC would
    # have said so first.
    # And for a call that the server cancels, as gRPC does when it shuts down.
    unloaded = code == "NOT_FOUND" and (_UNLOADED in message or _VERSION_GONE.search(message))
    if code in ("UNAVAILABLE", "CANCELLED") or unloaded:
        return ServerUnavailable(f"{url}: {_unavailable(message)}")
    if code == "NOT_FOUND":
        what = url if _UNKNOWN_REGION in message else missing_model(url, model)
        return ServerError(f"{what}: {message}")
    return ServerError(message if message.startswith(_CONTRACT) else f"{code}: {message}")


def code_of(error: InferenceServerException) -> str:
    """Return the name of the gRPC status, as "UNAVAILABLE"."""
    return str(error.status()).rpartition(".")[2]


def _unavailable(message: str) -> str:
    if failed_to_connect(message):
        return f"no connection: {last_error(message)}"
    if _QUEUED_TOO_LONG in message:
        return f"the request waited in the server's queue for as long as it may ({message})"
    return message


def is_unknown_region(error: TriwardError) -> bool:
    """Return True if the server says that it does not know a region of shared memory."""
    return _UNKNOWN_REGION in str(error)
