"""Whole conversations that a chat template rendered -> messages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from triward.conversation import Message, Messages
from triward.errors import InvalidRequest, located
from triward.integrations.chatml import PAD, chatml_turns, divided

from triward_tools.gateway.settings import Settings

_PLACE = re.compile(rf"(?:<\|vision_start\|>)?(?:{re.escape(PAD)})+(?:<\|vision_end\|>)?")


def text_list(value: object, name: str) -> list[str]:
    """Return a text or a list of texts as a list.

    Raises:
        InvalidRequest: it is something else, or empty.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InvalidRequest(f"{name}: must be a str or a list of str")
    if not texts:
        raise InvalidRequest(f"{name}: holds 0 texts, needs at least 1")
    return texts


def conversations_of(
    texts: Sequence[str], name: str, settings: Settings, images: Sequence[Sequence[str]] = ()
) -> list[Messages]:
    """Return the conversation that each text holds, in ChatML up to its last response.

    Raises:
        InvalidRequest: a text holds none; the message names it.
    """
    shown = images or [()] * len(texts)
    found = []
    for index, (text, urls) in enumerate(zip(texts, shown, strict=True)):
        try:
            found.append(_conversation(text, settings, urls))
        except InvalidRequest as error:
            raise located(error, f"{name}[{index}]") from error
    return found


def _conversation(text: str, settings: Settings, urls: Sequence[str]) -> Messages:
    prompt, response = divided(text, settings.ends)
    messages = _shown(chatml_turns(prompt), urls)
    return [*messages, {"role": "assistant", "content": response}]


def _shown(messages: Sequence[Message], urls: Sequence[str]) -> list[Message]:
    """Return the messages with the images in place of their placeholders."""
    places = sum(len(_PLACE.findall(message["content"])) for message in messages)
    if places != len(urls):
        raise InvalidRequest(f"the text has places for {places} images, {len(urls)} were sent")
    left = iter(urls)
    return [
        {**message, "content": _parts(message["content"], left)} if urls else message
        for message in messages
    ]


def _parts(content: str, urls: Any) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    end = 0
    for place in _PLACE.finditer(content):
        parts.append({"type": "text", "text": content[end : place.start()]})
        parts.append({"type": "image_url", "image_url": {"url": next(urls)}})
        end = place.end()
    parts.append({"type": "text", "text": content[end:]})
    return [part for part in parts if part["type"] != "text" or part["text"]]
