"""Llama 3 (arXiv:2407.21783): Skywork-Reward-Llama-3.1-8B, Skywork-Reward-V2-Llama."""

from __future__ import annotations

from ..decoder import DecoderConfig
from .interface import Architecture, Fields, common_decoder, only


def _decoder(config: Fields) -> DecoderConfig:
    only("attention_bias", [config.attention_bias], [False])
    only("mlp_bias", [config.mlp_bias], [False])
    return common_decoder(config)


ARCHITECTURE = Architecture(_decoder)
