"""What vision towers have in common: their interface, how pixels are cut, what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from cachetools import LRUCache
from torch import Tensor, nn

from ..schema import Grid

CHANNELS = 3  # red, green, blue


@dataclass(frozen=True)
class Cut:
    """Rules that cut media into patches, and patches into windows.

    Attributes:
        patch_size: side of a patch in pixels.
        frames: that a patch spans; a still image fills all of them.
        merge_size: patches that are merged into one token, along each side.
        window: tokens of an attention window, along each side.
        mean: of each channel's values 0 … 255, which normalising subtracts.
        std: by which it then divides.
    """

    patch_size: int
    frames: int
    merge_size: int
    window: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class TowerConfig(Protocol):
    """What the engine asks of a tower's configuration, whichever it is."""

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""

    @property
    def spatial_merge_size(self) -> int:
        """Patches that are merged into one token, along each side."""

    @property
    def out_hidden_size(self) -> int:
        """Width of an embedding."""

    @property
    def intermediate_size(self) -> int:
        """Width inside the MLP."""

    @property
    def tile(self) -> int | None:
        """Side of a tile in patches; None: an image of any size is encoded as it is."""

    def build(self, cut: Cut) -> MediaTower:
        """Return the tower without weights, on torch's default device."""

    def aligned(self, multiple: int) -> TowerConfig:
        """Return the configuration whose MLP is as wide as suits a GPU."""

    def patch_costs(self, itemsize: int) -> tuple[int, int]:
        """FLOPs of one patch, and bytes of its intermediate results; `itemsize`: of one."""


class MediaTower(nn.Module):
    """A vision tower.

    Attributes:
        config: what it computes.
    """

    config: TowerConfig

    def forward(self, media: Sequence[Tensor], grids: Sequence[Grid]) -> Tensor:
        """Encode images and videos.

        Args:
            media: uint8 [H, W, 3] or [T, H, W, 3] each, on the tower's device.
            grids: their patches.

        Returns:
            [M, out]: the items' tokens, one item's behind the other's.
        """
        raise NotImplementedError


def cut_of(
    tower: TowerConfig, frames: int, window: int, mean: Sequence[float], std: Sequence[float]
) -> Cut:
    """Return the cut of a checkpoint.

    Args:
        tower: what it computes.
        frames: see `Cut`.
        window: likewise.
        mean: the normalisation, per channel of values in 0 … 1.
        std: likewise.
    """
    return Cut(
        patch_size=tower.patch_size,
        frames=frames,
        merge_size=tower.spatial_merge_size,
        window=window,
        # As the processor has it: (x - 255 mean) / (255 std), on values 0 … 255.
        mean=tuple(255 * m for m in mean),
        std=tuple(255 * s for s in std),
    )


def normalisation(cut: Cut) -> Tensor:
    """Mean and deviation of each channel, float32 [2, 3, 1, 1, 1], on the CPU."""
    return torch.tensor([cut.mean, cut.std], device="cpu")[..., None, None, None]


class EmbeddingCache:
    """Image embeddings by content digest, least recently used first out.

    The digest covers the resized pixels, so that other pixel limits are another image. The cache
    belongs to one loaded model, so that other weights are another cache.

    Args:
        max_bytes: size of all embeddings together; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self._items: LRUCache[bytes, Tensor] = LRUCache(max_bytes, getsizeof=lambda t: t.nbytes)
        self.hits = 0
        self.misses = 0

    @property
    def nbytes(self) -> int:
        """Bytes that are kept at present."""
        return int(self._items.currsize)

    def clear(self) -> None:
        """Forget everything but the counts."""
        self._items.clear()

    def get(self, digest: bytes) -> Tensor | None:
        """Return the embedding [M, out], or None; either is counted."""
        embedding = self._items.get(digest)
        self.hits += embedding is not None
        self.misses += embedding is None
        return embedding

    def put(self, digest: bytes, embedding: Tensor) -> None:
        """Keep an embedding if it fits at all; others make room."""
        if embedding.nbytes <= self._items.maxsize:
            self._items[digest] = embedding.clone()  # not a view that keeps its batch alive
