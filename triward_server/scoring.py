"""`Scorer`: list[Features] -> list[Scores or error]. READ THIS FIRST.

One call of `Scorer.score` is one dynamic batch of Triton:

    check       each request's features fit the model              packing.check
    plan        cut the batch into micro-batches by tokens         plan
    pack        lay a micro-batch out in one padding-free row      packing.pack
    forward     encode its images, run the row, read the head      backbone.RewardModel
    hand back   scores to their requests; NaN is an error

A request that fails gets its error in its own place; its neighbours are scored.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from . import packing
from .checkpoint import load_model
from .config import ForwardConfig
from .errors import ForwardError, NonFiniteScore, TriwardError
from .packing import Geometry
from .schema import Features, Float32Array, Scores

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """Some of a request's conversations: `features` of responses `first`, `first + 1`, …"""

    request: int
    first: int
    features: Features


class Scorer:
    """Scores batches of requests with one model.

    Args:
        checkpoint: folder with config, processor and weights.
        config: dtype, device and budgets.

    Raises:
        CheckpointError: the checkpoint is not complete and exact.
    """

    def __init__(self, checkpoint: Path, config: ForwardConfig) -> None:
        self._config = config
        if config.threads:
            torch.set_num_threads(config.threads)
        self._model = load_model(
            checkpoint, getattr(torch, config.dtype), torch.device(config.device)
        )

    @property
    def geometry(self) -> Geometry:
        """Token ids and sizes of the model."""
        return self._model.geometry

    def score(self, batch: Sequence[Features]) -> list[Scores | TriwardError]:
        """Score every conversation of every request.

        Args:
            batch: requests, of one or many callers.

        Returns:
            For each request its scores, in the order of its responses, or what is wrong with it.
        """
        errors: dict[int, TriwardError] = {}
        for index, features in enumerate(batch):
            try:
                packing.check(features, self.geometry)
            except TriwardError as error:
                errors[index] = error
        rewards = [np.full(len(item.response_ids), np.nan, np.float32) for item in batch]
        valid = [index for index in range(len(batch)) if index not in errors]
        for micro_batch in plan({i: batch[i] for i in valid}, self.geometry, self._config):
            for work, scores in self._score_apart(micro_batch):
                if isinstance(scores, TriwardError):
                    errors[work.request] = scores
                else:
                    rewards[work.request][work.first : work.first + len(scores)] = scores
        return [
            errors.get(index) or _finish(features, rewards[index])
            for index, features in enumerate(batch)
        ]

    def warm_up(self) -> None:
        """Run text and images once, so that the first request does not pay for set-up.

        Raises:
            TriwardError: the model cannot score here, so it must not become ready.
        """
        unit = self.geometry.patch_size * self.geometry.merge_size
        image = np.zeros((4 * unit, 4 * unit, 3), np.uint8)
        placeholders = np.full(16, self.geometry.image_token_id, np.int32)
        text = np.zeros(64, np.int32)
        prompt = np.concatenate([text, placeholders, text])
        for result in self.score(
            [Features(prompt, (text, text), (image,)), Features(text, (text,))]
        ):
            if isinstance(result, TriwardError):
                raise result

    def _score_apart(self, works: Sequence[Work]) -> list[tuple[Work, Float32Array | TriwardError]]:
        """Run one forward pass; if it fails, halve it until the failure stands alone."""
        try:
            scores = self._forward([work.features for work in works])
        except Exception as error:
            if len(works) > 1:
                middle = len(works) // 2
                return [*self._score_apart(works[:middle]), *self._score_apart(works[middle:])]
            logger.exception("a forward pass failed")
            reason = f"{type(error).__name__}: {error}"
            return [(works[0], ForwardError(f"the forward pass failed: {reason}"))]
        counts = [len(work.features.response_ids) for work in works]
        return list(zip(works, np.split(scores, np.cumsum(counts)[:-1]), strict=True))

    def _forward(self, features: Sequence[Features]) -> Float32Array:
        scores: Float32Array = self._model(packing.pack(features, self.geometry)).cpu().numpy()
        return scores


def plan(
    requests: dict[int, Features], geometry: Geometry, config: ForwardConfig
) -> list[list[Work]]:
    """Cut requests into micro-batches within the budgets of tokens and vision patches.

    Conversations keep their order. One that exceeds a budget by itself runs alone. A request
    whose responses are spread over several micro-batches has its images encoded in each.
    """
    micro_batches: list[list[Work]] = []
    tokens = patches = 0

    def close(index: int, first: int, last: int) -> None:
        if last > first:
            part = replace(features, response_ids=features.response_ids[first:last])
            micro_batches[-1].append(Work(index, first, part))

    for index, features in requests.items():
        image_patches = sum(geometry.grid(image).patches for image in features.images)
        first = 0
        patches += image_patches
        for position, count in enumerate(features.token_counts):
            tokens += count
            fits = tokens <= config.max_batch_tokens and patches <= config.max_batch_patches
            if not micro_batches or not fits:
                if micro_batches:
                    close(index, first, position)
                micro_batches.append([])
                first, tokens, patches = position, count, image_patches
        close(index, first, len(features.response_ids))
    return [micro_batch for micro_batch in micro_batches if micro_batch]


def _finish(features: Features, rewards: Float32Array) -> Scores | TriwardError:
    finite = np.isfinite(rewards)
    if not finite.all():
        index = int(finite.argmin())
        return NonFiniteScore(f"responses[{index}]: the model's score is {rewards[index]}")
    return Scores(rewards, np.array(features.token_counts, dtype=np.int32))
