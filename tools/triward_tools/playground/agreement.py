"""Two models' scores of the same responses -> how far they agree on the order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from triward.errors import InvalidRequest
from triward.many import ranked

from triward_tools.playground.scored import Counts, Floats


@dataclass(frozen=True)
class Agreement:
    """Order of N responses by scores A and B.

    Attributes:
        pairs: of responses, N (N - 1) / 2.
        same: of these, how many both order alike.
        opposite: how many they order the other way round.
        ties: how many have two equal scores in A, in B or in both.
        best: whether both have the same best response, the first of equal ones.
        order: whether both have the same ranking, equal scores in the order given.
        kendall: tau-b, from -1 to 1; None where all scores of a side are equal.
        spearman: rho, likewise.
    """

    pairs: int
    same: int
    opposite: int
    ties: int
    best: bool
    order: bool
    kendall: float | None
    spearman: float | None


def agreement(a: Sequence[float], b: Sequence[float]) -> Agreement:
    """Return how far two lists of scores agree.

    Args:
        a: finite scores of N >= 2 responses.
        b: likewise, in the same order.

    Raises:
        InvalidRequest: they are not equally many, or fewer than 2.
    """
    if len(a) != len(b) or len(a) < 2:
        raise InvalidRequest(f"needs as many scores of both, at least 2; got {len(a)} and {len(b)}")
    first, second = np.triu_indices(len(a), 1)
    left, right = (_signs(scores, first, second) for scores in (a, b))
    product = left * right
    same, opposite = int((product > 0).sum()), int((product < 0).sum())
    return Agreement(
        pairs=len(product),
        same=same,
        opposite=opposite,
        ties=int((product == 0).sum()),
        best=ranked(a)[0] == ranked(b)[0],
        order=ranked(a) == ranked(b),
        kendall=_kendall(same - opposite, int((left != 0).sum()), int((right != 0).sum())),
        spearman=_pearson(mean_ranks(a), mean_ranks(b)),
    )


def mean_ranks(scores: Sequence[float]) -> Floats:
    """Return the rank of each score from 1, the lowest; equal scores share their ranks' mean."""
    _, places, counts = np.unique(np.asarray(scores), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: Floats = (last - (counts - 1) / 2)[places]
    return means


def places_of(scores: Sequence[float]) -> list[int]:
    """Return the place of each response from 1, the best; equal scores keep their order."""
    places = [0] * len(scores)
    for place, index in enumerate(ranked(scores), start=1):
        places[index] = place
    return places


def _signs(scores: Sequence[float], first: Counts, second: Counts) -> Counts:
    values = np.asarray(scores, dtype=np.float64)
    return np.sign(values[first] - values[second]).astype(np.int64)


def _kendall(surplus: int, decided_a: int, decided_b: int) -> float | None:
    """Return tau-b (Kendall 1945, Biometrika 33:239), from pairs that are no ties on a side."""
    decided = sqrt(decided_a * decided_b)
    return surplus / decided if decided else None


def _pearson(a: Floats, b: Floats) -> float | None:
    x, y = a - a.mean(), b - b.mean()
    spread = sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / spread if spread else None
