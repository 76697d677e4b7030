"""A SentencePiece model of an invented language, in InternLM2's form: `tokenizer.model`.

Byte-pair encoding with byte fallback, no normalisation and no dummy prefix. Ids are in the order of
the published file: three control pieces, 256 bytes, ordinary pieces, user-defined pieces, of which
the last 147 are `[UNUSED_TOKEN_0]` to `[UNUSED_TOKEN_146]`.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, models, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers.trainers import BpeTrainer

from .random_checkpoint import invented_text
from .random_sentencepiece import write_model
from .sentencepiece import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED, Piece

# The published file's, in its order.
DEFINED = (
    *"ＥＦＧＨＩＪＫＬＭＮＲＵＶＷＸＹＺ", *"ａｂｃｄｅｆｇｈｉｊｋｌｍｎｏｐｑｒｓｔｕｖｗｘｙｚ",
    "——", "……", *(f"[UNUSED_TOKEN_{number}]" for number in range(147)),
)  # fmt: skip


def sentencepiece_model(vocab_size: int, merges: int, seed: int) -> bytes:
    """Return the content of a `tokenizer.model`.

    Args:
        vocab_size: pieces in all; what training leaves is filled with pairs of ideographs.
        merges: pieces to train, at most.
        seed: of the text to train on.
    """
    named = (
        Piece("<unk>", 0.0, UNKNOWN), Piece("<s>", 0.0, CONTROL), Piece("</s>", 0.0, CONTROL),
    )  # fmt: skip
    bytes_ = (Piece(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256))
    defined = (Piece(text, 0.0, USER_DEFINED) for text in DEFINED)
    trained = _trained(merges, seed)
    room = vocab_size - len(named) - 256 - len(DEFINED)
    assert len(trained) <= room, f"{len(trained)} pieces, room for {room}"
    texts = itertools.islice(dict.fromkeys(itertools.chain(trained, _filling(room))), room)
    ordinary = (Piece(text, -float(n), NORMAL) for n, text in enumerate(texts))
    pieces = [*named, *bytes_, *ordinary, *defined]
    assert len(pieces) == vocab_size
    return write_model(pieces)


def _trained(merges: int, seed: int) -> list[str]:
    """Single characters, then what byte-pair encoding joins, in its order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    words = Regex(rf"{SPACE}?\p{{L}}+|\p{{N}}|{SPACE}+|\s+|[^\p{{L}}\p{{N}}\s{SPACE}]+")
    tokenizer.pre_tokenizer = pre.Split(words, behavior="isolated")
    printable = sorted({*string.ascii_letters, *string.digits, *string.punctuation, "\n", SPACE})
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
