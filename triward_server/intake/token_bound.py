"""A lower bound on a text's tokens, from its bytes alone: a long text is refused unencoded.

Give each byte the weight 1 / n, where n is the length of the longest token that holds it. Then no
token weighs more than 1, for each of its bytes weighs at most 1 / its length; so a text has at
least as many tokens as it weighs.

The same for pairs of neighbours, with 1 / (n - 1), and 1 for a pair that no token holds: those
inside a token weigh at most 1 together, and of those between tokens there are fewer than tokens.
So a text has more than half as many tokens as its pairs weigh. The larger bound counts.

Of BPE over characters that falls back to bytes, as Gemma's, the longest token alone is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float64]

_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
SHORT = 8192  # characters; less is encoded in the time that weighing takes
_ROUNDING = 1e-9  # of a sum of a few million floats, with room to spare


class TokenBound:
    """Bound for one tokenizer, if it is BPE that drops nothing; for others it is 0.

    Args:
        backend: of the `tokenizers` package; special tokens in text are text to it.
    """

    def __init__(self, backend: Any) -> None:
        self._normalizer = backend.normalizer
        self._weights, self._pairs = np.zeros(256), np.zeros(256**2)
        self._added: list[str] = []
        description = json.loads(backend.to_str())
        if _keeps_every_byte(description):
            self._added = [t["content"] for t in description["added_tokens"] if not t["special"]]
            self._weights, self._pairs = _weights(_vocabulary(description["model"]["vocab"]))
        self._longest = _longest(description) if _keeps_every_character(description) else 0

    def __call__(self, text: str) -> int:
        """Return how many tokens a text has at least; 0 for a short one."""
        if len(text) < SHORT:
            return 0
        if self._longest:
            return -(-len(text) // self._longest)
        if not self._weights.any():
            return 0
        # Added tokens are cut out of a text before it is normalized.
        parts = re.split("|".join(map(re.escape, self._added)), text) if self._added else [text]
        if self._normalizer is not None:
            parts = [self._normalizer.normalize_str(part) for part in parts]
        data = np.frombuffer("".join(parts).encode(), np.uint8)
        pairs = data[:-1].astype(np.uint16) << 8 | data[1:]
        weight = max(
            float(np.bincount(data, minlength=256) @ self._weights),
            float(np.bincount(pairs, minlength=256**2) @ self._pairs) / 2,
        )
        return len(parts) - 1 + int(weight * (1 - _ROUNDING))  # each cut out is one token


def _keeps_every_byte(description: Any) -> bool:
    """Return True if tokens are runs of a text's bytes and together all of it."""
    model, added = description["model"], description["added_tokens"]
    steps = description["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    splits = all(
        step["type"] == "ByteLevel" or (step["type"] == "Split" and step["behavior"] == "Isolated")
        for step in steps
        if step
    )
    return bool(
        splits
        and model["type"] == "BPE"
        and any(step.get("type") == "ByteLevel" for step in steps)
        and not any(model.get(name) for name in (*_AFFIXES, "unk_token"))
        # Such added tokens swallow spaces beside them, or are looked for in another text.
        and not any(
            t[flag]
            for t in added
            for flag in ("lstrip", "rstrip", "single_word", "normalized")
            if not t["special"]
        )
        and description["truncation"] is None
    )


def _keeps_every_character(description: Any) -> bool:
    """Return True if tokens are runs of characters, or bytes of one, and together the text."""
    model = description["model"]
    normalizer = description["normalizer"] or {"type": None}
    same_length = normalizer["type"] is None or (
        normalizer["type"] == "Replace"
        and len(normalizer["pattern"].get("String", "")) == len(normalizer["content"])
    )
    splitter = description["pre_tokenizer"] or {"type": "Split", "behavior": "Isolated"}
    return bool(
        same_length
        and model["type"] == "BPE"
        and model.get("byte_fallback")
        and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
        and splitter["type"] == "Split"
        and splitter["behavior"] != "Removed"
        and not any(model.get(name) for name in _AFFIXES)
        and not any(t[flag] for t in description["added_tokens"] for flag in ("lstrip", "rstrip"))
        and description["truncation"] is None
    )


def _longest(description: Any) -> int:
    """Characters of the longest token."""
    added = [token["content"] for token in description["added_tokens"]]
    return max(map(len, (*description["model"]["vocab"], *added)))


def _weights(tokens: Sequence[bytes]) -> tuple[Weights, Weights]:
    """Return the weight of each byte, and of each two, the first one times 256.

    A byte that no token holds weighs nothing, for the tokenizer leaves it out; then pairs do not
    either, for others become neighbours.
    """
    data = np.frombuffer(b"".join(tokens), np.uint8).astype(np.int64)
    sizes = np.array([len(token) for token in tokens])
    owner = np.repeat(np.arange(len(tokens)), sizes)
    longest = np.zeros(256)
    np.maximum.at(longest, data, sizes[owner])
    weights = np.divide(1, longest, out=np.zeros(256), where=longest > 0)
    if not weights.all():
        return weights, np.zeros(256**2)
    inside = owner[1:] == owner[:-1]
    longest = np.ones(256**2)
    pairs = (data[:-1] * 256 + data[1:])[inside]
    np.maximum.at(longest, pairs, sizes[owner[1:][inside]] - 1)
    return weights, 1 / longest


def _vocabulary(tokens: Iterable[str]) -> list[bytes]:
    """Tokens as bytes; those that are none no text becomes."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unseen = [byte for byte in range(256) if byte not in seen]
    # Byte-level tokenizers' characters for bytes: themselves where they can be seen.
    table = {256 + number: byte for number, byte in enumerate(unseen)}
    return [token.translate(table).encode("latin-1", errors="ignore") for token in tokens]
