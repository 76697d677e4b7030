"""Numbers of a report, computed once; `report.json` is this, and the pages show it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from triward_tools.evaluation.arithmetic import BENCHMARKS, Benchmark, BenchmarkScores, Score
from triward_tools.evaluation.published import PUBLISHED, Published
from triward_tools.evaluation.results import Problem, Result
from triward_tools.evaluation.rewardbench2 import TiesTally
from triward_tools.evaluation.statistics import (
    Calibration,
    Interval,
    Margins,
    bootstrap,
    calibration,
    margins,
)
from triward_tools.evaluation.tallies import Tally
from triward_tools.evaluation.wording import PAIRS, Wording

WORST = 20


@dataclass(frozen=True)
class ScoreLine:
    """A line of the table of scores.

    Attributes:
        level: 'total', 'section' or 'subset'.
        name: of the score.
        value: from 0 to 1.
        interval: of the value.
        pairs: that it rests on.
        correct: of these, how many are right.
        ties: of these, how many have two equal scores, which counts as wrong.
        mean_margin: of these.
        weight: the published count that weighs the subset, where there is one.
        missing: subsets that belong to it and have no pair.
    """

    level: str
    name: str
    value: float
    interval: Interval
    pairs: int
    correct: int
    ties: int
    mean_margin: float
    weight: int | None
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """Content of a report.

    Attributes:
        benchmark: its name.
        source: of its arithmetic.
        headline: the total that models are ranked by.
        model: that was asked.
        seed: of the bootstrap.
        pairs: how many have scores.
        correct: of these, how many are right.
        ties: of these, how many have two equal scores.
        problems: what has no score.
        absent: sections without a pair, which the totals leave out.
        rows: totals first, then each section before its subsets; none without pairs.
        margins: None without pairs.
        calibration: likewise, and where a margin is not between two responses of one pair.
        worst: the pairs of the lowest margins, lowest first.
        published: rows of others, best first.
        terms: of the score of RewardBench 2's Ties, name -> value; else none.
        wording: of the report.
    """

    benchmark: str
    source: str
    headline: str
    model: str
    seed: int
    pairs: int
    correct: int
    ties: int
    problems: tuple[Problem, ...]
    absent: tuple[str, ...]
    rows: tuple[ScoreLine, ...]
    margins: Margins | None
    calibration: Calibration | None
    worst: tuple[Result, ...]
    published: tuple[Published, ...]
    terms: Mapping[str, float]
    wording: Wording

    def of(self, level: str) -> list[ScoreLine]:
        """Return the rows of one level."""
        return [row for row in self.rows if row.level == level]

    @property
    def incomplete(self) -> tuple[str, ...]:
        """Subsets without a pair, of all sections."""
        totals = self.of("total")
        return totals[0].missing if totals else ()


def gather(
    key: str, results: Sequence[Result], problems: Sequence[Problem], *, model: str, seed: int
) -> Facts:
    """Compute everything.

    Args:
        key: the benchmark's, in BENCHMARKS.
        results: the pairs with scores, in any order.
        problems: what has none.
        model: its name.
        seed: of the bootstrap.

    Raises:
        ValueError: the benchmark or a subset is unknown, or two results have one index.
    """
    if key not in BENCHMARKS:
        raise ValueError(f"no benchmark {key!r}, only {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[key]
    results = sorted(results, key=lambda r: r.index)
    if len({r.index for r in results}) < len(results):
        raise ValueError("two results have one index: a pair would count twice")
    scores = benchmark.scores(results)
    headline = next(iter(benchmark.totals))
    present = {section.name for section in scores.sections}
    return Facts(
        benchmark=benchmark.title,
        source=benchmark.source,
        headline=headline,
        model=model,
        seed=seed,
        pairs=len(results),
        correct=sum(r.correct for r in results),
        ties=sum(r.tie for r in results),
        problems=tuple(sorted(problems, key=lambda p: p.index)),
        absent=tuple(name for name in benchmark.sections if name not in present),
        rows=_rows(benchmark, scores, results, seed),
        margins=margins(results) if results else None,
        calibration=calibration(results) if results and benchmark.wording is PAIRS else None,
        worst=tuple(sorted(results, key=lambda r: (r.margin, r.index))[:WORST]),
        published=tuple(sorted(PUBLISHED[key], key=lambda p: -p.values[headline])),
        terms=_terms(scores.subsets),
        wording=benchmark.wording,
    )


def _terms(subsets: Mapping[str, Tally]) -> Mapping[str, float]:
    return next((t.terms for t in subsets.values() if isinstance(t, TiesTally)), {})


def _rows(
    benchmark: Benchmark, scores: BenchmarkScores, results: Sequence[Result], seed: int
) -> tuple[ScoreLine, ...]:
    subsets = {
        subset: Score(subset, {subset: 1.0}, (), tally.accuracy)
        for subset, tally in scores.subsets.items()
    }
    ordered = [("total", score) for score in scores.totals]
    for section in scores.sections:
        ordered.append(("section", section))
        parts = [subset for subset in section.weights if subset != section.name]
        ordered += [("subset", subsets[subset]) for subset in parts]
    intervals = bootstrap([score for _, score in ordered], scores.subsets, seed=seed)
    summed: dict[str, float] = defaultdict(float)
    for result in results:
        summed[benchmark.part_of(result)] += result.margin
    rows = []
    for (level, score), interval in zip(ordered, intervals, strict=True):
        tallies = [scores.subsets[subset] for subset in score.weights]
        pairs = sum(tally.pairs for tally in tallies)
        rows.append(
            ScoreLine(
                level=level,
                name=score.name,
                value=score.value,
                interval=interval,
                pairs=pairs,
                correct=sum(tally.correct for tally in tallies),
                ties=sum(tally.ties for tally in tallies),
                mean_margin=sum(summed[subset] for subset in score.weights) / pairs,
                weight=benchmark.counts.get(score.name) if level == "subset" else None,
                missing=score.missing,
            )
        )
    return tuple(rows)
