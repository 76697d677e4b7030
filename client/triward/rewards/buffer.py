"""A buffer of samples whose advantages did not vanish, drawn by the size of these."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from triward.errors import InvalidRequest
from triward.moments import Array, Rewards, finite_rewards

Sample = TypeVar("Sample")

_STATE = ("samples", "advantages", "added", "now", "generator")


@dataclass(frozen=True)
class Drawn(Generic[Sample]):
    """A sample from the buffer.

    Attributes:
        sample: as it was added.
        advantage: it was added with.
        age: updates since then.
    """

    sample: Sample
    advantage: float
    age: int


class SelectiveSampleBuffer(Generic[Sample]):
    """The selective sample buffer of Skywork R1V2 (arXiv:2504.16656, section 3.3.2).

    It keeps samples with |A| > threshold, and draws them with p ~ |A|^alpha. The paper gives no
    formula, size or age; docs/rewards.md says what was chosen. One thread at a time may use it; it
    can be pickled if its samples can.

    Args:
        capacity: the most samples; beyond that the oldest leave.
        threshold: samples with |A| up to it are not kept; 0 or more.
        alpha: 0 draws all alike, 1 in proportion to |A|.
        max_age: calls of `advance` that a sample outlives; the next one removes it. None for no
            limit.
        seed: of the draws.

    Raises:
        InvalidRequest: one of them is out of its range.
    """

    def __init__(  # noqa: D107 - the class says it
        self,
        capacity: int,
        *,
        threshold: float = 0.0,
        alpha: float = 1.0,
        max_age: int | None = None,
        seed: int = 0,
    ) -> None:
        if capacity < 1:
            raise InvalidRequest(f"capacity: must be at least 1, got {capacity}")
        for name, value in (("threshold", threshold), ("alpha", alpha)):
            if not 0 <= value < math.inf:
                raise InvalidRequest(f"{name}: must be 0 or more and finite, got {value}")
        if max_age is not None and max_age < 1:
            raise InvalidRequest(f"max_age: must be at least 1, got {max_age}")
        self.capacity = capacity
        self.threshold = threshold
        self.alpha = alpha
        self.max_age = max_age
        self._held: deque[tuple[Sample, float, int]] = deque(maxlen=capacity)  # oldest first
        self._now = 0
        self._generator = np.random.default_rng(seed)

    def __len__(self) -> int:  # noqa: D105
        return len(self._held)

    @property
    def probabilities(self) -> Array:
        """Each sample's probability to be the first drawn, oldest first; float64 [len]."""
        if not self._held:
            return np.zeros(0)
        weights = np.exp(self._log_weights())
        return np.asarray(weights / weights.sum(), dtype=np.float64)

    def add(self, samples: Sequence[Sample], advantages: Rewards) -> int:
        """Take in samples of the present update, and return how many were kept.

        Args:
            samples: of any kind.
            advantages: one for each.

        Raises:
            InvalidRequest: their numbers differ, or an advantage is not finite; then none is kept.
        """
        values = finite_rewards(advantages, "advantages")
        if len(values) != len(samples):
            raise InvalidRequest(f"advantages: {len(values)} for {len(samples)} samples")
        large = np.abs(values) > self.threshold
        for place in np.flatnonzero(large):
            self._held.append((samples[place], float(values[place]), self._now))
        return int(large.sum())

    def advance(self) -> None:
        """Begin the next update: each sample is older by one, and those too old leave."""
        self._now += 1
        if self.max_age is not None:
            while self._held and self._now - self._held[0][2] > self.max_age:
                self._held.popleft()

    def draw(self, count: int, *, replace: bool = False) -> list[Drawn[Sample]]:
        """Draw samples, which stay in the buffer.

        Args:
            count: how many.
            replace: draw each from all, so that one may come twice. Without, from those that were
                not drawn yet, by the same weights.

        Raises:
            InvalidRequest: there are not so many.
        """
        least = min(count, 1) if replace else count
        if not 0 <= least <= len(self._held):
            raise InvalidRequest(f"count: {count} of {len(self._held)} samples cannot be drawn")
        if not count:
            return []
        if replace:
            places = self._generator.choice(len(self._held), count, p=self.probabilities)
        else:
            # The first `count` of exponential clocks with the weights as rates: drawn one by one
            # (Efraimidis and Spirakis 2006). In logarithms, which do not overflow.
            clocks = self._generator.standard_exponential(len(self._held))
            places = np.argsort(np.log(clocks) - self._log_weights())[:count]
        found = [self._held[place] for place in places]
        return [Drawn(sample, value, self._now - added) for sample, value, added in found]

    def _log_weights(self) -> Array:
        """Logarithms of |A|^alpha, the largest 0."""
        sizes = np.log(np.abs([value for _, value, _ in self._held]))
        return np.asarray(self.alpha * (sizes - sizes.max(initial=-math.inf)), dtype=np.float64)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: the samples themselves, and where the draws are. No settings."""
        samples, advantages, added = ([each[i] for each in self._held] for i in range(3))
        state = self._generator.bit_generator.state
        found = (samples, advantages, added, self._now, state)
        return dict(zip(_STATE, found, strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another stopped; the next draws are the ones that it would have made.

        Raises:
            InvalidRequest: it is not what `state_dict` gave, or holds what these settings exclude.
        """
        if set(state) != set(_STATE):
            raise InvalidRequest(f"state: must have {', '.join(_STATE)}, got {sorted(state)}")
        samples, added, now = list(state["samples"]), list(state["added"]), int(state["now"])
        values = finite_rewards(state["advantages"], "state['advantages']")
        if not len(samples) == len(values) == len(added) <= self.capacity:
            sizes = f"{len(samples)} samples, {len(values)} advantages and {len(added)} times"
            raise InvalidRequest(f"state: {sizes} do not fit, with a capacity of {self.capacity}")
        if (np.abs(values) <= self.threshold).any():
            raise InvalidRequest(f"state: an advantage is not above the threshold {self.threshold}")
        oldest = now if self.max_age is None else self.max_age
        if sorted(added) != added or any(not 0 <= now - each <= oldest for each in added):
            raise InvalidRequest(f"state: times {added} at {now} do not fit max_age {self.max_age}")
        try:
            self._generator.bit_generator.state = state["generator"]
        except (TypeError, ValueError, KeyError) as error:
            raise InvalidRequest(f"state['generator']: {error}") from None
        held = zip(samples, values.tolist(), added, strict=True)
        self._held = deque(held, maxlen=self.capacity)
        self._now = now
