"""Conversations of a request -> their scores, by one request for each prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from triward.aio import AsyncRewardClient
from triward.conversation import Messages
from triward.errors import TriwardError, relocated


def by_prompt(conversations: Sequence[Messages]) -> list[int]:
    """Return an order in which conversations of equal prompts are neighbours.

    Args:
        conversations: as they were sent, with media as URLs.
    """
    first: dict[str, int] = {}
    places = []
    for index, messages in enumerate(conversations):
        key = json.dumps(messages[:-1], sort_keys=True)
        places.append((first.setdefault(key, index), index))
    return [index for _, index in sorted(places)]


async def ask(
    client: AsyncRewardClient,
    conversations: Sequence[Messages],
    order: Sequence[int],
    timeout: float,
) -> list[float]:
    """Return the scores, in the order of the conversations, which are asked for in another.

    Raises:
        TriwardError: one has none; the message names it.
    """
    try:
        found = await client.score_many([conversations[i] for i in order], timeout=timeout)
    except TriwardError as error:
        raise _placed(error, order) from error
    return [score for _, score in sorted(zip(order, found, strict=True))]


def _placed(error: TriwardError, order: Sequence[int]) -> TriwardError:
    asked = re.fullmatch(r"conversations\[(\d+)\]", error.place)
    return relocated(error, f"conversations[{order[int(asked[1])]}]") if asked else error
