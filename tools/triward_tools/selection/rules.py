"""Rules for scores to keep, which are fitted to all scores, and then judge one at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from triward_tools.selection.limits import Floats, Limits, Numbers, finite_scores, lengths_of

SIDES = ("low", "high", "both")

# A normal distribution's median absolute deviation is 0.6745 sigma, its mean absolute deviation
# sqrt(2 / pi) sigma.
_MAD_OF_SIGMA = 0.6745
_MEAN_OF_SIGMA = math.sqrt(2 / math.pi)

# With fewer a median absolute deviation says little of what is usual.
_SMALLEST = 10


class Rule(Protocol):
    """Turns all scores into limits."""

    def fit(self, scores: Numbers, lengths: Numbers = ()) -> Limits:
        """Return the limits for scores [n] of responses with lengths [n] in characters."""


@dataclass(frozen=True)
class Threshold:
    """Keeps scores from `minimum` to `maximum`; None is no limit."""

    minimum: float | None = None
    maximum: float | None = None

    def __post_init__(self) -> None:
        """Check that some score can be kept."""
        for name in ("minimum", "maximum"):
            value = getattr(self, name)
            if value is not None and math.isnan(value):
                raise ValueError(f"{name} must be a number, got {value}")
        if None not in (self.minimum, self.maximum) and self._low > self._high:
            raise ValueError(f"minimum {self.minimum} is above maximum {self.maximum}")

    @property
    def _low(self) -> float:
        return -math.inf if self.minimum is None else float(self.minimum)

    @property
    def _high(self) -> float:
        return math.inf if self.maximum is None else float(self.maximum)

    def fit(self, scores: Numbers, lengths: Numbers = ()) -> Limits:
        """Return the limits, which do not depend on the scores."""
        return Limits((), (self._low,), (self._high,))


@dataclass(frozen=True)
class Quantile:
    """Keeps scores from the quantile `low` to the quantile `high` of all scores.

    Quantiles are between 0 and 1, interpolated as numpy's default does.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        """Check the quantiles."""
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(
                f"quantiles must be 0 <= low <= high <= 1, got {self.low}, {self.high}"
            )

    def fit(self, scores: Numbers, lengths: Numbers = ()) -> Limits:
        """Return the two quantiles as limits."""
        low, high = np.quantile(_some(scores), [self.low, self.high])
        return Limits((), (float(low),), (float(high),))


@dataclass(frozen=True)
class RobustOutliers:
    """Drops scores whose modified z-score is beyond `limit`.

    That is M = 0.6745 (x - median) / MAD, with the median absolute deviation MAD, and 3.5 as the
    limit: Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993. If more than half of the
    scores are equal, MAD is 0, and the mean absolute deviation from the median takes its place:
    M = (x - median) / (1.2533 MeanAD), which is the same for a normal distribution.

    Attributes:
        limit: above 0.
        side: which outliers are dropped: "low", "high" or "both".
    """

    limit: float = 3.5
    side: str = "both"

    def __post_init__(self) -> None:
        """Check limit and side."""
        _check_outliers(self.limit, self.side)

    def fit(self, scores: Numbers, lengths: Numbers = ()) -> Limits:
        """Return the scores whose M is -limit and limit."""
        low, high = _robust(_some(scores), self.limit, self.side)
        return Limits((), (low,), (high,))


@dataclass(frozen=True)
class LengthConditioned:
    """`RobustOutliers` among responses of like length: long answers are compared with long ones.

    The responses are cut by length into ranges that hold about equally many. Responses of one
    length are in one range. A range with fewer than 10 is joined to the one before it, the first
    one to the one behind it.

    Attributes:
        limit: see `RobustOutliers`.
        bins: how many ranges, if there are responses and lengths enough.
        side: see `RobustOutliers`.
    """

    limit: float = 3.5
    bins: int = 10
    side: str = "both"

    def __post_init__(self) -> None:
        """Check the numbers."""
        _check_outliers(self.limit, self.side)
        if self.bins < 1:
            raise ValueError(f"bins must be at least 1, got {self.bins}")

    def fit(self, scores: Numbers, lengths: Numbers = ()) -> Limits:
        """Limits for each range.

        Raises:
            ValueError: there are fewer than 10 responses.
        """
        found = _some(scores)
        if len(found) < _SMALLEST:
            raise ValueError(
                f"there are {len(found)} scores, ranges of length need at least {_SMALLEST}"
            )
        counted = lengths_of(found, lengths, (1.0,))
        edges = _edges(counted, self.bins)
        place = np.searchsorted(edges, counted, side="right")
        pairs = [
            _robust(found[place == each], self.limit, self.side) for each in range(len(edges) + 1)
        ]
        return Limits(edges, tuple(low for low, _ in pairs), tuple(high for _, high in pairs))


def _some(scores: Numbers) -> Floats:
    found = finite_scores(scores)
    if not len(found):
        raise ValueError("there are no scores to fit a rule to")
    return found


def _check_outliers(limit: float, side: str) -> None:
    if not 0 < limit < math.inf:
        raise ValueError(f"limit must be above 0, got {limit}")
    if side not in SIDES:
        raise ValueError(f"side must be one of {', '.join(SIDES)}, got {side!r}")


def _robust(scores: Floats, limit: float, side: str) -> tuple[float, float]:
    median = float(np.median(scores))
    away = np.abs(scores - median)
    sigma = float(np.median(away)) / _MAD_OF_SIGMA or float(np.mean(away)) / _MEAN_OF_SIGMA
    low = -math.inf if side == "high" else median - limit * sigma
    high = math.inf if side == "low" else median + limit * sigma
    return low, high


def _edges(lengths: Floats, bins: int) -> tuple[float, ...]:
    """Return where the ranges behind the first one begin."""
    ordered = np.sort(lengths)
    wanted = sorted({float(ordered[len(ordered) * each // bins]) for each in range(1, bins)})
    edges: list[float] = []
    start = 0  # of the range that is being filled
    for edge in wanted:
        here = int(np.searchsorted(ordered, edge, side="left"))
        if here - start >= _SMALLEST:
            edges.append(edge)
            start = here
    if edges and len(ordered) - start < _SMALLEST:
        edges.pop()
    return tuple(edges)
