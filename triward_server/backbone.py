"""`PackedBatch` -> float32 scores: Qwen2.5-VL's language model and trl's value head.

Only what a reward needs: one prefill, no cache, no vocabulary head. Parameter names are the
checkpoint's, but for `qkv_proj` and `gate_up_proj`, which `checkpoint.py` joins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .attention import Layout, make_layout, varlen
from .errors import CheckpointError
from .packing import Geometry, PackedBatch
from .vision import GatedMLP, RMSNorm, VisionTower, rotate


class Attention(nn.Module):
    """Grouped-query attention with multimodal rotary positions."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.heads = [config.num_attention_heads, *2 * [config.num_key_value_heads]]
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.heads) * self.head_dim)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
        """[T, dim] -> [T, dim]."""
        q, k, v = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=1)
        attended = varlen(rotate(q, *rotary), rotate(k, *rotary), v, layout)
        out: Tensor = self.o_proj(attended.flatten(1))
        return out


class DecoderLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
        """[T, dim] -> [T, dim]."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, layout)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class LanguageModel(nn.Module):
    """Token embeddings, decoder layers and the final norm."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """Embeddings [T, dim], M-RoPE positions [3, T] -> hidden states [T, dim] before `norm`."""
        angles = self._angles(positions)
        rotary = (angles.cos(), angles.sin())
        for layer in self.layers:
            x = layer(x, rotary, layout)
        return x

    def _angles(self, positions: Tensor) -> Tensor:
        """Rotary angles float32 [T, head_dim / 2]; each axis turns its section of frequencies."""
        rope = self.config.rope_parameters
        dim = self.config.hidden_size // self.config.num_attention_heads
        steps = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device)
        angles = positions[..., None].float() * (1.0 / rope["rope_theta"] ** (steps / dim))
        sections = angles.split(rope["mrope_section"], dim=-1)
        return torch.cat([section[axis] for axis, section in enumerate(sections)], dim=-1)


class ValueHead(nn.Module):
    """trl's value head: one affine map in float32. Its dropout does nothing in evaluation."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.summary = nn.Linear(dim, 1, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """[C, dim] -> float32 [C]."""
        out: Tensor = self.summary(x.float())[:, 0]
        return out


class RewardModel(nn.Module):
    """The vision tower, the language model and the value head.

    Args:
        config: transformers' `Qwen2_5_VLConfig`.
        mean: the image processor's normalisation.
        std: likewise.
    """

    def __init__(self, config: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        _check_supported(config.text_config)
        text, vision = config.text_config, config.vision_config
        self.visual = VisionTower(vision, mean, std)
        self.language_model = LanguageModel(text)
        self.v_head = ValueHead(text.hidden_size)
        self.geometry = Geometry(
            image_token_id=config.image_token_id,
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            vocab_size=text.vocab_size,
            max_tokens=text.max_position_embeddings,
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.v_head.summary.weight.device

    @torch.inference_mode()
    def forward(self, batch: PackedBatch) -> Tensor:
        """Scores float32 [C] of a packed batch, on the model's device."""
        device, language = self.device, self.language_model
        x: Tensor = language.embed_tokens(torch.from_numpy(batch.input_ids).to(device)).float()
        if batch.images:
            images = [torch.from_numpy(image).to(device) for image in batch.images]
            rows, tokens = (
                torch.from_numpy(index).to(device)
                for index in (batch.image_rows, batch.image_tokens)
            )
            x[rows] = self.visual(images)[tokens].float()
        layout = make_layout(
            batch.lengths.tolist(), causal=True, device=device, dtype=language.norm.weight.dtype
        )
        hidden = language(x, torch.from_numpy(batch.positions).to(device), layout)
        scored = torch.from_numpy(batch.scored).to(device)
        scores: Tensor = self.v_head(language.norm(hidden[scored]))
        return scores


def _check_supported(text_config: Any) -> None:
    """Refuse what this file does not compute rather than compute something else."""
    rope_type = text_config.rope_parameters["rope_type"]
    if rope_type != "default":
        raise CheckpointError(
            f"text_config.rope_parameters: rope type {rope_type!r} is not supported"
        )
    if "sliding_attention" in text_config.layer_types:
        raise CheckpointError("text_config.use_sliding_window: sliding windows are not supported")
    for name, config_value, supported in (
        ("hidden_act", text_config.hidden_act, "silu"),
        ("mrope sections", len(text_config.rope_parameters["mrope_section"]), 3),
    ):
        if config_value != supported:
            raise CheckpointError(f"text_config: {name} {config_value!r}, only {supported!r} works")
