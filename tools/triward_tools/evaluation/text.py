"""Texts of others, made safe to look at."""

from __future__ import annotations

import re
import unicodedata

# What a reader cannot see, or what changes how its neighbours look: control and format characters
# (with joiners and bidirectional marks), halves of surrogate pairs, what is for private use or has
# no meaning in this Python's Unicode, and separators of lines and paragraphs.
_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")

# The same, in categories that others share: fillers, an empty cell of braille, and selectors of
# variants. U+FE0F, the emojis' own, stays.
_FILLERS = {
    *"\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0",
    *map(chr, range(0xFE00, 0xFE0F)),
    *map(chr, range(0xE0100, 0xE01F0)),
}

_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~&$])")


def visible(text: str) -> str:
    r"""Return the text, with what is unseen in it written as its code point, such as `<U+202E>`.

    The result has an encoding in UTF-8, and cannot reorder the page around it. `\r\n` is a newline.
    Emojis that are joined of several show how: joiners are format characters.
    """
    text = text.replace("\r\n", "\n")
    unseen = {each for each in set(text) if _is_unseen(each)}
    return "".join(f"<U+{ord(each):04X}>" if each in unseen else each for each in text)


def markdown(text: object) -> str:
    """Return the text as a Markdown table's cell: one line without tags, emphasis, links or cells.

    Of an address that stands in it for itself, some viewers make a link all the same.
    """
    return _MARKDOWN.sub(r"\\\1", " ".join(visible(str(text)).split()))


def fenced(text: str) -> str:
    """Return the text as a code block, whose fence is longer than any row of backticks in it."""
    shown = visible(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence}text\n{shown}\n{fence}"


def _is_unseen(character: str) -> bool:
    if character in "\n\t":
        return False
    return unicodedata.category(character) in _UNSEEN or character in _FILLERS
