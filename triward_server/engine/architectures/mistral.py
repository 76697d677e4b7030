"""Mistral 7B (arXiv:2310.06825): RM-Mistral-7B. Llama, of which every layer may see a window."""

from __future__ import annotations

from dataclasses import replace

from ..decoder import DecoderConfig
from .interface import Architecture, Fields, common_decoder


def _decoder(config: Fields) -> DecoderConfig:
    windows = (config.sliding_window,) * config.num_hidden_layers
    return replace(common_decoder(config), windows=windows)


ARCHITECTURE = Architecture(_decoder)
