"""Prompts and responses as trainers hand them over -> conversations, and a process's clients."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache

from triward.aio import AsyncRewardClient
from triward.channel import Url
from triward.client import RewardClient
from triward.conversation import Messages
from triward.errors import InvalidRequest
from triward.integrations.chatml import ENDS, PAD, chatml, chatml_turns, unended
from triward.integrations.images import IMAGE, placed

Prompt = str | Messages
Rollout = tuple[Prompt, str, Sequence[object]]

_SHOWN = re.compile(rf"<\|vision_start\|>(?:{re.escape(PAD)})+<\|vision_end\|>")


def prompted(prompt: Prompt, images: Sequence[object] = ()) -> Messages:
    """Return a prompt's messages with its images in their places.

    Args:
        prompt: messages; or the text that a chat template made of them, in ChatML.
        images: for the places that hold none, which are image parts, `<image>` in a message's
            text, or Qwen's placeholders in ChatML.

    Raises:
        InvalidRequest: the text is another format, or there are not as many places as images.
    """
    if not isinstance(prompt, str):
        return placed(prompt, images)
    if not len(images):
        return chatml(prompt)
    turns = chatml_turns(prompt)
    if any(IMAGE in str(turn["content"]) for turn in turns):
        raise InvalidRequest(f"the prompt shows images, and says {IMAGE!r} in its text")
    shown = [{**turn, "content": _SHOWN.sub(IMAGE, str(turn["content"]))} for turn in turns]
    return placed(shown, images)


def rollouts(rows: Iterable[Rollout], ends: Sequence[str] = ENDS) -> Iterator[Messages]:
    """Yield the conversation of each prompt, response and images.

    Equal neighbours share their messages and images, so that they travel once.

    Args:
        rows: in the order of the batch.
        ends: tokens of the policy that end a response.

    Raises:
        InvalidRequest: see `prompted`.
    """
    asked: tuple[Prompt, list[object]] | None = None
    shared: Messages = []
    for prompt, response, images in rows:
        if (prompt, list(images)) != asked:
            asked = prompt, list(images)
            shared = prompted(prompt, images)
        yield [*shared, {"role": "assistant", "content": unended(response, ends)}]


def client_of(url: Url, timeout: float) -> RewardClient:
    """Return this process's client of a server, or of several."""
    return _client(url if isinstance(url, str) else tuple(url), timeout)


def async_client_of(url: Url, timeout: float) -> AsyncRewardClient:
    """Return this process's client of a server, for asyncio."""
    return _async_client(url if isinstance(url, str) else tuple(url), timeout)


@cache
def _client(url: Url, timeout: float) -> RewardClient:
    return RewardClient(url, timeout=timeout)


@cache
def _async_client(url: Url, timeout: float) -> AsyncRewardClient:
    return AsyncRewardClient(url, timeout=timeout)
