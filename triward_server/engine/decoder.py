"""The language model of every architecture: one decoder, and the few ways in which they differ.

`DecoderConfig` says what a model computes; a file of `architectures/` reads it from a checkpoint's
configuration. Only what a reward needs is here: one prefill, no vocabulary head.
Parameter names are the checkpoint's, but for `qkv_proj` and `gate_up_proj`, which `weights.py`
joins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .attention import Layout, LogitRules, blocks, join, varlen
from .layers import GatedMLP, Linear, RMSNorm, rotate_

# Those of a pass's rows [T, 2 G, D] -> those that its queries see.
KeysAndValues = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rope:
    """Rotary positions (arXiv:2104.09864).

    Attributes:
        inverse: head_dim / 2 inverse frequencies.
        scale: of cosines and sines; not 1 where a model was stretched to more positions.
        sections: how many frequencies each axis of a position turns, in order; they sum to
            head_dim / 2. A text model has one axis, Qwen2.5-VL's M-RoPE three (arXiv:2409.12191).
    """

    inverse: tuple[float, ...]
    scale: float
    sections: tuple[int, ...]


@dataclass(frozen=True)
class DecoderConfig:
    """Configuration of a decoder-only language model.

    Attributes:
        vocab_size: rows of the embedding.
        positions: tokens that a conversation can have.
        hidden: width of the residual stream.
        inner: width inside the gated MLP.
        heads: query heads.
        kv_heads: key heads, each of which serves heads / kv_heads query heads.
        head_dim: width of a head.
        eps: of the norms.
        rope: rotary positions.
        windows: for each layer how many tokens back a query sees, itself included; None: all.
        qkv_bias: whether the projections of queries, keys and values add a bias.
        qk_norm: whether queries and keys are normalised, head by head.
        activation: of the gated MLP: a key of `layers.ACTIVATIONS`.
        norm_offset: what a norm adds to its weight.
        sandwich: whether the results of attention and MLP are normalised too.
        embedding_scale: what embeddings are multiplied by.
        scale: what products of query and key are multiplied by.
        softcap: c, where these become c * tanh(product / c).
        media_rank: rank of the updates that the linear layers have for tokens of media alone
            (partial LoRA, arXiv:2401.16420, section 3.2); 0: all tokens are alike.
    """

    vocab_size: int
    positions: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    rope: Rope
    windows: tuple[int | None, ...]
    qkv_bias: bool
    qk_norm: bool
    activation: str
    norm_offset: float
    sandwich: bool
    embedding_scale: float
    scale: float
    softcap: float | None
    media_rank: int

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.windows)

    def norm(self, dim: int) -> RMSNorm:
        """Return a norm as this model has them."""
        return RMSNorm(dim, self.eps, self.norm_offset)


class Attention(nn.Module):
    """Projections of grouped-query attention; the rows of `qkv_proj` are heads of q, k, v."""

    def __init__(self, decoder: DecoderConfig, window: int | None) -> None:
        super().__init__()
        self.head_dim = decoder.head_dim
        self.queries = decoder.heads
        self.keys = decoder.kv_heads
        heads = self.queries + 2 * self.keys
        width, rank = self.queries * self.head_dim, decoder.media_rank
        self.qkv_proj = Linear(decoder.hidden, heads * self.head_dim, decoder.qkv_bias, rank)
        self.o_proj = Linear(width, decoder.hidden, False, rank)
        if decoder.qk_norm:
            self.q_norm = decoder.norm(self.head_dim)
            self.k_norm = decoder.norm(self.head_dim)
        self.qk_norm = decoder.qk_norm
        self.rules = LogitRules(decoder.scale, decoder.softcap, window)

    def project(
        self, x: Tensor, cos: Tensor, sin: Tensor, media: Tensor | None, first: int, last: int
    ) -> Tensor:
        """Heads `first` up to `last`: [T, dim] -> [T, last - first, D]. Values are not rotated."""
        rows = slice(first * self.head_dim, last * self.head_dim)
        heads: Tensor = self.qkv_proj.part(x, rows, media).unflatten(-1, (-1, self.head_dim))
        rotated = heads[:, : min(last, self.queries + self.keys) - first]
        if self.qk_norm:
            queries = max(0, self.queries - first)
            for norm, part in (
                (self.q_norm, rotated[:, :queries]),
                (self.k_norm, rotated[:, queries:]),
            ):
                part.copy_(norm(part.float()))
        rotate_(rotated, cos, sin)
        return heads


class DecoderLayer(nn.Module):
    """Pre-norm transformer layer: attention between two row-wise halves.

    `media` are a block's runs of media where these have updates (`attention.blocks`). Scored tokens
    are text, so what is computed for them alone needs none.
    """

    def __init__(self, decoder: DecoderConfig, window: int | None) -> None:
        super().__init__()
        self.input_layernorm = decoder.norm(decoder.hidden)
        self.self_attn = Attention(decoder, window)
        self.post_attention_layernorm = decoder.norm(decoder.hidden)
        self.mlp = GatedMLP(
            decoder.hidden, decoder.inner, False, decoder.activation, decoder.media_rank
        )

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], layout: Layout, recall: KeysAndValues
    ) -> Tensor:
        """[T, dim] -> [T, dim], the same tensor with the layer's results added."""
        queries, keys = self.self_attn.queries, self.self_attn.keys
        heads = join(self.before(*rows) for rows in blocks(layout, x, *rotary))
        q = heads[:, :queries]
        k, v = recall(heads[:, queries:]).split(keys, dim=1)
        for rows in blocks(layout, x, varlen(q, k, v, layout, self.self_attn.rules)):
            self.after_(*rows)
        return x

    def at(
        self,
        rows: Tensor,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        layout: Layout,
        last: Layout,
        recall: KeysAndValues,
    ) -> Tensor:
        """Compute only `rows` [C] beyond keys and values: [T, dim] -> [C, dim]."""
        cos, sin = rotary
        heads = join(self.keys_and_values(*each) for each in blocks(layout, x, cos, sin))
        k, v = recall(heads).chunk(2, dim=1)
        x, cos, sin = x[rows], cos[rows], sin[rows]
        q = join(self.queries(*each) for each in blocks(last, x, cos, sin))
        for each in blocks(last, x, varlen(q, k, v, last, self.self_attn.rules)):
            self.after_(*each)
        return x

    def before(self, x: Tensor, cos: Tensor, sin: Tensor, media: Tensor | None = None) -> Tensor:
        """Project to queries, keys and values: residual stream [T, dim] -> [T, H + 2 G, D]."""
        attention = self.self_attn
        heads = attention.queries + 2 * attention.keys
        return attention.project(self.input_layernorm(x), cos, sin, media, 0, heads)

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Project to queries alone: [T, dim] -> [T, H, D]."""
        attention = self.self_attn
        return attention.project(self.input_layernorm(x), cos, sin, None, 0, attention.queries)

    def keys_and_values(
        self, x: Tensor, cos: Tensor, sin: Tensor, media: Tensor | None = None
    ) -> Tensor:
        """Keys and values alone: [T, dim] -> [T, 2 G, D]."""
        attention = self.self_attn
        heads = attention.queries + 2 * attention.keys
        return attention.project(self.input_layernorm(x), cos, sin, media, attention.queries, heads)

    def after_(self, x: Tensor, attended: Tensor, media: Tensor | None = None) -> None:
        """Add attention's [T, H, D] and what follows to the residual stream [T, dim], in place."""
        x += self.self_attn.o_proj(attended.flatten(1), media)
        x += self.mlp(self.post_attention_layernorm(x), media)


class SandwichLayer(DecoderLayer):
    """A layer that normalises its halves' results too, as Gemma 2 has it (arXiv:2408.00118)."""

    def __init__(self, decoder: DecoderConfig, window: int | None) -> None:
        super().__init__(decoder, window)
        self.pre_feedforward_layernorm = decoder.norm(decoder.hidden)
        self.post_feedforward_layernorm = decoder.norm(decoder.hidden)

    def after_(self, x: Tensor, attended: Tensor, media: Tensor | None = None) -> None:
        """Add as every layer does, the results of both halves normalised."""
        result = self.self_attn.o_proj(attended.flatten(1), media)
        x += self.post_attention_layernorm(result.float())
        result = self.mlp(self.pre_feedforward_layernorm(x), media)
        x += self.post_feedforward_layernorm(result.float())


class LanguageModel(nn.Module):
    """Token embeddings, decoder layers and the final norm."""

    def __init__(self, decoder: DecoderConfig) -> None:
        super().__init__()
        self.decoder = decoder
        kind = SandwichLayer if decoder.sandwich else DecoderLayer
        self.embed_tokens = nn.Embedding(decoder.vocab_size, decoder.hidden)
        self.layers = nn.ModuleList(kind(decoder, window) for window in decoder.windows)
        self.norm = decoder.norm(decoder.hidden)
        # No buffer: nothing of it is in a checkpoint, and the model is made on the meta device.
        self._inverse = torch.tensor(decoder.rope.inverse, device="cpu")

    def embed(self, ids: Tensor) -> Tensor:
        """Int [T] -> float32 [T, dim]."""
        embedded: Tensor = self.embed_tokens(ids).float()
        return embedded.mul_(self.decoder.embedding_scale)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        rows: Tensor,
        layout: Layout,
        last: Layout,
        recall: Callable[[int, Tensor], Tensor],
    ) -> Tensor:
        """Hidden states of the rows that are read.

        Args:
            x: float32 [T, dim], embeddings.
            positions: [3, T], of M-RoPE; a text model reads the first axis.
            rows: [C], what is read.
            layout: attention of all rows.
            last: attention of `rows` alone; in the last layer no other row is anyone's input.
            recall: a layer's number, and the keys and values of all rows [T, 2 G, D] -> those that
                queries see, cached ones in front.

        Returns:
            [C, dim], normalised.
        """
        rotary = self._rotary(positions)
        *layers, final = self.layers
        assert isinstance(final, DecoderLayer)
        for index, layer in enumerate(layers):
            x = layer(x, rotary, layout, partial(recall, index))
        hidden = final.at(rows, x, rotary, layout, last, partial(recall, len(layers)))
        out: Tensor = self.norm(hidden)
        return out

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 [T, head_dim / 2]; each axis turns its frequencies."""
        rope = self.decoder.rope
        self._inverse = self._inverse.to(positions.device)  # a copy the first time
        angles = positions[..., None].float() * self._inverse
        sections = angles.split(rope.sections, dim=-1)
        turned = torch.cat([section[axis] for axis, section in enumerate(sections)], dim=-1)
        return turned.cos().mul_(rope.scale), turned.sin().mul_(rope.scale)


def weights_per_layer(decoder: DecoderConfig) -> tuple[int, int]:
    """Weights of one layer's matrices, and those of them that make keys and values."""
    width = decoder.heads * decoder.head_dim
    keys = 2 * decoder.kv_heads * decoder.head_dim * decoder.hidden
    return 2 * width * decoder.hidden + keys + 3 * decoder.hidden * decoder.inner, keys


def media_weights_per_layer(decoder: DecoderConfig) -> tuple[int, int]:
    """Count what `weights_per_layer` does, of the updates for tokens of media."""
    width = decoder.heads * decoder.head_dim
    keys = decoder.hidden + 2 * decoder.kv_heads * decoder.head_dim  # A is the queries', too
    sides = keys + width + (width + decoder.hidden) + 3 * (decoder.hidden + decoder.inner)
    return decoder.media_rank * sides, decoder.media_rank * keys
