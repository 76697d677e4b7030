"""A checkpoint as serving reads it: files that only remote code could read are written anew.

A tokenizer whose class is remote code becomes a `tokenizer.json`, made of its `tokenizer.model`. A
`value_head.bin` becomes a safetensors file, and an adapter of LoRA is merged in. Other weights stay
where they are, behind links. Nothing of a checkpoint is ever executed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers.models.auto.tokenization_auto import (
    TOKENIZER_MAPPING,
    tokenizer_class_from_name,
)

from ..engine.checkpoint import head_of, load_config
from ..engine.weights import VALUE_HEAD_FILE
from ..errors import CheckpointError
from .lora import merge
from .options import Template
from .sentencepiece import Vocabulary, read_vocabulary, tokenizer_of

_CONFIG, _MODEL, _TOKENIZER = "tokenizer_config.json", "tokenizer.model", "tokenizer.json"
_PICKLED = "value_head.bin"  # of LLaMA-Factory
_REGRESSION = "<|regression|>"
_POLAR_CLASS = "InternLM2ForRewardModel"
# What the written configuration keeps; the rest says how the remote class makes a tokenizer.
_KEPT = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template", "model_max_length")


# POLAR (github.com/InternLM/POLAR): the prompt with the reference, then with the response. In the
# prompt alone no assistant's message is the last, or what differs is written with the response.
_POLAR_TEMPLATE = """\
{%- set found = namespace(prompt=[], reference='', output='') -%}
{%- for message in messages -%}
{%- if loop.last and message.role == 'assistant' -%}
{%- set found.output = message.content -%}
{%- else -%}
{%- set found.prompt = found.prompt + [message.content] -%}
{%- endif -%}
{%- if message.reference is defined -%}
{%- set found.reference = message.reference -%}
{%- endif -%}
{%- endfor -%}
{%- set prompt = found.prompt | join('\\n') -%}
{{- prompt + '\\n' + found.reference + '<|reward|>' + prompt + '\\n' + found.output -}}
"""


@contextmanager
def prepared(
    checkpoint: Path,
    lora: Path | None = None,
    place: Path | None = None,
    template: Template | None = None,
) -> Iterator[Path]:
    """Yield a folder that has all that serving reads: the checkpoint's own where that has.

    Args:
        checkpoint: a folder.
        lora: a folder with an adapter that is merged in.
        place: where a folder is made, which with an adapter is as large as the checkpoint.
        template: which chat template requests are rendered with; None: the checkpoint's.

    Raises:
        CheckpointError: a file cannot be written anew, or the adapter is another checkpoint's.
    """
    _refuse_regression(checkpoint)
    polar = template is Template.POLAR
    if polar and not (_is_remote(checkpoint) and may_be_polar(checkpoint)):
        raise CheckpointError(f"{checkpoint}: --template polar: this is no model of POLAR's class")
    remote, pickled = _is_remote(checkpoint), (checkpoint / _PICKLED).is_file()
    if not (remote or pickled or lora):
        yield checkpoint
        return
    with tempfile.TemporaryDirectory(prefix=".triward-", dir=place) as name:
        folder = Path(name)
        if lora is not None:
            merge(checkpoint, lora, folder)
        if remote:
            write_tokenizer(checkpoint, folder, polar)
        for file in checkpoint.iterdir():
            if file.is_file() and file.name != _PICKLED and not (folder / file.name).exists():
                (folder / file.name).symlink_to(file.resolve())
        if pickled:
            write_value_head(checkpoint, folder)
        yield folder


def may_be_polar(checkpoint: Path) -> bool:
    """Return True for the class that InternLM2-Reward and POLAR share: nothing tells them apart."""
    return _POLAR_CLASS in (load_config(checkpoint).architectures or ())


def write_value_head(checkpoint: Path, output: Path) -> None:
    """Write a `value_head.bin` as safetensors; what is not plain tensors is refused, not run.

    Raises:
        CheckpointError: it is more than tensors with names, or there are two heads.
    """
    file, target = checkpoint / _PICKLED, output / VALUE_HEAD_FILE
    if target.exists():
        raise CheckpointError(f"{checkpoint}: {_PICKLED} and {VALUE_HEAD_FILE}: which one counts?")
    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise many types
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{file}: not tensors alone, so it is not loaded: {reason}") from None
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise CheckpointError(f"{file}: no tensors with names, so it is not loaded")
    save_file({n: t.contiguous() for n, t in found.items()}, target, metadata={"format": "pt"})
    target.chmod(0o644)  # safetensors leaves it to its owner


def write_tokenizer(checkpoint: Path, output: Path, polar: bool = False) -> None:
    """Write `tokenizer.json` and its configuration for a tokenizer that is remote code.

    The names of tokens are those of `tokenizer_config.json`, whose template writes them. The
    tokenizer puts the first token in front of a text, and behind it the one at which the head is
    read, unless the template writes that (`Head.appended`).
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
    head = head_of(checkpoint, config)
    last = None
    if head.appended and head.token is not None:
        last = _token(vocabulary, getattr(config, head.token))
    around = [token for token in (first, last) if token is not None]
    single = " ".join([first[0], "$A", *([last[0]] if last else [])])
    tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=around)
    tokenizer.save(str(output / _TOKENIZER))
    kept = {name: given[name] for name in _KEPT if name in given}
    if polar and last:
        kept["chat_template"] = _POLAR_TEMPLATE.replace("<|reward|>", last[0])
    written = {**kept, "tokenizer_class": "PreTrainedTokenizerFast"}
    (output / _CONFIG).write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n")


def _refuse_regression(checkpoint: Path) -> None:
    """Refuse DocReward, whose head is read at a token behind a last turn of images alone."""
    for file in (checkpoint / name for name in ("added_tokens.json", _CONFIG, _TOKENIZER)):
        if file.is_file() and _REGRESSION.encode() in file.read_bytes():
            raise CheckpointError(
                f"{file}: the head is read at {_REGRESSION} behind a turn of images; a request "
                "ends with a response of text, so this model is not supported"
            )


def _is_remote(checkpoint: Path) -> bool:
    """Return True if the tokenizer's class comes with the checkpoint, and transformers has none."""
    file = checkpoint / _CONFIG
    try:
        given = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError:  # which whoever reads it as a configuration says
        return False
    if "auto_map" not in given or type(load_config(checkpoint)) in TOKENIZER_MAPPING:
        return False
    return tokenizer_class_from_name(str(given.get("tokenizer_class"))) is None


def _names(given: dict[str, Any]) -> dict[int, str]:
    """Texts of the tokens with a role, by id."""
    listed: dict[str, Any] = given.get("added_tokens_decoder") or {}
    return {int(id_): str(token["content"]) for id_, token in listed.items()}


def _token(vocabulary: Vocabulary, id_: Any) -> tuple[str, int]:
    if not isinstance(id_, int) or id_ not in vocabulary.special:
        raise CheckpointError(f"config.json: id {id_!r} is no special token of {_MODEL}")
    return vocabulary.pieces[id_].text, id_
