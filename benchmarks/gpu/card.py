"""The model card's scores from transformers alone, without logits, trl or accelerate.

trl's value head is one affine map of the last token's hidden state, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor

from benchmarks.workloads import Messages
from triward_server.engine.checkpoint import load_config
from triward_server.engine.naming import canonical_name
from triward_server.engine.streaming import load_weights
from triward_server.engine.weights import read_tensors
from triward_server.export.reference import card_inputs, reference_model


class Card:
    """The card's model.

    Args:
        checkpoint: a multimodal model with a value head.
        dtype: of weights and activations; the head is float32.
        device: where it runs.
        attention: transformers' implementation.
        weights: of another instance, which are shared; None: they are read.
    """

    def __init__(
        self,
        checkpoint: Path,
        dtype: torch.dtype,
        device: torch.device,
        attention: str = "sdpa",
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        self._checkpoint, self._dtype, self._device = checkpoint, dtype, device
        self._processor: Any = AutoProcessor.from_pretrained(checkpoint)
        self.model = reference_model(load_config(checkpoint), "v_head", device, dtype, attention)
        load_weights(
            self.model, self._read if weights is None else _given(weights), canonical_name, False
        )

    def _read(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        read = read_tensors(self._checkpoint, self._dtype, self._device, wanted)
        return {k: t.float() if k.startswith("v_head.") else t for k, t in read.items()}

    def compiled(self) -> Card:
        """Return the fastest loop that transformers gives a user; it shares the weights.

        FlashAttention 2 where its package is there, else torch's fused attention; every decoder
        layer compiled, for rows of any length.
        """
        attention = fastest_attention()
        weights = {canonical_name(name): t for name, t in self.model.state_dict().items()}
        other = Card(self._checkpoint, self._dtype, self._device, attention, weights)
        for layer in other.model.model.language_model.layers:
            layer.compile(dynamic=True)
        return other

    def inputs(self, conversations: Sequence[Messages]) -> Any:
        """Return the processor's padded batch for whole conversations, responses included."""
        return card_inputs(self._processor, conversations).to(self._device)

    @torch.inference_mode()
    def score_inputs(self, inputs: Any) -> list[float]:
        """Return the value head at each row's last token."""
        hidden = self.model.model(**inputs, use_cache=False).last_hidden_state
        last = inputs["attention_mask"].sum(dim=-1) - 1
        rows = torch.arange(len(last), device=last.device)
        values = self.model.v_head["summary"](hidden[rows, last].float())
        scores: list[float] = values[:, 0].tolist()
        return scores

    def score(self, messages: Messages) -> float:
        """Return the number for one conversation whose last message is the assistant's."""
        return self.score_inputs(self.inputs([messages]))[0]


def fastest_attention() -> str:
    """Return transformers' name of FlashAttention 2 where it can be imported, or of SDPA."""
    return "flash_attention_2" if find_spec("flash_attn") else "sdpa"


def _given(weights: dict[str, Tensor]) -> Callable[[Callable[[str], bool]], dict[str, Tensor]]:
    return lambda wanted: {name: tensor for name, tensor in weights.items() if wanted(name)}
