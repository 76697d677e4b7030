"""`Scorer`: list[Features] -> list[Scores or error]. READ THIS FIRST.

One call of `Scorer.score` is one dynamic batch of Triton:

    check       each request's features fit the model              geometry.check
    sort        conversations that begin alike become neighbours   packing.sort_batch
    recall      find what earlier batches have computed            prefix_cache.PrefixCache
    plan        cut them into micro-batches by predicted cost      planning.plan
    pack        lay a micro-batch's tree out in one row            packing.pack
    launch      hand it to the device, and prepare the next one    passes.Passes
    forward     encode its media, run the row, read the head      backbone.RewardModel
    hand back   scores to their requests; NaN is an error

A request that fails gets its error in its own place; its neighbours are scored.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from traceback import clear_frames

import numpy as np
import torch

from ..config import ForwardConfig, token_limit
from ..device import select
from ..errors import (
    Cancelled,
    DeviceFault,
    ForwardError,
    NonFiniteScore,
    TriwardError,
    Unavailable,
    is_device_fault,
    is_out_of_memory,
)
from ..schema import Features, Float32Array, Grid, Scores, UInt8Array
from . import packing
from .backbone import Encoder, RewardModel
from .checkpoint import load_model
from .float8 import activations, check_float8
from .geometry import Geometry, check
from .packing import SortedBatch
from .passes import Launched, Observer, Pass, Passes
from .planning import Cost, plan
from .prefix_cache import PrefixCache, prefix_bytes

logger = logging.getLogger(__name__)

# Sizes of the passes that warm up: odd ones, so that no compiler takes the number of rows for a
# dimension of the model that happens to be as large.
_WARM_UP_TOKENS = (23, 131, 1031, 8209)
_WARM_UP_LENGTH = 4099  # of one conversation in them
_CPU_TFLOP = 0.01  # of the language model in one such pass on a CPU
_GIVEN_UP = "the caller has cancelled, or its timeout has passed"


@dataclass(frozen=True)
class Prepared:
    """A batch as far as it gets without the device and the prefix cache.

    Attributes:
        batch: its requests.
        errors: what is wrong with some of them, by index.
        ordered: the conversations of the others.
    """

    batch: Sequence[Features]
    errors: dict[int, TriwardError]
    ordered: SortedBatch


@dataclass(frozen=True)
class _Flight:
    """A micro-batch, and its pass or why that could not be launched."""

    chosen: Sequence[int]
    launched: Launched | Exception


class Scorer:
    """Scores batches of requests with one model.

    Args:
        checkpoint: folder with config, processor and weights.
        config: dtype, device and budgets.
        encoder: what encodes images where `config.vision` is not the model's own tower.
        model: the checkpoint's, if it is loaded already.

    Raises:
        CheckpointError: the checkpoint is not complete and exact.
        ConfigError: the model has fewer positions than `max_tokens`, or the GPU no float8.
    """

    def __init__(
        self,
        checkpoint: Path,
        config: ForwardConfig,
        encoder: Encoder | None = None,
        model: RewardModel | None = None,
    ) -> None:
        self._config = config
        self._sees = encoder is None
        if config.threads:
            torch.set_num_threads(config.threads)
        device, float8 = select(config.device), config.dtype == "float8"
        if float8:
            check_float8(device)
        self._model = model or load_model(
            checkpoint,
            activations(config.dtype),
            device,
            config.deterministic,
            config.embedding_cache_bytes,
            encoder,
            float8,
        )
        self._prefixes = PrefixCache(
            prefix_bytes(config, self._model.device),
            self._model.language_model.decoder,
            activations(config.dtype),
            self._model.device,
            config.deterministic,
        )
        self._passes = Passes(self._model, self._prefixes)
        geometry = self._model.geometry
        self._geometry = replace(
            geometry, max_tokens=token_limit(config.max_tokens, geometry.max_tokens)
        )

    @property
    def geometry(self) -> Geometry:
        """Token ids and sizes of the model, `max_tokens` as configured."""
        return self._geometry

    @property
    def cost(self) -> Cost:
        """Cost of a token, a pair and a patch in this model."""
        return self._model.cost

    def prepare(self, batch: Sequence[Features]) -> Prepared:
        """Check requests, find equal media and sort the conversations.

        One thread may prepare a batch while another one scores the batch before it.
        """
        errors: dict[int, TriwardError] = {}
        for index, features in enumerate(batch):
            try:
                check(features, self.geometry, self._config)
            except TriwardError as error:
                errors[index] = error
        valid = {index: item for index, item in enumerate(batch) if index not in errors}
        return Prepared(batch, errors, self._sort(valid, self.geometry))

    def score(
        self,
        batch: Sequence[Features],
        is_cancelled: Callable[[int], bool] = lambda index: False,
        observe: Observer = lambda done: None,
    ) -> list[Scores | TriwardError]:
        """Prepare a batch and score it."""
        return self.score_prepared(self.prepare(batch), is_cancelled, observe)

    def score_prepared(
        self,
        prepared: Prepared,
        is_cancelled: Callable[[int], bool] = lambda index: False,
        observe: Observer = lambda done: None,
        launched: Callable[[], None] = lambda: None,
    ) -> list[Scores | TriwardError]:
        """Score every conversation of every request.

        Args:
            prepared: requests, of one or many callers.
            is_cancelled: whether the caller of a request has given up; asked between
                micro-batches.
            observe: called after every forward pass.
            launched: called when the last pass of the plan is in the device's queue.

        Returns:
            For each request its scores, in the order of its responses, or what is wrong with it.

        Raises:
            DeviceFault: the process must end; nothing runs on its device any more.
        """
        batch, errors = prepared.batch, dict(prepared.errors)
        rewards = [np.full(len(item.response_ids), np.nan, np.float32) for item in batch]
        ordered = self._prefixes.begin(prepared.ordered)

        def micro_batches() -> Iterator[list[int]]:
            for chosen in plan(ordered, self._model.cost, self._config):
                callers = {ordered.branches[i].request for i in chosen} - errors.keys()
                for caller in filter(is_cancelled, callers):
                    errors[caller] = Cancelled(_GIVEN_UP)
                yield [i for i in chosen if ordered.branches[i].request not in errors]
            launched()

        for i, score in self._run(ordered, filter(None, micro_batches()), observe):
            branch = ordered.branches[i]
            if isinstance(score, TriwardError):
                errors[branch.request] = score
            else:
                rewards[branch.request][branch.response] = score
        return [
            errors.get(index) or _finish(features, rewards[index])
            for index, features in enumerate(batch)
        ]

    def warm_up(self) -> None:
        """Run passes of shrinking size, so that the first requests are as fast as later ones.

        The largest comes first: what a compiler or a library chooses by the sizes that it meets
        suits that one, and memory is taken in pieces that smaller passes fit into. On CUDA it has
        `max_batch_tokens` of text, so that a device with too little memory for them shows here; on
        a CPU, where nothing is tuned by size, it is one that takes moments. If the model is
        compiled, this is where; nothing is compiled after it.

        Raises:
            TriwardError: the model cannot score here, so it must not become ready.
        """
        if self._config.compile:
            self._model.compile_layers()
        largest = self._config.max_batch_tokens
        geometry = replace(self.geometry, padding_id=None)  # every token counts
        # Triton lets no model ask another one before it is ready itself: text alone then.
        sees = self._sees and geometry.image_token_id is not None
        passes = [(size, sees) for size in reversed(_WARM_UP_TOKENS) if size < largest]
        for tokens, images in [(max(largest, _WARM_UP_TOKENS[0]), False), *passes]:
            flops = self.cost.per_token * tokens
            if self._model.device.type == "cpu" and flops > _CPU_TFLOP * 1e12:
                continue
            batch = warm_up_requests(tokens, geometry, images)
            self._warm_up_with(self._sort(dict(enumerate(batch)), geometry))
        # One row, which compiled code treats apart.
        single = Features(np.empty(0, np.int32), (np.zeros(1, np.int32),))
        self._warm_up_with(self._sort({0: single}, geometry))
        self._model.embeddings.clear()
        self._prefixes.clear()
        self._passes.recompile = not self._config.compile

    def _sort(self, batch: dict[int, Features], geometry: Geometry) -> SortedBatch:
        deterministic = self._config.deterministic
        return packing.sort_batch(batch, geometry, deterministic, self._prefixes.numbers)

    def _warm_up_with(self, batch: SortedBatch) -> None:
        """Run a batch's micro-batches whole: one that fails is not halved here."""
        ordered = self._prefixes.begin(batch)
        for chosen in plan(ordered, self._model.cost, self._config):
            tokens = len(packing.pack(ordered, chosen).input_ids)
            try:
                scores, _ = self._passes.collect(self._passes.launch(ordered, chosen))
            except Exception as error:
                if is_out_of_memory(error):
                    raise Unavailable(
                        f"a pass of {tokens} tokens, which max_batch_tokens and max_batch_bytes "
                        f"allow, exceeds the device's free memory: {error}"
                    ) from None
                if is_device_fault(error):
                    raise DeviceFault(error) from error
                raise _failure(error, tokens) from error
            if not np.isfinite(scores).all():
                raise NonFiniteScore(f"warming up: a pass of {tokens} tokens scores {scores}")

    def _run(
        self, ordered: SortedBatch, micro_batches: Iterable[Sequence[int]], observe: Observer
    ) -> Iterator[tuple[int, float | TriwardError]]:
        """Run micro-batches and yield each branch's index and score.

        Each is prepared and launched while the device computes the one before it.
        """
        before: _Flight | None = None
        for chosen in micro_batches:
            flight = self._begin(ordered, chosen)
            if before and not (yield from self._end(ordered, before, observe)):
                # It may have found in the prefix cache what should not be there.
                flight = self._begin(ordered, chosen)
            before = flight
            # A CPU is done by now; callers and the watchdog learn of each pass when it ends.
            if isinstance(flight.launched, Exception) or flight.launched.is_done:
                yield from self._end(ordered, flight, observe)
                before = None
        if before:
            yield from self._end(ordered, before, observe)

    def _begin(self, ordered: SortedBatch, chosen: Sequence[int]) -> _Flight:
        try:
            return _Flight(chosen, self._passes.launch(ordered, chosen))
        except Exception as error:
            clear_frames(error.__traceback__)  # they hold the failed pass's tensors
            return _Flight(chosen, error)

    def _end(
        self, ordered: SortedBatch, flight: _Flight, observe: Observer
    ) -> Generator[tuple[int, float | TriwardError], None, bool]:
        """Wait for a pass and yield its scores; if it fails, halve it until the failure is alone.

        Returns whether what it has left in the prefix cache can stay. On a device that faulted
        every further pass would fail, so none is tried.
        """
        try:
            if isinstance(flight.launched, Exception):
                raise flight.launched
            scores, done = self._passes.collect(flight.launched)
        except Exception as error:
            if is_device_fault(error):
                raise DeviceFault(error) from error
            self._prefixes.clear()
            without_memory = is_out_of_memory(error)
            again = without_memory and self._prefixes.shrink()
            if len(flight.chosen) == 1 and not again:
                (only,) = flight.chosen
                yield only, _failure(error, len(ordered.branches[only].keys))
                return False
            if without_memory:
                observe(Pass(out_of_memory=True))
            clear_frames(error.__traceback__)
        else:
            observe(done)
            yield from zip(flight.chosen, scores.tolist(), strict=True)
            return bool(np.isfinite(scores).all())
        middle = len(flight.chosen) // 2
        halves = [flight.chosen] if again else [flight.chosen[:middle], flight.chosen[middle:]]
        yield from self._run(ordered, halves, observe)
        return False


def warm_up_requests(tokens: int, geometry: Geometry, images: bool) -> list[Features]:
    """Make requests of `tokens` tokens together, or a few less, three responses each.

    Args:
        tokens: at least the smallest of `_WARM_UP_TOKENS`.
        geometry: the model's.
        images: whether half of the tokens are images'.
    """
    requests: list[Features] = []
    while tokens >= _WARM_UP_TOKENS[0]:
        length = min(tokens, geometry.max_tokens, _WARM_UP_LENGTH)
        grid = geometry.largest(length // 2) if images else None
        # Another first token and other pixels for each, so that requests share nothing.
        first = len(requests)
        shown = () if grid is None else (_plain_image(grid, first % 256, geometry),)
        count = 0 if grid is None else geometry.tokens(grid)
        pads = np.full(count, geometry.image_token_id or 0, np.int32)
        text = np.full(max(1, (length - len(pads)) // 2), first, np.int32)
        rest = length - len(pads) - len(text)
        lengths = (rest - 2 * (rest // 3), rest // 3, rest // 3)
        answers = tuple(np.full(n, index, np.int32) for index, n in enumerate(lengths))
        requests.append(Features(np.concatenate([text, pads]), answers, shown))
        tokens -= length
    return requests


def _plain_image(grid: Grid, value: int, geometry: Geometry) -> UInt8Array:
    sides = (grid.h * geometry.patch_size, grid.w * geometry.patch_size)
    return np.full((*sides, 3), value, np.uint8)


def _failure(error: Exception, tokens: int) -> TriwardError:
    if is_out_of_memory(error):
        return Unavailable(f"a conversation of {tokens} tokens exceeds the device's free memory")
    if isinstance(error, TriwardError):
        return error
    logger.error("a forward pass failed", exc_info=error)
    return ForwardError(f"the forward pass failed: {type(error).__name__}: {error}")


def _finish(features: Features, rewards: Float32Array) -> Scores | TriwardError:
    finite = np.isfinite(rewards)
    if not finite.all():
        index = int(finite.argmin())
        return NonFiniteScore(f"responses[{index}]: the model's score is {rewards[index]}")
    return Scores(rewards, np.array(features.token_counts, dtype=np.int32))
