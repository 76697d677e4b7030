"""Intervals and calibration, each against a second computation."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from tests.evaluations import groups_of, results_of
from triward_tools.evaluation.arithmetic import BENCHMARKS, Score
from triward_tools.evaluation.results import Result
from triward_tools.evaluation.statistics import (
    Interval,
    auroc,
    bootstrap,
    calibration,
    margins,
    wilson,
)
from triward_tools.evaluation.tallies import Tally

VL = BENCHMARKS["vl-rewardbench"]


class TestBootstrap:
    def test_like_resampling_pairs(self):
        """Binomial draws give what resampling each pair by a loop gives."""
        results = results_of("vl-rewardbench", 140, seed=3)
        scores = VL.scores(results)
        totals = list(scores.totals)
        got = bootstrap(totals, scores.subsets, seed=1)
        rng = random.Random(5)
        by_subset = defaultdict(list)
        for r in results:
            by_subset[r.subset].append(r)
        drawn = defaultdict(list)
        for _ in range(1500):
            sample = [rng.choice(group) for group in by_subset.values() for _ in group]
            for total in VL.scores(sample).totals:
                drawn[total.name].append(total.value)
        for score, interval in zip(totals, got, strict=True):
            low, high = np.quantile(drawn[score.name], [0.025, 0.975])
            # Two resamplings' own noise; the intervals are 0.15 wide.
            assert interval.low == pytest.approx(low, abs=0.012), score.name
            assert interval.high == pytest.approx(high, abs=0.012), score.name

    def test_like_resampling_prompts(self):
        """Of RewardBench 2, where Ties' rows are drawn together, and credits are parts of one."""
        benchmark = BENCHMARKS["rewardbench-2"]
        results = groups_of(120, seed=3)
        scores = benchmark.scores(results)
        wanted = [*scores.totals, *scores.sections]
        got = bootstrap(wanted, scores.subsets, seed=1)
        prompts = defaultdict(lambda: defaultdict(list))
        for r in results:
            prompts[r.subset][r.id.partition(":")[2] or r.id].append(r)
        rng = random.Random(5)
        drawn = defaultdict(list)
        for _ in range(1000):
            sample = []
            for groups in prompts.values():
                rows = list(groups.values())
                for number in range(len(rows)):
                    for r in rng.choice(rows):  # a prompt that is drawn twice is two prompts
                        name = f"{r.id.partition(':')[0]}:{number}" if ":" in r.id else r.id
                        sample.append(replace(r, index=len(sample), id=name))
            found = benchmark.scores(sample)
            for score in (*found.totals, *found.sections):
                drawn[score.name].append(score.value)
        for score, interval in zip(wanted, got, strict=True):
            low, high = np.quantile(drawn[score.name], [0.025, 0.975])
            width = high - low
            assert interval.low == pytest.approx(low, abs=0.15 * width + 0.01), score.name
            assert interval.high == pytest.approx(high, abs=0.15 * width + 0.01), score.name

    def test_covers_what_was_planted(self):
        """Of 400 made-up data sets, 95 % of the intervals hold the true score."""
        chances = {"povid": 0.8, "rlhf-v": 0.6, "mathverse": 0.7, "vlfeedback": 0.55}
        pairs = {"povid": 150, "rlhf-v": 60, "mathverse": 90, "vlfeedback": 120}
        sections = [("povid", "rlhf-v"), ("mathverse",), ("vlfeedback",)]
        truth = sum(
            sum(chances[s] * pairs[s] for s in part) / sum(pairs[s] for s in part)
            for part in sections
        ) / len(sections)
        rng = np.random.default_rng(11)
        held = 0
        for trial in range(400):
            tallies = {s: Tally(n, int(rng.binomial(n, chances[s])), 0) for s, n in pairs.items()}
            weights = {}
            for part in sections:
                whole = sum(pairs[s] for s in part)
                weights.update({s: pairs[s] / whole / len(sections) for s in part})
            score = Score("Macro", weights, (), 0.0)
            interval = bootstrap([score], tallies, seed=trial, draws=1000)[0]
            held += interval.low <= truth <= interval.high
        # 380 expected, with a deviation of 4.4.
        assert 365 <= held <= 395

    def test_the_seed_decides(self):
        scores = VL.scores(results_of("vl-rewardbench", 200))
        runs = [bootstrap(scores.totals, scores.subsets, seed=s) for s in (1, 1, 2)]
        assert runs[0] == runs[1] != runs[2]

    def test_all_right_has_no_width_and_stays_within_one(self):
        subsets = ["hep-go"] * 5 + ["hep-cpp"] * 7
        right = [Result(i, str(i), subset, 1.0, 0.0) for i, subset in enumerate(subsets)]
        scores = BENCHMARKS["rewardbench"].scores(right)
        assert bootstrap(scores.totals, scores.subsets, seed=0) == [Interval(1.0, 1.0)]


class TestStatistics:
    def test_auroc_by_all_pairs_of_pairs(self):
        rng = random.Random(2)
        for _ in range(30):
            sizes = [rng.randint(0, 8) / 2 for _ in range(40)]
            correct = [rng.random() < 0.6 for _ in sizes]
            points = [
                1.0 if a > b else 0.5 if a == b else 0.0
                for a, right in zip(sizes, correct, strict=True)
                if right
                for b, other in zip(sizes, correct, strict=True)
                if not other
            ]
            got = auroc(np.array(sizes), np.array(correct))
            assert got == pytest.approx(sum(points) / len(points), abs=1e-12)

    def test_auroc_needs_right_and_wrong(self):
        assert auroc(np.array([1.0, 2.0]), np.array([True, True])) is None
        assert auroc(np.array([1.0, 2.0]), np.array([False, False])) is None

    def test_wilson_solves_its_equation(self):
        """The ends are where the normal test of the proportion just rejects."""
        for correct, pairs in [(0, 7), (3, 7), (40, 50), (1, 1), (999, 1000)]:
            interval = wilson(correct, pairs)
            for end in (interval.low, interval.high):
                if 1e-9 < end < 1 - 1e-9:
                    z = (correct / pairs - end) / math.sqrt(end * (1 - end) / pairs)
                    assert abs(z) == pytest.approx(1.959964, abs=1e-5)
            assert interval.low <= correct / pairs <= interval.high
            assert interval.high > interval.low

    def test_calibration_by_loops(self):
        results = results_of("vl-rewardbench", 157, seed=9)
        got = calibration(results)
        expected = [1 / (1 + math.exp(-abs(r.margin))) for r in results]
        assert got.expected == pytest.approx(sum(expected) / 157)
        assert got.accuracy == pytest.approx(sum(r.chosen > r.rejected for r in results) / 157)
        ordered = sorted(results, key=lambda r: abs(r.margin))
        error, start = 0.0, 0
        for b in got.bins:
            part = ordered[start : start + b.pairs]
            start += b.pairs
            right = sum(r.correct for r in part) / len(part)
            promised = sum(1 / (1 + math.exp(-abs(r.margin))) for r in part) / len(part)
            assert (b.accuracy, b.expected) == pytest.approx((right, promised))
            assert (b.low, b.high) == (abs(part[0].margin), abs(part[-1].margin))
            error += abs(right - promised) * len(part) / 157
        assert start == 157
        assert {b.pairs for b in got.bins} == {15, 16}
        assert got.error == pytest.approx(error)

    def test_a_bradley_terry_judge_is_calibrated(self):
        """Outcomes drawn from sigmoid(margin) leave nothing but noise."""
        rng = random.Random(4)
        results = []
        for i in range(20_000):
            size = rng.expovariate(0.7)
            sign = 1 if rng.random() < 1 / (1 + math.exp(-size)) else -1
            results.append(Result(i, str(i), "povid", sign * size, 0.0))
        got = calibration(results)
        assert got.error < 0.015
        assert abs(got.accuracy - got.expected) < 0.01

    def test_margins(self):
        got = margins(results_of("vl-rewardbench", 101, seed=5))
        values = sorted(r.margin for r in results_of("vl-rewardbench", 101, seed=5))
        assert got.mean == pytest.approx(sum(values) / 101)
        assert got.quantiles == pytest.approx(
            {str(p): values[p] for p in (0, 5, 25, 50, 75, 95, 100)}
        )

    def test_huge_margins(self):
        """A margin of 1e30 overflows nothing."""
        with np.errstate(all="raise", under="ignore"):
            got = calibration([Result(0, "a", "povid", 1e30, 0), Result(1, "b", "povid", 0, 1.0)])
        assert got.bins[-1].expected == 1.0
