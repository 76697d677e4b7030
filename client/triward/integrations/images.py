"""Images of data sets, and the parts of messages that they go into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from triward.errors import InvalidRequest


def image_of(value: object) -> object:
    """Return an image as the client takes it; what is in a struct that Hugging Face writes.

    Raises:
        InvalidRequest: the struct has neither bytes nor a path.
    """
    if not isinstance(value, Mapping):
        return value
    held = value.get("path") if value.get("bytes") is None else value["bytes"]
    if held is None:
        raise InvalidRequest("an image has neither bytes nor a path")
    return held


def copied(content: object) -> object:
    """Return content whose parts can be changed; what is wrong with it the client will say."""
    if not isinstance(content, (list, tuple)):
        return content
    return [dict(part) if isinstance(part, Mapping) else part for part in content]


def image_parts(content: object) -> list[dict[str, Any]]:
    """Return the parts of a content that are for images."""
    return [part for part in content if _is_image(part)] if isinstance(content, list) else []


def holds_none(part: Mapping[str, Any]) -> bool:
    """Return True if an image part is a place for an image."""
    return part.get("image") is None and part.get("image_url") is None


def _is_image(part: object) -> bool:
    return isinstance(part, dict) and (
        part.get("type") in ("image", "image_url") or not holds_none(part)
    )
