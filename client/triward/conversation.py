"""The model card's messages -> the three values of a request.

The only input/output is `read_media`, so blocking and asyncio clients share everything else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from triward.deadline import Deadline
from triward.errors import InvalidRequest, TriwardError, located
from triward.jsonvalue import check_text, plain_json
from triward.media import read_media

Message = Mapping[str, Any]
Messages = Sequence[Message]

# The key that holds a part's media value -> the part's type on the wire.
_MEDIA_KEYS = {"image": "image", "image_url": "image", "video": "video"}


@dataclass(frozen=True)
class MediaRef:
    """A media value, or one frame of a list, and where in the messages it stands."""

    place: str
    value: object


@dataclass(frozen=True)
class RewardRequest:
    """A row for the ensemble.

    Attributes:
        messages: UTF-8 JSON array of the messages before the response, media values taken out.
        responses: N >= 1 candidates, UTF-8.
        media: encoded files, in the order of the media parts in `messages`; of a list of frames
            each is one.
    """

    messages: bytes
    responses: tuple[bytes, ...]
    media: tuple[bytes, ...]


def build_request(
    messages: Messages, responses: Sequence[str], deadline: Deadline
) -> RewardRequest:
    """Check and encode everything, then read the media.

    Raises:
        InvalidRequest: the input cannot be sent; the message names the place.
        DeadlineExceeded: a URL did not deliver in time.
    """
    encoded, refs = encode_messages(messages)
    candidates = encode_responses(responses)
    return RewardRequest(encoded, candidates, tuple(read_ref(ref, deadline) for ref in refs))


def encode_messages(messages: Messages) -> tuple[bytes, list[MediaRef]]:
    """Messages -> UTF-8 JSON without media values, and those values in order of appearance.

    In a part a key whose value is None counts as absent: tables that store messages fill in every
    key.

    Raises:
        InvalidRequest: the messages cannot be sent; the message names the place.
    """
    media: list[MediaRef] = []
    try:
        wire = [_message(m, f"messages[{i}]", media) for i, m in enumerate(_list(messages))]
        text = json.dumps(wire, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise InvalidRequest("messages: nested too deeply") from None
    return text.encode(), media


def encode_responses(responses: Sequence[str]) -> tuple[bytes, ...]:
    """Candidates -> UTF-8.

    Raises:
        InvalidRequest: there are none, or one is no text.
    """
    if not isinstance(responses, (list, tuple)):
        raise InvalidRequest(f"responses: must be a list of str, got {_type(responses)}")
    if not responses:
        raise InvalidRequest("responses: holds 0 responses, needs at least 1")
    return tuple(check_text(r, f"responses[{i}]").encode() for i, r in enumerate(responses))


def read_ref(ref: MediaRef, deadline: Deadline) -> bytes:
    """Read one media value; errors name its place."""
    try:
        return read_media(ref.value, deadline)
    except TriwardError as error:
        raise located(error, ref.place) from error


def split_conversation(messages: Messages) -> tuple[list[Message], str]:
    """Split a whole conversation into the messages before the response and the response's text.

    Raises:
        InvalidRequest: the last message is not an assistant's, or holds more than text.
    """
    items = _list(messages)
    place = f"messages[{len(items) - 1}]"
    if not items:
        raise InvalidRequest("messages: is empty, needs at least the assistant's message")
    role = _mapping(items[-1], place).get("role")
    if role != "assistant":
        raise InvalidRequest(f"{place}: the last role must be 'assistant', got {role!r}")
    content = items[-1].get("content")
    if isinstance(content, str):
        return items[:-1], check_text(content, f"{place}.content")
    media: list[MediaRef] = []
    parts = _content(content, f"{place}.content", media)
    if media:
        raise InvalidRequest(f"{media[0].place}: the scored response must be text only")
    return items[:-1], "".join(part["text"] for part in parts)


def _message(message: Message, place: str, media: list[MediaRef]) -> dict[str, Any]:
    if not isinstance(_mapping(message, place).get("role"), str):
        raise InvalidRequest(f"{place}: a message needs 'role', a str")
    if "content" not in message:
        raise InvalidRequest(f"{place}: a message needs 'content'")
    rest = {key: value for key, value in message.items() if key != "content"}
    wire: dict[str, Any] = plain_json(rest, place)
    wire["content"] = _content(message["content"], f"{place}.content", media)
    return wire


def _content(content: object, place: str, media: list[MediaRef]) -> Any:
    if isinstance(content, str):
        return check_text(content, place)
    if not isinstance(content, (list, tuple)):
        raise InvalidRequest(f"{place}: must be a str or a list of parts, got {_type(content)}")
    return [_part(part, f"{place}[{i}]", media) for i, part in enumerate(content)]


def _part(part: object, place: str, media: list[MediaRef]) -> dict[str, Any]:
    present = {key: value for key, value in _mapping(part, place).items() if value is not None}
    key = _media_key(present, place)
    kind = _kind(present, key, place)
    if kind == "text":
        check_text(present.get("text"), f"{place}.text")
    rest = {name: value for name, value in present.items() if name not in ("type", key)}
    wire: dict[str, Any] = {"type": kind, **plain_json(rest, place)}
    if key == "video" and isinstance(present[key], (list, tuple)):
        frames = _frames(present[key], place)
        media += frames
        wire["frames"] = len(frames)
    elif key is not None:
        media.append(MediaRef(place, _media_value(present[key], key, place)))
    return wire


def _media_key(part: Message, place: str) -> str | None:
    keys = [key for key in _MEDIA_KEYS if key in part]
    if len(keys) > 1:
        raise InvalidRequest(f"{place}: a part holds one image or video, got {' and '.join(keys)}")
    return keys[0] if keys else None


def _kind(part: Message, key: str | None, place: str) -> str:
    """Return the part's type on the wire; a part may leave it out, as in the chat template."""
    implied = "text" if key is None else _MEDIA_KEYS[key]
    kind = part.get("type", implied)
    if kind == "image_url":
        kind = "image"
    if kind not in ("text", "image", "video"):
        known = "'text', 'image', 'image_url' or 'video'"
        raise InvalidRequest(f"{place}: a part's type must be {known}, got {kind!r}")
    if kind == "text" and key is not None:
        raise InvalidRequest(f"{place}: a text part cannot hold {key!r}")
    if kind != implied:
        article = "an" if kind == "image" else "a"
        raise InvalidRequest(f"{place}: {article} {kind} part needs {kind!r}")
    if kind == "text" and "text" not in part:
        raise InvalidRequest(f"{place}: a text part needs 'text'")
    return str(kind)


def _frames(values: Sequence[object], place: str) -> list[MediaRef]:
    """Return the frames of a video given as a list; each may be whatever an image may be."""
    if not values:
        raise InvalidRequest(f"{place}: a video needs at least 1 frame, got an empty list")
    return [MediaRef(f"{place}.video[{i}]", value) for i, value in enumerate(values)]


def _media_value(value: object, key: str, place: str) -> object:
    if key == "image_url" and isinstance(value, Mapping):
        # The other key of this form, `detail`, means nothing to the model.
        if not isinstance(value.get("url"), str):
            raise InvalidRequest(f"{place}: 'image_url' needs 'url', a str")
        return value["url"]
    return value


def _list(messages: object) -> list[Message]:
    if not isinstance(messages, (list, tuple)):
        raise InvalidRequest(f"messages: must be a list of messages, got {_type(messages)}")
    return list(messages)


def _mapping(value: object, place: str) -> Message:
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{place}: must be a dict, got {_type(value)}")
    return value


def _type(value: object) -> str:
    return type(value).__name__
