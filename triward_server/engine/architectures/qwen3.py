"""Qwen3 (arXiv:2505.09388): Skywork-Reward-V2-Qwen3. Queries and keys are normalised."""

from __future__ import annotations

from dataclasses import replace

from ..decoder import DecoderConfig
from .interface import Architecture, Fields, common_decoder, only


def _decoder(config: Fields) -> DecoderConfig:
    only("attention_bias", [config.attention_bias], [False])
    return replace(common_decoder(config), qk_norm=True)


ARCHITECTURE = Architecture(_decoder)
