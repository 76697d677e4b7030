"""Two thousand templated prompts of many scripts, for tests of InternLM2's tokenizer."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tests.conversations import PROSE, RESPONSES

Turns = list[tuple[str, str]]  # role and content

# First and last code point of what a prompt draws characters from.
_SCRIPTS = (
    (0x20, 0x7E), (0xA0, 0x17F), (0x370, 0x3FF), (0x400, 0x45F), (0x5D0, 0x5EA), (0x620, 0x64A),
    (0x900, 0x94F), (0xE01, 0xE3A), (0x1100, 0x1112), (0x2010, 0x2027), (0x2190, 0x21FF),
    (0x2580, 0x2590), (0x3000, 0x30FF), (0x4E00, 0x62FF), (0xAC00, 0xACFF), (0xFF01, 0xFF5E),
    (0x1F300, 0x1F64F), (0x20000, 0x2001F),
)  # fmt: skip
_FRAGMENTS = (
    *"\n \t\r", "  ", "    ", "\n\n", "\r\n", "{\n", ");\n", "——", "———", "……", "…", "ＥＦ", "ｚ",
    "\u2581", "[UNUSED_TOKEN_", "[UNUSED", "</s", "<s", "unk>", "<0x0A>", "<ImageHere",
    "<|im_end|>", "user\n", "assistant\n", "http://", "def f(x):\n    return x", "3.14159",
    "图片", "可以", "的",
)  # fmt: skip
# What means more than its letters: a picture's place, and control tokens, which the published slow
# class reads wherever they stand.
NAMES = (
    "<ImageHere>",
    "[UNUSED_TOKEN_145]",
    "[UNUSED_TOKEN_130]",
    "</s>",
    "<s>",
    "<unk>",
    "[UNUSED_TOKEN_0]",
)


def prompts(count: int = 2000, seed: int = 0) -> Iterator[Turns]:
    """Yield conversations in which none of `NAMES` is whole."""
    rng = random.Random(seed)
    while count:
        turns = [
            (role, _content(rng))
            for _ in range(rng.randint(1, 2))
            for role in ("user", "assistant")
        ]
        if rng.random() < 0.2:
            turns = [("system", _content(rng)), *turns]
        if not any(name in content for name in NAMES for _, content in turns):
            count -= 1
            yield turns


def _content(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.1:
        return rng.choice([text for text in RESPONSES.values() if len(text) < 1000])
    if kind < 0.2:
        return PROSE[rng.randint(0, 40) :] * rng.randint(0, 3)
    pieces = []
    for _ in range(rng.randint(0, 25)):
        first, last = rng.choice(_SCRIPTS)
        run = "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 6)))
        pieces.append(rng.choice(_FRAGMENTS) if rng.random() < 0.5 else run)
    return rng.choice(("", " ", "\n")).join(pieces)


def rendered(turns: Turns) -> str:
    """Return the published template's text."""
    chat = "".join(f"[UNUSED_TOKEN_146]{role}\n{text}[UNUSED_TOKEN_145]\n" for role, text in turns)
    return f"{chat}</s>[UNUSED_TOKEN_130]"
