"""Scores as a table for people: a line for each response, best first, as wide as the terminal."""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from triward.many import ranked

_HEAD = ("", "rank", "response", "score")
_GAP = "  "
_LEAST_TEXT = 10  # columns; a terminal that has fewer left wraps lines
_BOLD, _PLAIN = "\x1b[1m", "\x1b[0m"
# They change the order of what follows on the line; joiners of emoji and scripts stay.
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_SOFT_HYPHEN, _AS_EMOJI = "\xad", "\ufe0f"


@dataclass(frozen=True)
class Screen:
    """The place where a table is shown.

    Attributes:
        columns: width of a line.
        encoding: characters that it lacks are shown as escapes.
        styled: whether escape sequences may make a line bold.
    """

    columns: int
    encoding: str
    styled: bool

    @classmethod
    def of(cls, stream: TextIO) -> Screen:
        """Return standard output's: 80 columns, and no style, where it is no terminal."""
        styled = (
            stream.isatty()
            and not os.environ.get("NO_COLOR")
            and os.environ.get("TERM") != "dumb"
            and os.name != "nt"  # whose older consoles print the sequences
        )
        encoding = getattr(stream, "encoding", None) or "utf-8"
        return cls(shutil.get_terminal_size().columns, encoding, styled)


def table_lines(
    scores: Sequence[float], names: Sequence[str], texts: Sequence[str], screen: Screen
) -> list[str]:
    """Return lines: a head, then responses, best first.

    Where several responses are compared, the best is marked with `*`; so are others that score the
    same.

    Args:
        scores: finite, at least one.
        names: of the responses, in the order of their scores.
        texts: the responses; what does not fit into a line is left out, with an ellipsis.
        screen: where the lines are shown.
    """
    best = max(scores)
    rows = [_HEAD]
    for rank, index in enumerate(ranked(scores), start=1):
        mark = "*" if len(scores) > 1 and scores[index] == best else ""
        rows.append((mark, str(rank), names[index], f"{scores[index]:.4f}"))
    widths = [max(1, *(len(row[column]) for row in rows)) for column in range(len(_HEAD))]
    room = max(_LEAST_TEXT, screen.columns - sum(widths) - len(_GAP) * len(widths))
    shown = ["text", *(one_line(texts[index], room, screen.encoding) for index in ranked(scores))]
    lines = []
    for row, text in zip(rows, shown, strict=True):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        line = _GAP.join([*cells, text]).rstrip()
        lines.append(f"{_BOLD}{line}{_PLAIN}" if screen.styled and row[0] else line)
    return lines


def one_line(text: str, room: int, encoding: str = "utf-8") -> str:
    """Return the text as one line of at most `room` columns, without control characters."""
    ellipsis = _shown("\N{HORIZONTAL ELLIPSIS}", encoding, "...")
    kept: list[str] = []
    used = fitting = before = 0
    for character in " ".join(text.split()):
        if unicodedata.category(character) == "Cc" or character in _BIDI:
            continue
        shown = _shown(character, encoding)
        before = _width(shown, before) if shown == character else len(shown)
        used += before
        if used > room:
            return "".join(kept[:fitting]) + ellipsis
        kept.append(shown)
        if used <= room - len(ellipsis):
            fitting = len(kept)
    return "".join(kept)


def _shown(character: str, encoding: str, instead: str | None = None) -> str:
    """Return the character, or what stands for it where the encoding lacks it: an escape."""
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return instead or character.encode(encoding, "backslashreplace").decode(encoding)
    return character


def _width(character: str, before: int) -> int:
    """Return columns of a terminal; never fewer than it takes.

    Args:
        character: not a control character.
        before: columns of the character before it.
    """
    if character == _AS_EMOJI:  # makes the one before two columns wide
        return 1 if before == 1 else 0
    if character != _SOFT_HYPHEN and unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
