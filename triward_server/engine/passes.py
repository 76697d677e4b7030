"""`Passes`: one micro-batch on its device, from the sorted batch to the scores.

A GPU works through a queue. `launch` returns when a pass is in it, so that the host prepares the
next one while the device computes this one; `collect` waits for the scores. On a CPU `launch`
computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor
from torch.compiler import set_stance

from ..schema import Float32Array
from . import packing
from .arena import Arena
from .backbone import Clock, RewardModel
from .packing import PackedBatch, SortedBatch
from .prefix_cache import PrefixCache


@dataclass(frozen=True)
class Pass:
    """Statistics of one forward pass, for the observer.

    Attributes:
        tokens: computed.
        tokens_saved: what they would have been more without sharing among conversations.
        tokens_reused: what they would have been more without the prefix cache.
        tokens_evicted: what the prefix cache forgot to make room for this pass.
        prefix_bytes: of all that the prefix cache keeps behind it.
        images: distinct images and videos that it showed.
        images_cached: those of them that were not encoded.
        cache_bytes: of all embeddings that are kept behind it.
        vision_seconds: the device's, for the vision tower.
        language_model_seconds: for the rest.
        out_of_memory: it failed for lack of memory, and did nothing of the above.
    """

    tokens: int = 0
    tokens_saved: int = 0
    tokens_reused: int = 0
    tokens_evicted: int = 0
    prefix_bytes: int = 0
    images: int = 0
    images_cached: int = 0
    cache_bytes: int = 0
    vision_seconds: float = 0.0
    language_model_seconds: float = 0.0
    out_of_memory: bool = False


Observer = Callable[[Pass], None]


@dataclass(frozen=True)
class Launched:
    """A pass that is in its device's queue.

    Attributes:
        scores: float32 [C], which to read waits for the device.
        clock: of the pass.
        statistics: all but the device's seconds.
    """

    scores: Tensor
    clock: Clock
    statistics: Pass

    @property
    def is_done(self) -> bool:
        """Whether the device has computed it."""
        return self.clock.is_past()


class Passes:
    """Launches and collects the passes of one model.

    Args:
        model: what computes them.
        prefixes: what they find and leave.
    """

    def __init__(self, model: RewardModel, prefixes: PrefixCache) -> None:
        self._model = model
        self._prefixes = prefixes
        self.recompile = True

    def launch(self, ordered: SortedBatch, chosen: Sequence[int]) -> Launched:
        """Pack some branches of a batch and hand them to the device."""
        clock, cached = Clock(self._model.device), self._model.embeddings.hits
        evicted = self._prefixes.evicted
        batch = packing.pack(ordered, chosen, self._prefixes.find(ordered, chosen))
        arena = Arena(self._model.device)
        recall = self._prefixes.recall(batch, arena)
        # A pass whose shapes no compiled code serves runs as it is written: compiling takes longer
        # than any caller waits.
        with nullcontext() if self.recompile else set_stance("eager_on_recompile"):
            scores = self._model(batch, clock, recall.join, arena)
        statistics = Pass(
            tokens=len(batch.input_ids),
            tokens_saved=_saved(ordered, chosen, batch),
            tokens_reused=len(batch.slots),
            tokens_evicted=self._prefixes.evicted - evicted,
            prefix_bytes=self._prefixes.nbytes,
            images=len({item.digest for item in batch.media}),
            images_cached=self._model.embeddings.hits - cached,
            cache_bytes=self._model.embeddings.nbytes,
        )
        return Launched(scores, clock, statistics)

    def collect(self, launched: Launched) -> tuple[Float32Array, Pass]:
        """Wait for a pass and return its scores, and what it was."""
        scores: Float32Array = launched.scores.cpu().numpy()
        vision, language = launched.clock.seconds()
        done = replace(launched.statistics, vision_seconds=vision, language_model_seconds=language)
        if not np.isfinite(scores).all():
            self._prefixes.clear()  # what is not finite may be what it has, and would stay
        return scores, done


def _saved(ordered: SortedBatch, chosen: Sequence[int], batch: PackedBatch) -> int:
    """Tokens that no pass computes because conversations share them."""
    alone = sum(len(ordered.branches[index].keys) for index in chosen)
    return alone - len(batch.input_ids) - len(batch.slots)
