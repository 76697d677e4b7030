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
            try:
                scores = self._forward([work.features for work in micro_batch])
            except Exception as error:
                logger.exception("a forward pass failed")
                failure = ForwardError(f"the forward pass failed: {type(error).__name__}: {error}")
                errors |= {work.request: failure for work in micro_batch}
                continue
            for work in micro_batch:
                count = len(work.features.response_ids)
                rewards[work.request][work.first : work.first + count] = scores[:count]
                scores = scores[count:]
        return [
            errors.get(index) or _finish(features, rewards[index])
            for index, features in enumerate(batch)
        ]

    def warm_up(self) -> None:
        """Run text and images once, so that the first request does not pay for set-up."""
        unit = self.geometry.patch_size * self.geometry.merge_size
        image = np.zeros((4 * unit, 4 * unit, 3), np.uint8)
        placeholders = np.full(16, self.geometry.image_token_id, np.int32)
        text = np.zeros(64, np.int32)
        prompt = np.concatenate([text, placeholders, text])
        result = self.score([Features(prompt, (text, text), (image,)), Features(text, (text,))])
        logger.info("warmed up: %s", result)

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
    for index, features in requests.items():
        image_patches = sum(geometry.grid(image).patches for image in features.images)
        for position, count in enumerate(features.token_counts):
            current = micro_batches[-1] if micro_batches else []
            joins = bool(current) and current[-1].request == index
            extra_patches = 0 if joins else image_patches
            fits = (
                tokens + count <= config.max_batch_tokens
                and patches + extra_patches <= config.max_batch_patches
            )
            if not current or not fits:
                micro_batches.append(current := [])
                tokens = patches = 0
                joins, extra_patches = False, image_patches
            tokens += count
            patches += extra_patches
            response = (features.response_ids[position],)
            if joins:
                last = current[-1]
                grown = replace(last.features, response_ids=last.features.response_ids + response)
                current[-1] = replace(last, features=grown)
            else:
                current.append(Work(index, position, replace(features, response_ids=response)))
    return micro_batches


def _finish(features: Features, rewards: Float32Array) -> Scores | TriwardError:
    finite = np.isfinite(rewards)
    if not finite.all():
        index = int(finite.argmin())
        return NonFiniteScore(f"responses[{index}]: the model's score is {rewards[index]}")
    return Scores(rewards, np.array(features.token_counts, dtype=np.int32))
