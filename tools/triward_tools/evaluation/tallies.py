"""Counts of a subset, from which its accuracy and the accuracy's spread follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from triward_tools.evaluation.results import Result

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Tally:
    """Counts of one subset.

    Attributes:
        pairs: how many have scores, at least 1.
        correct: of those, how many are right; a tie is not.
        ties: how many have two equal scores.
    """

    pairs: int
    correct: int
    ties: int

    @property
    def accuracy(self) -> float:
        """From 0 to 1."""
        return self.correct / self.pairs

    @property
    def slack(self) -> float:
        """Distance by which the accuracy can be outside of 0 to 1."""
        return 0.0

    def drawn(self, rng: np.random.Generator, draws: int) -> Floats:
        """Return accuracies of as many pairs, drawn again with replacement; shape (draws,)."""
        return rng.binomial(self.pairs, self.accuracy, draws) / self.pairs


def tally(subset: str, results: Sequence[Result]) -> Tally:
    """Count at least one result of a subset."""
    return Tally(
        pairs=len(results),
        correct=sum(r.correct for r in results),
        ties=sum(r.tie for r in results),
    )
