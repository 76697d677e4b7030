"""Checkpoints with random weights in the on-disk layout of IXC-2.5-Reward-7B.

The published tensor names and files, without the remote code that `auto_map` names. The published
config.json says nothing of the vision tower, which is CLIP-L/14 of 560 pixels, nor which token
stands for a picture's; a smaller checkpoint's says both. The rank of the partial LoRA is in the
tensors' shapes.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .options import Size
from .random_checkpoint import random_tensor, write_json, write_shards
from .random_ixc_tokenizer import DEFINED, sentencepiece_model

PATCH = 14
_CODE = "modeling_internlm_xcomposer2.InternLMXComposer2ForCausalLM"
# Of every linear map of a layer: the low-rank part of image tokens stands beside it.
_LINEAR = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w3",
           "feed_forward.w2")  # fmt: skip
_FIELDS: dict[str, Any] = {
    "architectures": ["InternLMXComposer2ForCausalLM"],
    "attn_implementation": "flash_attention_2",
    "auto_map": {
        "AutoConfig": "configuration_internlm_xcomposer2.InternLMXcomposer2Config",
        "AutoModel": _CODE,
        "AutoModelForCausalLM": _CODE,
    },
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_length": 16_384,
    "max_position_embeddings": 32_768,
    "model_type": "internlmxcomposer2",
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1_000_000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": False,
}
_TOKENIZER = {
    "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "pad_token": "</s>",
    "tokenizer_class": "InternLM2Tokenizer",
    "unk_token": "<unk>",
}


@dataclass(frozen=True)
class IxcDimensions:
    """Dimensions of one size; `tile` is a side in pixels."""

    merges: int
    vocab_size: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    rank: int
    tile: int
    vision_hidden: int
    vision_inner: int
    vision_layers: int


IXC_SIZES: dict[Size, IxcDimensions] = {
    "tiny": IxcDimensions(512, 2048, 128, 256, 4, 8, 2, 8, 56, 128, 256, 3),
    "small": IxcDimensions(2048, 4096, 512, 1536, 12, 8, 2, 32, 336, 256, 768, 8),
    "7b": IxcDimensions(2048, 92_544, 4096, 14_336, 32, 32, 8, 256, 560, 1024, 4096, 24),
}


def make_ixc_checkpoint(
    size: Size, seed: int, output: Path, device: str = "cpu", font: Path | None = None
) -> None:
    """Write a checkpoint.

    Args:
        size: `tiny` and `small` are for CPUs; `7b` has the real dimensions (16.6 GB).
        seed: two checkpoints of one size and seed are equal; on another device they may differ.
        output: a folder that does not exist yet.
        device: where the random numbers are drawn.
        font: a TrueType file, which stands in for the published one; without it no video has a
            sheet.

    Raises:
        FileExistsError: the folder exists.
    """
    output.mkdir(parents=True)
    d = IXC_SIZES[size]
    (output / "tokenizer.model").write_bytes(sentencepiece_model(d.vocab_size, d.merges, seed))
    write_json(output / "tokenizer_config.json", _TOKENIZER)
    smaller = {} if size == "7b" else _smaller(d)
    write_json(output / "config.json", dict(sorted((_config(d) | smaller).items())))
    if font:
        shutil.copyfile(font, output / "SimHei.ttf")
    shapes = {name: torch.Size(shape) for name, shape in _shapes(d).items()}
    write_shards(output, shapes, lambda name: _tensor(name, shapes[name], seed, device))


def _config(d: IxcDimensions) -> dict[str, Any]:
    return _FIELDS | {
        "hidden_size": d.hidden,
        "intermediate_size": d.inner,
        "num_attention_heads": d.heads,
        "num_hidden_layers": d.layers,
        "num_key_value_heads": d.kv_heads,
        "vocab_size": d.vocab_size,
    }


def _smaller(d: IxcDimensions) -> dict[str, Any]:
    """Return the fields that replace the published sizes, under transformers' names."""
    placeholder = "[UNUSED_TOKEN_0]"  # 92397 in the published vocabulary
    return {
        "image_token_id": d.vocab_size - len(DEFINED) + DEFINED.index(placeholder),
        "plora_rank": d.rank,
        "vision_config": {
            "hidden_act": "quick_gelu",
            "hidden_size": d.vision_hidden,
            "image_size": d.tile,
            "intermediate_size": d.vision_inner,
            "layer_norm_eps": 1e-05,
            "num_attention_heads": d.vision_hidden // 64,
            "num_hidden_layers": d.vision_layers,
            "patch_size": PATCH,
        },
    }


def _shapes(d: IxcDimensions) -> dict[str, tuple[int, ...]]:
    merged = 4 * d.vision_hidden
    shapes: dict[str, tuple[int, ...]] = {
        "plora_glb_GN": (1, 1, merged),
        "plora_sub_GN": (1, 1, 1, merged),
        "model.tok_embeddings.weight": (d.vocab_size, d.hidden),
    }
    for layer in range(d.layers):
        shapes |= _layer_shapes(d, f"model.layers.{layer}")
    shapes |= {"model.norm.weight": (d.hidden,), "score.weight": (1, d.hidden)}
    shapes |= _vision_shapes(d, "vit.vision_tower.vision_model")
    return shapes | _affine("vision_proj.0", d.hidden, merged) | _affine(
        "vision_proj.2", d.hidden, d.hidden
    )  # fmt: skip


def _layer_shapes(d: IxcDimensions, layer: str) -> dict[str, tuple[int, ...]]:
    grouped = d.hidden // d.heads * (d.heads + 2 * d.kv_heads)
    widths = ((grouped, d.hidden), (d.hidden, d.hidden), (d.inner, d.hidden),
              (d.inner, d.hidden), (d.hidden, d.inner))  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (out, in_) in zip(_LINEAR, widths, strict=True):
        shapes |= {
            f"{layer}.{name}.weight": (out, in_),
            f"{layer}.{name}.Plora_A.weight": (d.rank, in_),
            f"{layer}.{name}.Plora_B.weight": (out, d.rank),
        }
    norms = (f"{layer}.attention_norm.weight", f"{layer}.ffn_norm.weight")
    return shapes | dict.fromkeys(norms, (d.hidden,))


def _vision_shapes(d: IxcDimensions, tower: str) -> dict[str, tuple[int, ...]]:
    width, inner = d.vision_hidden, d.vision_inner
    shapes: dict[str, tuple[int, ...]] = {
        f"{tower}.embeddings.class_embedding": (width,),
        f"{tower}.embeddings.patch_embedding.weight": (width, 3, PATCH, PATCH),
        f"{tower}.embeddings.position_embedding.weight": ((d.tile // PATCH) ** 2 + 1, width),
    }
    norms = [f"{tower}.pre_layrnorm", f"{tower}.post_layernorm"]
    for number in range(d.vision_layers):
        layer = f"{tower}.encoder.layers.{number}"
        for projection in "qkv":
            shapes |= _affine(f"{layer}.self_attn.{projection}_proj", width, width)
        shapes |= _affine(f"{layer}.self_attn.out_proj", width, width)
        shapes |= _affine(f"{layer}.mlp.fc1", inner, width)
        shapes |= _affine(f"{layer}.mlp.fc2", width, inner)
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
    return shapes | {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}


def _affine(name: str, out: int, in_: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, in_), f"{name}.bias": (out,)}


def _tensor(name: str, shape: torch.Size, seed: int, device: str) -> Tensor:
    """Draw as `random_tensor` does; tokens without a picture are as large as patches."""
    tensor = random_tensor(name, shape, seed, device)
    if name.startswith("plora_"):
        return tensor * math.sqrt(shape.numel())
    return tensor * 10 if name == "score.weight" else tensor
