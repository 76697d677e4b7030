"""Limits of scores, which a fitted rule keeps; and the numbers that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Numbers = Sequence[float] | Sequence[int] | NDArray[Any]


@dataclass(frozen=True)
class Limits:
    """Scores that a fitted rule keeps: from `low` to `high`, for each range of lengths.

    Attributes:
        edges: lengths at which the second, third, ... range begins; none for one range.
        low: of each range, the lowest score that is kept.
        high: of each range, the highest one.
    """

    edges: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def keep(self, scores: Numbers, lengths: Numbers = ()) -> NDArray[np.bool_]:
        """Return True for each score that is kept; several ranges need lengths."""
        found = finite_scores(scores)
        place = np.searchsorted(self.edges, lengths_of(found, lengths, self.edges), side="right")
        inside = (found >= np.asarray(self.low)[place]) & (found <= np.asarray(self.high)[place])
        return np.asarray(inside, dtype=np.bool_)

    def reason(self, score: float, length: float = 0) -> str:
        """Return why a score is dropped; "" if it is kept."""
        side, place = self.side(score, length), self._place(length)
        if not side:
            return ""
        limit = self.low[place] if side == "below" else self.high[place]
        return f"score {score:.6g} is {side} {limit:.6g}{self._range(place)}"

    def side(self, score: float, length: float = 0) -> str:
        """Return "below" or "above" for a score outside the limits; "" if it is kept."""
        place = self._place(length)
        if score < self.low[place]:
            return "below"
        return "above" if score > self.high[place] else ""

    def _place(self, length: float) -> int:
        return int(np.searchsorted(self.edges, length, side="right"))

    def _range(self, place: int) -> str:
        if not self.edges:
            return ""
        first = self.edges[place - 1] if place else 0
        last = f" to {self.edges[place] - 1:.0f}" if place < len(self.edges) else " or more"
        return f", of responses with {first:.0f}{last} characters"


def finite_scores(scores: Numbers) -> Floats:
    """Scores as an array [n].

    Raises:
        ValueError: one is not finite, or they are no list of numbers.
    """
    found = np.asarray(scores, dtype=np.float64)
    if found.ndim != 1:
        raise ValueError(f"scores must be a list of numbers, got an array of shape {found.shape}")
    wrong = np.flatnonzero(~np.isfinite(found))
    if len(wrong):
        raise ValueError(f"scores[{wrong[0]}]: must be finite, got {found[wrong[0]]}")
    return found


def lengths_of(scores: Floats, lengths: Numbers, edges: tuple[float, ...]) -> Floats:
    """Return the lengths as an array; any will do where there is one range only."""
    if not edges and not len(lengths):
        return np.zeros(len(scores))
    found = np.asarray(lengths, dtype=np.float64)
    if found.shape != scores.shape:
        raise ValueError(f"{len(scores)} scores need as many lengths, got {len(found)}")
    return found
