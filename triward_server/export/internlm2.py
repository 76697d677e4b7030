"""InternLM2's reward model, restated: what scores are compared with, since transformers has none.

Written from the published classes' arithmetic, in their tensors' names, with no code of the engine.
One conversation at a time, attention written out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN


class InternLM2Reward(nn.Module):
    """The decoder, and `v_head`, which is read at the last token.

    Args:
        config: an `InternLM2Config`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.model = _Decoder(config)
        self.v_head = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids [1, L] -> the score, float32 []."""
        hidden = self.model(input_ids[0])
        return F.linear(hidden[-1].float(), self.v_head.weight.float())[0]


class _Decoder(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = _Norm(config)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok_embeddings(ids)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.norm(x)
        return out


class _Layer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = _Norm(config), _Norm(config)
        self.attention, self.feed_forward = _Attention(config), _FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.feed_forward(self.ffn_norm(x))
        return out


class _Attention(nn.Module):
    """Grouped-query attention: each key head's rows of `wqkv` follow those of its query heads."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, self.heads = config.hidden_size, config.num_attention_heads
        self.groups = config.num_key_value_heads
        self.width = hidden // self.heads
        rows = (self.heads + 2 * self.groups) * self.width
        self.wqkv = nn.Linear(hidden, rows, bias=False)
        self.wo = nn.Linear(hidden, hidden, bias=False)
        rope = config.rope_parameters
        self.theta = rope["rope_theta"]
        self.stretch = rope["factor"] if rope["rope_type"] == "linear" else 1.0

    def forward(self, x: Tensor) -> Tensor:
        length, each = len(x), self.heads // self.groups
        grouped = self.wqkv(x).view(length, self.groups, each + 2, self.width)
        q = grouped[:, :, :each].reshape(length, self.heads, self.width)
        k, v = grouped[:, :, each], grouped[:, :, each + 1]
        q, k = self._turn(q), self._turn(k)
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        out = []
        for head in range(self.heads):
            key, value = k[:, head // each], v[:, head // each]
            products = (q[:, head] @ key.t()) / self.width**0.5
            weights = products.masked_fill(later, -torch.inf).softmax(-1, dtype=torch.float32)
            out.append(weights.to(value.dtype) @ value)
        result: Tensor = self.wo(torch.cat(out, dim=-1))
        return result

    def _turn(self, x: Tensor) -> Tensor:
        """Rotate [L, H, D] by positions; a dimension's partner is half a head away."""
        steps = torch.arange(0, self.width, 2, device=x.device).float() / self.width
        positions = torch.arange(len(x), device=x.device).float() / self.stretch
        angles = torch.outer(positions, 1.0 / self.theta**steps).repeat(1, 2)[:, None]
        a, b = x.chunk(2, dim=-1)
        return x * angles.cos().to(x.dtype) + torch.cat([-b, a], -1) * angles.sin().to(x.dtype)


class _FeedForward(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.w1 = nn.Linear(hidden, inner, bias=False)
        self.w3 = nn.Linear(hidden, inner, bias=False)
        self.w2 = nn.Linear(inner, hidden, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(self.act(self.w1(x)) * self.w3(x))
        return out


class _Norm(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)
