"""SGLang's native /classify: `{"text": [str], "image_data": [...]}` -> `[{"embedding": [float]}]`.

A text is a conversation that a chat template rendered. As in SGLang, unknown fields, `model` among
them, are ignored.
"""

from __future__ import annotations

import uuid
from typing import Any

from triward.conversation import Messages
from triward.errors import InvalidRequest

from triward_tools.gateway.settings import Door, Request, Settings
from triward_tools.gateway.texts import conversations_of, text_list

_OTHERS = ("input_ids", "input_embeds", "video_data", "audio_data")


def read(request: Request, settings: Settings) -> list[Messages]:
    """Return a conversation for each text."""
    for name in _OTHERS:
        if request.get(name) is not None:
            raise InvalidRequest(f"{name}: only texts and images are taken here")
    texts = text_list(request.get("text"), "text")
    images = _images(request.get("image_data"), single=isinstance(request["text"], str))
    if images and len(images) != len(texts):
        raise InvalidRequest(f"image_data: {len(images)} entries for {len(texts)} texts")
    return conversations_of(texts, "text", settings, images)


def answer(request: Request, scores: list[float], settings: Settings) -> Any:
    """Return a dict for each text; for a text that stood alone, its dict."""
    told = [{"embedding": [each], "meta_info": {"id": uuid.uuid4().hex}} for each in scores]
    return told[0] if isinstance(request["text"], str) else told


def _images(value: Any, single: bool) -> list[list[str]]:
    """Return URLs for each text; several images of a text stand in a list of their own."""
    if value is None:
        return []
    if single:
        value = [value]
    if not isinstance(value, list):
        raise InvalidRequest("image_data: must be a list with an entry for each text")
    entries = [each if isinstance(each, list) else [each] for each in value]
    return [[_url(image) for image in entry if image is not None] for entry in entries]


def _url(image: object) -> str:
    if not isinstance(image, str):
        raise InvalidRequest(f"image_data: must hold str, got {type(image).__name__}")
    # Without a scheme it is base64, which a path or a name of a file hardly ever is.
    return image if ":" in image[:8] else f"data:;base64,{image}"


CLASSIFY = Door("sglang_classify", ("/classify",), read, answer)
