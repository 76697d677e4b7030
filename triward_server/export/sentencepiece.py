"""A `tokenizer.model` of SentencePiece as a tokenizer of the `tokenizers` package, with equal ids.

Of byte-pair encodings that keep every character as it is and fall back to bytes, as InternLM2's
does. The file is a protobuf message of a few fields, read here; another kind is refused by name.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from ..errors import CheckpointError

SPACE = "\u2581"  # what a space becomes

# Of `sentencepiece_model.proto`: the types of a piece.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
_BPE = 2  # of its types of a model
# Pieces that are kept free for a role, and so are a template's alone.
_ROLE = re.compile(r"\[UNUSED_TOKEN_\d+\]")

_NUL = "<NUL>"  # no text becomes it, for it is made of no others

Value = int | bytes


class Piece(NamedTuple):
    """An entry of the vocabulary: its text, its rank (the higher the earlier), and its type."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class Vocabulary:
    """Pieces by id.

    Attributes:
        pieces: of which the text is unique.
        special: ids that no text of a caller becomes.
    """

    pieces: Sequence[Piece]
    special: Collection[int]

    def renamed(self, names: Mapping[int, str]) -> Vocabulary:
        """Return a copy whose pieces have other texts, and are special.

        Raises:
            CheckpointError: an id is outside, or a text is another piece's.
        """
        pieces = list(self.pieces)
        for id_, text in names.items():
            if not 0 <= id_ < len(pieces):
                raise CheckpointError(
                    f"tokenizer_config.json: token {text!r} has id {id_}, tokenizer.model has "
                    f"{len(pieces)} pieces"
                )
            pieces[id_] = pieces[id_]._replace(text=text)
        if len({piece.text for piece in pieces}) != len(pieces):
            raise CheckpointError("tokenizer_config.json: two tokens have the same text")
        return Vocabulary(pieces, {*self.special, *names})


def read_vocabulary(file: Path) -> Vocabulary:
    """Read a `tokenizer.model`.

    Raises:
        CheckpointError: it is none, or it does to text what is not done here.
    """
    pieces: list[Piece] = []
    rules: dict[int, dict[int, Value]] = {2: {}, 3: {}}
    try:
        for number, value in _fields(file.read_bytes()):
            if number == 1:
                pieces.append(_piece(dict(_fields(_bytes(value)))))
            elif number in rules:
                rules[number] = dict(_fields(_bytes(value)))
    except (ValueError, IndexError, KeyError, struct.error) as error:
        raise CheckpointError(f"{file}: not a tokenizer.model: {error}") from None
    _check_rules(file, pieces, *rules.values())
    special = {
        id_
        for id_, piece in enumerate(pieces)
        if piece.kind in (UNKNOWN, CONTROL) or _ROLE.fullmatch(piece.text)
    }
    return Vocabulary(pieces, special)


def tokenizer_of(vocabulary: Vocabulary) -> Tokenizer:
    """Return a tokenizer that gives SentencePiece's ids, and puts nothing around a text."""
    pieces = vocabulary.pieces
    ids = {piece.text: id_ for id_, piece in enumerate(pieces)}
    unknown = next(piece.text for piece in pieces if piece.kind == UNKNOWN)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges(vocabulary, ids),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = [pieces[id_].text for id_ in sorted(vocabulary.special)]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    # Cut out of a text first, wherever they stand.
    fixed = [
        piece.text
        for id_, piece in enumerate(pieces)
        if piece.kind == USER_DEFINED and id_ not in vocabulary.special
    ]
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in fixed])
    return tokenizer


def _merges(vocabulary: Vocabulary, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two: SentencePiece takes the pair that makes the best piece."""
    joined = {
        piece.text: piece.score
        for id_, piece in enumerate(vocabulary.pieces)
        if piece.kind in (NORMAL, USER_DEFINED) and id_ not in vocabulary.special
    }
    found = []
    for text, score in joined.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in joined and right in joined:
                found.append((-score, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _check_rules(
    file: Path, pieces: Sequence[Piece], trainer: Mapping[int, Value], normal: Mapping[int, Value]
) -> None:
    """Refuse a model that changes text, or cuts it in another way."""
    if len({piece.text for piece in pieces}) != len(pieces):
        raise CheckpointError(f"{file}: a piece is there twice")
    kinds = [piece.kind for piece in pieces]
    asked: list[tuple[str, object, object]] = [
        ("model_type", trainer.get(3, 1), _BPE),
        ("byte_fallback", trainer.get(35, 0), 1),
        ("treat_whitespace_as_suffix", trainer.get(24, 0), 0),
        ("normalizer", normal.get(2, b""), b""),
        ("add_dummy_prefix", normal.get(3, 1), 0),
        ("remove_extra_whitespaces", normal.get(4, 1), 0),
        ("escape_whitespaces", normal.get(5, 1), 1),
        ("number of bytes", kinds.count(BYTE), 256),
        ("number of unknown pieces", kinds.count(UNKNOWN), 1),
        ("number of unused pieces", kinds.count(5), 0),
    ]
    for name, value, supported in asked:
        if value != supported:
            raise CheckpointError(f"{file}: {name} is {value!r}, only {supported!r} is supported")


def _piece(fields: Mapping[int, Value]) -> Piece:
    (score,) = struct.unpack("<f", _bytes(fields.get(2, b"\0\0\0\0")))
    text, kind = _bytes(fields[1]).decode(), fields.get(3, NORMAL)
    if text == "\0":  # SentencePiece does not use it, and spells the byte
        text, kind = _NUL, 0
    return Piece(text, score, kind if isinstance(kind, int) else 0)


def _bytes(value: Value) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number stands where bytes are expected")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """Numbers and values of a protobuf message's fields; floats stay four bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = {1: 8, 5: 4}[kind]
        else:
            raise ValueError(f"wire type {kind} of field {number}")
        if at + size > len(data):
            raise ValueError("cut short")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number of seven bits a byte, and where it ends."""
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 0x80:
            return value, at
