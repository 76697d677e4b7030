"""InternLM2's tokenizer from `tokenizer.model`: the slow class's ids, for any text."""

from __future__ import annotations

import hashlib
import os
import random
import struct
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.conversations import RESPONSES
from triward_server.errors import CheckpointError
from triward_server.export.ixc_tokens import SlowTokenizer
from triward_server.export.prepared import prepared
from triward_server.export.sentencepiece import read_vocabulary, tokenizer_of

MODEL_FILE = "tokenizer.model"
COUNT = 2000
POOLS = (
    "abcdefghij klmno pqr stuv", "0123456789.,", "中文字符测试图表", "الجواب هو", "\n\t  ",
    "😀👍🏽👩‍👩‍👧", "def f(x): return {1}", "ＥＦａｂ—…——……", "<s>/[UNUSED_TOKEN_]145",
    "\x00\x01\x7f\u200b\ufeff", "é\u0301ñü", "ひらがなカタカナ한국어",
)  # fmt: skip
WORDS = ("[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_0]", "</s>", "<unk>", "<s>", " the ", "……", "user\n")
# SHA-256 of the 2,000 prompts' ids as little-endian int32, each followed by -1, from the published
# tokenizer.model (1,477,754 bytes): </s>, <s> and <unk> cut out and named as the slow class does,
# the rest by `SentencePieceProcessor.encode` of sentencepiece 0.2.3.
PUBLISHED = "def2ded0018fd942d811ecadb1917d686952c5b828fd8f6d078465737e200b90"


def convert(folder: Path) -> Tokenizer:
    return tokenizer_of(read_vocabulary(folder / MODEL_FILE))


def prompts() -> list[str]:
    """Seeded, many scripts, with control tokens spelled in every second one."""
    rng = random.Random(0)
    texts = list(RESPONSES.values())
    while len(texts) < COUNT:
        pools = rng.sample(POOLS, rng.randint(1, 4))
        pieces = [rng.choice(rng.choice(pools)) for _ in range(rng.randint(0, 90))]
        if len(texts) % 2:
            pieces.insert(rng.randint(0, len(pieces)), rng.choice(WORDS))
        texts.append("".join(pieces))
    return [f"[UNUSED_TOKEN_146]user\n{t}[UNUSED_TOKEN_145]\n</s>[UNUSED_TOKEN_130]" for t in texts]


def equal(tokenizer: Tokenizer, slow: SlowTokenizer) -> str:
    """Compare all prompts; the digest of their ids."""
    texts = prompts()
    digest = hashlib.sha256()
    for text, encoding in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert encoding.ids == slow.published(text), text
        digest.update(struct.pack(f"<{len(encoding.ids) + 1}i", *encoding.ids, -1))
    return digest.hexdigest()


def test_ids_equal_the_slow_tokenizers(ixc_checkpoint: Path) -> None:
    assert len(prompts()) == COUNT
    equal(convert(ixc_checkpoint), SlowTokenizer(ixc_checkpoint / MODEL_FILE))


def test_control_tokens_as_text(ixc_checkpoint: Path) -> None:
    tokenizer, slow = convert(ixc_checkpoint), SlowTokenizer(ixc_checkpoint / MODEL_FILE)
    tokenizer.encode_special_tokens = True
    for text in prompts():
        assert tokenizer.encode(text, add_special_tokens=False).ids == slow.plain(text), text


def test_what_is_saved_is_the_same(ixc_checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = convert(ixc_checkpoint)
    tokenizer.encode_special_tokens = True  # as serving has it; a file does not say so
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    equal(again, SlowTokenizer(ixc_checkpoint / MODEL_FILE))


def test_a_nul_is_a_byte(ixc_checkpoint: Path, tmp_path: Path) -> None:
    """The published file has a piece for it, which SentencePiece does not use."""
    data = (ixc_checkpoint / MODEL_FILE).read_bytes()
    piece = b"\x0a\x01Q\x15"  # the text Q, and the score's tag
    assert data.count(piece) == 1
    (tmp_path / MODEL_FILE).write_bytes(data.replace(piece, b"\x0a\x01\0\x15"))
    assert convert(tmp_path).encode("\0").ids == [3]
    assert convert(ixc_checkpoint).encode("Q").ids != [3]


@pytest.mark.parametrize("content", [None, b"", b"\x0a\x05ab", b"\xff" * 9, b"\x0a\x02\x0a\x00"])
def test_a_damaged_model(content: bytes | None, ixc_checkpoint: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((ixc_checkpoint / name).read_bytes())
    if content is not None:
        (tmp_path / MODEL_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"), prepared(tmp_path):
        pass


@pytest.mark.skipif("TRIWARD_INTERNLM2_TOKENIZER" not in os.environ, reason="not at hand")
def test_the_published_vocabulary(tmp_path: Path) -> None:
    """TRIWARD_INTERNLM2_TOKENIZER names the published `tokenizer.model`."""
    file = tmp_path / MODEL_FILE
    file.write_bytes(Path(os.environ["TRIWARD_INTERNLM2_TOKENIZER"]).read_bytes())
    assert equal(convert(tmp_path), SlowTokenizer(file)) == PUBLISHED
