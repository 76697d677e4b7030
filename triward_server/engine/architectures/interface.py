"""The interface of an architecture, and the configuration that most of them share.

A configuration that asks for anything that is not computed here is refused by name: the score would
be another one. That holds for fields that nothing here has heard of, too: see `fields.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..decoder import DecoderConfig, Rope
from ..layers import ACTIVATIONS
from ..naming import PLAIN, Naming
from ..towers import Cut, TowerConfig
from .fields import Fields, only

__all__ = [
    "Architecture", "Fields", "Head", "Shapes", "Vision", "common_decoder", "only",
]  # fmt: skip

Shapes = Mapping[str, tuple[int, ...]]  # of tensors, by their names in a checkpoint


@dataclass(frozen=True)
class Vision:
    """What a model reads of images and videos.

    Attributes:
        tower: what encodes them.
        image_token_id: see `Geometry`.
        video_token_id: likewise.
        tokens_per_second: likewise.
        cut: how they become patches; None: the processors' files say it.
    """

    tower: TowerConfig
    image_token_id: int
    video_token_id: int | None = None
    tokens_per_second: int = 0
    cut: Cut | None = None


@dataclass(frozen=True)
class Head:
    """A checkpoint's head, and where it is read.

    Attributes:
        kind: a key of `backbone.HEADS`.
        padding: read in front of the padding that ends a conversation ("last"), or of the first
            that is anywhere ("first"); None: at the last token, whatever that is.
        token: a field of the configuration, whose id the last token must have.
        appended: the tokenizer puts that token behind a text; else the chat template writes it.
    """

    kind: str
    padding: Literal["first", "last"] | None = None
    token: str | None = None
    appended: bool = False


def _plain(decoder: DecoderConfig) -> Naming:
    return PLAIN


@dataclass(frozen=True)
class Architecture:
    """Readers of the configurations of one `model_type`.

    Both functions read the fields of transformers' configuration. What they leave unread is refused
    by name, unless it is known to change no score.

    Attributes:
        decoder: what the language model computes.
        vision: what is read of images and videos; None: a text model.
        naming: how the checkpoint's tensors become ours.
        shapes: of all tensors but the head's, where transformers has no class to ask.
        heads: of classes that are remote code, by their names in `architectures`; beside
            transformers' classification and trl's value head, which all architectures may have.
    """

    decoder: Callable[[Fields], DecoderConfig]
    vision: Callable[[Fields], Vision] | None = None
    naming: Callable[[DecoderConfig], Naming] = _plain
    shapes: Callable[[DecoderConfig, TowerConfig | None], Shapes] | None = None
    heads: Mapping[str, Head] = field(default_factory=dict)


# Kinds of rotary positions whose frequencies do not depend on a conversation's length.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def common_decoder(config: Fields, rope_types: Sequence[str] = _ROPE_TYPES) -> DecoderConfig:
    """Return the decoder that transformers' text configurations describe in common.

    Args:
        config: of a decoder-only language model.
        rope_types: kinds of rotary positions that are right for it.

    Raises:
        CheckpointError: it asks for what is not computed here.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return DecoderConfig(
        vocab_size=config.vocab_size,
        positions=config.max_position_embeddings,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        eps=config.rms_norm_eps,
        rope=_rope(config, head_dim, rope_types),
        windows=_windows(config),
        qkv_bias=False,
        qk_norm=False,
        activation=_activation(config),
        norm_offset=0.0,
        sandwich=False,
        embedding_scale=1.0,
        scale=head_dim**-0.5,
        softcap=None,
        media_rank=0,
    )


def _windows(config: Fields) -> tuple[int | None, ...]:
    """Return each layer's window, where the configuration says so layer by layer.

    Without `layer_types` each class makes its own of `sliding_window`. That is then left unread
    here: the architecture's file reads it, or a configuration that has one is refused.
    """
    kinds: list[str] | None = getattr(config, "layer_types", None)
    layers: int = config.num_hidden_layers
    if not kinds:
        return (None,) * layers
    # What transformers has filled in `layer_types` from, where the file does not have it.
    config.ignore("use_sliding_window", "max_window_layers")
    window = getattr(config, "sliding_window", None)
    windows: dict[str, int | None] = {"full_attention": None}
    if window is not None:
        windows["sliding_attention"] = window
    only("layer_types", set(kinds), windows)
    only("number of layer_types", [len(kinds)], [layers])
    return tuple(windows[kind] for kind in kinds)


def _activation(config: Fields) -> str:
    field = "hidden_activation"
    if getattr(config, field, None) is None:
        field = "hidden_act"
    else:
        config.ignore("hidden_act")  # an older name, kept beside it
    name = getattr(config, field)
    only(field, [name], ACTIVATIONS)
    return str(name)


def _rope(config: Fields, head_dim: int, types: Sequence[str]) -> Rope:
    """Frequencies as transformers computes them, in float32."""
    parameters = config.rope_parameters
    kind = parameters["rope_type"]
    only("rope type", [kind], types)
    only("partial_rotary_factor", [parameters.get("partial_rotary_factor", 1.0)], [1.0])
    # An older name of `rope_type`, which counts where both are there; and what transformers has
    # copied into the parameters of the types that read it.
    parameters.ignore("type")
    config.ignore("original_max_position_embeddings")
    if kind == "default":
        steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        inverse, scale = 1.0 / parameters["rope_theta"] ** steps, 1.0
    else:
        inverse, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return Rope(tuple(inverse.tolist()), scale, (head_dim // 2,))
