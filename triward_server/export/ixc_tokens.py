"""InternLM2's slow tokenizer, restated: `tokenizer.model` (SentencePiece BPE) read and applied.

Part of the plain restatement of IXC-2.5-Reward (`ixc_reference.py`); nothing that serves imports
it.
"""

from __future__ import annotations

import heapq
import re
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

_NORMAL, _USER_DEFINED = 1, 4
_SPACE = "\u2581"
_CONTROL = re.compile(r"\[UNUSED_TOKEN_\d+\]")
BOS, EOS = 1, 2


class SlowTokenizer:
    """Byte-pair encoding with byte fallback over Unicode characters.

    Args:
        file: a SentencePiece model: no normalisation, no dummy prefix, spaces kept.
    """

    def __init__(self, file: Path) -> None:
        pieces = list(_pieces(file.read_bytes()))
        self.ids = {text: number for number, (text, _, _) in enumerate(pieces)}
        self._scores = {
            text: score
            for text, score, kind in pieces
            # sentencepiece 0.2.3 falls back on bytes for a NUL.
            if kind in (_NORMAL, _USER_DEFINED) and text != "\0"
        }
        defined = [text for text, _, kind in pieces if kind == _USER_DEFINED]
        self._controls = {text for text in defined if _CONTROL.fullmatch(text)}
        self._frozen = _longest_first(defined)
        self._frozen_text = _longest_first(set(defined) - self._controls)

    def published(self, text: str) -> list[int]:
        """Return the ids that the published slow class gives, without a BOS.

        Control tokens are recognised wherever they stand.
        """
        ids: list[int] = []
        for part in re.split("(<unk>|<s>|</s>)", text):
            named = part in ("<unk>", "<s>", "</s>")
            ids += [self.ids[part]] if named else self._encode(part, self._frozen, set())
        return ids

    def plain(self, text: str) -> list[int]:
        """Return the ids of text in which the names of control tokens are text, too."""
        return self._encode(text, self._frozen_text, self._controls)

    def _encode(self, text: str, frozen: re.Pattern[str], hidden: set[str]) -> list[int]:
        """Merge the pair of the highest score, of equal ones the first, while there is one."""
        symbols: list[str | None] = []
        whole: list[bool] = []
        for match in frozen.finditer(text.replace(" ", _SPACE)):
            symbols.append(match[0])
            whole.append(match.lastgroup == "frozen")
        before = list(range(-1, len(symbols) - 1))
        after = [*range(1, len(symbols)), -1]
        agenda: list[tuple[float, int, int, str]] = []

        def consider(left: int, right: int) -> None:
            if left < 0 or right < 0 or whole[left] or whole[right]:
                return
            joined = f"{symbols[left]}{symbols[right]}"
            if joined in self._scores and joined not in hidden:
                heapq.heappush(agenda, (-self._scores[joined], left, right, joined))

        for left, right in pairwise(range(len(symbols))):
            consider(left, right)
        while agenda:
            _, left, right, joined = heapq.heappop(agenda)
            first, second = symbols[left], symbols[right]
            if first is None or second is None or first + second != joined:
                continue  # one of them has been merged since
            symbols[left], symbols[right] = joined, None
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
            consider(before[left], left)
            consider(left, after[left])
        return [number for symbol in symbols if symbol for number in self._numbers(symbol)]

    def _numbers(self, symbol: str) -> Iterator[int]:
        if symbol in self._scores:
            yield self.ids[symbol]
        else:
            yield from (self.ids[f"<0x{byte:02X}>"] for byte in symbol.encode())


def _longest_first(frozen: set[str] | list[str]) -> re.Pattern[str]:
    """Return what cuts a text into user-defined pieces, the longest first, and characters."""
    names = "|".join(map(re.escape, sorted(frozen, key=len, reverse=True)))
    return re.compile(f"(?P<frozen>{names})|.", re.DOTALL)


def _pieces(model: bytes) -> Iterator[tuple[str, float, int]]:
    """Yield the text, score and type of each entry of a `ModelProto`."""
    for field, message in _fields(model):
        if field == 1:
            entry = dict(_fields(message))
            score = struct.unpack("<f", entry[2])[0] if 2 in entry else 0.0
            yield entry[1].decode(), score, int.from_bytes(entry.get(3, b"\1"), "little")


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the number and content of each field; integers as little-endian bytes."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint().to_bytes(8, "little")
            continue
        length = {1: 8, 5: 4}.get(key & 7) or varint()
        yield key >> 3, message[position : position + length]
        position += length
