"""Doors of trainers with schemas of their own: OpenRLHF, LLaMA-Factory and slime.

As there, unknown fields are ignored. LLaMA-Factory's client always sends the model's name "model",
so it is not looked at.
"""

from __future__ import annotations

import uuid
from typing import Any

from triward.conversation import Messages
from triward.errors import InvalidRequest
from triward.integrations import openrlhf
from triward.integrations.chatml import unended

from triward_tools.gateway.settings import Door, Request, Settings
from triward_tools.gateway.texts import conversations_of, text_list


def _openrlhf(request: Request, settings: Settings) -> list[Messages]:
    texts = openrlhf.read_texts(request)
    return openrlhf.conversations(*texts, parse=settings.parse, ends=settings.ends)


def _rewards(request: Request, scores: list[float], settings: Settings) -> dict[str, Any]:
    return {"rewards": scores}


def _llamafactory(request: Request, settings: Settings) -> list[Messages]:
    if request.get("max_length") is not None:
        raise InvalidRequest(f"max_length: {request['max_length']!r:.50}; nothing is truncated")
    name = request.get("model", "")
    if not isinstance(name, str) or not name.isprintable():  # it is told again in the answer
        raise InvalidRequest(f"model: must be a printable str, got {name!r:.50}")
    texts = text_list(request.get("messages"), "messages")
    return conversations_of(texts, "messages", settings)


def _scores(request: Request, scores: list[float], settings: Settings) -> dict[str, Any]:
    told = {"id": f"scoreeval-{uuid.uuid4().hex}", "object": "score.evaluation"}
    return {**told, "model": request.get("model", settings.models[0]), "scores": scores}


def _slime(request: Request, settings: Settings) -> list[Messages]:
    prompt, response = request.get("prompt"), request.get("response")
    if not isinstance(prompt, (str, list)):
        raise InvalidRequest("prompt: must be a str or a list of messages")
    if not isinstance(response, str):
        raise InvalidRequest("response: must be a str")
    # A prompt that slime has not rendered is a list of messages already.
    parse: Any = settings.parse if isinstance(prompt, str) else list
    messages = openrlhf.messages_of(prompt, request.get("label"), parse)
    ended = unended(response, settings.ends)
    return [[*messages, {"role": "assistant", "content": ended}]]


def _number(request: Request, scores: list[float], settings: Settings) -> float:
    return scores[0]


OPENRLHF = Door("openrlhf", ("/get_reward",), _openrlhf, _rewards)
LLAMAFACTORY = Door("llamafactory", ("/v1/score/evaluation",), _llamafactory, _scores)
SLIME = Door("slime", ("/remote_rm",), _slime, _number)
