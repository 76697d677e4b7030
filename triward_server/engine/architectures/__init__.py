"""The architectures that can be served: one small file each, and one line here.

docs/adding-a-model.md shows how to add one.
"""

from __future__ import annotations

from . import (
    gemma2,
    internlm2,
    internlmxcomposer2,
    llama,
    mistral,
    qwen2,
    qwen2_5_vl,
    qwen3,
)
from .interface import Architecture, Head, Vision

# By `model_type` of a checkpoint's config.json.
ARCHITECTURES: dict[str, Architecture] = {
    "qwen2_5_vl": qwen2_5_vl.ARCHITECTURE,
    "llama": llama.ARCHITECTURE,
    "gemma2": gemma2.ARCHITECTURE,
    "qwen2": qwen2.ARCHITECTURE,
    "qwen3": qwen3.ARCHITECTURE,
    "internlm2": internlm2.ARCHITECTURE,
    "internlmxcomposer2": internlmxcomposer2.ARCHITECTURE,
    "mistral": mistral.ARCHITECTURE,
}

__all__ = ["ARCHITECTURES", "Architecture", "Head", "Vision"]
