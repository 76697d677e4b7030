"""A lower bound on a text's tokens, from its bytes alone: a long text is refused unencoded.

Give each byte the weight 1 / n, where n is the length of the longest token that holds it. Then no
token weighs more than 1, for each of its bytes weighs at most 1 / its length; so a text has at
least as many tokens as it weighs. English weighs about a third of its tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROUNDING = 1e-9  # of a sum of a few million floats, with room to spare


class TokenBound:
    """For one tokenizer. Only of byte-level BPE anything is known; for others the bound is 0.

    Args:
        backend: of the `tokenizers` package; special tokens in text are text to it.
    """

    def __init__(self, backend: Any) -> None:
        self._normalizer = backend.normalizer
        self._weights = np.zeros(256)
        description = json.loads(backend.to_str())
        if _keeps_every_byte(description):
            added = (t["content"] for t in description["added_tokens"] if not t["special"])
            tokens = [_bytes_of(token) for token in description["model"]["vocab"]]
            self._weights = _weights([*tokens, *(token.encode() for token in added)])

    def __call__(self, text: str) -> int:
        """How many tokens a text has at least."""
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
        # As in a tokenizer, half a surrogate pair is no text; JSON's are refused at the door.
        data = np.frombuffer(text.encode(), np.uint8)
        weight = float(np.bincount(data, minlength=256) @ self._weights)
        return int(weight * (1 - _ROUNDING))


def _keeps_every_byte(description: Any) -> bool:
    """Whether tokens are runs of a text's bytes and together all of it."""
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
        and not any(
            model.get(name)
            for name in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token")
        )
        # These swallow spaces beside them.
        and not any(t["lstrip"] or t["rstrip"] for t in added if not t["special"])
        and description["truncation"] is None
    )


def _weights(tokens: Iterable[bytes]) -> NDArray[np.float64]:
    """Of each byte; 0 for one that no token holds, which the tokenizer leaves out."""
    weights = np.zeros(256)
    for token in sorted(tokens, key=len, reverse=True):
        held = np.unique(np.frombuffer(token, np.uint8))
        held = held[weights[held] == 0]
        weights[held] = 1 / max(1, len(token))
        if weights.all():
            break
    return weights


def _alphabet() -> dict[str, int]:
    """Byte-level tokenizers' characters for bytes: themselves where they can be seen."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(b): b for b in seen} | {chr(256 + n): byte for n, byte in enumerate(unseen)}


_ALPHABET = _alphabet()


def _bytes_of(token: str) -> bytes:
    """A token of the vocabulary; empty if it is none of bytes, which no text then becomes."""
    if not all(character in _ALPHABET for character in token):
        return b""
    return bytes(_ALPHABET[character] for character in token)
