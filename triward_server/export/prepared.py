"""A checkpoint as serving reads it: files that only remote code could read are written anew.

A tokenizer whose class is remote code becomes a `tokenizer.json`, made of its `tokenizer.model`.
Weights stay where they are, behind links. Nothing of a checkpoint is ever executed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing

from ..engine.checkpoint import head_of, load_config
from ..errors import CheckpointError
from .sentencepiece import Vocabulary, read_vocabulary, tokenizer_of

_CONFIG, _MODEL, _TOKENIZER = "tokenizer_config.json", "tokenizer.model", "tokenizer.json"
# What the written configuration keeps; the rest says how the remote class makes a tokenizer.
_KEPT = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template", "model_max_length")


@contextmanager
def prepared(checkpoint: Path) -> Iterator[Path]:
    """Yield a folder that has all that serving reads: the checkpoint's own where that has.

    Raises:
        CheckpointError: a tokenizer is remote code, and cannot be made of its files.
    """
    if not _is_remote(checkpoint):
        yield checkpoint
        return
    with tempfile.TemporaryDirectory(prefix="triward-") as folder:
        for file in checkpoint.iterdir():
            if file.is_file() and file.name not in (_CONFIG, _TOKENIZER):
                Path(folder, file.name).symlink_to(file.resolve())
        write_tokenizer(checkpoint, Path(folder))
        yield Path(folder)


def write_tokenizer(checkpoint: Path, output: Path) -> None:
    """Write `tokenizer.json` and its configuration for a tokenizer that is remote code.

    The names of tokens are those of `tokenizer_config.json`, whose template writes them. The
    tokenizer puts the first token in front of a text, and behind it the one at which the head is
    read.
    """
    config = load_config(checkpoint)
    given: dict[str, Any] = json.loads((checkpoint / _CONFIG).read_text())
    if not (checkpoint / _MODEL).is_file():
        raise CheckpointError(
            f"{checkpoint}: the tokenizer is remote code, and there is no {_MODEL} to make a "
            f"{_TOKENIZER} of"
        )
    vocabulary = read_vocabulary(checkpoint / _MODEL).renamed(_names(given))
    if len(vocabulary.pieces) > config.vocab_size:
        raise CheckpointError(
            f"{checkpoint / _MODEL}: {len(vocabulary.pieces)} pieces, the model's vocabulary has "
            f"{config.vocab_size}"
        )
    tokenizer = tokenizer_of(vocabulary)
    first = _token(vocabulary, config.bos_token_id)
    read = head_of(checkpoint, config).token
    last = _token(vocabulary, getattr(config, read)) if read else None
    around = [token for token in (first, last) if token is not None]
    single = " ".join([first[0], "$A", *([last[0]] if last else [])])
    tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=around)
    tokenizer.save(str(output / _TOKENIZER))
    kept = {name: given[name] for name in _KEPT if name in given}
    written = {**kept, "tokenizer_class": "PreTrainedTokenizerFast"}
    (output / _CONFIG).write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n")


def _is_remote(checkpoint: Path) -> bool:
    file = checkpoint / _CONFIG
    try:
        return file.is_file() and "auto_map" in json.loads(file.read_text())
    except (ValueError, TypeError):  # which whoever reads it as a configuration says
        return False


def _names(given: dict[str, Any]) -> dict[int, str]:
    """Texts of the tokens with a role, by id."""
    listed: dict[str, Any] = given.get("added_tokens_decoder") or {}
    return {int(id_): str(token["content"]) for id_, token in listed.items()}


def _token(vocabulary: Vocabulary, id_: Any) -> tuple[str, int]:
    if not isinstance(id_, int) or id_ not in vocabulary.special:
        raise CheckpointError(f"config.json: id {id_!r} is no special token of {_MODEL}")
    return vocabulary.pieces[id_].text, id_
