"""`PackedBatch` -> float32 scores: a vision tower if there is one, a language model, a head."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..schema import Grid, Int64Array, UInt8Array
from .arena import Arena, upload
from .attention import Layout, make_layout
from .clip_tower import ClipBlock
from .decoder import DecoderConfig, DecoderLayer, LanguageModel, SandwichLayer
from .float8 import EXTRA_BYTES, replace_linears
from .geometry import Geometry
from .packing import MediaItem, PackedBatch
from .planning import costs
from .towers import EmbeddingCache, MediaTower
from .vision import VisionBlock

# Images uint8 [H, W, 3] and videos [T, H, W, 3], and their patches -> embeddings [M, out], one
# item's tokens behind the other's.
Encoder = Callable[[Sequence[UInt8Array], Sequence[Grid]], Tensor]

_ROW_WISE: dict[type[nn.Module], tuple[str, ...]] = {
    DecoderLayer: ("before", "queries", "keys_and_values", "after_"),
    SandwichLayer: ("before", "queries", "keys_and_values", "after_"),
    VisionBlock: ("before", "after_"),
    ClipBlock: ("before", "after_"),
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
    """transformers' head of one label: a linear map, of some with a bias; in float32 here."""

    def __init__(self, dim: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, dim, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(1, dtype=torch.float32)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[C, dim] -> float32 [C], each row for itself."""
        out = (x.float() * self.weight).sum(-1)
        return out if self.bias is None else out + self.bias


class TwoLayerHead(nn.Sequential):
    """Qwen2.5-Math-RM's head: two affine maps and a ReLU; in float32 here."""

    def __init__(self, dim: int) -> None:
        first, second = (nn.Linear(dim, width, dtype=torch.float32) for width in (dim, 1))
        super().__init__(first, nn.ReLU(), second)

    def forward(self, x: Tensor) -> Tensor:
        """[C, dim] -> float32 [C], each row for itself: how many there are moves no bit."""
        rows = []
        for row in x.float().split(1):
            for layer in self:
                row = layer(row)
            rows.append(row)
        return torch.cat(rows)[:, 0]


class HeadKind(NamedTuple):
    """What a checkpoint's tensors of a head begin with, and the head of a width."""

    prefix: str
    make: Callable[[int], nn.Module]


HEADS: dict[str, HeadKind] = {
    "v_head": HeadKind("v_head", ValueHead),
    "score": HeadKind("score", ClassificationHead),
    "biased_score": HeadKind("score", partial(ClassificationHead, bias=True)),
    "two_layers": HeadKind("score", TwoLayerHead),
}


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

    def is_past(self) -> bool:
        """Return True if the device has got to the last mark."""
        return not self._cuda or bool(self._marks[-1].query())

    def seconds(self) -> list[float]:
        """Return the seconds from each mark to the next; the device must have got to the last."""
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
        decoder: DecoderConfig,
        visual: MediaTower | None,
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
        self.head = HEADS[head].prefix
        self.add_module(self.head, HEADS[head].make(decoder.hidden))
        self.embeddings = EmbeddingCache(cache_bytes)
        self.deterministic = deterministic
        tower = None if visual is None else visual.config
        self.cost = costs(decoder, tower, torch.finfo(dtype).bits // 8)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.language_model.norm.weight.device

    def hold_in_float8(self) -> None:
        """Give the decoder layers' linears float8 weights; before there are any.

        Raises:
            CheckpointError: see `float8.replace_linears`.
        """
        decoder = self.language_model.decoder
        replace_linears(self.language_model.layers)
        widest = max(decoder.hidden, decoder.inner, decoder.heads * decoder.head_dim)
        more = EXTRA_BYTES * widest
        self.cost = replace(self.cost, token_bytes=self.cost.token_bytes + more)

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
    def forward(
        self,
        batch: PackedBatch,
        clock: Clock | None = None,
        recall: Callable[[int, Tensor], Tensor] = lambda layer, own: own,
        arena: Arena | None = None,
    ) -> Tensor:
        """Scores float32 [C] of a packed batch, on the model's device.

        Args:
            batch: what to score.
            clock: gets three marks, around the vision tower and behind the head.
            recall: keeps keys and values, and has those of the batch's `slots`
                (`prefix_cache.Recall.join`).
            arena: takes what the pass needs to the device, and what `recall` has put there.
        """
        clock = clock or Clock(self.device)
        arena = arena or Arena(self.device)
        language = self.language_model
        input_ids, positions = arena.add(batch.input_ids), arena.add(batch.positions)
        media_rows, media_tokens = arena.add(batch.media_rows), arena.add(batch.media_tokens)
        apart = batch.media_rows if language.decoder.media_rank and batch.media else None
        layout = self._layout(batch.node_lengths, batch.key_lengths, batch.key_rows, arena, apart)
        # Conversations that end at one node (equal ones) are read once.
        nodes, conversations = np.unique(batch.scored, return_inverse=True)
        ends = np.cumsum(batch.key_lengths)
        last = self._layout(
            [1] * len(nodes),
            [batch.key_lengths[node] for node in nodes],
            np.concatenate(
                [batch.key_rows[ends[n] - batch.key_lengths[n] : ends[n]] for n in nodes]
            ),
            arena,
        )
        rows = arena.add(np.cumsum(batch.node_lengths)[nodes] - 1)
        reads = arena.add(conversations)
        arena.send()
        clock.mark()
        embeddings = torch.cat(self._embed(batch.media)) if batch.media else None
        clock.mark()
        x = language.embed(input_ids)
        if embeddings is not None:
            x[media_rows] = embeddings[media_tokens].float()
        hidden = language(x, positions, rows, layout, last, recall)
        scores: Tensor = self.get_submodule(self.head)(hidden)[reads]
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
            grids = [item.grid for item in together]
            encoded = self._encode([item.pixels for item in together], grids).to(self.device)
            counts = [self.geometry.tokens(grid) for grid in grids]
            for item, embedding in zip(together, encoded.split(counts), strict=True):
                found[item.digest] = embedding
                self.embeddings.put(item.digest, embedding)
        return [found[item.digest] for item in media]

    def _encode_here(self, media: Sequence[UInt8Array], grids: Sequence[Grid]) -> Tensor:
        assert self.visual is not None, "geometry.check lets no media through without one"
        pixels = [upload(torch.from_numpy(each), self.device) for each in media]
        embeddings: Tensor = self.visual(pixels, grids)
        return embeddings

    def _layout(
        self,
        lengths: Sequence[int],
        keys: Sequence[int],
        key_rows: Int64Array,
        arena: Arena,
        media_rows: Int64Array | None = None,
    ) -> Layout:
        # Gathered keys lie otherwise in memory, which rounding may depend on.
        in_order = not self.deterministic and np.array_equal(key_rows, np.arange(len(key_rows)))
        return make_layout(
            lengths,
            True,
            arena,
            self.language_model.norm.weight.dtype,
            keys,
            None if in_order else key_rows,
            deterministic=self.deterministic,
            media_rows=media_rows,
            by_pages=self.language_model.decoder.softcap is None,  # else no kernel reads them
        )
