"""The selective sample buffer and dynamic sampling, against the formulas of their distributions."""

from __future__ import annotations

import itertools
import json
import pickle
import statistics
import warnings

import numpy as np
import pytest

from triward import InvalidRequest
from triward.rewards import (
    SelectiveSampleBuffer,
    fill_batch,
    group_advantages,
    group_spreads,
    varied,
)

# Planted: three vanish, two of them not by exactly 0.
PLANTED = {"a": 2.0, "none": 0.0, "b": -1.0, "small": 0.05, "c": 0.5, "d": -4.0, "less": -0.1}
LARGE = {name: abs(value) for name, value in PLANTED.items() if abs(value) > 0.1}


def filled(**settings):
    buffer = SelectiveSampleBuffer(16, threshold=0.1, **settings)
    assert buffer.add([*PLANTED], [*PLANTED.values()]) == len(LARGE) == len(buffer)
    return buffer


def chi_square(counts, expected):
    """The statistic for counts and probabilities by the same names."""
    assert set(counts) <= set(expected)
    total = sum(counts.values())
    return sum((counts.get(k, 0) - total * p) ** 2 / (total * p) for k, p in expected.items())


def tally(items):
    counts = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return counts


def bound(categories):
    """A chi-square that chance exceeds once in about 100,000: Wilson and Hilferty's quantile."""
    k = categories - 1
    return k * (1 - 2 / (9 * k) + 4.265 * (2 / (9 * k)) ** 0.5) ** 3


def weights(alpha):
    raw = {name: size**alpha for name, size in LARGE.items()}
    return {name: value / sum(raw.values()) for name, value in raw.items()}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
class TestDistribution:
    def test_with_replacement(self, alpha):
        buffer, expected = filled(alpha=alpha, seed=1), weights(alpha)
        assert dict(zip(LARGE, buffer.probabilities, strict=True)) == pytest.approx(expected)
        drawn = buffer.draw(20_000, replace=True)
        counts = tally(each.sample for each in drawn)
        assert chi_square(counts, expected) < bound(len(expected))
        assert {each.sample: each.advantage for each in drawn} == {k: PLANTED[k] for k in LARGE}

    def test_without_replacement(self, alpha):
        """Every ordered pair: p_i p_j / (1 - p_i)."""
        buffer, first = filled(alpha=alpha, seed=2), weights(alpha)
        expected = {
            (i, j): first[i] * first[j] / (1 - first[i])
            for i, j in itertools.permutations(LARGE, 2)
        }
        assert sum(expected.values()) == pytest.approx(1)
        pairs = [tuple(each.sample for each in buffer.draw(2)) for _ in range(20_000)]
        assert chi_square(tally(pairs), expected) < bound(len(expected))

    def test_the_wrong_exponent_is_told_apart(self, alpha):
        """Else the two above show nothing."""
        counts = tally(each.sample for each in filled(alpha=alpha).draw(20_000, replace=True))
        assert chi_square(counts, weights(alpha + 0.2)) > bound(len(LARGE))


def test_all_of_them_once():
    buffer = filled()
    assert sorted(each.sample for each in buffer.draw(4)) == sorted(LARGE)
    assert buffer.draw(0) == [] and len(buffer) == 4
    assert SelectiveSampleBuffer(1).draw(0, replace=True) == []


def test_advantages_that_differ_beyond_a_floats_range():
    buffer = SelectiveSampleBuffer(3, alpha=40)
    buffer.add(["tiny", "huge"], [1e-30, -1e30])
    assert [each.sample for each in buffer.draw(2)] == ["huge", "tiny"]
    assert buffer.probabilities.tolist() == [0, 1]


class TestBounds:
    def test_the_oldest_leave_beyond_the_capacity(self):
        buffer = SelectiveSampleBuffer(3)
        buffer.add(list("abcde"), [1, 0, 1, 1, 1])
        assert {each.sample for each in buffer.draw(3)} == set("cde")

    def test_a_sample_leaves_after_its_age(self):
        buffer = SelectiveSampleBuffer(9, max_age=2)
        for name in "abcd":
            buffer.add([name], [1.0])
            ages = {each.sample: each.age for each in buffer.draw(len(buffer))}
            buffer.advance()
        assert ages == {"b": 2, "c": 1, "d": 0}
        assert {each.sample for each in buffer.draw(2)} == set("cd")

    @pytest.mark.parametrize("replace", [False, True])
    def test_no_more_than_there_are(self, replace):
        buffer = filled()
        count = 5
        if replace:
            assert len(buffer.draw(count, replace=True)) == 5
            buffer, count = SelectiveSampleBuffer(2), 1
        with pytest.raises(InvalidRequest, match=rf"count: {count} of {len(buffer)} samples"):
            buffer.draw(count, replace=replace)
        with pytest.raises(InvalidRequest, match="-1 of"):
            buffer.draw(-1, replace=replace)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"capacity": 0}, "capacity: must be at least 1, got 0"),
            ({"threshold": -0.1}, "threshold: must be 0 or more and finite, got -0.1"),
            ({"threshold": float("nan")}, "threshold: .* got nan"),
            ({"alpha": float("inf")}, "alpha: .* got inf"),
            ({"max_age": 0}, "max_age: must be at least 1, got 0"),
        ],
    )
    def test_settings_out_of_range(self, settings, message):
        with pytest.raises(InvalidRequest, match=message):
            SelectiveSampleBuffer(**{"capacity": 1, **settings})

    def test_an_advantage_that_is_no_number_keeps_nothing(self):
        buffer = filled()
        with pytest.raises(InvalidRequest, match=r"advantages\[1\]: nan is not finite"):
            buffer.add(["x", "y"], [1.0, float("nan")])
        with pytest.raises(InvalidRequest, match="advantages: 1 for 2 samples"):
            buffer.add(["x", "y"], [1.0])
        assert len(buffer) == 4


def draws(buffer):
    return [buffer.draw(2), buffer.draw(5, replace=True), buffer.draw(3)]


class TestState:
    def test_the_same_seed_draws_the_same(self):
        assert draws(filled(seed=3)) == draws(filled(seed=3)) != draws(filled(seed=4))

    @pytest.mark.parametrize("way", ["state", "json", "pickle"])
    def test_a_restored_one_draws_what_the_first_would(self, way):
        buffer = filled(seed=5, max_age=7)
        buffer.advance()
        buffer.draw(3)
        if way == "pickle":
            other = pickle.loads(pickle.dumps(buffer))
        else:
            state = buffer.state_dict()
            other = SelectiveSampleBuffer(16, threshold=0.1, max_age=7, seed=99)
            other.load_state_dict(json.loads(json.dumps(state)) if way == "json" else state)
        assert draws(other) == draws(buffer)
        for each in (other, buffer):
            each.add(["new"], [3.0])
            each.advance()
        assert draws(other) == draws(buffer)
        assert {each.age for each in other.draw(5)} == {1, 2}

    def test_a_state_is_not_the_buffer(self):
        buffer = filled()
        state = buffer.state_dict()
        before = pickle.dumps(state)
        buffer.add(["new"], [1.0])
        buffer.draw(2)
        assert pickle.dumps(state) == before

    @pytest.mark.parametrize(
        ("changes", "settings", "message"),
        [
            ({"other": 1}, {}, "state: must have samples, advantages"),
            ({"samples": []}, {}, "0 samples, 4 advantages and 4 times do not fit"),
            ({}, {"capacity": 3}, "with a capacity of 3"),
            ({}, {"threshold": 0.5}, "not above the threshold 0.5"),
            ({"now": 9}, {"max_age": 3}, "do not fit max_age 3"),
            ({"added": [0, 0, 0, 5]}, {}, "times"),
            ({"generator": {"bit_generator": "no"}}, {}, r"state\['generator'\]"),
        ],
    )
    def test_a_state_that_does_not_fit(self, changes, settings, message):
        state = {**filled().state_dict(), **changes}
        other = SelectiveSampleBuffer(**{"capacity": 16, "threshold": 0.1, **settings})
        with pytest.raises(InvalidRequest, match=message):
            other.load_state_dict(state)
        assert len(other) == 0


REWARDS = [1.0, 1.0, 1.0, 2.0, 2.01, 2.0, 3.0, 5.0, 4.0, 7.0]
IDS = ["x", "x", "x", "y", "y", "y", "z", "z", "z", "alone"]


def test_spreads_are_the_groups_deviations():
    spreads = dict(zip(IDS, group_spreads(REWARDS, IDS), strict=True))
    expected = {"x": 0.0, "y": statistics.stdev([2, 2.01, 2]), "z": 1.0, "alone": 0.0}
    assert spreads == pytest.approx(expected)
    assert spreads["x"] == 0
    assert {n for n, good in zip(IDS, varied(REWARDS, IDS), strict=True) if good} == {"y", "z"}
    assert varied(REWARDS, IDS, 0.1).tolist() == [False] * 6 + [True] * 3 + [False]
    with pytest.raises(InvalidRequest, match="threshold: must be 0 or more"):
        varied(REWARDS, IDS, -1)


def test_advantages_do_not_tell_a_small_spread_from_a_large_one():
    """Why groups are chosen by their rewards and not by normalised advantages."""
    small, large = group_advantages([0.0, 0.01, 0.0, 10.0], 2).reshape(2, 2)
    np.testing.assert_allclose(small, large, rtol=0.02)
    assert varied([0.0, 0.01, 0.0, 10.0], 2, 0.1).tolist() == [False, False, True, True]


def rounds(*spreads):
    """A round a list; a group of two with each spread. Counts what was generated."""
    made = []

    def generate():
        for number, each in enumerate(spreads):
            made.append(number)
            samples = [(number, place, k) for place in range(len(each)) for k in range(2)]
            yield samples, [sign * s / 2**0.5 for s in each for sign in (0.5, -0.5)], 2

    return generate(), made


class TestFilling:
    def test_until_the_batch_is_full(self):
        source, made = rounds([0, 2], [0.5, 4, 0], [3, 5], [1])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            batch = fill_batch(source, 3, threshold=0.4, max_rounds=9)
        assert made == [0, 1, 2]
        assert [group.samples[0][:2] for group in batch.groups] == [(0, 1), (1, 1), (2, 0)]
        assert (batch.full, batch.rounds, batch.seen, batch.kept) == (True, 3, 7, 4)
        assert batch.groups[1].samples == [(1, 1, 0), (1, 1, 1)]
        assert batch.groups[1].rewards == pytest.approx([2**0.5, -(2**0.5)])

    def test_the_last_round_is_told(self):
        source, made = rounds([0, 2], [0.1], [9])
        with pytest.warns(RuntimeWarning, match=r"1 of 3 groups after 2 rounds \(max_rounds 2\)"):
            batch = fill_batch(source, 3, threshold=0.4, max_rounds=2)
        assert made == [0, 1]
        assert (batch.full, len(batch.groups), batch.seen) == (False, 1, 3)

    def test_prompts_that_run_out_are_told(self):
        with pytest.warns(RuntimeWarning, match="0 of 1 groups after 1 rounds"):
            assert fill_batch(rounds([0])[0], 1, max_rounds=5).groups == []

    def test_groups_in_any_order(self):
        given = [(["a", "b", "c", "d"], [0.0, 5.0, 1.0, 5.0], [1, 2, 1, 2])]
        [group] = fill_batch(given, 1, max_rounds=1).groups
        assert (group.samples, group.rewards) == (["a", "c"], [0.0, 1.0])

    def test_wrong_numbers(self):
        with pytest.raises(InvalidRequest, match="rewards: 2 for 1 samples"):
            fill_batch([(["a"], [1.0, 2.0], 2)], 1, max_rounds=1)
        for size, most in ((0, 1), (1, 0)):
            with pytest.raises(InvalidRequest, match=f"at least 1, got {size}, {most}"):
                fill_batch([], size, max_rounds=most)
