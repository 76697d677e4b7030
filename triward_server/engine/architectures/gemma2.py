"""Gemma 2 (arXiv:2408.00118): Skywork-Reward-Gemma-2-27B.

Every other layer sees a window, products of query and key are capped, and each half of a layer is
normalised in front and behind.
"""

from __future__ import annotations

from dataclasses import replace

from ..decoder import DecoderConfig
from .interface import Architecture, Fields, common_decoder, only


def _decoder(config: Fields) -> DecoderConfig:
    only("attention_bias", [config.attention_bias], [False])
    both_ways = getattr(config, "use_bidirectional_attention", None)
    only("use_bidirectional_attention", [both_ways], [None, False])
    # Published beside `sliding_window`, and read nowhere.
    size = getattr(config, "sliding_window_size", config.sliding_window)
    only("sliding_window_size", [size], [config.sliding_window])
    return replace(
        common_decoder(config),
        norm_offset=1.0,
        sandwich=True,
        embedding_scale=config.hidden_size**0.5,
        scale=config.query_pre_attn_scalar**-0.5,
        softcap=config.attn_logit_softcapping,
    )


ARCHITECTURE = Architecture(_decoder)
