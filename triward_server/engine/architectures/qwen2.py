"""Qwen2 and Qwen2.5 (arXiv:2407.10671), text only."""

from __future__ import annotations

from dataclasses import replace

from ..decoder import DecoderConfig
from .interface import Architecture, Fields, Head, common_decoder


def _decoder(config: Fields) -> DecoderConfig:
    return replace(common_decoder(config), qkv_bias=True)


# Qwen2.5-Math-RM and WorldPM, which read their head of two layers in front of the first padding.
ARCHITECTURE = Architecture(
    _decoder, heads={"Qwen2ForRewardModel": Head("two_layers", padding="first")}
)
