"""Text that a chat template rendered -> messages."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from triward.conversation import Message, Messages
from triward.errors import InvalidRequest

Parse = Callable[[str], Messages]

# What ends a response of Qwen's models.
ENDS = ("<|im_end|>", "<|endoftext|>")

PAD = "<|image_pad|>"

_OPENING = "<|im_start|>assistant\n"
_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", re.DOTALL)


def chatml(prompt: str) -> Messages:
    """Return the messages of a prompt in ChatML that ends where the assistant's turn begins.

    Raises:
        InvalidRequest: it is another format, or shows an image, which text does not hold.
    """
    if PAD in prompt:
        raise InvalidRequest("the prompt shows an image; give its messages in the label")
    return chatml_turns(prompt)


def chatml_turns(prompt: str) -> list[Message]:
    """Return the messages of such a prompt; placeholders for images stay in their text.

    Raises:
        InvalidRequest: it is another format.
    """
    closed = prompt[: -len(_OPENING)] if prompt.endswith(_OPENING) else ""
    messages: list[Message] = []
    position = 0
    while turn := _TURN.match(closed, position):
        messages.append({"role": turn[1], "content": turn[2]})
        position = turn.end()
    if not messages or position < len(closed):
        raise InvalidRequest(
            f"the prompt is not ChatML up to {_OPENING!r}; "
            "give its messages in the label, or use `plain` if it has no template"
        )
    return messages


def plain(prompt: str) -> Messages:
    """Return the prompt as one message of the user's."""
    return [{"role": "user", "content": prompt}]


def divided(text: str, ends: Sequence[str] = ENDS) -> tuple[str, str]:
    """Divide a whole conversation in ChatML into the prompt and the last response.

    A text does not say where a policy began: a response that holds control tokens divides, too.

    Raises:
        InvalidRequest: the assistant says nothing in it.
    """
    before, opening, response = text.rpartition(_OPENING)
    if not opening:
        raise InvalidRequest(f"the text is not ChatML with {_OPENING!r} and a response")
    # The reward model's own template ends the conversation with a line break, a policy does not.
    return before + opening, unended(response, [end + tail for end in ends for tail in ("\n", "")])


def unended(response: str, ends: Sequence[str]) -> str:
    """Return a response without the token that ended it."""
    end = next((end for end in ends if response.endswith(end)), "")
    return response[: len(response) - len(end)]
