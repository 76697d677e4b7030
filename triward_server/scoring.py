"""`Scorer`: list[Features] -> list[Scores or error]. READ THIS FIRST.

One call of `Scorer.score` is one dynamic batch of Triton:

    check       each request's features fit the model              packing.check
    plant       sort conversations so that they share prefixes     packing.plant
    plan        cut them into micro-batches by predicted cost      plan
    pack        lay a micro-batch's tree out in one row            packing.pack
    forward     encode its images, run the row, read the head      backbone.RewardModel
    hand back   scores to their requests; NaN is an error

A request that fails gets its error in its own place; its neighbours are scored.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from . import packing
from .checkpoint import load_model
from .config import ForwardConfig
from .errors import Cancelled, ForwardError, NonFiniteScore, TriwardError, Unavailable
from .packing import Cost, Forest, Geometry
from .schema import Features, Float32Array, Scores

logger = logging.getLogger(__name__)


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
            checkpoint,
            getattr(torch, config.dtype),
            torch.device(config.device),
            config.deterministic,
            config.embedding_cache_bytes,
        )

    @property
    def geometry(self) -> Geometry:
        """Token ids and sizes of the model."""
        return self._model.geometry

    def score(
        self, batch: Sequence[Features], is_cancelled: Callable[[int], bool] = lambda index: False
    ) -> list[Scores | TriwardError]:
        """Score every conversation of every request.

        Args:
            batch: requests, of one or many callers.
            is_cancelled: whether the caller of a request has given up; asked between
                micro-batches.

        Returns:
            For each request its scores, in the order of its responses, or what is wrong with it.
        """
        errors: dict[int, TriwardError] = {}
        for index, features in enumerate(batch):
            try:
                packing.check(features, self.geometry)
            except TriwardError as error:
                errors[index] = error
        valid = {index: item for index, item in enumerate(batch) if index not in errors}
        rewards = [np.full(len(item.response_ids), np.nan, np.float32) for item in batch]
        forest = packing.plant(valid, self.geometry, self._config.deterministic)
        for chosen in plan(forest, self.geometry, self._model.cost, self._config):
            callers = {forest.branches[i].request for i in chosen} - errors.keys()
            gone = {caller for caller in callers if is_cancelled(caller)}
            errors |= {caller: Cancelled("the caller has cancelled") for caller in gone}
            needed = [i for i in chosen if forest.branches[i].request not in errors]
            for i, score in zip(needed, self._score_apart(forest, needed), strict=True):
                branch = forest.branches[i]
                if isinstance(score, TriwardError):
                    errors[branch.request] = score
                else:
                    rewards[branch.request][branch.response] = score
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

    def _score_apart(self, forest: Forest, chosen: Sequence[int]) -> list[float | TriwardError]:
        """Run one forward pass; if it fails, halve it until the failure stands alone."""
        if not chosen:
            return []
        try:
            return list(self._forward(forest, chosen))
        except Exception as error:
            if len(chosen) == 1:
                return [_failure(error, len(forest.branches[chosen[0]].keys))]
        # Outside the handler: the traceback would keep the failed pass's tensors in memory.
        middle = len(chosen) // 2
        halves = chosen[:middle], chosen[middle:]
        return [score for half in halves for score in self._score_apart(forest, half)]

    def _forward(self, forest: Forest, chosen: Sequence[int]) -> Float32Array:
        scores: Float32Array = self._model(packing.pack(forest, chosen)).cpu().numpy()
        return scores


def plan(forest: Forest, geometry: Geometry, cost: Cost, config: ForwardConfig) -> list[list[int]]:
    """Cut a forest into micro-batches within the budgets of tokens, patches and FLOPs.

    A branch costs what it does not share with the one before it. One that exceeds a budget by
    itself runs alone. An image that is shown in several micro-batches counts in each.

    Returns:
        Indices of branches, in order.
    """
    micro_batches: list[list[int]] = []
    budget = (config.max_batch_tokens, config.max_batch_patches, config.max_batch_tflop * 1e12)
    used = np.zeros(3)
    shown: frozenset[int] = frozenset()
    for index, branch in enumerate(forest.branches):
        extra = _price(forest, index, int(forest.shared[index]), shown, geometry, cost)
        if micro_batches and (used + extra <= budget).all():
            micro_batches[-1].append(index)
        else:
            micro_batches.append([index])
            used, shown = np.zeros(3), frozenset()
            extra = _price(forest, index, 0, shown, geometry, cost)
        used += extra
        shown |= branch.images
    return micro_batches


def _price(
    forest: Forest,
    index: int,
    shared: int,
    shown: frozenset[int],
    geometry: Geometry,
    cost: Cost,
) -> NDArray[np.float64]:
    """Tokens, patches and FLOPs of a branch behind `shared` tokens and the images in `shown`."""
    branch = forest.branches[index]
    length = len(branch.keys)
    images = (forest.images[i].pixels for i in branch.images - shown)
    patches = sum(geometry.grid(pixels).patches for pixels in images)
    pairs = (length * (length + 1) - shared * (shared + 1)) // 2
    flops = cost.per_token * (length - shared) + cost.per_pair * pairs + cost.per_patch * patches
    return np.array([length - shared, patches, flops], np.float64)


def _failure(error: Exception, tokens: int) -> TriwardError:
    if isinstance(error, torch.OutOfMemoryError):
        return Unavailable(f"a conversation of {tokens} tokens exceeds the device's free memory")
    logger.error("a forward pass failed", exc_info=error)
    return ForwardError(f"the forward pass failed: {type(error).__name__}: {error}")


def _finish(features: Features, rewards: Float32Array) -> Scores | TriwardError:
    finite = np.isfinite(rewards)
    if not finite.all():
        index = int(finite.argmin())
        return NonFiniteScore(f"responses[{index}]: the model's score is {rewards[index]}")
    return Scores(rewards, np.array(features.token_counts, dtype=np.int32))
