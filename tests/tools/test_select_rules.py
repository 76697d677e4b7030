"""What is decided from scores alone, against second computations and planted data."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest

from triward_tools.selection import (
    Columns,
    LengthConditioned,
    Limits,
    Pair,
    Pairing,
    Quantile,
    RobustOutliers,
    Threshold,
    best_of,
    best_of_n,
    best_of_n_curve,
    filter_rows,
    length_correlation,
    length_slope,
    make_pairs,
    pair_rows,
)
from triward_tools.selection.best import points


def test_the_best_is_the_first_of_the_highest():
    assert best_of([1.0, 3.0, 3.0, -2.0]) == 1
    assert best_of([-7]) == 0


@pytest.mark.parametrize("scores", [[], [1.0, math.nan], [math.inf], [[1.0]]])
def test_there_is_no_best_of_what_are_no_scores(scores):
    with pytest.raises(ValueError, match="scores"):
        best_of(scores)


def test_the_curve_is_the_mean_maximum_of_all_subsets():
    rng = np.random.default_rng(0)
    groups = [rng.normal(size=n) for n in (6, 6, 9)]
    for k, value in zip(range(1, 7), best_of_n_curve(groups, range(1, 7)), strict=True):
        subsets = [[max(each) for each in itertools.combinations(group, k)] for group in groups]
        assert value == pytest.approx(statistics.mean(map(statistics.mean, subsets)))


def test_a_curve_is_about_the_same_prompts_throughout():
    assert best_of_n_curve([[1.0, 3.0], [100.0]], [1, 2]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="no prompt has 3 scores"):
        best_of_n_curve([[1.0, 3.0]], [3])
    assert points([4, 4, 4, 2]) == [1, 2, 4]
    assert points([6, 6, 2]) == [1, 2, 4, 6]
    assert points([]) == []


def test_threshold_and_quantile():
    scores = [float(n) for n in range(101)]
    kept = Threshold(10, 90).fit(scores).keep(scores)
    assert kept.tolist() == [10 <= n <= 90 for n in range(101)]
    kept = Quantile(0.05, 0.5).fit(scores).keep(scores)
    assert kept.tolist() == [5 <= n <= 50 for n in range(101)]
    assert Threshold().fit([]).keep([1e300, -1e300]).all()
    assert Threshold(2.0).fit([]).reason(1.0) == "score 1 is below 2"


def test_lengths_are_whole_numbers():
    limits = Limits((1234567.0, 2345678.0), (0.0,) * 3, (1.0,) * 3)
    told = "score 2 is above 1, of responses with 1234567 to 2345677 characters"
    assert limits.reason(2.0, 1234567) == told
    assert [limits.side(score) for score in (-1.0, 0.5, 2.0)] == ["below", "", "above"]


@pytest.mark.parametrize(("side", "lost"), [("both", [3, 50]), ("low", [50]), ("high", [3])])
def test_planted_outliers_and_nothing_else_are_dropped(side, lost):
    scores = np.random.default_rng(1).uniform(-1, 1, 100)  # |M| < 1.4 without the planted ones
    scores[3], scores[50] = 9.0, -9.0
    kept = RobustOutliers(side=side).fit(scores).keep(scores)
    assert np.flatnonzero(~kept).tolist() == lost


def modified_z(scores):
    """Iglewicz and Hoaglin's, computed with other means."""
    median = statistics.median(scores)
    away = [abs(score - median) for score in scores]
    mad = statistics.median(away)
    if mad:
        return [0.6745 * (score - median) / mad for score in scores]
    mean = statistics.mean(away)
    return [(score - median) / (1.253314 * mean) if mean else 0.0 for score in scores]


@pytest.mark.parametrize("equal", [0, 30, 60])
def test_robust_outliers_are_those_of_the_modified_z_score(equal):
    """Of 50 scores; with more than half of them equal the MAD is 0."""
    scores = np.random.default_rng(2).standard_cauchy(50 if equal < 60 else 60)
    scores[:equal] = 0.25
    kept = RobustOutliers(limit=2.0).fit(scores).keep(scores)
    assert kept.tolist() == [abs(z) <= 2.0 for z in modified_z(scores.tolist())]
    assert kept.all() == (equal == 60)


def test_the_mean_deviation_takes_the_place_of_a_median_of_0():
    scores = [0.0] * 6 + [1.0, 2.0, 3.0, 4.0]  # on average 1 away from the median
    assert RobustOutliers(limit=2.0).fit(scores).high[0] == pytest.approx(2 * 1.253314)


def test_length_finds_what_a_global_rule_misses_and_keeps_long_good_answers():
    rng = np.random.default_rng(3)
    lengths = rng.integers(10, 1000, 500)
    scores = lengths / 100 + rng.uniform(-1, 1, 500)
    planted = int(np.flatnonzero(lengths < 60)[0])
    scores[planted] = 8.0  # usual among all, not among the short
    everywhere = RobustOutliers(3.5).fit(scores).keep(scores)
    assert everywhere.all()
    by_length = LengthConditioned(3.5).fit(scores, lengths).keep(scores, lengths)
    assert np.flatnonzero(~by_length).tolist() == [planted]
    best = int(np.argmax(lengths))
    short = RobustOutliers(3.5).fit(scores[lengths < 100])
    assert short.reason(scores[best])
    assert by_length[best]


def test_ranges_of_length_are_equal_counts_and_each_has_its_own_rule():
    rng = np.random.default_rng(4)
    lengths = rng.permutation(200)
    scores = rng.standard_cauchy(200) + lengths
    limits = LengthConditioned(2.0, bins=4).fit(scores, lengths)
    assert limits.edges == (50, 100, 150)
    expected = np.zeros(200, bool)
    for start in range(0, 200, 50):
        places = np.flatnonzero((lengths >= start) & (lengths < start + 50))
        expected[places] = [abs(z) <= 2.0 for z in modified_z(scores[places].tolist())]
    assert limits.keep(scores, lengths).tolist() == expected.tolist()
    assert 0 < expected.sum() < 200
    reasons = [bool(limits.reason(*each)) for each in zip(scores, lengths, strict=True)]
    assert reasons == (~expected).tolist()


def test_equal_lengths_share_a_range_and_small_ranges_are_joined():
    lengths = [5] * 40 + [6] * 3 + [7] * 40 + [8] * 4
    scores = list(range(len(lengths)))
    # 6 alone would be three, so 5 and 6 are one range; 8 alone would be four.
    assert LengthConditioned(bins=80).fit(scores, lengths).edges == (6,)
    assert LengthConditioned(bins=2).fit([0.0] * 12, [9] * 12).edges == ()
    with pytest.raises(ValueError, match="there are 9 scores, ranges of length need at least 10"):
        LengthConditioned().fit([0.0] * 9, [1] * 9)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Threshold(2, 1),
        lambda: Threshold(math.nan),
        lambda: Quantile(0.6, 0.5),
        lambda: Quantile(-0.1),
        lambda: RobustOutliers(0),
        lambda: RobustOutliers(side="left"),
        lambda: LengthConditioned(bins=0),
        lambda: RobustOutliers().fit([]),
        lambda: RobustOutliers().fit([1.0, math.nan]),
        lambda: LengthConditioned().fit([1.0] * 20),
        lambda: Pairing("worst-best"),
        lambda: Pairing(min_margin=2, max_margin=1),
        lambda: Pairing(min_margin=-1),
        lambda: Pairing(max_length_ratio=0.5),
        lambda: Pairing(length_penalty="none"),
        lambda: Pairing(length_penalty=math.nan),
        lambda: Pairing(max_pairs=0),
        lambda: make_pairs(["a"], [1.0, 2.0]),
        lambda: make_pairs(["a", "b"], [1.0, 2.0], length_penalty="auto"),
        lambda: Pairing(length_penalty="auto").pairs(["a", "b"], [1.0, 2.0]),
    ],
)
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError, match=r"got|are|must|have|need|above"):
        wrong()


TEXTS = ["mid", "worst", "best", "second"]
SCORES = [1.0, -4.0, 5.0, 4.0]


def found(**controls):
    pairs = make_pairs(TEXTS, SCORES, **controls)
    return [(TEXTS[pair.chosen], TEXTS[pair.rejected], pair.margin) for pair in pairs]


def test_strategies():
    assert found() == [("best", "worst", 9.0)]
    adjacent = [("mid", "worst", 5.0), ("second", "mid", 3.0), ("best", "second", 1.0)]
    assert found(strategy="adjacent") == adjacent
    everything = found(strategy="all")
    assert len(everything) == 6
    assert [margin for _, _, margin in everything] == [9.0, 8.0, 5.0, 4.0, 3.0, 1.0]
    scores = dict(zip(TEXTS, SCORES, strict=True))
    assert all(scores[a] - scores[b] == margin for a, b, margin in everything)


def test_controls():
    assert [m for _, _, m in found(strategy="all", min_margin=3.0, max_margin=8.0)] == [8, 5, 4, 3]
    assert [m for _, _, m in found(strategy="all", max_pairs=2)] == [9.0, 8.0]
    assert found(max_margin=8.0) == []  # the best and the worst have no substitute
    short = found(strategy="all", max_length_ratio=1.5)
    assert {(a, b) for a, b, _ in short} == {
        ("best", "worst"), ("best", "mid"), ("best", "second"), ("second", "worst"),
    }  # fmt: skip


def test_ties_and_equal_texts_are_never_paired():
    assert make_pairs(["a", "b"], [1.0, 1.0], strategy="all") == []
    assert make_pairs(["a", "a"], [1.0, 2.0], strategy="all") == []
    assert make_pairs(["a"], [1.0]) == []
    # The first of equal texts stands for both.
    assert make_pairs(["a", "b", "a"], [1.0, 2.0, 9.0], strategy="all") == [Pair(1, 0, 1.0)]
    assert make_pairs(["", "b"], [1.0, 2.0], max_length_ratio=10) == []
    assert make_pairs(["", "b"], [1.0, 2.0]) == [Pair(1, 0, 1.0)]


def test_a_penalty_on_length_turns_a_pair_round():
    texts, scores = ["x" * 2000, "x" * 100], [3.0, 2.0]
    assert make_pairs(texts, scores) == [Pair(0, 1, 1.0)]
    (pair,) = make_pairs(texts, scores, length_penalty=1.0)
    assert (pair.chosen, pair.rejected) == (1, 0)
    assert pair.margin == pytest.approx((2 - 0.1) - (3 - 2))


def planted(slope, prompts=200):
    """Scores that rise with length by `slope` for 1,000 characters within each prompt.

    Between prompts it is the other way round: those with long answers have low scores.
    """
    rng = np.random.default_rng(5)
    scores, lengths = [], []
    for prompt in range(prompts):
        counted = rng.integers(100, 300, 6) + 10 * prompt
        lengths.append(counted)
        scores.append(slope * counted / 1000 + rng.normal(0, 0.1, 6) - 0.2 * prompt)
    return scores, lengths


def test_the_slope_within_prompts_is_found():
    assert length_slope(*planted(4.0)) == pytest.approx(4.0, abs=0.2)
    assert length_slope(*planted(0.0)) == pytest.approx(0.0, abs=0.2)
    assert length_slope([[1.0, 2.0]], [[5, 5]]) == 0.0
    assert length_slope([], []) == length_correlation([], []) == 0.0
    # Against numpy's least squares with a constant for each prompt.
    scores, lengths = planted(4.0, prompts=20)
    prompts = np.repeat(np.eye(20), 6, axis=0)
    design = np.column_stack([np.concatenate(lengths) / 1000, prompts])
    fitted = np.linalg.lstsq(design, np.concatenate(scores), rcond=None)[0][0]
    assert length_slope(scores, lengths) == pytest.approx(fitted)


def test_the_correlation_is_that_of_what_varies_within_prompts():
    scores, lengths = planted(4.0)
    centred = [[each - np.mean(each) for each in groups] for groups in (scores, lengths)]
    expected = np.corrcoef(*(np.concatenate(each) for each in centred))[0, 1]
    assert length_correlation(scores, lengths) == pytest.approx(expected)
    assert expected > 0.9
    together = np.corrcoef(np.concatenate(scores), np.concatenate(lengths))[0, 1]
    assert together < 0


QUESTION = [{"role": "user", "content": "q"}]


def rows(count=40):
    """Rows with scores; of row n the response n % 4 is the best."""
    return [
        {
            "id": n,
            "messages": QUESTION,
            "responses": ["a", "bb", "ccc", "dddd"],
            "scores": [5.0 if place == n % 4 else place / 10 for place in range(4)],
        }
        for n in range(count)
    ]


HELD = Columns(scores="scores")


def test_rows_in_memory():
    chosen = list(best_of_n(rows(), columns=HELD))
    assert [row["index"] for row in chosen] == [n % 4 for n in range(40)]
    assert chosen[6] == {**rows()[6], "response": "ccc", "score": 5.0, "index": 2}
    kept = list(filter_rows(rows(), Threshold(maximum=1.0), columns=HELD))
    assert [len(row["responses"]) for row in kept] == [3] * 40
    assert kept[1]["responses"] == ["a", "ccc", "dddd"]
    assert kept[1]["scores"] == [0.0, 0.2, 0.3]
    (first, *_) = pair_rows(rows(), Pairing("adjacent", max_pairs=1), columns=HELD)
    assert first == {
        "id": 0, "prompt": QUESTION,
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "dddd"}],
        "score_chosen": 5.0, "score_rejected": 0.3, "margin": 4.7,
    }  # fmt: skip
    assert list(filter_rows([], Threshold(), columns=HELD)) == []


def test_an_automatic_penalty_takes_length_out():
    """Scores are the length and a little quality: only quality decides the pairs."""
    rng = np.random.default_rng(6)
    data = []
    for _ in range(200):
        lengths, quality = rng.integers(100, 900, 2), rng.permutation([0.0, 0.5])
        scores = [float(n / 100 + good) for n, good in zip(lengths, quality, strict=True)]
        names = ["good" if good else "poor" for good in quality]
        texts = [name + "x" * int(n) for name, n in zip(names, lengths - 4, strict=True)]
        data.append({"messages": QUESTION, "responses": texts, "scores": scores})

    def share(**controls):
        made = list(pair_rows(data, Pairing(**controls), columns=HELD))
        return np.mean([row["chosen"][0]["content"].startswith("good") for row in made])

    assert share() < 0.7
    assert share(length_penalty="auto") > 0.95


def test_a_prompt_with_images_becomes_placeholders_and_images():
    shown = [{"role": "user", "content": [{"type": "image", "image": "a.png"},
                                          {"type": "text", "text": "what?"}]}]  # fmt: skip
    data = [{**rows()[0], "messages": shown}, rows()[1]]
    first, second = pair_rows(data, columns=HELD)
    image, text = {"type": "image"}, {"type": "text", "text": "what?"}
    assert first["prompt"] == [{"role": "user", "content": [image, text]}]
    assert first["images"] == ["a.png"]
    # In data with images every row has the same form.
    assert second["prompt"] == [{"role": "user", "content": [{"type": "text", "text": "q"}]}]
    assert second["images"] == []


def test_parts_of_text_become_text_where_there_is_no_image():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    data = [{**rows()[0], "messages": [{"role": "user", "content": parts}]}]
    (row,) = pair_rows(data, columns=HELD)
    assert row["prompt"] == [{"role": "user", "content": "ab"}]
    assert "images" not in row


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"responses": []}, "rows[0]: responses: holds 0 responses"),
        ({"responses": "one"}, "rows[0]: needs a list of responses"),
        ({"scores": [1.0]}, "rows[0]: scores: holds 1 scores for 4 responses"),
        ({"scores": [1.0, 2.0, math.nan, 0.0]}, "rows[0]: scores[2]: must be a finite number"),
        ({"scores": None}, "rows[0]: scores: holds 1 scores for 4 responses"),
        ({"messages": [{"role": "user", "content": 3}]}, "rows[0]: messages[0].content: must be"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "v.mp4"}]}]},
            "rows[0]: a preference pair for TRL cannot hold a video",
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_named(change, error):
    with pytest.raises(ValueError) as caught:
        list(pair_rows([{**rows()[0], **change}], columns=HELD))
    assert str(caught.value).startswith(error)


def test_somebody_must_know_the_scores():
    with pytest.raises(ValueError, match="needs a client, or the name of the column"):
        list(best_of_n(rows()))
    with pytest.raises(ValueError, match="scores: there is no column 'reward', there are id, mess"):
        list(best_of_n(rows(), columns=Columns(scores="reward")))
    with pytest.raises(ValueError, match="name the column of messages, or those of prompt and"):
        list(filter_rows(rows(), Threshold(), columns=Columns(prompt="id", scores="scores")))
