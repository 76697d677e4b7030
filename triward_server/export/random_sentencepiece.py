"""A small `tokenizer.model` of SentencePiece, in the form that InternLM2's has."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence

from tokenizers import Tokenizer, models, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers.trainers import BpeTrainer

from .sentencepiece import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED, Piece

# Of `sentencepiece_model.proto`: byte-pair encoding with byte fallback; text stays as it is.
_TRAINER: Mapping[int, int | bytes] = {3: 2, 35: 1}
_NORMALIZER: Mapping[int, int | bytes] = {1: b"identity", 2: b"", 3: 0, 4: 0}


def train_pieces(
    lines: Iterable[str], merges: int, fixed: Sequence[str], roles: Sequence[str]
) -> list[Piece]:
    """Train a vocabulary.

    Args:
        lines: of text.
        merges: how many pieces are made of others.
        fixed: texts that are one piece wherever they stand.
        roles: pieces that stand last, for templates.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre.Split(SPACE, behavior="merged_with_next")
    text = list(lines)
    alphabet = sorted({letter for line in text for letter in line.replace(" ", SPACE)})
    trainer = BpeTrainer(
        vocab_size=len(alphabet) + merges, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    ranked = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    made = [token for token, _ in ranked if len(token) > 1]
    single = [token for token, _ in ranked if len(token) == 1]
    return [
        Piece("<unk>", 0.0, UNKNOWN),
        Piece("<s>", 0.0, CONTROL),
        Piece("</s>", 0.0, CONTROL),
        *(Piece(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)),
        # Ranks, as SentencePiece has them: what was made first, then single characters.
        *(Piece(token, -float(rank), NORMAL) for rank, token in enumerate([*made, *single])),
        *(Piece(token, 0.0, USER_DEFINED) for token in [*fixed, *roles]),
    ]


def write_model(pieces: Iterable[Piece]) -> bytes:
    """Return the file's bytes."""
    found = [
        _field(1, _field(1, p.text.encode()) + _float(2, p.score) + _field(3, p.kind))
        for p in pieces
    ]
    rules: tuple[tuple[int, Mapping[int, int | bytes]], ...] = ((2, _TRAINER), (3, _NORMALIZER))
    for number, fields in rules:
        found.append(_field(number, b"".join(_field(n, v) for n, v in fields.items())))
    return b"".join(found)


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _float(number: int, value: float) -> bytes:
    return _varint(number << 3 | 5) + struct.pack("<f", value)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
