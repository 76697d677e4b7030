"""Pixels -> image embeddings: CLIP's tower over the tiles of all images of a batch, packed.

IXC-2.5 (arXiv:2407.03320, section 3.1) reads an image as tiles as large as the tower was trained
for, and first as a whole, shrunk to one tile. Each tile is a sequence of the row, with a class
token of its own. Squares of patches are merged; then separators, which are weights, go behind each
row of tokens and behind the whole, and a projector makes embeddings of all of them.

Parameter names are the checkpoint's, but for what `weights.py` joins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..schema import Grid, Int64Array
from .arena import Arena
from .attention import Layout, blocks, join, make_layout, varlen
from .layers import row_bytes
from .towers import CHANNELS, Cut, MediaTower, normalisation

# Rows in front of all images' tokens, where these are put in order.
_ROW_END, _WHOLE_END, _SEPARATORS = 0, 1, 2


@dataclass(frozen=True)
class TiledTower:
    """Configuration of a tower, by transformers' names of the fields where they have one.

    Attributes:
        depth: layers.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the MLP.
        num_heads: of attention.
        image_size: side of a tile in pixels.
        patch_size: side of a patch in pixels.
        eps: of the norms.
        out_hidden_size: width of an embedding.
        spatial_merge_size: patches that are merged into one token, along each side.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    image_size: int
    patch_size: int
    eps: float
    out_hidden_size: int
    spatial_merge_size: int = 2

    @property
    def tile(self) -> int:
        """Side of a tile in patches."""
        return self.image_size // self.patch_size

    @property
    def merged(self) -> int:
        """Width of merged patches."""
        return self.hidden_size * self.spatial_merge_size**2

    def build(self, cut: Cut) -> ClipTower:
        """Return the tower without weights, on torch's default device."""
        return ClipTower(self, cut)

    def aligned(self, multiple: int) -> TiledTower:
        """Return this: the published width is aligned."""
        return self

    def patch_costs(self, itemsize: int) -> tuple[int, int]:
        """FLOPs of one patch, attention in its tile included, and bytes."""
        dim, inner, tile = self.hidden_size, self.intermediate_size, self.tile
        layer = 4 * dim**2 + 2 * dim * inner + 2 * tile**2 * dim
        token = self.merged * self.out_hidden_size + self.out_hidden_size**2
        pixels = CHANNELS * self.patch_size**2
        return (
            2 * (layer * self.depth + token // self.spatial_merge_size**2),
            5 * 4 * pixels + row_bytes(dim, 4 * dim, inner, itemsize),
        )


class LayerNorm(nn.LayerNorm):
    """A norm that reads the residual stream in float32; the weight's dtype out."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


class ClipAttention(nn.Module):
    """Projections of attention; the rows of `qkv_proj` are heads of q, k, v."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)


class ClipMLP(nn.Module):
    """Two linear layers; between them x * sigmoid(1.702 x), by which CLIP approximates GELU."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, inner)
        self.fc2 = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[T, dim] -> [T, dim]."""
        inner = self.fc1(x)
        out: Tensor = self.fc2(inner * torch.sigmoid(1.702 * inner))
        return out


class ClipBlock(nn.Module):
    """Pre-norm transformer layer: attention between two row-wise halves."""

    def __init__(self, config: TiledTower) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, config.eps)
        self.self_attn = ClipAttention(config.hidden_size, config.num_heads)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.eps)
        self.mlp = ClipMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """[T, dim] -> [T, dim], the same tensor with the layer's results added."""
        heads = join(self.before(*rows) for rows in blocks(layout, x))
        q, k, v = heads.chunk(3, dim=1)
        for rows in blocks(layout, x, varlen(q, k, v, layout)):
            self.after_(*rows)
        return x

    def before(self, x: Tensor) -> Tensor:
        """Project to queries, keys and values: [T, dim] -> [T, 3 H, D]."""
        heads: Tensor = self.self_attn.qkv_proj(self.layer_norm1(x))
        out: Tensor = heads.unflatten(-1, (3 * self.self_attn.heads, -1))
        return out

    def after_(self, x: Tensor, attended: Tensor) -> None:
        """Add attention's [T, H, D] and what follows to the residual stream [T, dim], in place."""
        x += self.self_attn.out_proj(attended.flatten(1))
        x += self.mlp(self.layer_norm2(x))


class ClipEmbeddings(nn.Module):
    """Patches, a class token in front of each tile's, and learned positions."""

    def __init__(self, config: TiledTower) -> None:
        super().__init__()
        side, dim = config.patch_size, config.hidden_size
        self.class_embedding = nn.Parameter(torch.empty(dim))
        self.patch_embedding = nn.Conv2d(CHANNELS, dim, side, stride=side, bias=False)
        self.position_embedding = nn.Embedding(config.tile**2 + 1, dim)

    def forward(self, patches: Tensor) -> Tensor:
        """Float32 [tiles, P, 3 * patch * patch] -> float32 [tiles, 1 + P, dim]."""
        weight = self.patch_embedding.weight.flatten(1)
        embedded = F.linear(patches.to(weight.dtype), weight).float()
        first = self.class_embedding.float().expand(len(embedded), 1, -1)
        return torch.cat([first, embedded], dim=1) + self.position_embedding.weight.float()


class ClipTower(MediaTower):
    """The tower, the separators and the projector.

    Args:
        config: what it computes.
        cut: how media become its patches.
    """

    config: TiledTower

    def __init__(self, config: TiledTower, cut: Cut) -> None:
        super().__init__()
        self.config = config
        self.cut = cut
        self.embeddings = ClipEmbeddings(config)
        self.pre_layrnorm = LayerNorm(config.hidden_size, config.eps)  # so it is called
        self.layers = nn.ModuleList(ClipBlock(config) for _ in range(config.depth))
        self.plora_sub_GN = nn.Parameter(torch.empty(1, 1, 1, config.merged))
        self.plora_glb_GN = nn.Parameter(torch.empty(1, 1, config.merged))
        self.proj = nn.Sequential(
            nn.Linear(config.merged, config.out_hidden_size),
            nn.GELU(),
            nn.Linear(config.out_hidden_size, config.out_hidden_size),
        )
        # No buffer: it is in no checkpoint, and the tower is made on the meta device.
        self._normal = normalisation(cut)

    def forward(self, media: Sequence[Tensor], grids: Sequence[Grid]) -> Tensor:
        """Encode images.

        Args:
            media: uint8 [H, W, 3] each, whole tiles, on the tower's device.
            grids: their patches.

        Returns:
            [M, out]: the images' tokens one image behind the other; of an image the whole, then the
            tiles as one picture.
        """
        weight = self.pre_layrnorm.weight
        side = self.config.tile
        tokens = (side // self.config.spatial_merge_size) ** 2
        tiles = [1 + grid.patches // side**2 for grid in grids]
        arena = Arena(weight.device)
        layout = make_layout([1 + side**2] * sum(tiles), False, arena, weight.dtype)
        firsts = accumulate((tokens * count for count in tiles[:-1]), initial=0)
        orders = zip(map(self._order, grids), firsts, strict=True)
        # Separators are those of all images; patches are counted over the whole row.
        places = arena.add(
            np.concatenate([np.where(o < _SEPARATORS, o, o + at) for o, at in orders])
        )
        arena.send()

        self._normal = self._normal.to(weight.device)  # a copy the first time
        patches = torch.cat([tile_rows(each, self.cut, side, self._normal) for each in media])
        embedded = self.embeddings(patches.unflatten(0, (-1, side**2)))
        x = self.pre_layrnorm(embedded).float().flatten(0, 1)
        for layer in self.layers:
            x = layer(x, layout)
        patches = x.unflatten(0, (-1, 1 + side**2))[:, 1:].to(weight.dtype)  # no class tokens
        separators = [self.plora_sub_GN.flatten()[None], self.plora_glb_GN.flatten()[None]]
        out: Tensor = self.proj(torch.cat([*separators, self._merge(patches)])[places])
        return out

    def _merge(self, patches: Tensor) -> Tensor:
        """Join squares: [tiles, P, dim] -> [tiles * P / merge², merged], tile by tile."""
        merge = self.config.spatial_merge_size
        grid = patches.unflatten(1, (self.config.tile // merge, merge, -1, merge))
        merged: Tensor = grid.transpose(2, 3).flatten(3).flatten(0, 2)
        return merged

    def _order(self, grid: Grid) -> Int64Array:
        side = self.config.tile
        return order(grid.h // side, grid.w // side, side // self.config.spatial_merge_size)


def tile_rows(canvas: Tensor, cut: Cut, tile: int, normal: Tensor) -> Tensor:
    """Pixels of the whole and of each tile, row by row of tiles, patch by patch.

    Args:
        canvas: uint8 [H, W, 3], on any device; H and W are multiples of a tile's side.
        cut: how tiles are cut into patches.
        tile: side of a tile in patches.
        normal: of `normalisation`, on the canvas' device.

    Returns:
        Normalised float32 [(tiles + 1) * tile², 3 * patch * patch], a patch by channel, row and
        column.
    """
    mean, std = normal.flatten(2)  # [3, 1]
    pixels = (canvas.permute(2, 0, 1).float() - mean[..., None]) / std[..., None]
    size = tile * cut.patch_size
    whole = F.interpolate(pixels[None], (size, size), mode="bicubic", align_corners=False)
    # channel, row, its pixels, column, its pixels
    cells = pixels.unflatten(2, (-1, size)).unflatten(1, (-1, size))
    tiles = torch.cat([whole, cells.permute(1, 3, 0, 2, 4).flatten(0, 1)])
    side = cut.patch_size
    patches = tiles.unflatten(3, (tile, side)).unflatten(2, (tile, side))
    rows: Tensor = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)
    return rows


@lru_cache(maxsize=64)
def order(rows: int, columns: int, side: int) -> Int64Array:
    """Where an image's tokens come from: separators, or its merged patches behind those.

    Args:
        rows: of tiles.
        columns: likewise.
        side: tokens of a tile along each side.
    """
    whole = np.arange(side**2).reshape(side, side) + _SEPARATORS
    tiles = np.arange(rows * columns * side**2).reshape(rows, columns, side, side)
    picture = tiles.swapaxes(1, 2).reshape(rows * side, columns * side) + _SEPARATORS + side**2
    by_row = (
        np.pad(each, ((0, 0), (0, 1)), constant_values=_ROW_END).ravel()
        for each in (whole, picture)
    )
    first, rest = by_row
    return np.concatenate([first, [_WHOLE_END], rest])
