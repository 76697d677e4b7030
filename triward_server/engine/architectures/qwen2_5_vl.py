"""Qwen2.5-VL (arXiv:2502.13923): Skywork-VL-Reward-7B. Qwen2's decoder with M-RoPE, and a tower."""

from __future__ import annotations

from dataclasses import replace

from ...schema import FRAMES_PER_GRID
from ..decoder import DecoderConfig
from ..towers import CHANNELS
from ..vision import Tower
from .interface import Architecture, Fields, Vision, common_decoder, only


def _decoder(config: Fields) -> DecoderConfig:
    text = config.text
    # A stretched M-RoPE, and windows counted in tokens that share positions: nobody ships them.
    only("rope type", [text.rope_parameters["rope_type"]], ["default"])
    only("layer_types", set(text.layer_types), ["full_attention"])
    decoder = common_decoder(text)
    sections = tuple(text.rope_parameters["mrope_section"])
    only("number of mrope sections", [len(sections)], [3])
    only("sum of mrope_section", [sum(sections)], [decoder.head_dim // 2])
    return replace(decoder, qkv_bias=True, rope=replace(decoder.rope, sections=sections))


def _vision(config: Fields) -> Vision:
    vision = config.vision_config
    only("vision_config.hidden_act", [vision.hidden_act], ["silu"])
    only("vision_config.in_channels", [vision.in_channels], [CHANNELS])
    only("vision_config.hidden_size modulo num_heads", [vision.hidden_size % vision.num_heads], [0])
    only("vision_config.temporal_patch_size", [vision.temporal_patch_size], [FRAMES_PER_GRID])
    rope = vision.rope_parameters
    only("vision_config's rope type", [rope["rope_type"]], ["axial"])
    # Published under these names too, which transformers reads nowhere.
    for name, read in (("in_chans", "in_channels"), ("spatial_patch_size", "patch_size")):
        value = getattr(vision, read)
        only(f"vision_config.{name}", [getattr(vision, name, value)], [value])
    tower = Tower(
        depth=vision.depth,
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_heads=vision.num_heads,
        out_hidden_size=vision.out_hidden_size,
        patch_size=vision.patch_size,
        spatial_merge_size=vision.spatial_merge_size,
        window_size=vision.window_size,
        fullatt_block_indexes=tuple(vision.fullatt_block_indexes),
        rope_theta=rope["rope_theta"],
    )
    return Vision(tower, config.image_token_id, config.video_token_id, vision.tokens_per_second)


ARCHITECTURE = Architecture(_decoder, _vision)
