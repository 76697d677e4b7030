"""The reference score: transformers' own class, with the checkpoint's head.

Where transformers has no class, a restatement of the published one stands in its place.

`Reference` is a model card's code without what costs memory and packages and changes no score:
trl's wrapper, whose head is one affine map, and the logits of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from qwen_vl_utils import process_vision_info
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
)

from ..engine.checkpoint import architecture_of, head_of, load_config
from ..engine.naming import canonical_name
from ..engine.streaming import load_weights, parameters_on_meta
from ..engine.weights import read_tensors
from ..schema import Int32Array
from .internlm2 import InternLM2Reward

Messages = Sequence[dict[str, Any]]

# Restatements, by `model_type`.
_RESTATED: dict[str, Callable[[Any], nn.Module]] = {"internlm2": InternLM2Reward}


def is_restated(config: Any) -> bool:
    """Return True if the reference is a restatement: transformers has no such class."""
    return config.model_type in _RESTATED


class Reference:
    """Scores one conversation at a time.

    Args:
        checkpoint: a folder that `checkpoint.check_tensors` has passed.
        device: where it runs.
        streamed: with one layer's weights at a time in memory.
        dtype: of weights and activations; trl's value head is float32 always, as on the cards.
    """

    def __init__(
        self,
        checkpoint: Path,
        device: torch.device,
        streamed: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        config = load_config(checkpoint)
        self._sees = architecture_of(config).vision is not None
        auto = AutoProcessor if self._sees else AutoTokenizer
        self._processor: Any = auto.from_pretrained(checkpoint)
        self._device = device
        head = head_of(checkpoint, config)
        self._model = reference_model(config, head.kind, device, dtype)

        def tensors(wanted: Callable[[str], bool]) -> dict[str, Tensor]:
            return read_tensors(checkpoint, dtype, device, wanted)

        load_weights(self._model, tensors, canonical_name, streamed)

    def score(self, messages: Messages) -> float:
        """Return the number for one conversation whose last message is the assistant's."""
        inputs = card_inputs if self._sees else text_inputs
        return self._score(inputs(self._processor, [messages]))

    def score_ids(self, ids: Int32Array) -> float:
        """Return the number for the token ids [L] of a conversation without media."""
        row = torch.from_numpy(ids.astype(np.int64))[None]
        inputs = {"input_ids": row, "attention_mask": torch.ones_like(row)}
        return self._score(inputs | ({"mm_token_type_ids": row * 0} if self._sees else {}))

    def _score(self, inputs: Any) -> float:
        on_device = {name: value.to(self._device) for name, value in dict(inputs).items()}
        return score_inputs(self._model, on_device)


def score_inputs(model: Any, inputs: dict[str, Tensor]) -> float:
    """Return the number of a `reference_model` for one row."""
    with torch.inference_mode():
        if type(model) in _RESTATED.values():
            return float(model(inputs["input_ids"]))
        if not isinstance(model, _Headed):
            return float(model(**inputs, use_cache=False).logits[0, 0])
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[0]
        return float(model.read(hidden, inputs["input_ids"][0]))


class _Headed(nn.Module):
    """A backbone, and a head that no class of transformers has, by a checkpoint's names.

    trl's value head; a linear map with a bias; two layers; or one label of a multimodal model.
    """

    def __init__(self, config: Any, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind
        text = config.get_text_config()
        self.pad, hidden = text.pad_token_id, text.hidden_size
        if kind == "v_head":
            self.v_head = nn.ModuleDict({"summary": nn.Linear(hidden, 1)})
        elif kind == "two_layers":
            self.score: nn.Module = nn.Sequential(
                nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
            )
        else:
            self.score = nn.Linear(hidden, 1, bias=kind == "biased_score")

    def read(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Hidden states [L, dim] and ids [L] -> the head's number, where its class reads it."""
        if self.kind == "v_head":
            value: Tensor = self.v_head["summary"](hidden[-1].float())
            return value
        at = len(ids) - 1
        if self.pad is not None and self.kind == "two_layers":
            at = (int((ids == self.pad).int().argmax()) - 1) % len(ids)
        elif self.pad is not None:
            at = int((torch.arange(len(ids), device=ids.device) * (ids != self.pad)).argmax())
        number: Tensor = self.score(hidden[at])
        return number


def reference_model(
    config: Any,
    head: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
) -> Any:
    """Return transformers' own model, its parameters on the meta device.

    Args:
        config: transformers' configuration.
        head: a key of `backbone.HEADS`; one that transformers' classes lack is put behind them.
        device: where its buffers are.
        dtype: of its weights.
        attention: transformers' implementation; None: the one that computes what the model asks.
    """
    if is_restated(config):
        with device, parameters_on_meta():
            return _RESTATED[config.model_type](config).to(dtype)
    sees = architecture_of(config).vision is not None
    own = head == "score" and not sees
    auto: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    if own:
        auto = AutoModelForSequenceClassification
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        part.return_dict = True  # a form of the result alone, which no caller can ask for inside
    # "eager" caps attention's products where a model asks for that; for images it is too slow.
    attention = attention or ("sdpa" if sees else "eager")
    with device, parameters_on_meta():
        model = auto.from_config(config, attn_implementation=attention, dtype=dtype)
        return model if own else _Headed(config, model.model, head)


def card_inputs(processor: Any, conversations: Sequence[Messages]) -> Any:
    """Return a multimodal card's padded batch for whole conversations, responses included."""
    texts = [
        processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        for messages in conversations
    ]
    images, videos = process_vision_info(list(conversations))
    return processor(text=texts, images=images, videos=videos, padding=True, return_tensors="pt")


def text_inputs(tokenizer: Any, conversations: Sequence[Messages]) -> Any:
    """Return a text card's padded batch.

    The BOS token that some templates write is left to the tokenizer, as the cards of
    Skywork-Reward-V2 do, so that it is there once.
    """
    texts = [
        tokenizer.apply_chat_template(list(map(_joined, messages)), tokenize=False)
        for messages in conversations
    ]
    if tokenizer.bos_token is not None:
        texts = [text.removeprefix(tokenizer.bos_token) for text in texts]
    return tokenizer(texts, padding=True, return_tensors="pt")


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    """Join a message's parts of text into one string: templates of text models know no parts."""
    if isinstance(message["content"], str):
        return message
    return {**message, "content": "".join(part["text"] for part in message["content"])}


def fp32_budget(score: float) -> float:
    """Return how far a float32 score may be from the reference's: 1e-4, relative above 1."""
    return 1e-4 * max(1.0, abs(score))
