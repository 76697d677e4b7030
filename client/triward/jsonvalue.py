"""JSON in and out: callers' values as plain JSON values, and objects from lines of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from triward.errors import InvalidRequest


def plain_json(value: object, place: str) -> Any:
    """Copy a value into plain JSON types; numpy's scalars become Python's.

    Raises:
        InvalidRequest: JSON or UTF-8 cannot hold it; the message starts with `place`.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return check_text(value, place)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return _finite(float(value), place)
    if isinstance(value, Mapping):
        return {_key(k, place): plain_json(v, f"{place}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item, f"{place}[{i}]") for i, item in enumerate(value)]
    raise InvalidRequest(f"{place}: JSON cannot hold a {type(value).__name__}")


def check_text(value: object, place: str) -> str:
    """Return the value, once it is known to be text that UTF-8 can encode.

    Raises:
        InvalidRequest: it is no str, or holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise InvalidRequest(f"{place}: must be a str, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        wrong = ascii(value[error.start])
        raise InvalidRequest(f"{place}: {wrong} at {error.start} is half of a character") from error
    return value


def read_object(text: str | bytes) -> dict[str, Any]:
    """Return the object that a line of JSON holds.

    Raises:
        InvalidRequest: it is not JSON in UTF-8, or no object.
    """
    try:
        return as_object(json.loads(text if isinstance(text, str) else text.decode("utf-8-sig")))
    except InvalidRequest:
        raise
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"not JSON: {error}") from error


def as_object(value: object) -> dict[str, Any]:
    """Return a value of JSON that is an object.

    Raises:
        InvalidRequest: it is none.
    """
    if not isinstance(value, dict):
        raise InvalidRequest(f"must be an object, got {type(value).__name__}")
    return value


def _key(key: object, place: str) -> str:
    if not isinstance(key, str):
        raise InvalidRequest(f"{place}: keys must be str, got {key!r}")
    return check_text(key, f"{place}: a key")


def _finite(value: float, place: str) -> float:
    if not math.isfinite(value):
        raise InvalidRequest(f"{place}: must be finite, got {value}")
    return value
