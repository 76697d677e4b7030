"""A SentencePiece model of an invented language, in InternLM2's form: `tokenizer.model`.

Byte-pair encoding with byte fallback, no normalisation and no dummy prefix. Ids are in the order of
the published file: three control pieces, 256 bytes, ordinary pieces, user-defined pieces, of which
the last 147 are `[UNUSED_TOKEN_0]` to `[UNUSED_TOKEN_146]`.
"""

from __future__ import annotations

import itertools
import string
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, models, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers.trainers import BpeTrainer

from .random_checkpoint import invented_text

_SPACE = "\u2581"
# The published file's, in its order.
USER_DEFINED = (
    *"ＥＦＧＨＩＪＫＬＭＮＲＵＶＷＸＹＺ", *"ａｂｃｄｅｆｇｈｉｊｋｌｍｎｏｐｑｒｓｔｕｖｗｘｙｚ",
    "——", "……", *(f"[UNUSED_TOKEN_{number}]" for number in range(147)),
)  # fmt: skip


class _PieceType(IntEnum):
    """`ModelProto.SentencePiece.Type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    BYTE = 6


class _Piece(NamedTuple):
    """An entry of the vocabulary; of two merges the one of the higher score is made first."""

    text: str
    score: float
    type: _PieceType


def sentencepiece_model(vocab_size: int, merges: int, seed: int) -> bytes:
    """Return the content of a `tokenizer.model`.

    Args:
        vocab_size: pieces in all; what training leaves is filled with pairs of ideographs.
        merges: pieces to train, at most.
        seed: of the text to train on.
    """
    named = (
        _Piece("<unk>", 0.0, _PieceType.UNKNOWN),
        _Piece("<s>", 0.0, _PieceType.CONTROL),
        _Piece("</s>", 0.0, _PieceType.CONTROL),
    )
    bytes_ = (_Piece(f"<0x{byte:02X}>", 0.0, _PieceType.BYTE) for byte in range(256))
    defined = (_Piece(text, 0.0, _PieceType.USER_DEFINED) for text in USER_DEFINED)
    trained = _trained(merges, seed)
    room = vocab_size - len(named) - 256 - len(USER_DEFINED)
    assert len(trained) <= room, f"{len(trained)} pieces, room for {room}"
    texts = itertools.islice(dict.fromkeys(itertools.chain(trained, _filling(room))), room)
    ordinary = (_Piece(text, -float(n), _PieceType.NORMAL) for n, text in enumerate(texts))
    pieces = [*named, *bytes_, *ordinary, *defined]
    assert len(pieces) == vocab_size
    return _model(pieces)


def _trained(merges: int, seed: int) -> list[str]:
    """Single characters, then what byte-pair encoding joins, in its order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    words = Regex(rf"{_SPACE}?\p{{L}}+|\p{{N}}|{_SPACE}+|\s+|[^\p{{L}}\p{{N}}\s{_SPACE}]+")
    tokenizer.pre_tokenizer = pre.Split(words, behavior="isolated")
    printable = sorted({*string.ascii_letters, *string.digits, *string.punctuation, "\n", _SPACE})
    trainer = BpeTrainer(
        vocab_size=len(printable) + merges, initial_alphabet=printable, show_progress=False
    )
    tokenizer.train_from_iterator(invented_text(seed), trainer)
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _filling(count: int) -> Iterator[str]:
    """Enough ideographs, then their pairs."""
    ideographs = [chr(0x4E00 + number) for number in range(int(count**0.5) + 1)]
    return itertools.chain(ideographs, map("".join, itertools.product(ideographs, repeat=2)))


def _model(pieces: list[_Piece]) -> bytes:
    """Serialize a `ModelProto`: pieces (1), trainer_spec (2) and normalizer_spec (3)."""
    entries = (
        _text(1, piece.text) + _tag(2, 5) + struct.pack("<f", piece.score) + _number(3, piece.type)
        for piece in pieces
    )
    bpe, byte_fallback = _number(3, 2), _number(35, 1)
    trainer = bpe + _number(4, len(pieces)) + byte_fallback
    # name, add_dummy_prefix, remove_extra_whitespaces
    normalizer = _text(1, "identity") + _number(3, 0) + _number(4, 0)
    return b"".join([*(_message(1, e) for e in entries), _message(2, trainer),
                     _message(3, normalizer)])  # fmt: skip


def _tag(field: int, wire: int) -> bytes:
    return _varint(field << 3 | wire)


def _number(field: int, value: int) -> bytes:
    return _tag(field, 0) + _varint(value)


def _message(field: int, content: bytes) -> bytes:
    return _tag(field, 2) + _varint(len(content)) + content


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last byte have the eighth bit set."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
