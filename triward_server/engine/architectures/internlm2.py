"""InternLM2 (arXiv:2403.17297): InternLM2-Reward. Llama in other names, its q, k, v in one matrix.

Its classes are remote code, which is not executed: `model_configs.py` has the configuration, and
the tensors are listed here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..decoder import DecoderConfig
from ..naming import Naming
from ..towers import TowerConfig
from .interface import Architecture, Fields, Head, Shapes, common_decoder, only

RENAMES = (
    (r"\btok_embeddings\.", "embed_tokens."),
    (r"\battention_norm\.", "input_layernorm."),
    (r"\bffn_norm\.", "post_attention_layernorm."),
    (r"\battention\.wqkv\.", "self_attn.qkv_proj."),
    (r"\battention\.wo\.", "self_attn.o_proj."),
    (r"\bfeed_forward\.w1\.", "mlp.gate_proj."),
    (r"\bfeed_forward\.w2\.", "mlp.down_proj."),
    (r"\bfeed_forward\.w3\.", "mlp.up_proj."),
    (r"^v_head\.", "score."),  # a linear map without bias, unlike trl's
)


@dataclass(frozen=True)
class GroupedRows:
    """Rows of `wqkv`, which has each key head's together: its query heads, itself, its values.

    Attributes:
        groups: key heads.
        queries: query heads of each.
    """

    groups: int
    queries: int

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """Put all query heads first, then all key heads, then all value heads."""
        if ".qkv_proj." not in name:
            return tensor
        heads = tensor.unflatten(0, (self.groups, self.queries + 2, -1))
        parts = heads.split([self.queries, 1, 1], dim=1)
        return torch.cat([part.flatten(0, 2) for part in parts])


def internlm2_decoder(config: Fields) -> DecoderConfig:
    """Return the decoder of InternLM2's configurations."""
    only("bias", [config.bias], [False])
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    only("hidden_size modulo num_attention_heads", [config.hidden_size % heads], [0])
    only("num_attention_heads modulo num_key_value_heads", [heads % keys], [0])
    # "dynamic" stretches conversations beyond `max_position_embeddings` alone, which are refused.
    return common_decoder(config, ("default", "linear", "dynamic"))


def _naming(decoder: DecoderConfig) -> Naming:
    return Naming(RENAMES, GroupedRows(decoder.kv_heads, decoder.heads // decoder.kv_heads))


def internlm2_shapes(decoder: DecoderConfig, tower: TowerConfig | None) -> Shapes:
    """Return the shapes of InternLM2's tensors, without a head."""
    hidden, inner, width = decoder.hidden, decoder.inner, decoder.heads * decoder.head_dim
    rows = width + 2 * decoder.kv_heads * decoder.head_dim
    layer = {
        "attention_norm": (hidden,),
        "attention.wqkv": (rows, hidden),
        "attention.wo": (hidden, width),
        "ffn_norm": (hidden,),
        "feed_forward.w1": (inner, hidden),
        "feed_forward.w2": (hidden, inner),
        "feed_forward.w3": (inner, hidden),
    }
    layers = {
        f"model.layers.{index}.{name}.weight": shape
        for index in range(decoder.layers)
        for name, shape in layer.items()
    }
    return {
        "model.tok_embeddings.weight": (decoder.vocab_size, hidden),
        **layers,
        "model.norm.weight": (hidden,),
    }


ARCHITECTURE = Architecture(
    internlm2_decoder,
    naming=_naming,
    shapes=internlm2_shapes,
    heads={"InternLM2ForRewardModel": Head("score", token="reward_token_id", appended=True)},
)
