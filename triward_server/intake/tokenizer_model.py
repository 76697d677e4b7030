"""Tokenizers of checkpoints whose own tokenizer class is remote code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast


def load_tokenizer(checkpoint: Path, template: str) -> Any:
    """Return a checkpoint's tokenizer with a chat template."""
    backend = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )
