"""InternLM2's `tokenizer.model`, SentencePiece's byte pairs, as a tokenizer of `tokenizers`.

The checkpoint's own tokenizer class is remote code. A merge of SentencePiece is any piece that is
two pieces side by side, the one of the highest score first; here each is listed once for each pair.

`[UNUSED_TOKEN_n]` are control tokens of templates: unlike the class's, they are special here, so
that callers' text can spell them as text (`tokenization.py`). The ids of all else are the same.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from ..errors import CheckpointError

MODEL_FILE, TOKENIZER_FILE = "tokenizer.model", "tokenizer.json"
_UNKNOWN, _FIRST, _LAST = "<unk>", "<s>", "</s>"
_CONTROL = re.compile(r"\[UNUSED_TOKEN_\d+\]")
_SPACE = "\u2581"


class _Kind(IntEnum):
    """`ModelProto.SentencePiece.Type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class _Piece:
    text: str
    score: float
    kind: _Kind


def load_tokenizer(checkpoint: Path, template: str) -> Any:
    """Return transformers' tokenizer of a checkpoint, with a chat template of ours.

    From `tokenizer.json` if an export has written it, or else from `tokenizer.model`.

    Raises:
        CheckpointError: neither is there, or it is damaged or of another kind.
    """
    written = checkpoint / TOKENIZER_FILE
    backend = Tokenizer.from_file(str(written)) if written.is_file() else convert(checkpoint)
    tokens = backend.get_added_tokens_decoder().values()
    for token in tokens:
        if _CONTROL.fullmatch(token.content) and not token.special:
            raise CheckpointError(
                f"{written}: {token.content} is not special, so that callers' text could be a "
                f"control token; without the file the tokenizer is made of {MODEL_FILE}"
            )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=_FIRST, eos_token=_LAST, chat_template=template
    )


def convert(checkpoint: Path) -> Tokenizer:
    """Return the tokenizer of a checkpoint's `tokenizer.model`; errors as of `load_tokenizer`."""
    path = checkpoint / MODEL_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, and no {TOKENIZER_FILE} beside it")
    try:
        pieces = list(_pieces(path.read_bytes()))
    except (ValueError, KeyError, IndexError, struct.error) as error:
        raise CheckpointError(f"{path}: no SentencePiece model: {error}") from None
    vocabulary = {piece.text: id_ for id_, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces) or not {_UNKNOWN, _FIRST, _LAST} <= vocabulary.keys():
        raise CheckpointError(f"{path}: not InternLM2's: a piece twice, or no {_FIRST}")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(pieces),
            unk_token=_UNKNOWN,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_FIRST} $A", special_tokens=[(_FIRST, vocabulary[_FIRST])]
    )
    named = [piece.text for piece in pieces if piece.kind is _Kind.USER_DEFINED]
    special = [_UNKNOWN, _FIRST, _LAST, *filter(_CONTROL.fullmatch, named)]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    others = [text for text in named if not _CONTROL.fullmatch(text)]
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in others])
    return tokenizer


def _merges(pieces: list[_Piece]) -> list[tuple[str, str]]:
    """Return all pairs that make a piece: the highest score first, then the lowest ids."""
    usable = {
        piece.text: (id_, piece.score)
        for id_, piece in enumerate(pieces)
        if piece.kind in (_Kind.NORMAL, _Kind.USER_DEFINED)
    }
    found = [
        (-score, usable[text[:cut]][0], usable[text[cut:]][0], text[:cut], text[cut:])
        for text, (_, score) in usable.items()
        for cut in range(1, len(text))
        if text[:cut] in usable and text[cut:] in usable
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def _pieces(data: bytes) -> Iterator[_Piece]:
    """Read the pieces of a `ModelProto`, its field 1: text (1), score (2) and type (3)."""
    for field, value in _fields(data):
        if field != 1:
            continue
        entry = dict(_fields(value))
        text = entry[1].decode()
        kind = _Kind(entry.get(3, _Kind.NORMAL))
        if text == "\0":  # SentencePiece never gives it, and spells the byte instead
            text, kind = "[NUL]", _Kind.UNUSED
        yield _Piece(text, struct.unpack("<f", entry.get(2, bytes(4)))[0], kind)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Read a protobuf message's fields: numbers, or bytes of fixed or written length."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value: int | bytes
            value, at = _varint(data, at)
        elif wire in (1, 2, 5):
            size = {1: 8, 5: 4}.get(wire)
            if size is None:
                size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
            if at > len(data):
                raise ValueError(f"it ends at byte {len(data)}, inside a field")
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number, seven bits a byte from the lowest on, and where it ends."""
    value = shift = 0
    while True:
        byte, at = data[at], at + 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
