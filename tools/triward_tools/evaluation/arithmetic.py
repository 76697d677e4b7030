"""The benchmarks' own arithmetic, from pairs to the numbers that their tables show.

    RewardBench            a section is the mean of its subsets' accuracies, each weighed with the
                           published count; the Score is the plain mean of the four sections
    VL-RewardBench         a section is the accuracy over its pairs; Overall is the accuracy over
                           all pairs, Macro the plain mean of the three sections
    Multimodal RewardBench a section is the accuracy over its pairs; Overall over all pairs
    RewardBench 2          a section is its subset, see `rewardbench2`; the Score is the plain mean
                           of the six

Every one of these is a weighted mean of the subsets' accuracies, so a score is kept as its weights.
A subset without a pair has no accuracy: it is left out, and the score names it as missing.

Sources: github.com/allenai/reward-bench (rewardbench/constants.py for sections and counts,
`calculate_scores_per_section` in rewardbench/utils.py; Lambert et al. 2024, arXiv:2403.13787);
github.com/vl-rewardbench/VL_RewardBench (cal.py; Li et al. 2024, arXiv:2411.17451);
github.com/facebookresearch/multimodal_rewardbench (scripts/2_get_accuracy.py; Yasunaga et al. 2025,
arXiv:2502.14191). Those of RewardBench 2 stand in `rewardbench2`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from triward_tools.evaluation import rewardbench2
from triward_tools.evaluation.results import Result
from triward_tools.evaluation.sections import (
    MULTIMODAL_CATEGORIES,
    MULTIMODAL_REWARDBENCH,
    REWARDBENCH,
    REWARDBENCH_2,
    VL_REWARDBENCH,
    multimodal_part,
)
from triward_tools.evaluation.tallies import Tally, tally
from triward_tools.evaluation.wording import GROUPS, PAIRS, Wording


@dataclass(frozen=True)
class Score:
    """A weighted mean of the accuracies of subsets.

    Attributes:
        name: as the benchmark's own tables call it.
        weights: subset -> share, which add up to 1. Those without a pair are not in it.
        missing: the subsets that belong to it and have no pair.
        value: from 0 to 1.
    """

    name: str
    weights: Mapping[str, float]
    missing: tuple[str, ...]
    value: float


@dataclass(frozen=True)
class BenchmarkScores:
    """All numbers of a benchmark that its data allow; a score without any pair is left out.

    Attributes:
        subsets: subset -> what was counted, in the benchmark's order.
        sections: the scores of the sections, likewise.
        totals: the scores over all sections, the best known first.
    """

    subsets: Mapping[str, Tally]
    sections: tuple[Score, ...]
    totals: tuple[Score, ...]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's sections, and how they make its scores.

    Attributes:
        title: its name.
        source: where its arithmetic is defined.
        sections: section -> its subsets.
        totals: name -> 'macro', the plain mean of the sections, or 'micro', over all pairs.
        counts: subset -> published weight within its section; where there are none, the number of
            its pairs in the data.
        part_of: the subset that a pair counts under, where its data's name is too coarse.
        subsets: the names that a pair may have in the data.
        tally: counts the results of a subset; None where they give it no value.
        wording: for reports.
    """

    title: str
    source: str
    sections: Mapping[str, tuple[str, ...]]
    totals: Mapping[str, str]
    counts: Mapping[str, int]
    part_of: Callable[[Result], str]
    subsets: frozenset[str]
    tally: Callable[[str, Sequence[Result]], Tally | None] = tally
    wording: Wording = PAIRS

    def scores(self, results: Sequence[Result]) -> BenchmarkScores:
        """Return the numbers of these pairs.

        Raises:
            ValueError: a pair's subset is not the benchmark's.
        """
        tallies = self.tallies(results)
        names = {name: self._weights(parts, tallies) for name, parts in self.sections.items()}
        sections = [_score(name, names[name], self.sections[name], tallies) for name in names]
        present = [weights for weights in names.values() if weights]
        everything = [subset for parts in self.sections.values() for subset in parts]
        totals = [
            _score(
                name, _macro(present) if kind == "macro" else _micro(tallies), everything, tallies
            )
            for name, kind in self.totals.items()
        ]
        return BenchmarkScores(tallies, _present(sections), _present(totals))

    def tallies(self, results: Sequence[Result]) -> dict[str, Tally]:
        """Return the counts of each subset that has a pair, in the benchmark's order."""
        grouped: dict[str, list[Result]] = defaultdict(list)
        for result in results:
            if result.subset not in self.subsets:
                raise ValueError(f"{self.title} has no subset {result.subset!r}")
            grouped[self.part_of(result)].append(result)
        parts = [subset for held in self.sections.values() for subset in held]
        counted = {s: self.tally(s, grouped[s]) for s in parts if grouped.get(s)}
        return {subset: found for subset, found in counted.items() if found is not None}

    def _weights(self, parts: Sequence[str], tallies: Mapping[str, Tally]) -> dict[str, float]:
        counted = {s: self.counts.get(s, tallies[s].pairs) for s in parts if s in tallies}
        whole = sum(counted.values())
        return {subset: count / whole for subset, count in counted.items()}


def _macro(sections: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {s: weight / len(sections) for section in sections for s, weight in section.items()}


def _micro(tallies: Mapping[str, Tally]) -> dict[str, float]:
    whole = sum(tally.pairs for tally in tallies.values())
    return {subset: tally.pairs / whole for subset, tally in tallies.items()}


def _present(scores: Sequence[Score]) -> tuple[Score, ...]:
    return tuple(score for score in scores if score.weights)


def _score(
    name: str, weights: Mapping[str, float], parts: Sequence[str], tallies: Mapping[str, Tally]
) -> Score:
    value = sum(weight * tallies[subset].accuracy for subset, weight in weights.items())
    return Score(name, weights, tuple(s for s in parts if s not in tallies), value)


def _named(result: Result) -> str:
    return result.subset


BENCHMARKS: Mapping[str, Benchmark] = {
    "rewardbench": Benchmark(
        title="RewardBench",
        source="github.com/allenai/reward-bench, arXiv:2403.13787",
        sections={section: tuple(counts) for section, counts in REWARDBENCH.items()},
        totals={"Score": "macro"},
        counts={s: count for counts in REWARDBENCH.values() for s, count in counts.items()},
        part_of=_named,
        subsets=frozenset(s for counts in REWARDBENCH.values() for s in counts),
    ),
    "vl-rewardbench": Benchmark(
        title="VL-RewardBench",
        source="github.com/vl-rewardbench/VL_RewardBench, arXiv:2411.17451",
        sections=VL_REWARDBENCH,
        totals={"Overall": "micro", "Macro": "macro"},
        counts={},
        part_of=_named,
        subsets=frozenset(s for parts in VL_REWARDBENCH.values() for s in parts),
    ),
    "multimodal-rewardbench": Benchmark(
        title="Multimodal RewardBench",
        source="github.com/facebookresearch/multimodal_rewardbench, arXiv:2502.14191",
        sections=MULTIMODAL_REWARDBENCH,
        totals={"Overall": "micro"},
        counts={},
        part_of=lambda result: multimodal_part(result.subset, result.id),
        subsets=frozenset(MULTIMODAL_CATEGORIES),
    ),
    "rewardbench-2": Benchmark(
        title="RewardBench 2",
        source="github.com/allenai/reward-bench, arXiv:2506.01937",
        sections={subset: (subset,) for subset in REWARDBENCH_2},
        totals={"Score": "macro"},
        counts={},
        part_of=_named,
        subsets=frozenset(REWARDBENCH_2),
        tally=rewardbench2.subset_tally,
        wording=GROUPS,
    ),
}
