"""Prompts for a reader: texts, small pictures, and words for what cannot be shown."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from triward.conversation import Message
from triward.deadline import Deadline
from triward.media import read_media

from triward_tools.evaluation.text import visible

# Pixels of the longer side.
THUMBNAIL = 480

_IMAGE_KEYS = ("image", "image_url")

# A page is made without the network, so nothing is waited for.
_TIMEOUT = 60.0


@dataclass(frozen=True)
class Part:
    """A piece of a message: a text, a picture, or words about something that is not shown.

    Attributes:
        text: of a text; of a picture, what it is; else the words.
        source: of a picture, its data: URL; else empty.
        is_text: whether `text` is the message's own.
    """

    text: str
    source: str = ""
    is_text: bool = False


@dataclass(frozen=True)
class Turn:
    """A message of a prompt."""

    role: str
    parts: tuple[Part, ...]


def turns(messages: Sequence[Message], show: Callable[[object], Part] | None = None) -> list[Turn]:
    """Return the messages with their pictures made small; nothing in them makes this fail.

    Args:
        messages: with images as the client takes them.
        show: makes a part of an image; `thumbnail` by default, which reads any file.
    """
    chosen = show or thumbnail
    return [
        Turn(visible(str(m.get("role", "?"))), tuple(_parts(m.get("content"), chosen)))
        for m in messages
    ]


def _parts(content: object, show: Callable[[object], Part]) -> list[Part]:
    if isinstance(content, str):
        return [Part(visible(content), is_text=True)]
    if not isinstance(content, (list, tuple)):
        return [Part(f"content of type {type(content).__name__}, not shown")]
    return [_part(part, show) for part in content]


def _part(part: object, show: Callable[[object], Part]) -> Part:
    if not isinstance(part, Mapping):
        return Part(f"part of type {type(part).__name__}, not shown")
    for key in _IMAGE_KEYS:
        if part.get(key) is not None:
            value = part[key]
            url = value.get("url") if isinstance(value, Mapping) else None
            return show(value if url is None else url)
    if isinstance(part.get("text"), str):
        return Part(visible(part["text"]), is_text=True)
    return Part(visible(f"{part.get('type', 'part of unknown type')}, not shown"))


def thumbnail(value: object) -> Part:
    """Return a small copy of an image, or words that say why there is none."""
    if isinstance(value, str) and value[:8].lower().startswith(("http://", "https://")):
        return Part(visible(f"image at {value[:200]}, not fetched"))
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(read_media(value, Deadline(_TIMEOUT)))) as image:
            size = image.size
            image.draft("RGB", (THUMBNAIL, THUMBNAIL))
            small = ImageOps.exif_transpose(image).convert("RGBA")
            small.thumbnail((THUMBNAIL, THUMBNAIL))
    except Exception as error:  # decoders raise whatever they like for a broken file
        # Their messages hold addresses and folders, which differ from run to run.
        return Part(visible(f"{_named(value)}, not shown: {type(error).__name__}"))
    paper = Image.new("RGBA", small.size, "white")
    paper.alpha_composite(small)
    packed = io.BytesIO()
    paper.convert("RGB").save(packed, "JPEG", quality=85)
    encoded = base64.b64encode(packed.getvalue()).decode()
    return Part(f"image of {size[0]} x {size[1]} pixels", f"data:image/jpeg;base64,{encoded}")


def _named(value: object) -> str:
    if isinstance(value, (str, PurePath)) and str(value)[:5].lower() != "data:":
        return f"image {PurePath(value).name[:200]}"
    return "image"
