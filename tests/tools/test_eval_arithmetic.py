"""The benchmarks' arithmetic, each formula against a second computation."""

from __future__ import annotations

import random
from collections import defaultdict
from fractions import Fraction

import numpy as np
import pytest

from triward_tools.evaluation.arithmetic import BENCHMARKS
from triward_tools.evaluation.published import PUBLISHED, VL_PAIRS
from triward_tools.evaluation.results import Result

VL = BENCHMARKS["vl-rewardbench"]
RB = BENCHMARKS["rewardbench"]
MULTIMODAL = BENCHMARKS["multimodal-rewardbench"]


def outcomes(subset: str, correct: int, pairs: int, start: int = 0) -> list[Result]:
    return [
        Result(start + i, f"{subset}-{i}", subset, 1.0 if i < correct else -1.0, 0.0)
        for i in range(pairs)
    ]


def values(scores) -> dict[str, float]:
    return {s.name: s.value for s in (*scores.sections, *scores.totals)}


class TestTheCardsRows:
    def test_vl_rewardbench(self):
        """66.0, 80.0 and 61.0 of 183, 749 and 318 pairs are 73.1 overall and 69.0 macro.

        The card's 66.0 is no number of 183 pairs; 121 of them come nearest.
        """
        right = {"vlfeedback": (121, 183), "povid": (599, 749), "mathverse": (194, 318)}
        results = [r for s, (k, n) in right.items() for r in outcomes(s, k, n)]
        got = {name: round(100 * value, 1) for name, value in values(VL.scores(results)).items()}
        assert got == {
            "General": 66.1,
            "Hallucination": 80.0,
            "Reasoning": 61.0,
            "Overall": 73.1,
            "Macro": 69.0,
        }

    def test_rewardbench(self):
        """The Score is the plain mean of the sections: 90.0, 87.5, 91.1 and 91.8 are 90.1."""
        right = {
            "alpacaeval-easy": (900, 1000),
            "llmbar-natural": (875, 1000),
            "donotanswer": (911, 1000),
            "hep-go": (918, 1000),
        }
        results = [r for s, (k, n) in right.items() for r in outcomes(s, k, n)]
        assert values(RB.scores(results))["Score"] == pytest.approx(0.901, abs=1e-12)


class TestRules:
    def test_tie_is_a_loss(self):
        tie = Result(0, "a", "povid", 2.5, 2.5)
        win = Result(1, "b", "povid", 2.5, 2.4)
        tally = VL.scores([tie, win]).subsets["povid"]
        assert (tally.pairs, tally.correct, tally.ties) == (2, 1, 1)

    def test_mathematics_weighs_as_much_as_all_code(self):
        """447 pairs count as 984."""
        code = ["hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"]
        results = outcomes("math-prm", 447, 447)
        results += [r for s in code for r in outcomes(s, 0, 164)]
        assert RB.counts["math-prm"] == 984 == sum(RB.counts[s] for s in code)
        assert values(RB.scores(results))["Reasoning"] == 0.5

    def test_published_counts_add_up_to_the_public_data(self):
        """2,985 pairs, once math-prm counts its own."""
        assert sum(RB.counts.values()) - 984 + 447 == 2985
        assert len(RB.subsets) == 23

    def test_published_counts_weigh_a_part_of_the_data(self):
        """A file that holds a tenth of one subset weighs it as the whole."""
        results = outcomes("refusals-dangerous", 10, 10) + outcomes("donotanswer", 0, 136)
        assert values(RB.scores(results))["Safety"] == pytest.approx(100 / 236)

    def test_missing_subset_is_left_out_and_named(self):
        scores = VL.scores(outcomes("vlfeedback", 3, 4))
        assert [s.name for s in scores.sections] == ["General"]
        assert scores.sections[0].missing == ("wildvision",)
        assert {s.name: s.value for s in scores.totals} == {"Overall": 0.75, "Macro": 0.75}
        assert scores.totals[0].missing[0] == "wildvision"
        assert len(scores.totals[0].missing) == 6

    def test_no_pairs_have_no_scores(self):
        for benchmark in BENCHMARKS.values():
            scores = benchmark.scores([])
            assert (scores.subsets, scores.sections, scores.totals) == ({}, (), ())

    def test_unknown_subset_is_refused(self):
        with pytest.raises(ValueError, match="VL-RewardBench has no subset 'povit'"):
            VL.scores(outcomes("povit", 1, 1))

    def test_multimodal_parts_follow_the_id(self):
        results = [
            Result(0, "PAIRS_1", "safety", 1, 0),
            Result(1, "memes_1", "safety", 0, 1),
            Result(2, "mathvista_3", "reasoning", 1, 0),
            Result(3, "EMMA-Coding_3", "reasoning", 0, 1),
        ]
        subsets = MULTIMODAL.scores(results).subsets
        assert [(name, tally.pairs, tally.correct) for name, tally in subsets.items()] == [
            ("reasoning/math", 1, 1),
            ("reasoning/coding", 1, 0),
            ("safety/bias", 1, 1),
            ("safety/toxicity", 1, 0),
        ]


@pytest.mark.parametrize("seed", range(20))
class TestAgainstFractions:
    """Random outcomes, by loops over pairs and exact fractions."""

    def random_results(self, benchmark, seed):
        rng = random.Random(seed)
        subsets = rng.sample(sorted(benchmark.subsets), rng.randint(1, len(benchmark.subsets)))
        results = []
        for subset in subsets:
            for i in range(rng.randint(1, 60)):
                prefix = rng.choice(["pairs", "math", "other"])
                scores = rng.randint(-3, 3), rng.randint(-3, 3)
                results.append(Result(len(results), f"{prefix}-{i}", subset, *map(float, scores)))
        rng.shuffle(results)
        return results

    def shares(self, results, key):
        right, total = defaultdict(int), defaultdict(int)
        for r in results:
            total[key(r)] += 1
            if r.chosen > r.rejected:
                right[key(r)] += 1
        return {k: Fraction(right[k], total[k]) for k in total}

    def check(self, got, expected):
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert got[name] == pytest.approx(float(value), abs=1e-12), name

    def test_rewardbench(self, seed):
        results = self.random_results(RB, seed)
        accuracy = self.shares(results, lambda r: r.subset)
        expected = {}
        for section, subsets in RB.sections.items():
            top = bottom = Fraction(0)
            for subset in subsets:
                if subset in accuracy:
                    top += accuracy[subset] * RB.counts[subset]
                    bottom += RB.counts[subset]
            if bottom:
                expected[section] = top / bottom
        expected["Score"] = sum(expected.values()) / len(expected)
        self.check(values(RB.scores(results)), expected)

    def test_vl_rewardbench(self, seed):
        results = self.random_results(VL, seed)
        group = {
            "vlfeedback": "General",
            "wildvision": "General",
            "povid": "Hallucination",
            "rlaif-v": "Hallucination",
            "rlhf-v": "Hallucination",
            "mathverse": "Reasoning",
            "mmmu": "Reasoning",
        }
        expected = self.shares(results, lambda r: group[r.subset])
        macro = sum(expected.values()) / len(expected)
        expected["Macro"] = macro
        expected["Overall"] = self.shares(results, lambda r: 0)[0]
        self.check(values(VL.scores(results)), expected)

    def test_multimodal_rewardbench(self, seed):
        results = self.random_results(MULTIMODAL, seed)
        title = {
            "open_generation/correctness_task": "Correctness",
            "open_generation/preference_task": "Preference",
            "knowledge": "Knowledge",
            "reasoning": "Reasoning",
            "safety": "Safety",
            "vqa": "VQA",
        }
        expected = self.shares(results, lambda r: title[r.subset])
        expected["Overall"] = self.shares(results, lambda r: 0)[0]
        scores = MULTIMODAL.scores(results)
        self.check(values(scores), expected)
        parts = self.shares(results, lambda r: MULTIMODAL.part_of(r))
        self.check({s: t.accuracy for s, t in scores.subsets.items()}, parts)


class TestPublished:
    def test_rows(self):
        assert {key: len(rows) for key, rows in PUBLISHED.items()} == {
            "rewardbench": 16,
            "vl-rewardbench": 16,
            "multimodal-rewardbench": 0,
            "rewardbench-2": 25,
        }

    def test_columns_are_scores_of_the_benchmark(self):
        for key, rows in PUBLISHED.items():
            for row in rows:
                benchmark = BENCHMARKS[key]
                assert list(row.values) == [*benchmark.sections, *benchmark.totals]

    def test_scores_and_macros_follow_from_their_rows(self):
        for row in (*PUBLISHED["rewardbench"], *PUBLISHED["rewardbench-2"]):
            *sections, score = row.values.values()
            assert abs(np.mean(sections) - score) <= 0.1, row
        for row in PUBLISHED["vl-rewardbench"]:
            *sections, _, macro = row.values.values()
            assert abs(np.mean(sections) - macro) <= 0.1, row

    def test_overall_values_that_do_not_follow_are_named(self):
        """These stand in the table as they do here, and do not fit their own sections."""
        wrong = []
        for row in PUBLISHED["vl-rewardbench"]:
            pooled = np.average([row.values[s] for s in VL_PAIRS], weights=list(VL_PAIRS.values()))
            if abs(pooled - row.values["Overall"]) > 0.1:
                wrong.append(row.model)
            assert ("Overall" in row.doubtful) == (row.model in wrong)
        assert wrong == [
            "Claude-3.5-Sonnet (2024-06-22)",
            "GPT-4o (2024-08-06)",
            "Qwen2-VL-7B-Instruct",
            "MAmmoTH-VL-8B",
            "Qwen2.5-VL-7B-Instruct",
            "InternVL3-8B",
            "Qwen2-VL-72B-Instruct",
            "Molmo-72B-0924",
            "QVQ-72B-Preview",
            "Qwen2.5-VL-72B-Instruct",
            "InternVL3-78B",
        ]
        assert not any(row.doubtful for row in PUBLISHED["rewardbench"])
