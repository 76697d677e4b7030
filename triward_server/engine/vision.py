"""Pixels -> image embeddings: Qwen2.5-VL's vision tower over all images of a batch, packed.

Every image is a run of patches in one row, a video one for each pair of frames. Most blocks attend
within windows of 112 x 112 pixels, a few within the whole image (arXiv:2502.13923, section 2.1.1);
both are one `varlen` call a block. Patches are kept in window order from the start, so that a
window is a run of the row too.

Parameter names are the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..schema import FRAMES_PER_GRID, Grid, Int64Array
from .arena import Arena
from .attention import Layout, blocks, join, make_layout, varlen
from .layers import GatedMLP, Linear, RMSNorm, linear, rotate_, row_bytes
from .towers import CHANNELS, Cut, MediaTower, normalisation


@dataclass(frozen=True)
class Tower:
    """Configuration of a vision tower, by transformers' names of the fields.

    Attributes:
        depth: blocks.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the gated MLP.
        num_heads: of attention.
        out_hidden_size: width of an embedding.
        patch_size: side of a patch in pixels.
        spatial_merge_size: patches that are merged into one token, along each side.
        window_size: side of an attention window in pixels.
        fullatt_block_indexes: blocks that attend within the whole image.
        rope_theta: base of the rotary positions.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    patch_size: int
    spatial_merge_size: int
    window_size: int
    fullatt_block_indexes: tuple[int, ...]
    rope_theta: float

    @property
    def tile(self) -> None:
        """An image is encoded as it is."""

    def build(self, cut: Cut) -> VisionTower:
        """Return the tower without weights, on torch's default device."""
        return VisionTower(self, cut)

    def aligned(self, multiple: int) -> Tower:
        """Return the tower whose inner width is a multiple; zeros fill it (`weights`)."""
        inner = -(-self.intermediate_size // multiple) * multiple
        return replace(self, intermediate_size=inner)

    def patch_costs(self, itemsize: int) -> tuple[int, int]:
        """FLOPs and bytes of one patch."""
        dim, inner = self.hidden_size, self.intermediate_size
        block = 4 * dim**2 + 3 * dim * inner
        merged = dim * self.spatial_merge_size**2
        merger = (merged**2 + merged * self.out_hidden_size) // self.spatial_merge_size**2
        pixels = CHANNELS * FRAMES_PER_GRID * self.patch_size**2
        return (
            2 * (block * self.depth + merger),
            5 * 4 * pixels + row_bytes(dim, 4 * dim, inner, itemsize),
        )

    @property
    def window(self) -> int:
        """Tokens of an attention window, along each side."""
        return self.window_size // self.spatial_merge_size // self.patch_size


class VisionAttention(nn.Module):
    """Projections of attention with axial rotary positions."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim, True)
        self.proj = Linear(dim, dim, True)


class VisionBlock(nn.Module):
    """Pre-norm transformer block: attention between two row-wise halves."""

    def __init__(self, config: Tower) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, eps=1e-6)
        self.norm2 = RMSNorm(config.hidden_size, eps=1e-6)
        self.attn = VisionAttention(config.hidden_size, config.num_heads)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
        """[T, dim] -> [T, dim], the same tensor with the layer's results added."""
        heads = join(self.before(*rows) for rows in blocks(layout, x, *rotary))
        q, k, v = heads.chunk(3, dim=1)
        for rows in blocks(layout, x, varlen(q, k, v, layout)):
            self.after_(*rows)
        return x

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotated queries, rotated keys and values: [T, dim] -> [T, 3 H, D]."""
        heads: Tensor = self.attn.qkv(self.norm1(x)).unflatten(-1, (3 * self.attn.heads, -1))
        rotate_(heads[:, : 2 * self.attn.heads], cos, sin)
        return heads

    def after_(self, x: Tensor, attended: Tensor) -> None:
        """Add attention's [T, H, D] and what follows to the residual stream [T, dim], in place."""
        x += self.attn.proj(attended.flatten(1))
        x += self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel: one matrix product over flattened patches."""

    def __init__(self, config: Tower) -> None:
        super().__init__()
        kernel = (FRAMES_PER_GRID, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(CHANNELS, config.hidden_size, kernel, stride=kernel, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """[T, channels * frames * patch * patch] -> float32 [T, dim]."""
        weight = self.proj.weight.flatten(1)
        return linear(patches.to(weight.dtype), weight).float()


class PatchMerger(nn.Module):
    """Joins each square of merge x merge patches into one token of the language model."""

    def __init__(self, config: Tower) -> None:
        super().__init__()
        self.merged = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, eps=1e-6)
        self.mlp = nn.Sequential(
            Linear(self.merged, self.merged, True),
            nn.GELU(),
            Linear(self.merged, config.out_hidden_size, True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[T, dim] -> [T / merge², out]."""
        out: Tensor = self.mlp(self.ln_q(x).view(-1, self.merged))
        return out


class VisionTower(MediaTower):
    """The whole tower.

    Args:
        config: what it computes.
        cut: how media become its patches.
    """

    config: Tower

    def __init__(self, config: Tower, cut: Cut) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)
        self.cut = cut
        # No buffer: it is in no checkpoint, and the tower is made on the meta device.
        self._normal = normalisation(cut)

    def forward(self, media: Sequence[Tensor], grids: Sequence[Grid]) -> Tensor:
        """Encode images and videos.

        Args:
            media: uint8 [H, W, 3] or [T, H, W, 3] each, on the tower's device.
            grids: their patches. A video's frames are resized where they do not fill them.

        Returns:
            [M, out]: the items' tokens one item behind the other, rows before columns.
        """
        config = self.config
        plans = [plan_windows(grid, config.spatial_merge_size, self.cut.window) for grid in grids]
        device = self.merger.ln_q.weight.device

        # Units (merged squares of patches) in window order, counted over the whole row.
        first = np.cumsum([0, *(len(order) for order, _ in plans)])
        order = np.concatenate([order + at for (order, _), at in zip(plans, first, strict=False)])
        arena = Arena(device)
        units = arena.add(order)
        in_windows = self._layout([n for _, lengths in plans for n in lengths], arena)
        in_images = self._layout([grid.h * grid.w for grid in grids for _ in range(grid.t)], arena)
        rows = np.concatenate([places(grid, config.spatial_merge_size) for grid in grids])
        row_and_column = arena.add(rows)
        arena.send()

        patches = torch.cat([self._patchify(*item) for item in zip(media, grids, strict=True)])
        x = self.patch_embed(self._by_unit(patches)[units].flatten(0, 1))
        angles = self._by_unit(self._angles(row_and_column))[units].flatten(0, 1)
        rotary = (angles.cos(), angles.sin())
        for index, block in enumerate(self.blocks):
            whole = index in config.fullatt_block_indexes
            x = block(x, rotary, in_images if whole else in_windows)
        merged = self.merger(x)
        out = torch.empty_like(merged)
        out[units] = merged
        return out

    def _layout(self, lengths: Sequence[int], arena: Arena) -> Layout:
        return make_layout(lengths, False, arena, self.merger.ln_q.weight.dtype)

    def _by_unit(self, rows: Tensor) -> Tensor:
        units: Tensor = rows.unflatten(0, (-1, self.config.spatial_merge_size**2))
        return units

    def _patchify(self, pixels: Tensor, grid: Grid) -> Tensor:
        self._normal = self._normal.to(pixels.device)  # a copy the first time
        return patchify(pixels, grid, self.cut, self._normal)

    def _angles(self, places: Tensor) -> Tensor:
        """Rotary angles float32 [T, head_dim / 2] of places [T, 2]: a row's, then a column's."""
        config = self.config
        half = config.hidden_size // config.num_heads // 2
        inverse = 1.0 / config.rope_theta ** (
            torch.arange(0, half, 2, dtype=torch.float32, device=places.device) / half
        )
        angles: Tensor = places[..., None].float() * inverse
        return angles.flatten(1)


def patchify(pixels: Tensor, grid: Grid, cut: Cut, normal: Tensor) -> Tensor:
    """uint8 [H, W, 3] or [T, H, W, 3] -> normalised float32 [P, 3 * frames * patch²], by unit.

    A still image fills both frames of a temporal patch. A video's frames are resized where they do
    not fill the grid.

    Args:
        pixels: on any device.
        grid: their patches.
        cut: how they are cut.
        normal: of `normalisation`, on the pixels' device.
    """
    side, merge = cut.patch_size, cut.merge_size
    pairs = _sized(pixels, grid.h * side, grid.w * side)
    squares = pairs.unflatten(3, (-1, merge, side)).unflatten(2, (-1, merge, side))
    # pair, frame, row, merge, side, column, merge, side, channel
    patches: Tensor = squares.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).flatten(0, 4)
    mean, std = normal
    patches = (patches.float() - mean) / std
    return patches.expand(-1, -1, cut.frames, -1, -1).flatten(1)


def _sized(pixels: Tensor, height: int, width: int) -> Tensor:
    """Pairs of frames [t, 2, height, width, 3]; of an image one with a single frame.

    The second resize of the processor's: unlike the first one it works on float32, which it neither
    rounds nor clamps.
    """
    if pixels.ndim == 3:
        return pixels[None, None]
    if pixels.shape[1:3] != (height, width):
        frames = pixels.permute(0, 3, 1, 2).float()
        resized = F.interpolate(frames, (height, width), mode="bicubic", antialias=True)
        pixels = resized.permute(0, 2, 3, 1)
    pairs: Tensor = pixels.unflatten(0, (-1, FRAMES_PER_GRID))
    return pairs


@lru_cache(maxsize=64)
def plan_windows(grid: Grid, merge: int, window: int) -> tuple[Int64Array, tuple[int, ...]]:
    """Order of an image's units by window, and the patches of each window.

    Windows are cut from the top left corner; those at the right and lower edge are smaller.
    """
    rows, columns = grid.h // merge, grid.w // merge
    t, row, column = np.indices((grid.t, rows, columns)).reshape(3, -1)
    across, down = -(-columns // window), -(-rows // window)
    index = (t * down + row // window) * across + column // window
    order = np.argsort(index, kind="stable")
    return order, tuple((np.bincount(index) * merge**2).tolist())


@lru_cache(maxsize=64)
def places(grid: Grid, merge: int) -> Int64Array:
    """Row and column int64 [T, 2] of each patch, in the order of `_patchify`."""
    place = np.moveaxis(np.indices((grid.h, grid.w)), 0, -1)
    blocks = place.reshape(grid.h // merge, merge, grid.w // merge, merge, 2)
    return np.tile(blocks.swapaxes(1, 2).reshape(-1, 2), (grid.t, 1))
