"""InternLM-XComposer 2.5 (arXiv:2407.03320): IXC-2.5-Reward-7B. InternLM2 and CLIP's tower.

The decoder's linear layers have low-rank updates for tokens of images (partial LoRA,
arXiv:2401.16420), and images are read as tiles. What the published configuration leaves to its code
has the published values; a smaller checkpoint's says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ...model_configs import COMPOSER, REWARD_TOKEN
from ..clip_tower import TiledTower
from ..decoder import DecoderConfig
from ..naming import Naming
from ..towers import CHANNELS, TowerConfig, cut_of
from .interface import Architecture, Fields, Head, Shapes, Vision, only
from .internlm2 import RENAMES, GroupedRows, internlm2_decoder, internlm2_shapes

# CLIP's, which the published preprocessing has as constants.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
# ViT-L/14 for tiles of 560 pixels, by transformers' names.
_PUBLISHED: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 560,
    "patch_size": 14,
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
    "num_channels": CHANNELS,
}
_MERGE = 2
_TOWER = "vit.vision_tower.vision_model."
# Positions that older savers wrote, and a norm behind the states that are read.
_UNREAD = r".*\.rotary_emb\.inv_freq|visual\.(post_layernorm\.\w+|embeddings\.position_ids)"
_LINEAR = ("attention.wqkv", "attention.wo", *(f"feed_forward.w{n}" for n in (1, 2, 3)))


@dataclass(frozen=True)
class _Rows(GroupedRows):
    """Only what has a row for each output is in groups, not the updates' first factors."""

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """Put all query heads first, then all key heads, then all value heads."""
        return tensor if name.endswith(".plora.A") else super().__call__(name, tensor)


def _decoder(config: Fields) -> DecoderConfig:
    decoder = internlm2_decoder(config)
    # Which the template writes, wherever the field says that the head is read.
    only("reward_token_id", [config.reward_token_id], [config.image_token_id + REWARD_TOKEN])
    only("head width", [decoder.head_dim * decoder.heads], [decoder.hidden])
    return replace(
        decoder,
        positions=min(decoder.positions, config.max_length),
        media_rank=config.plora_rank,
    )


def _vision(config: Fields) -> Vision:
    given: Any = config.vision_config or {}

    def read(name: str) -> Any:
        return given.get(name, _PUBLISHED[name])

    for name in ("hidden_act", "num_channels"):
        only(f"vision_config.{name}", [read(name)], [_PUBLISHED[name]])
    size, patch, dim = read("image_size"), read("patch_size"), read("hidden_size")
    only("vision_config.image_size modulo merged patches", [size % (_MERGE * patch)], [0])
    only("vision_config.hidden_size modulo heads", [dim % read("num_attention_heads")], [0])
    tower = TiledTower(
        depth=read("num_hidden_layers"),
        hidden_size=dim,
        intermediate_size=read("intermediate_size"),
        num_heads=read("num_attention_heads"),
        image_size=size,
        patch_size=patch,
        eps=read("layer_norm_eps"),
        out_hidden_size=config.hidden_size,
        spatial_merge_size=_MERGE,
    )
    window = tower.tile // _MERGE  # attention sees a tile
    cut = cut_of(tower, frames=1, window=window, mean=_MEAN, std=_STD)
    return Vision(tower, config.image_token_id, cut=cut)


def _naming(decoder: DecoderConfig) -> Naming:
    renames = (
        (r"\.Plora_([AB])\.weight$", r".plora.\1"),
        *RENAMES,
        (r"^vit\.vision_tower\.vision_model\.(encoder\.)?", "visual."),
        (r"^vision_proj\.", "visual.proj."),
        (r"^plora_", "visual.plora_"),
    )
    rows = _Rows(decoder.kv_heads, decoder.heads // decoder.kv_heads)
    return Naming(renames, rows, _UNREAD)


def _shapes(decoder: DecoderConfig, tower: TowerConfig | None) -> Shapes:
    assert isinstance(tower, TiledTower)
    shapes = dict(internlm2_shapes(decoder, tower))
    for layer in range(decoder.layers):
        for name in _LINEAR:
            path = f"model.layers.{layer}.{name}"
            outputs, inputs = shapes[f"{path}.weight"]
            shapes[f"{path}.Plora_A.weight"] = (decoder.media_rank, inputs)
            shapes[f"{path}.Plora_B.weight"] = (outputs, decoder.media_rank)
    return {**shapes, **_tower_shapes(tower)}


def _tower_shapes(tower: TiledTower) -> Shapes:
    dim, inner, out, merged = (
        tower.hidden_size, tower.intermediate_size, tower.out_hidden_size, tower.merged,
    )  # fmt: skip
    patch = tower.patch_size
    linear = {"vision_proj.0": (out, merged), "vision_proj.2": (out, out)}
    norms = [f"{_TOWER}pre_layrnorm"]
    for index in range(tower.depth):
        layer = f"{_TOWER}encoder.layers.{index}."
        names = [f"{layer}self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
        linear |= dict.fromkeys(names, (dim, dim))
        linear |= {f"{layer}mlp.fc1": (inner, dim), f"{layer}mlp.fc2": (dim, inner)}
        norms += [f"{layer}layer_norm1", f"{layer}layer_norm2"]
    return {
        "plora_glb_GN": (1, 1, merged),
        "plora_sub_GN": (1, 1, 1, merged),
        f"{_TOWER}embeddings.class_embedding": (dim,),
        f"{_TOWER}embeddings.patch_embedding.weight": (dim, CHANNELS, patch, patch),
        f"{_TOWER}embeddings.position_embedding.weight": (tower.tile**2 + 1, dim),
        **{f"{name}.weight": shape for name, shape in linear.items()},
        **{f"{name}.bias": shape[:1] for name, shape in linear.items()},
        **_both(norms, dim),
    }


def _both(norms: Sequence[str], dim: int) -> Shapes:
    return {f"{norm}.{part}": (dim,) for norm in norms for part in ("weight", "bias")}


ARCHITECTURE = Architecture(
    _decoder,
    _vision,
    naming=_naming,
    shapes=_shapes,
    heads={COMPOSER: Head("score", token="reward_token_id")},
)
