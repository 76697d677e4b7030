"""What differs between kinds of checkpoints before the model: chats, media, and their options.

`preprocess.py` asks these alone; `families.py` says which checkpoint has which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import InvalidRequest
from ..schema import UInt8Array
from .conversation import Conversation, ImagePart, MediaPlace, TextPart, VideoPart
from .decoding import Reading

# Breaks what a text spells of control tokens.
Mark = Callable[[str], str]
Content = str | Sequence[TextPart | ImagePart | VideoPart]


@dataclass(frozen=True)
class Item:
    """A media item whose headers have been read.

    Attributes:
        field: its name in error messages.
        tokens: placeholders that it takes.
        read: decodes it: uint8 [H, W, 3] or [T, H, W, 3], once what waits has been flushed.
        shown: pixels of video that are then held.
        timed: its frames have times, `schema.SECONDS_PER_GRID`.
    """

    field: str
    tokens: int
    read: Callable[[], Future[UInt8Array]]
    shown: int = 0
    timed: bool = False


class Media(Protocol):
    """Rules for a family's images and videos."""

    @property
    def patch_size(self) -> int:
        """Side of a vision patch in pixels."""

    def open(self, reading: Reading, conversation: Conversation) -> Iterator[Item]:
        """Read the headers of a request's media, one item after the other.

        Raises:
            InvalidRequest: naming the part or the item, the value and the limit.
        """

    def flush(self) -> None:
        """Complete what waits in items that were read."""


class Chat(Protocol):
    """How a prompt becomes what a chat template is given."""

    def __call__(self, conversation: Conversation, mark: Mark) -> list[dict[str, Any]]:
        """Return the messages, all of a caller's text marked.

        Raises:
            InvalidRequest: the prompt does not fit the family.
        """


@dataclass(frozen=True)
class Family:
    """A checkpoint's files as preprocessing reads them.

    Attributes:
        processor: has the chat template, and the tokenizer, or is it.
        positions: tokens that a conversation may have.
        chat: how a prompt is given to the template.
        media: None: a text model.
        placeholders: the ids that stand for media.
        place: what a prompt's text has where a media item stands, if its part does not say so.
    """

    processor: Any
    positions: int
    chat: Chat
    media: Media | None = None
    placeholders: tuple[int, ...] = ()
    place: str = ""


def check_options(place: MediaPlace, known: AbstractSet[str]) -> None:
    """Raise `InvalidRequest` for an option of a media part that the family does not know."""
    given = place.part.model_dump(exclude={"type", "frames"}, exclude_none=True)
    for name in sorted(given.keys() - known):
        options = ", ".join(sorted(known)) or "none"
        raise InvalidRequest(
            f"{place.path}.{name}",
            f"{given[name]} was given; this checkpoint's {place.part.type}s have no such option "
            f"({options})",
        )


def joined(content: Content) -> str:
    """Return the text of a message, its parts of text joined."""
    if isinstance(content, str):
        return content
    return "".join(part.text for part in content if isinstance(part, TextPart))


def text_chat(conversation: Conversation, mark: Mark) -> list[dict[str, Any]]:
    """`Chat` for templates that know strings only, as text models'."""
    return [{"role": m.role, "content": mark(joined(m.content))} for m in conversation.messages]


def parts_chat(conversation: Conversation, mark: Mark) -> list[dict[str, Any]]:
    """`Chat` for templates that write each media part's placeholder in its place."""
    return [
        {"role": m.role, "content": _marked_parts(m.content, mark)} for m in conversation.messages
    ]


def _marked_parts(content: Content, mark: Mark) -> Any:
    if isinstance(content, str):
        return mark(content)
    return [
        {"type": "text", "text": mark(part.text)}
        if isinstance(part, TextPart)
        else {"type": part.type}
        for part in content
    ]


def done(pixels: UInt8Array) -> Future[UInt8Array]:
    """Return the result of an item that waits for nothing."""
    result: Future[UInt8Array] = Future()
    result.set_result(pixels)
    return result
