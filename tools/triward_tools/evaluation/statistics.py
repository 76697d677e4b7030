"""Confidence of the numbers, and whether a large margin means more than a small one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from triward_tools.evaluation.arithmetic import Score
from triward_tools.evaluation.results import Result
from triward_tools.evaluation.tallies import Floats, Tally

DRAWS = 10_000
LEVEL = 0.95
BINS = 10

# Of the normal distribution at 1 - (1 - LEVEL) / 2.
_Z = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval of an accuracy or a score."""

    low: float
    high: float


@dataclass(frozen=True)
class Margins:
    """The distribution of chosen minus rejected score.

    Attributes:
        mean: of all pairs.
        quantiles: percent -> value, between neighbours interpolated linearly.
    """

    mean: float
    quantiles: Mapping[str, float]


@dataclass(frozen=True)
class Bin:
    """The pairs of similar |margin|.

    Attributes:
        low: the smallest |margin|.
        high: the largest.
        pairs: how many.
        mean: of |margin|.
        accuracy: how many of them are right, from 0 to 1.
        interval: Wilson's, of the accuracy.
        expected: mean of sigmoid(|margin|).
    """

    low: float
    high: float
    pairs: int
    mean: float
    accuracy: float
    interval: Interval
    expected: float


@dataclass(frozen=True)
class Calibration:
    """|margin| against being right.

    Attributes:
        bins: at most BINS, with equally many pairs as far as that is possible, by |margin|.
        accuracy: plain, over all pairs, from 0 to 1.
        expected: what the margins promise as Bradley-Terry log-odds: mean of sigmoid(|margin|).
        error: expected calibration error over the bins.
        auroc: see `auroc`; None where all pairs are right, or none is.
    """

    bins: tuple[Bin, ...]
    accuracy: float
    expected: float
    error: float
    auroc: float | None


def bootstrap(
    scores: Sequence[Score], tallies: Mapping[str, Tally], *, seed: int, draws: int = DRAWS
) -> list[Interval]:
    """Stratified percentile bootstrap intervals (Efron & Tibshirani 1993, chapters 13 and 6.4).

    Each draw resamples every subset's pairs with replacement, and computes the scores anew. Of n
    pairs of which k are right, a resample has Binomial(n, k / n) right ones, so these are drawn in
    place of the pairs themselves. A subset in which all pairs are right, or none, never varies: its
    interval has no width, which is the method's limit and no certainty.

    Args:
        scores: each a weighted mean of accuracies.
        tallies: the subsets in `weights` of the scores.
        seed: of the draws; the same seed gives the same intervals.
        draws: how many resamples.

    Returns:
        An interval for each score, in their order.
    """
    rng = np.random.default_rng(seed)
    accuracies = {subset: tally.drawn(rng, draws) for subset, tally in tallies.items()}
    tail = (1 - LEVEL) / 2
    intervals = []
    for score in scores:
        drawn = sum(
            (weight * accuracies[subset] for subset, weight in score.weights.items()),
            np.zeros(draws),
        )
        low, high = np.quantile(drawn, [tail, 1 - tail])
        # The weights add up to 1 but for rounding.
        slack = sum(weight * tallies[subset].slack for subset, weight in score.weights.items())
        intervals.append(Interval(max(-slack, float(low)), min(1 + slack, float(high))))
    return intervals


def wilson(correct: int, pairs: int) -> Interval:
    """Return a proportion's score interval (Wilson 1927, JASA 22:209), which is never empty."""
    p, z2 = correct / pairs, _Z * _Z
    center = (p + z2 / (2 * pairs)) / (1 + z2 / pairs)
    half = _Z / (1 + z2 / pairs) * sqrt(p * (1 - p) / pairs + z2 / (4 * pairs * pairs))
    # Where none is right, or all are, rounding would leave the proportion itself outside.
    return Interval(min(p, max(0.0, center - half)), max(p, min(1.0, center + half)))


def margins(results: Sequence[Result]) -> Margins:
    """Summarise the margins of at least one pair."""
    values = np.array([r.margin for r in results], dtype=np.float64)
    percents = (0, 5, 25, 50, 75, 95, 100)
    return Margins(
        mean=float(values.mean()),
        quantiles={
            str(p): float(q)
            for p, q in zip(percents, np.quantile(values, [p / 100 for p in percents]), strict=True)
        },
    )


def calibration(results: Sequence[Result]) -> Calibration:
    """Compare |margin| with being right, over at least one pair.

    A reward model that is trained on pairs says sigmoid(margin) for how probable it is that a
    response is preferred (Bradley & Terry 1952, Biometrika 39:324). The error is the mean over bins
    of |accuracy - expected|, weighed with their pairs (Guo et al. 2017, arXiv:1706.04599), with
    bins of equally many pairs (Nixon et al. 2019, arXiv:1904.01685).
    """
    sizes = np.abs(np.array([r.margin for r in results], dtype=np.float64))
    correct = np.array([r.correct for r in results], dtype=np.bool_)
    order = np.argsort(sizes, kind="stable")
    parts = np.array_split(order, min(BINS, len(order)))
    bins = tuple(_bin(sizes[part], correct[part]) for part in parts)
    off = sum(b.pairs * abs(b.accuracy - b.expected) for b in bins)
    return Calibration(
        bins=bins,
        accuracy=float(correct.mean()),
        expected=float(_sigmoid(sizes).mean()),
        error=off / len(results),
        auroc=auroc(sizes, correct),
    )


def auroc(sizes: Floats, correct: NDArray[np.bool_]) -> float | None:
    """Return how probable it is that a right pair has the larger |margin| than a wrong one.

    The Mann-Whitney statistic, where equal ones count half: 0.5 says that the size of a margin
    tells nothing (Hanley & McNeil 1982, Radiology 143:29).

    Args:
        sizes: |margin| of each pair.
        correct: whether it is right.
    """
    right = int(correct.sum())
    wrong = len(correct) - right
    if not right or not wrong:
        return None
    _, inverse, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    # Of equal values each has the mean of their ranks, which begin at 1.
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[correct].sum() - right * (right + 1) / 2) / (right * wrong))


def _bin(sizes: Floats, correct: NDArray[np.bool_]) -> Bin:
    return Bin(
        low=float(sizes[0]),
        high=float(sizes[-1]),
        pairs=len(sizes),
        mean=float(sizes.mean()),
        accuracy=float(correct.mean()),
        interval=wilson(int(correct.sum()), len(sizes)),
        expected=float(_sigmoid(sizes).mean()),
    )


def _sigmoid(sizes: Floats) -> Floats:
    """Return the sigmoid of values that are not negative, so that nothing overflows."""
    return 1 / (1 + np.exp(-sizes))
