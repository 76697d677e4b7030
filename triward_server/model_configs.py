"""Configurations of models whose classes exist as remote code alone, which is never executed here.

They are registered with transformers, so that `AutoConfig` reads them as it reads its own, and does
not offer to run the code that a checkpoint brings. Fields and defaults are the published classes'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

REWARD_TOKEN = 130  # of IXC-2.5's tokens `[UNUSED_TOKEN_n]`; its placeholder is n = 0


@strict
class InternLM2Config(PreTrainedConfig):  # type: ignore[misc] # an untyped package
    """InternLM2's (arXiv:2403.17297), with the reward model's token."""

    model_type = "internlm2"

    vocab_size: int = 103_168
    hidden_size: int = 4096
    intermediate_size: int = 11_008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    reward_token_id: int = 92_527
    pretraining_tp: int | None = 1
    tie_word_embeddings: bool = False
    bias: bool = True
    rope_parameters: dict | None = None  # type: ignore[type-arg] # `strict` knows no arguments

    default_theta = 10_000.0

    def __post_init__(self, **kwargs: object) -> None:
        """Fill in what follows from other fields."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)


@strict
class InternLMXComposer2Config(InternLM2Config):
    """IXC-2.5's (arXiv:2407.03320); what the published classes have as constants is a field here.

    Some checkpoints call their `model_type` InternLM2's, so their class decides (`COMPOSER`).
    """

    model_type = "internlmxcomposer2"

    reward_token_id: int | None = None  # type: ignore[assignment] # see below
    max_length: int = 16_384
    image_token_id: int = 92_397
    plora_rank: int = 256
    vision_config: dict | None = None  # type: ignore[type-arg]

    def __post_init__(self, **kwargs: object) -> None:
        """Fill in what follows from other fields."""
        if self.reward_token_id is None:
            self.reward_token_id = self.image_token_id + REWARD_TOKEN
        super().__post_init__(**kwargs)


COMPOSER = "InternLMXComposer2ForCausalLM"


def kind_of(written: Mapping[str, Any]) -> str:
    """Return the `model_type` of what config.json holds; IXC-2.5's class decides over it."""
    composes = COMPOSER in (written.get("architectures") or ())
    return InternLMXComposer2Config.model_type if composes else str(written.get("model_type"))


for _config in (InternLM2Config, InternLMXComposer2Config):
    AutoConfig.register(_config.model_type, _config)
