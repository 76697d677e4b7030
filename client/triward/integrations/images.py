"""Images of data sets, and the parts of messages that they go into."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from triward.conversation import Message, Messages
from triward.errors import InvalidRequest

# In the text of a prompt it stands for the next of the row's images.
IMAGE = "<image>"


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


def settle(part: dict[str, Any]) -> None:
    """Leave an image part its image alone, without the struct that it was read from.

    verl decodes a data set's struct and keeps both: `bytes` and `path` beside `image`.
    """
    struct = {key: part.pop(key, None) for key in ("bytes", "path")}
    if holds_none(part) and any(held is not None for held in struct.values()):
        part["image"] = struct
    if part.get("image") is not None:
        part["image"] = image_of(part["image"])


def illustrated(messages: Iterable[Message], images: Sequence[object]) -> list[Message]:
    """Return copies of the messages, with the images in their places.

    Places are the image parts that hold none; without any image part, the beginning of the first
    message of the user's.

    Raises:
        InvalidRequest: there are more images than places, or fewer.
    """
    copies = [{**message, "content": copied(message.get("content"))} for message in messages]
    parts = [part for copy in copies for part in image_parts(copy["content"])]
    if images and not parts:
        return _led_by(images, copies)
    for part in parts:
        settle(part)
    places = [part for part in parts if holds_none(part)]
    if len(places) != len(images):
        given = f"the row has {len(images)} for them"
        raise InvalidRequest(f"{len(places)} image parts hold no image, {given}")
    for part, image in zip(places, images, strict=True):
        part["image"] = image
    return list(copies)


def _led_by(images: Sequence[object], messages: list[dict[str, Any]]) -> list[Message]:
    """Return the messages; the first of the user's begins with the images."""
    first = [{"type": "image", "image": image} for image in images]
    for place, message in enumerate(messages):
        content = message["content"]
        if message.get("role") == "user" and isinstance(content, (str, list)):
            rest = [{"type": "text", "text": content}] if isinstance(content, str) else content
            led = {**message, "content": [*first, *rest]}
            return [*messages[:place], led, *messages[place + 1 :]]
    raise InvalidRequest(f"the row has {len(images)} images, but no user message to hold them")


def _is_image(part: object) -> bool:
    return isinstance(part, dict) and (
        part.get("type") in ("image", "image_url") or not holds_none(part)
    )


def placed(messages: Iterable[Message], images: Sequence[Any]) -> Messages:
    """Return copies of the messages with the images in their places, in order.

    A place is `<image>` in a content that is a str, as in verl's and ms-swift's datasets, or an
    image part; one that holds its image keeps it. Without images `<image>` is text like other text.

    Raises:
        InvalidRequest: there are more images than places, or fewer.
    """
    split = _parts if len(images) else copied
    filled = [{**message, "content": split(message.get("content"))} for message in messages]
    places = [part for message in filled for part in image_parts(message["content"])]
    for place in places:
        settle(place)
    if not len(images):
        return filled
    if len(places) != len(images):
        raise InvalidRequest(f"images: {len(images)} for {len(places)} places in the prompt")
    for place, image in zip(places, images, strict=True):
        if holds_none(place):
            described = isinstance(image, Mapping) and image.get("image") is not None
            place.update(image if described else {"image": image_of(image)})
            settle(place)
    return filled


def _parts(content: Any) -> Any:
    """Return copies of a content's parts; `<image>` in a text becomes one."""
    if not isinstance(content, str):
        return copied(list(content))  # of a table it may be an array
    pieces = [piece for piece in re.split(f"({IMAGE})", content) if piece]
    return [
        {"type": "image"} if piece == IMAGE else {"type": "text", "text": piece} for piece in pieces
    ]
