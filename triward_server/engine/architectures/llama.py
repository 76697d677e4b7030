"""Llama 3 (arXiv:2407.21783): Skywork-Reward-Llama-3.1-8B, Skywork-Reward-V2-Llama."""

from __future__ import annotations

from ..decoder import Decoder
from .interface import Architecture, Fields, only, plain


def _decoder(config: Fields) -> Decoder:
    only("attention_bias", [config.attention_bias], [False])
    only("mlp_bias", [config.mlp_bias], [False])
    return plain(config)


ARCHITECTURE = Architecture(_decoder)
