"""Mean and standard deviation of rewards that come in over time."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from triward.errors import InvalidRequest

Array = npt.NDArray[np.float64]
Rewards = Sequence[float] | npt.NDArray[Any]

EPS = 1e-4  # TRL's


def finite_rewards(rewards: Rewards, place: str) -> Array:
    """Rewards as float64 [N].

    Raises:
        InvalidRequest: one is not finite in float32, in which scores are; the message names it.
    """
    try:
        given = np.asarray(as_list(rewards))
        if given.dtype.kind in "US":  # numpy would read numbers from texts
            raise TypeError(f"got the text {given.flat[0]!r}")
        values = given.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"{place}: must be numbers: {error}") from None
    if values.ndim != 1:
        raise InvalidRequest(f"{place}: must have one dimension, got the shape {values.shape}")
    wrong = ~(np.abs(values) <= np.finfo(np.float32).max)
    if wrong.any():
        index = int(np.argmax(wrong))
        raise InvalidRequest(f"{place}[{index}]: {rewards[index]} is not finite in float32")
    return values


def as_list(rewards: Any) -> Any:
    """Return a tensor's numbers as a list; anything else as it is."""
    # numpy knows no bfloat16, and torch's own conversion no device but the CPU.
    return rewards.tolist() if hasattr(rewards, "tolist") else rewards


class RunningMoments:
    """Mean and standard deviation of all rewards so far. Threads may share it.

    Batches are merged as in Chan, Golub and LeVeque 1983, "Algorithms for computing the sample
    variance", so that it does not matter how rewards are cut into batches or processes.

    A pickled copy goes its own way: processes have to `merge`, or each knows its own rewards.

    Attributes:
        count: of rewards.
        mean: of them.
        m2: sum of their squared deviations from it.
    """

    count: int
    mean: float
    m2: float

    def __init__(self, count: int = 0, mean: float = 0.0, m2: float = 0.0) -> None:  # noqa: D107
        self._lock = threading.Lock()
        self.load_state_dict({"count": count, "mean": mean, "m2": m2})

    @property
    def std(self) -> float:
        """With n - 1; 0 of fewer than two."""
        with self._lock:
            return math.sqrt(self.m2 / max(self.count - 1, 1))

    def update(self, rewards: Rewards) -> None:
        """Take rewards [N] in; all of them, or none if one is not finite (`InvalidRequest`)."""
        values = finite_rewards(rewards, "rewards")
        if len(values):
            # Off the first: equal rewards have a deviation of exactly 0, which is not divided by.
            shifted = values - values[0]
            mean = float(shifted.mean())
            squares = float(((shifted - mean) ** 2).sum())
            self._merge(len(values), float(values[0]) + mean, squares)

    def merge(self, other: RunningMoments) -> None:
        """Take in what another has seen; it stays as it is."""
        state = other.state_dict()
        if state["count"]:
            self._merge(state["count"], state["mean"], state["m2"])

    def _merge(self, count: int, mean: float, m2: float) -> None:
        with self._lock:
            total = self.count + count
            delta = mean - self.mean
            self.m2 += m2 + delta**2 * (self.count * count / total)
            self.mean += delta * (count / total)
            self.count = total

    def normalise(self, rewards: Rewards, *, center: bool = True, eps: float = EPS) -> Array:
        """(r - mean) / (std + eps), or r / (std + eps); float64 [N].

        While all rewards were equal, or there was but one, nothing is known of their scale, and
        nothing is divided.

        Raises:
            InvalidRequest: a reward is not finite.
            ValueError: no rewards were taken in yet.
        """
        values = finite_rewards(rewards, "rewards")
        seen = RunningMoments(**self.state_dict())  # one moment's, while others update
        if not seen.count:
            raise ValueError("no rewards were taken in yet")
        return (values - (seen.mean if center else 0.0)) / (seen.std + eps if seen.m2 else 1.0)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, and for JSON."""
        with self._lock:
            return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another stopped.

        Raises:
            InvalidRequest: it is not what `state_dict` gave.
        """
        if set(state) != {"count", "mean", "m2"}:
            raise InvalidRequest(f"state: must have count, mean and m2, got {sorted(state)}")
        try:
            count, mean, m2 = state["count"], float(state["mean"]), float(state["m2"])
            whole = int(count)
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidRequest(f"state: must be numbers: {error}") from None
        if count != whole or count < 0 or not math.isfinite(mean) or not 0 <= m2 < math.inf:
            raise InvalidRequest(f"state: {dict(state)} is no count, mean and sum of squares")
        with self._lock:
            self.count, self.mean, self.m2 = whole, mean, m2

    __getstate__ = state_dict

    def __setstate__(self, state: Mapping[str, Any]) -> None:  # noqa: D105
        self.__init__(**state)  # type: ignore[misc]
