"""Qwen3 (arXiv:2505.09388): Skywork-Reward-V2-Qwen3. Queries and keys are normalised."""

from __future__ import annotations

from dataclasses import replace

from ..decoder import Decoder
from .interface import Architecture, Fields, only, plain


def _decoder(config: Fields) -> Decoder:
    only("attention_bias", [config.attention_bias], [False])
    return replace(plain(config), qk_norm=True)


ARCHITECTURE = Architecture(_decoder)
