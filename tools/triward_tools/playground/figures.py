"""Charts of a file's scores, in the style of the evaluation's report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from triward_tools.evaluation.charts import BAD, GOOD, INK, margin_histogram, svg_chart
from triward_tools.evaluation.wording import PAIRS
from triward_tools.playground.scored import Counts, Floats, ScoredFile
from triward_tools.selection.pairing import correlation_of, within

DRAWN = 2000  # dots; more are a blot, and make the page slow
_BINS = 40
_STEPS = 10  # ranges of length, whose mean scores are drawn


@dataclass(frozen=True)
class LengthFigures:
    """Score against length.

    Attributes:
        unit: of the lengths, "characters" or "tokens".
        overall: Pearson's correlation over all responses; None where one of both does not vary.
        inside: the same of both less the means of their rows.
        several: whether a row has several responses.
        chart: SVG.
        drawn: how many responses are drawn.
    """

    unit: str
    overall: float | None
    inside: float | None
    several: bool
    chart: str
    drawn: int


def score_chart(scores: Floats) -> str:
    """Draw a histogram of scores [n], at least one, with their mean."""
    edges = _edges(scores)
    mean = float(np.mean(scores))

    def draw(axes: Any) -> None:
        counts, _ = np.histogram(scores, edges)
        width = edges[1] - edges[0]
        axes.bar(edges[:-1] + 0.05 * width, counts, 0.9 * width, align="edge", color=GOOD)
        axes.axvline(mean, color=INK, linewidth=1, linestyle="--", label=f"mean {mean:.3g}")
        axes.set(xlabel="score", ylabel="responses")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1))

    return svg_chart("scores", draw)


def margin_chart_of(found: ScoredFile) -> str:
    """Draw a histogram of the margins of a file that holds pairs."""
    return margin_histogram(found.margins, PAIRS)


def length_figures(found: ScoredFile) -> LengthFigures | None:
    """Return scores against lengths in tokens, or else in characters; None without lengths."""
    unit = "tokens" if len(found.tokens) else "characters"
    lengths = found.tokens if len(found.tokens) else found.characters
    if not len(lengths):
        return None
    whole = np.array([len(found.scores)])
    places = sampled_places(len(lengths), DRAWN)
    return LengthFigures(
        unit=unit,
        overall=_correlation(found.scores, lengths, whole),
        inside=_correlation(found.scores, lengths, found.counts),
        several=bool((found.counts > 1).any()),
        chart=_length_chart(found.scores, lengths, places, unit),
        drawn=len(places),
    )


def _correlation(scores: Floats, lengths: Counts, counts: Counts) -> float | None:
    """Return that within groups of these sizes; None if scores or lengths vary in none."""
    starts = np.cumsum(counts) - counts
    for values in (scores, lengths):
        if (np.minimum.reduceat(values, starts) == np.maximum.reduceat(values, starts)).all():
            return None
    return correlation_of(*within(scores, lengths, counts))


def sampled_places(size: int, most: int) -> Counts:
    """Return all places from 0 to `size`, or `most` of them, the same for the same size."""
    if size <= most:
        return np.arange(size)
    return np.sort(np.random.default_rng(0).choice(size, most, replace=False))


def length_steps(scores: Floats, lengths: Counts) -> tuple[Floats, Floats]:
    """Return mean length and mean score of ranges of length with about equally many responses.

    Responses of one length are in one range, so there may be fewer than ten.
    """
    order = np.argsort(lengths, kind="stable")
    long = lengths[order]
    wanted = np.linspace(0, len(long), min(_STEPS, len(long)) + 1).astype(int)[:-1]
    starts = np.unique(np.searchsorted(long, long[wanted]))
    sizes = np.diff([*starts, len(long)])
    return (
        np.add.reduceat(long, starts) / sizes,
        np.add.reduceat(scores[order], starts) / sizes,
    )


def _length_chart(scores: Floats, lengths: Counts, places: Counts, unit: str) -> str:
    mean_length, mean_score = length_steps(scores, lengths)

    def draw(axes: Any) -> None:
        axes.plot(
            lengths[places], scores[places], "o",
            markersize=3.5, markeredgewidth=0, color=GOOD, alpha=0.5,
        )  # fmt: skip
        if len(mean_length) > 1:
            axes.plot(
                mean_length, mean_score, "-o",
                markersize=3, linewidth=1.4, color=BAD, label="mean of a range of lengths",
            )  # fmt: skip
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1))
        axes.set(xlabel=f"length of the response, {unit}", ylabel="score")

    return svg_chart("lengths", draw)


def _edges(values: Floats) -> Floats:
    low, high = float(values.min()), float(values.max())
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    if high - low < slack:  # equal but for rounding
        low, high = low - slack / 2, high + slack / 2
    part = np.linspace(0, 1, _BINS + 1)
    return low * (1 - part) + high * part  # high - low may be more than a float holds
