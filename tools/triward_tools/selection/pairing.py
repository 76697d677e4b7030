"""Scored responses to a prompt -> pairs of a chosen and a rejected one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from triward_tools.selection.limits import Floats, Numbers, finite_scores

STRATEGIES = ("best-worst", "adjacent", "all")


@dataclass(frozen=True)
class Pair:
    """Two responses to a prompt.

    Attributes:
        chosen: index of the better one.
        rejected: index of the other one.
        margin: by how much it is better, after the penalty for length.
    """

    chosen: int
    rejected: int
    margin: float


@dataclass(frozen=True)
class Pairing:
    """Choice of pairs among responses.

    Attributes:
        strategy: "best-worst" is one pair; "adjacent" pairs each response with the next lower one;
            "all" is every pair. What a limit below refuses has no substitute.
        min_margin: the lowest margin; 0 or more. Ties are never paired.
        max_margin: the highest margin.
        max_length_ratio: of the longer response's characters to the shorter one's, at least 1.
        length_penalty: what a response loses for each 1,000 characters before responses are
            compared, in units of the score; or "auto" for the slope that `length_slope` finds in
            all the data, so that length by itself no longer wins.
        max_pairs: of a prompt, those with the highest margins; None for all.
    """

    strategy: str = "best-worst"
    min_margin: float = 0.0
    max_margin: float = math.inf
    max_length_ratio: float = math.inf
    length_penalty: float | str = 0.0
    max_pairs: int | None = None

    def __post_init__(self) -> None:
        """Check the limits."""
        if self.strategy not in STRATEGIES:
            raise ValueError(
                f"strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}"
            )
        if not 0 <= self.min_margin <= self.max_margin:
            raise ValueError(
                f"margins must be 0 <= min <= max, got {self.min_margin}, {self.max_margin}"
            )
        if not self.max_length_ratio >= 1:
            raise ValueError(f"max_length_ratio must be at least 1, got {self.max_length_ratio}")
        if self.max_pairs is not None and self.max_pairs < 1:
            raise ValueError(f"max_pairs must be at least 1, got {self.max_pairs}")
        penalty = self.length_penalty
        if penalty != "auto" and (isinstance(penalty, str) or not math.isfinite(penalty)):
            raise ValueError(f"length_penalty must be a number or 'auto', got {penalty!r}")

    def penalty(self, slope: float | None) -> float:
        """Return the penalty, where `slope` is that of all the data.

        Raises:
            ValueError: it is needed, and None.
        """
        if not isinstance(self.length_penalty, str):
            return float(self.length_penalty)
        if slope is None:
            raise ValueError("length_penalty 'auto' needs the slope of all the data: length_slope")
        return slope

    def pairs(
        self, responses: Sequence[str], scores: Numbers, slope: float | None = None
    ) -> list[Pair]:
        """Return the pairs of a prompt, highest margins first. Equal texts count as one response.

        Args:
            responses: their texts.
            scores: one for each.
            slope: what `length_slope` finds in all the data; for a penalty of "auto".

        Raises:
            ValueError: responses and scores differ in number, a score is not finite, or the
                penalty is "auto" and there is no slope.
        """
        found = finite_scores(scores)
        if len(found) != len(responses):
            raise ValueError(f"{len(responses)} responses have {len(found)} scores")
        lengths = np.array([len(text) for text in responses])
        worth = found - self.penalty(slope) * lengths / 1000
        first = {text: index for index, text in reversed([*enumerate(responses)])}
        order = sorted(first.values(), key=lambda index: (-worth[index], index))
        pairs = [
            Pair(a, b, float(worth[a] - worth[b]))
            for a, b in self._candidates(order)
            if self._fits(int(lengths[a]), int(lengths[b]))
        ]
        kept = [pair for pair in pairs if pair.margin > 0 and self._allows(pair.margin)]
        return sorted(kept, key=lambda pair: -pair.margin)[: self.max_pairs]

    def _candidates(self, order: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield indices of better and worse responses, of those that are ordered best first."""
        if self.strategy == "all":
            yield from combinations(order, 2)
        elif self.strategy == "adjacent":
            yield from pairwise(order)
        elif len(order) > 1:
            yield order[0], order[-1]

    def _allows(self, margin: float) -> bool:
        return self.min_margin <= margin <= self.max_margin

    def _fits(self, a: int, b: int) -> bool:
        ratio = self.max_length_ratio
        return math.isinf(ratio) or max(a, b) <= ratio * min(a, b)


def make_pairs(
    responses: Sequence[str],
    scores: Numbers,
    *,
    strategy: str = "best-worst",
    min_margin: float = 0.0,
    max_margin: float = math.inf,
    max_length_ratio: float = math.inf,
    length_penalty: float = 0.0,
    max_pairs: int | None = None,
) -> list[Pair]:
    """Return the pairs of one prompt; arguments and errors are those of `Pairing` and its `pairs`.

    For the slope of all the data, as `length_penalty`, see `length_slope`.
    """
    pairing = Pairing(strategy, min_margin, max_margin, max_length_ratio, length_penalty, max_pairs)
    return pairing.pairs(responses, scores)


def length_slope(scores: Iterable[Numbers], lengths: Iterable[Numbers]) -> float:
    """Return the score's rise with 1,000 characters among responses to the same prompt.

    The least-squares slope of scores on lengths, both less their prompt's mean, over all prompts
    (the within estimator of panel data): that some prompts have long answers and high scores does
    not count. 0 if no prompt has responses of two lengths.

    Args:
        scores: of the responses to each prompt.
        lengths: their numbers of characters.
    """
    return slope_of(*within(*_flat(scores, lengths)))


def length_correlation(scores: Iterable[Numbers], lengths: Iterable[Numbers]) -> float:
    """Pearson's correlation of the same; 0 if one of them does not vary."""
    return correlation_of(*within(*_flat(scores, lengths)))


def slope_of(x: Floats, y: Floats) -> float:
    """Return the slope of y on x, for 1,000 of x, where both are what `within` makes."""
    spread = float(x @ x)
    return 1000 * float(x @ y) / spread if spread else 0.0


def correlation_of(x: Floats, y: Floats) -> float:
    """Pearson's, of the same."""
    spread = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / spread if spread else 0.0


def within(scores: Floats, lengths: Numbers, counts: Numbers) -> tuple[Floats, Floats]:
    """Lengths and scores, both less the means of their prompts.

    Args:
        scores: of all responses, one prompt's behind the other's.
        lengths: likewise.
        counts: how many responses each prompt has; at least 1.
    """
    sizes = np.asarray(counts, dtype=np.int64)
    if not len(sizes):
        return np.zeros(0), np.zeros(0)
    starts = np.cumsum(sizes) - sizes

    def centred(values: Floats) -> Floats:
        return values - np.repeat(np.add.reduceat(values, starts) / sizes, sizes)

    return centred(np.asarray(lengths, dtype=np.float64)), centred(scores)


def _flat(
    scores: Iterable[Numbers], lengths: Iterable[Numbers]
) -> tuple[Floats, list[float], list[int]]:
    """Return the arguments of `within`, from groups."""
    groups = [(each, counted) for each, counted in zip(scores, lengths, strict=True) if len(each)]
    flat = [float(value) for each, _ in groups for value in each]
    long = [float(value) for _, counted in groups for value in counted]
    return finite_scores(flat), long, [len(each) for each, _ in groups]
