"""Rewards for ms-swift's GRPO, 4.6, in a file that it is given as `--external_plugins`.

    orms["triward"] = partial(TriwardORM, RewardClient("rewards:8001"))

What is scored is the row's `messages` with its `images`, and the completion behind them. A failure
raises a `TriwardError`; None, which ms-swift would leave out, is never returned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from triward.client import RewardClient
from triward.errors import InvalidRequest
from triward.integrations.prompts import rollouts
from triward.rewards import Shape


class TriwardORM:
    """A reward function, made and called as ms-swift does with its class ORM.

    Args:
        client: whom to ask.
        args: ms-swift's; not used.
        shape: what becomes of the scores.
        other: what else ms-swift passes; not used.
    """

    def __init__(  # noqa: D107 - the class says it
        self, client: RewardClient, args: object = None, shape: Shape | None = None, **other: object
    ) -> None:
        self.client = client
        self.args = args
        self.shape = shape

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float]:
        """Return the reward of each completion.

        Args:
            completions: texts.
            columns: a value for each completion; used are `messages`, whose last one is the
                completion's, and `images`, which may be None.

        Raises:
            TriwardError: a completion has no score; the message names it.
        """
        count = len(completions)
        images = columns.get("images") or [None] * count
        messages = columns.get("messages")
        if messages is None or not len(messages) == len(images) == count:
            raise InvalidRequest(f"messages, images: need one for each of {count} completions")
        asked = zip(messages, completions, images, strict=True)
        rows = ((prompt_of(said), text, shown or []) for said, text, shown in asked)
        scores = self.client.score_many(rollouts(rows))
        return self.shape(scores) if self.shape else scores


def prompt_of(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages before the completion.

    Raises:
        InvalidRequest: the last one is not the assistant's.
    """
    if not messages or messages[-1].get("role") != "assistant":
        raise InvalidRequest("messages: the last one must be the assistant's")
    return [dict(message) for message in messages[:-1]]
