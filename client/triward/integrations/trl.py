"""Rewards for TRL's trainers that take reward functions: GRPO, RLOO, OnlineDPO and others.

    GRPOTrainer(reward_funcs=TriwardReward(RewardClient("rewards:8001")), ...)

What is scored is the prompt's messages with the completion's behind them. Of a standard (plain
text) dataset the prompt is a user's message, the completion the assistant's. Of a multimodal
dataset GRPO and RLOO have put the images of the column `image` or `images` into the prompt's
messages. Other trainers have not, as OnlineDPO, which leaves `{"type": "image"}` there: those
places are filled from the columns here.

TRL repeats a prompt for each of its completions; they go to the server as one request. A failure
raises a `TriwardError`, which ends the training: no reward is made up, and None, which TRL
would leave out, is never returned.

Rewards are the model's scores, or what a `Shape` makes of them. TRL mixes reward functions itself,
by `reward_weights`, and normalises each group: see docs/rewards.md before doing it twice.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from triward.aio import AsyncRewardClient
from triward.client import RewardClient
from triward.conversation import Messages
from triward.errors import InvalidRequest
from triward.integrations.images import holds_none, illustrated, image_of, image_parts
from triward.rewards import Shape

Text = str | Messages


class TriwardReward:
    """A reward function. Can be pickled, for trainers that start processes.

    Args:
        client: whom to ask.
        name: under which TRL logs the rewards.
        shape: what becomes of the scores; a pickled copy learns for itself.
    """

    def __init__(  # noqa: D107 - the class says it
        self, client: RewardClient, name: str = "triward", shape: Shape | None = None
    ) -> None:
        self.client = client
        self.shape = shape
        self.__name__ = name

    def __call__(
        self, prompts: list[Text], completions: list[Text], **columns: object
    ) -> list[float]:
        """Return the reward of each completion.

        Args:
            prompts: plain texts or messages.
            completions: likewise, one for each prompt.
            columns: of the dataset; used are `images`, lists of images, or `image`.

        Raises:
            TriwardError: a completion has no score; the message names it.
        """
        scores = self.client.score_many(_conversations(prompts, completions, columns))
        return self.shape(scores) if self.shape else scores


def async_triward_reward(
    client: AsyncRewardClient, shape: Shape | None = None
) -> Callable[..., Awaitable[list[float]]]:
    """Return a coroutine reward function, which TRL runs beside the others of `reward_funcs`."""
    # TRL tells coroutine functions from others with inspect, which does not see through an object
    # with an async __call__, but through a partial.
    return partial(async_triward, client, shape)


async def async_triward(
    client: AsyncRewardClient,
    shape: Shape | None,
    /,
    prompts: list[Text],
    completions: list[Text],
    **columns: object,
) -> list[float]:
    """Score completions as `TriwardReward.__call__` does."""
    scores = await client.score_many(_conversations(prompts, completions, columns))
    return shape(scores) if shape else scores


def _conversations(
    prompts: Sequence[Text], completions: Sequence[Text], columns: Mapping[str, Any]
) -> Iterator[Messages]:
    asked: Any = None
    shared: Messages = []
    pictures = _pictures(columns, len(prompts))
    for prompt, completion, images in zip(prompts, completions, pictures, strict=True):
        # A dataset decodes a repeated row's image each time. The client takes images for the same,
        # and sends them once, when they are the same object, so equal ones become it here.
        if (prompt, images) != asked:
            asked = prompt, images
            shared = _shown(_messages(prompt, "user"), images)
        yield [*shared, *_messages(completion, "assistant")]


def _pictures(columns: Mapping[str, Any], rows: int) -> list[list[Any]]:
    """Return each row's images; of the two columns TRL's trainers take `images` first."""
    name = next((name for name in ("images", "image") if columns.get(name) is not None), None)
    if name is None:
        return [[]] * rows
    if len(columns[name]) != rows:
        raise InvalidRequest(f"{name}: {len(columns[name])} rows for {rows} prompts")
    if name == "image":
        return [[] if image is None else [image] for image in columns[name]]
    return [list(images or ()) for images in columns[name]]


def _shown(messages: Messages, images: list[Any]) -> Messages:
    """Return the messages with the row's images, which may be in them already."""
    parts = [part for message in messages for part in image_parts(message.get("content"))]
    if not images or (parts and not any(holds_none(part) for part in parts)):
        return messages
    return illustrated(messages, [image_of(image) for image in images])


def _messages(text: Text, role: str) -> Messages:
    return [{"role": role, "content": text}] if isinstance(text, str) else text
