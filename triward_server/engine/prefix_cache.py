"""`PrefixCache`: keys and values of prompts, kept from one pass to the next.

A pass sees the tokens that it finds here as if it had computed them, and leaves its own prompts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..config import ForwardConfig
from ..errors import is_out_of_memory
from ..schema import Int64Array
from .arena import Arena
from .decoder import DecoderConfig
from .packing import Branch, MediaItem, MediaNumbers, PackedBatch, SortedBatch
from .prefixes import PrefixIndex

logger = logging.getLogger(__name__)

_NONE = np.empty(0, np.int64)
_CPU_BYTES = 256 * 1024**2
_CUDA_SHARE = 0.4  # of the device's memory, at most


@dataclass(frozen=True)
class Recall:
    """Cached tokens that one pass sees, and those of its own that it leaves.

    Attributes:
        pool: a tensor [slots, 2 G, D] for each layer.
        slots: int64 [R], the cached tokens.
        rows: int64 [N], rows of the pass whose keys and values are kept; a slice if they lie one
            behind the other, which copies nothing on the way.
        targets: int64 [N], the slots that they go to.
    """

    pool: Sequence[Tensor]
    slots: Tensor
    rows: Tensor | slice
    targets: Tensor

    def join(self, layer: int, keys_and_values: Tensor) -> Tensor:
        """Keep what is to be kept; put what is cached in front: [T, 2 G, D] -> [R + T, 2 G, D]."""
        if len(self.targets):
            self.pool[layer][self.targets] = keys_and_values[self.rows]
        if not len(self.slots):
            return keys_and_values
        return torch.cat([self.pool[layer][self.slots], keys_and_values])


class PrefixCache:
    """Keys and values of the tokens that conversations began with.

    It belongs to one loaded model: other weights are another cache. Media are told apart by the
    digest of their resized pixels, so other pixel limits are other tokens.

    Args:
        max_bytes: of the pool; 0: nothing is kept. It is allocated at once.
        decoder: the language model's configuration.
        dtype: of keys and values.
        device: where they are.
        deterministic: keep and find whole prompts alone.
    """

    def __init__(
        self,
        max_bytes: int,
        decoder: DecoderConfig,
        dtype: torch.dtype,
        device: torch.device,
        deterministic: bool,
    ) -> None:
        self._shape = (2 * decoder.kv_heads, decoder.head_dim)
        self._layers = decoder.layers
        self._dtype = dtype
        self._device = device
        self._deterministic = deterministic
        self._token_bytes = self._layers * math.prod(self._shape) * dtype.itemsize
        self._index = PrefixIndex(max_bytes // self._token_bytes, whole=deterministic)
        self._pool = self._allocate()
        self.numbers = MediaNumbers()

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens that are kept at present."""
        return self._index.size * self._token_bytes

    @property
    def evicted(self) -> int:
        """Tokens that had to make room, since the model was loaded."""
        return self._index.evicted

    def clear(self) -> None:
        """Forget everything."""
        self._index.clear(self._index.capacity)

    def shrink(self) -> bool:
        """Free the pool's memory; the next batch gets half of it. False if there is none."""
        had, self._pool = bool(self._pool), []
        if had:
            self._index.clear(self._index.capacity // 2)
            logger.warning("out of memory: the prefix cache is freed, and halved from now on")
        return had

    def begin(self, ordered: SortedBatch) -> SortedBatch:
        """Begin a batch: note what of it is cached. That stays until the next one begins."""
        self._index.begin()
        if not self._pool:
            self._pool = self._allocate()
        cached = [len(each) for each in self.find(ordered, range(len(ordered.branches)))]
        branches = [
            replace(branch, media=_shown(branch, ordered.media, known)) if known else branch
            for branch, known in zip(ordered.branches, cached, strict=True)
        ]
        return replace(ordered, branches=tuple(branches), cached=np.array(cached, np.int64))

    def find(self, ordered: SortedBatch, chosen: Sequence[int]) -> list[Int64Array]:
        """Return for each branch the slots of its first tokens that are cached.

        All but its last token at most, which the score is read at; in deterministic mode those of
        the whole prompt or none; of a probe none.
        """
        found = []
        for branch in (ordered.branches[index] for index in chosen):
            end = len(branch.keys) - 1
            if self._deterministic:
                end = branch.prompt_length if branch.prompt_length <= end else 0
            known = self._pool and branch.lasting
            found.append(self._index.match(branch.keys[:end]) if known else _NONE)
        return found

    def recall(self, batch: PackedBatch, arena: Arena) -> Recall:
        """Make room for what a pass is to leave; whoever runs it clears the cache if it fails."""
        rows, targets = [_NONE], [_NONE]
        for kept in batch.kept if self._pool else ():
            known, slots = self._index.keep(kept.path, kept.count)
            first = kept.row + known - (len(kept.path) - kept.count)
            rows.append(first + np.arange(len(slots)))
            targets.append(slots)
        all_rows = np.concatenate(rows)
        first = int(all_rows[0]) if len(all_rows) else 0
        run = slice(first, first + len(all_rows))
        in_a_row = np.array_equal(all_rows, np.arange(run.start, run.stop))
        return Recall(
            self._pool,
            arena.add(batch.slots),
            run if in_a_row else arena.add(all_rows),
            arena.add(np.concatenate(targets)),
        )

    def _allocate(self) -> list[Tensor]:
        """Return the pool; none if there is no memory for it now, or no room was asked for."""
        slots = self._index.capacity
        shape = (slots, *self._shape)
        try:
            return [
                torch.empty(shape, dtype=self._dtype, device=self._device)
                for _ in range(self._layers if slots else 0)
            ]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._index.clear(slots // 2)
            return []


def prefix_bytes(config: ForwardConfig, device: torch.device) -> int:
    """Return the bytes that the cache may take, when the weights are loaded.

    Where none are configured: on a CPU 256 MiB; on CUDA what the weights, a pass and the embedding
    cache leave, at most 40 % of the device.
    """
    if config.prefix_cache_bytes >= 0:
        return config.prefix_cache_bytes
    if device.type == "cpu":
        return _CPU_BYTES
    free, total = torch.cuda.mem_get_info(device)
    left = free - config.max_batch_bytes - config.embedding_cache_bytes
    return max(0, min(left, int(_CUDA_SHARE * total)))


def _shown(branch: Branch, media: Sequence[MediaItem], known: int) -> frozenset[int]:
    """Return the media of which a branch has tokens behind its first `known` ones."""
    tokens = -1 - branch.keys[known:]
    first = {index: media[index].first_token for index in branch.media}
    return frozenset(
        index
        for index in branch.media
        if ((tokens >= first[index]) & (tokens < first[index] + media[index].tokens)).any()
    )
