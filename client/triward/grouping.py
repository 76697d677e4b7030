"""Conversations -> requests: neighbours that share a prompt travel together.

A request holds one prompt and N responses, and the server computes the prompt once for all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from triward.conversation import (
    MediaRef,
    Messages,
    RewardRequest,
    encode_messages,
    encode_responses,
    split_conversation,
)
from triward.errors import TriwardError

# Enough to make the prompt's share of the work small; more groups at once keep more servers busy.
MAX_GROUP = 32


@dataclass
class Group:
    """Consecutive conversations with one prompt.

    Attributes:
        first: index of the first of them.
        messages: the prompt, as it is sent.
        refs: its media, not read yet.
        responses: one for each conversation, at least one, as they are sent.
        error: why the only conversation of this group cannot be sent; nothing else is set then.
    """

    first: int
    messages: bytes = b""
    refs: list[MediaRef] = field(default_factory=list)
    responses: list[bytes] = field(default_factory=list)
    error: TriwardError | None = None

    def takes(self, other: Group) -> bool:
        """Return True if another group's conversations can be asked for with these."""
        return (
            self.error is None
            and other.error is None
            and len(self.responses) + len(other.responses) <= MAX_GROUP
            and self.messages == other.messages
            and len(self.refs) == len(other.refs)
            and all(_same(a.value, b.value) for a, b in zip(self.refs, other.refs, strict=True))
        )

    def request(self, read: Callable[[MediaRef], bytes]) -> RewardRequest:
        """Read the media, and return the request."""
        media = tuple(read(ref) for ref in self.refs)
        return RewardRequest(self.messages, tuple(self.responses), media)

    @property
    def size(self) -> int:
        """Number of conversations."""
        return max(1, len(self.responses))

    def alone(self) -> Iterator[Group]:
        """Its conversations, each in a group of its own."""
        for offset, response in enumerate(self.responses):
            yield Group(self.first + offset, self.messages, self.refs, [response])


def grouped(conversations: Iterable[Messages]) -> Iterator[Group]:
    """Yield groups in the order of the conversations; one that cannot be sent has an error.

    A group is complete when the next conversation does not fit into it, so one conversation more
    is taken from the iterable than the group holds.
    """
    group: Group | None = None
    for index, conversation in enumerate(conversations):
        single = _encode(index, conversation)
        if group and group.takes(single):
            group.responses += single.responses
            continue
        if group:
            yield group
        group = single
    if group:
        yield group


def place(index: int) -> str:
    """Return a conversation's name in messages."""
    return f"conversations[{index}]"


def _encode(index: int, conversation: Messages) -> Group:
    try:
        prompt, response = split_conversation(conversation)
        messages, refs = encode_messages(prompt)
        return Group(index, messages, refs, list(encode_responses([response])))
    except TriwardError as error:
        return Group(index, error=error)


def _same(a: object, b: object) -> bool:
    """Return True if two media values are surely the same file; pixels are not compared."""
    if a is b:
        return True
    comparable = (str, bytes, os.PathLike)
    return isinstance(a, comparable) and isinstance(b, comparable) and a == b
