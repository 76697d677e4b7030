"""Settings of a gateway, and what its doors are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from triward.conversation import Messages
from triward.errors import InvalidRequest
from triward.integrations.chatml import ENDS, Parse, chatml

Request = Mapping[str, Any]


class UnknownModel(InvalidRequest):
    """The request names another model than the one that is served."""


@dataclass(frozen=True)
class Settings:
    """Options of a gateway.

    Attributes:
        models: names under which the model is asked for; the first one is told.
        parse: makes messages of a prompt that is text.
        ends: tokens of the policy that end a response.
        timeout: seconds for each request, from its first byte to its answer.
        max_body_bytes: the most bytes of a request's body.
        max_requests: the most requests at once.
        allow_urls: fetch images from http(s) URLs, of public addresses alone.
    """

    models: Sequence[str] = ("reward",)
    parse: Parse = chatml
    ends: Sequence[str] = ENDS
    timeout: float = 60.0
    max_body_bytes: int = 64 * 2**20
    max_requests: int = 128
    allow_urls: bool = False

    def check_model(self, name: object) -> None:
        """See that a request is for this model; one without a name is.

        Raises:
            UnknownModel: it is for another.
        """
        if name is not None and name not in self.models:
            raise UnknownModel(f"model: {name!r} is not served, {self.models[0]!r} is")


@dataclass(frozen=True)
class Door:
    """One project's way to ask for rewards.

    Attributes:
        name: in metrics.
        paths: where it is asked.
        read: returns the conversations of a request, whose media are still as they were sent.
        answer: returns the body for a request and its scores.
    """

    name: str
    paths: Sequence[str]
    read: Callable[[Request, Settings], list[Messages]]
    answer: Callable[[Request, list[float], Settings], Any]
