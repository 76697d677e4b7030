"""Wire bytes -> a validated `Conversation`. Nothing is decoded, opened or resized here.

The wire carries the model card's `messages`, media values taken out: an image part says how to
resize, its bytes are the next entry of `media`. A part never names a path or a URL.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from ..config import MAX_TILES, PreprocessConfig
from ..errors import InvalidRequest

Positive = Annotated[int, Field(gt=0, le=2**31 - 1)]


class _FailFast(FailFast):
    """Stop at the first error: building millions of them is slow, and one is reported."""

    __hash__ = object.__hash__  # `|` between annotated types asks for one


_FAIL_FAST = _FailFast()


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TextPart(_Wire):
    """A run of text."""

    type: Literal["text"]
    text: str


class MediaPart(_Wire):
    """A part with pixels: the size limits of qwen-vl-utils, for images and videos.

    Which of the options a checkpoint knows, its family says (`family.py`). `min_pixels` and
    `max_pixels` bound the resized area in pixels. `resized_height` and `resized_width` ask for a
    size instead, and come together.
    """

    min_pixels: Positive | None = None
    max_pixels: Positive | None = None
    resized_height: Positive | None = None
    resized_width: Positive | None = None

    @model_validator(mode="after")
    def _size_is_whole(self) -> MediaPart:
        if (self.resized_height is None) != (self.resized_width is None):
            raise ValueError("resized_height and resized_width come together, only one is given")
        return self


class ImagePart(MediaPart):
    """The place of one image; its bytes are the next entry of `media`.

    `hd_num` is how many tiles it may fill, for models that cut images into tiles.
    """

    type: Literal["image"]
    hd_num: Annotated[int, Field(ge=1, le=MAX_TILES)] | None = None


class VideoPart(MediaPart):
    """The place of one video; its bytes are the next entry of `media`.

    With `frames`, the next so many entries are images, each a frame: a list is shown whole, as
    qwen-vl-utils does it, and whatever chooses frames of a file says nothing about it.
    """

    type: Literal["video"]
    frames: Positive | None = None
    total_pixels: Positive | None = None
    fps: Annotated[float, Field(gt=0)] | None = None
    nframes: Positive | None = None
    min_frames: Positive | None = None
    max_frames: Positive | None = None
    video_start: Annotated[float, Field(ge=0)] | None = None
    video_end: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _one_rate(self) -> VideoPart:
        if self.fps is not None and self.nframes is not None:
            raise ValueError("fps and nframes exclude each other, both are given")
        return self


# Tags in angle brackets are pydantic's names for union members; `_path` leaves them out.
def _part_tag(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>"


def _content_tag(value: Any) -> str:
    if isinstance(value, str):
        return "<string>"
    return "<parts>" if isinstance(value, list) else "<neither>"


Part = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImagePart, Tag("<image>")]
    | Annotated[VideoPart, Tag("<video>")],
    Discriminator(
        _part_tag,
        custom_error_type="unknown_part",
        custom_error_message="a part's type must be 'text', 'image' or 'video'",
    ),
]
Content = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[Part], _FAIL_FAST, Tag("<parts>")],
    Discriminator(
        _content_tag,
        custom_error_type="unknown_content",
        custom_error_message="content must be a string or an array of parts",
    ),
]


class Message(_Wire):
    """One chat message; `reference` is an answer that a model compares responses with."""

    role: Literal["system", "user", "assistant"]
    content: Content
    reference: str | None = None


_MESSAGES = TypeAdapter(Annotated[list[Message], _FAIL_FAST])


@dataclass(frozen=True)
class MediaPlace:
    """Place of a media part.

    Attributes:
        path: in the request.
        part: itself.
        entries: of `media`, which are its own.
    """

    path: str
    part: ImagePart | VideoPart
    entries: range

    @property
    def fields(self) -> list[str]:
        """Names of its entries in error messages."""
        return [f"media[{i}]" for i in self.entries]


@dataclass(frozen=True)
class Conversation:
    """One request: a prompt, the media that its parts stand for, and N candidate responses.

    `media_places` has the media parts in order of appearance.
    """

    messages: tuple[Message, ...]
    responses: tuple[str, ...]
    media: tuple[bytes, ...]
    media_places: tuple[MediaPlace, ...]

    def entries(self, place: MediaPlace) -> Sequence[bytes]:
        """Return the files of a media part."""
        return self.media[place.entries.start : place.entries.stop]


def parse_conversation(
    messages: bytes, responses: Sequence[bytes], media: Sequence[bytes], limits: PreprocessConfig
) -> Conversation:
    """Check one request against the wire contract and the limits.

    Args:
        messages: JSON array of the chat messages before the response, UTF-8.
        responses: N >= 1 candidate assistant messages, UTF-8; any may be empty.
        media: encoded files, one for each media part, or one for each frame of a list.
        limits: what one request may hold.

    Raises:
        InvalidRequest: naming the field, the value and the limit.
    """
    _at_most("responses", len(responses), limits.max_responses, "responses")
    if not responses:
        raise InvalidRequest("responses", "0 responses were given; at least 1 is needed")
    _at_most("messages", len(messages), limits.max_text_bytes, "bytes")
    _at_most("responses", sum(map(len, responses)), limits.max_text_bytes, "bytes in all")
    for index, item in enumerate(media):
        _at_most(f"media[{index}]", len(item), limits.max_media_bytes, "bytes")
    _at_most("media", sum(map(len, media)), limits.max_request_bytes, "bytes in all")

    parsed = _parse_messages(_utf8("messages", messages))
    conversation = Conversation(
        messages=parsed,
        responses=tuple(_utf8(f"responses[{i}]", text) for i, text in enumerate(responses)),
        media=tuple(media),
        media_places=tuple(_media_places(parsed)),
    )
    count = len(conversation.messages) + sum(
        len(m.content) for m in conversation.messages if not isinstance(m.content, str)
    )
    _at_most("messages", count, limits.max_parts, "messages and parts")
    _check_media(conversation, limits)
    return conversation


def _check_media(conversation: Conversation, limits: PreprocessConfig) -> None:
    places = conversation.media_places
    for place in places:
        if isinstance(place.part, VideoPart) and place.part.frames:
            _at_most(f"{place.path}.frames", len(place.entries), limits.max_video_frames, "frames")
    given, needed = len(conversation.media), places[-1].entries.stop if places else 0
    _at_most("media", given - (needed - len(places)), limits.max_media, "entries")
    if needed != given:
        raise InvalidRequest(
            "media", f"{given} entries were given for {needed} media parts in messages"
        )


def _parse_messages(text: str) -> tuple[Message, ...]:
    try:
        messages = tuple(_MESSAGES.validate_json(text))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        problem = first["msg"].removeprefix("Value error, ")
        value = repr(first["input"])
        if first["type"] != "json_invalid":
            problem += f", got {value if len(value) <= 80 else value[:77] + '...'}"
        raise InvalidRequest(_path(first["loc"]), problem) from None
    _check_keys(text)
    return messages


@dataclass(frozen=True)
class _Twice:
    """Stands for an object that has a key twice."""

    key: str


def _check_keys(text: str) -> None:
    """Refuse a key that is there twice, of which parsers keep the last; `text` is valid else."""
    found = False

    def object_of(pairs: list[tuple[str, Any]]) -> Any:
        nonlocal found
        fields = dict(pairs)
        if len(fields) == len(pairs):
            return fields
        found = True
        keys = [key for key, _ in pairs]
        return _Twice(next(key for key in keys if keys.count(key) > 1))

    # Numbers stay text: Python refuses some that pydantic takes.
    parsed = json.loads(text, object_pairs_hook=object_of, parse_int=str, parse_float=str)
    if not found:
        return
    for i, message in enumerate(parsed):
        content = None if isinstance(message, _Twice) else message["content"]
        parts = content if isinstance(content, list) else []
        places = [((i,), message), *(((i, "content", j), p) for j, p in enumerate(parts))]
        for place, value in places:
            if isinstance(value, _Twice):
                raise InvalidRequest(_path((*place, value.key)), "the key is there twice")
    raise AssertionError("valid messages have objects only where they were looked for")


def _path(loc: tuple[int | str, ...]) -> str:
    path = "messages"
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith("<"):
            path += f".{step}"
    return path


def _media_places(messages: Sequence[Message]) -> Iterator[MediaPlace]:
    start = 0
    for i, message in enumerate(messages):
        for j, part in enumerate(message.content):
            if isinstance(part, MediaPart):
                end = start + ((isinstance(part, VideoPart) and part.frames) or 1)
                yield MediaPlace(f"messages[{i}].content[{j}]", part, range(start, end))
                start = end


def _utf8(field: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"not valid UTF-8 at byte {error.start} of {len(raw)}: {error.reason}"
        raise InvalidRequest(field, problem) from None


def _at_most(field: str, value: int, limit: int, unit: str) -> None:
    if value > limit:
        raise InvalidRequest(field, f"{value} {unit}, the limit is {limit}")
