"""Qwen2 and Qwen2.5 (arXiv:2407.10671), text only."""

from __future__ import annotations

from dataclasses import replace

from ..decoder import Decoder
from .interface import Architecture, Fields, plain


def _decoder(config: Fields) -> Decoder:
    return replace(plain(config), qkv_bias=True)


ARCHITECTURE = Architecture(_decoder)
