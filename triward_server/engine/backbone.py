"""`PackedBatch` -> float32 scores: a vision tower if there is one, a language model, a head."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..schema import FRAMES_PER_GRID, Grid, UInt8Array
from .attention import CAPPED_BYTES, Layout, make_layout, repeats_keys, upload
from .decoder import Decoder, DecoderLayer, LanguageModel, SandwichLayer, weights_per_layer
from .packing import Cost, Geometry, Int64Array, MediaItem, PackedBatch
from .vision import CHANNELS, EmbeddingCache, Tower, VisionBlock, VisionTower

# Images uint8 [H, W, 3] and videos [T, H, W, 3], and their patches -> embeddings [M, out], one
# item's tokens behind the other's.
Encoder = Callable[[Sequence[UInt8Array], Sequence[Grid]], Tensor]

_ROW_WISE: dict[type[nn.Module], tuple[str, ...]] = {
    DecoderLayer: ("before", "queries", "keys_and_values", "after_"),
    SandwichLayer: ("before", "queries", "keys_and_values", "after_"),
    VisionBlock: ("before", "after_"),
}


class ValueHead(nn.Module):
    """trl's value head: one affine map in float32. Its dropout does nothing in evaluation."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.summary = nn.Linear(dim, 1, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """[C, dim] -> float32 [C], each row for itself."""
        out: Tensor = (x.float() * self.summary.weight).sum(-1) + self.summary.bias
        return out


class ClassificationHead(nn.Module):
    """transformers' head of one label: a linear map without bias; in float32 here."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, dim, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """[C, dim] -> float32 [C], each row for itself."""
        return (x.float() * self.weight).sum(-1)


# By the name that a checkpoint's tensors begin with.
HEADS: dict[str, Callable[[int], nn.Module]] = {"v_head": ValueHead, "score": ClassificationHead}


class Clock:
    """Marks in a device's work, read when the work is done, so that nothing waits for them.

    Args:
        device: whose time.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Note when the device gets here."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From each mark to the next; the device must have got to the last."""
        if self._cuda:
            return [a.elapsed_time(b) / 1e3 for a, b in pairwise(self._marks)]
        return [b - a for a, b in pairwise(self._marks)]


class RewardModel(nn.Module):
    """The vision tower, the language model and the head.

    Args:
        geometry: the model's.
        decoder: what the language model computes.
        visual: the vision tower; None: a text model, or the tower is elsewhere.
        head: which of `HEADS`.
        dtype: of weights and activations.
        deterministic: compute every node of a batch as if it were alone.
        cache_bytes: image embeddings that are kept from one batch to the next.
        encoder: what encodes images in place of a vision tower here.
    """

    def __init__(
        self,
        geometry: Geometry,
        decoder: Decoder,
        visual: VisionTower | None,
        head: str,
        dtype: torch.dtype,
        deterministic: bool = False,
        cache_bytes: int = 0,
        encoder: Encoder | None = None,
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.visual = visual
        self._encode = encoder or self._encode_here
        self.language_model = LanguageModel(decoder)
        self.head = head
        self.add_module(head, HEADS[head](decoder.hidden))
        self.embeddings = EmbeddingCache(cache_bytes)
        self.deterministic = deterministic
        tower = None if visual is None else visual.config
        self.cost = costs(decoder, tower, torch.finfo(dtype).bits // 8)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.language_model.norm.weight.device

    def compile_layers(self, **options: Any) -> None:
        """Compile the layers' row-wise halves when they are first run; for any number of rows.

        All layers of a kind share the code. Attention stays a call of its own between them.

        Args:
            options: for `torch.compile`.
        """
        for kind, halves in _ROW_WISE.items():
            compiled = {
                name: torch.compile(getattr(kind, name), dynamic=True, fullgraph=True, **options)
                for name in halves
            }
            for layer in self.modules():
                if type(layer) is kind:
                    for name, function in compiled.items():
                        setattr(layer, name, partial(function, layer))

    @torch.inference_mode()
    def forward(self, batch: PackedBatch, clock: Clock | None = None) -> Tensor:
        """Scores float32 [C] of a packed batch, on the model's device.

        Args:
            batch: what to score.
            clock: gets three marks, around the vision tower and behind the head.
        """
        clock = clock or Clock(self.device)
        language = self.language_model
        clock.mark()
        embeddings = torch.cat(self._embed(batch.media)) if batch.media else None
        clock.mark()
        x = language.embed(self._upload(batch.input_ids))
        if embeddings is not None:
            x[self._upload(batch.media_rows)] = embeddings[self._upload(batch.media_tokens)].float()
        shares = batch.key_lengths != batch.node_lengths
        layout = self._layout(
            batch.node_lengths, batch.key_lengths, batch.key_rows if shares else None
        )
        # Conversations that end at one node (equal ones) are read once.
        nodes, conversations = np.unique(batch.scored, return_inverse=True)
        ends = np.cumsum(batch.key_lengths)
        last = self._layout(
            [1] * len(nodes),
            [batch.key_lengths[node] for node in nodes],
            np.concatenate(
                [batch.key_rows[ends[n] - batch.key_lengths[n] : ends[n]] for n in nodes]
            ),
        )
        rows = self._upload(np.cumsum(batch.node_lengths)[nodes] - 1)
        hidden = language(x, self._upload(batch.positions), rows, layout, last)
        scores: Tensor = self.get_submodule(self.head)(hidden)[self._upload(conversations)]
        clock.mark()
        return scores

    def _embed(self, media: Sequence[MediaItem]) -> list[Tensor]:
        """Embeddings of each item: those not kept go through the tower once, in one row."""
        distinct = {item.digest: item for item in media}
        kept = {digest: self.embeddings.get(digest) for digest in distinct}
        found = {digest: embedding for digest, embedding in kept.items() if embedding is not None}
        missing = [item for digest, item in distinct.items() if digest not in found]
        rounds = [[item] for item in missing] if self.deterministic else [missing]
        for together in filter(None, rounds):
            grids = [self.geometry.grid(item.pixels) for item in together]
            encoded = self._encode([item.pixels for item in together], grids).to(self.device)
            counts = [self.geometry.tokens(grid) for grid in grids]
            for item, embedding in zip(together, encoded.split(counts), strict=True):
                found[item.digest] = embedding
                self.embeddings.put(item.digest, embedding)
        return [found[item.digest] for item in media]

    def _encode_here(self, media: Sequence[UInt8Array], grids: Sequence[Grid]) -> Tensor:
        assert self.visual is not None, "packing.check lets no media through without one"
        embeddings: Tensor = self.visual([self._upload(pixels) for pixels in media], grids)
        return embeddings

    def _layout(
        self, lengths: Sequence[int], keys: Sequence[int], key_rows: Int64Array | None
    ) -> Layout:
        dtype = self.language_model.norm.weight.dtype
        return make_layout(
            lengths, True, self.device, dtype, keys, key_rows, apart=self.deterministic
        )

    def _upload(self, array: NDArray[Any]) -> Tensor:
        return upload(torch.from_numpy(array), self.device)


def costs(decoder: Decoder, vision: Tower | None, itemsize: int) -> Cost:
    """FLOPs and bytes of a forward pass.

    In FLOPs multiply-adds count twice; norms, rotations and activations are left out. Bytes are an
    upper bound, as if nothing were freed early; float32 on CUDA is left out, where torch may keep
    attention's weights too.

    Args:
        decoder: the language model's.
        vision: the tower's; None: there is none.
        itemsize: bytes of one activation.
    """
    layer, seen = weights_per_layer(decoder)  # the last one computes `seen` for what is not scored
    width = decoder.heads * decoder.head_dim
    keys = 2 * decoder.kv_heads * decoder.head_dim
    # Gathered, and where the kernel wants it, repeated for every query head.
    gathered = keys + (2 * width if repeats_keys() else 0)
    per_patch, patch_bytes = (0, 0) if vision is None else _patch_costs(vision, itemsize)
    return Cost(
        per_token=2 * (layer * (decoder.layers - 1) + seen),
        per_score=2 * (layer - seen),
        per_pair=4 * width * (decoder.layers - 1),
        per_patch=per_patch,
        token_bytes=_row_bytes(decoder.hidden, 2 * width + keys, decoder.inner, itemsize),
        key_bytes=gathered * itemsize,
        patch_bytes=patch_bytes,
        pass_bytes=0 if decoder.softcap is None else CAPPED_BYTES,
    )


def _patch_costs(vision: Tower, itemsize: int) -> tuple[int, int]:
    """FLOPs and bytes of one patch in the tower."""
    dim, inner = vision.hidden_size, vision.intermediate_size
    block = 4 * dim**2 + 3 * dim * inner
    merged = dim * vision.spatial_merge_size**2
    merger = (merged**2 + merged * vision.out_hidden_size) // vision.spatial_merge_size**2
    pixels = CHANNELS * FRAMES_PER_GRID * vision.patch_size**2
    return (
        2 * (block * vision.depth + merger),
        5 * 4 * pixels + _row_bytes(dim, 4 * dim, inner, itemsize),
    )


def _row_bytes(dim: int, heads: int, inner: int, itemsize: int) -> int:
    """The residual stream and its norm in float32; q, k, v, what is attended, the gated MLP."""
    return 4 * 4 * dim + itemsize * (dim + heads + 3 * inner)
