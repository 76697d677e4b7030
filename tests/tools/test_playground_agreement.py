"""How far two models agree, and what the page says about them."""

from __future__ import annotations

import re
from itertools import combinations
from math import sqrt

import numpy as np
import pytest

from triward import InvalidRequest, ServerUnavailable
from triward_tools.playground.agreement import agreement, mean_ranks, places_of
from triward_tools.playground.asking import Reply
from triward_tools.playground.sides import Side, sides_page


def test_by_hand():
    # Orders: A 3 1 4 2 (best first: third, first, fourth, second), B third, fourth, first, second.
    found = agreement([3.0, 1.0, 4.0, 2.0], [0.2, 0.1, 0.9, 0.3])
    assert (found.pairs, found.same, found.opposite, found.ties) == (6, 5, 1, 0)
    assert (found.best, found.order) == (True, False)
    assert found.kendall == pytest.approx(4 / 6)
    assert found.spearman == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_ties_by_hand():
    # A ties the first two, B ties the last two; only (first, third) is decided by both.
    found = agreement([1.0, 1.0, 2.0], [1.0, 2.0, 2.0])
    assert (found.pairs, found.same, found.opposite, found.ties) == (3, 1, 0, 2)
    assert found.kendall == pytest.approx(1 / 2)  # 1 / sqrt(2 * 2)
    assert found.spearman == pytest.approx(0.5)  # ranks 1.5 1.5 3 and 1 2.5 2.5


def test_the_ends():
    scores = [0.5, -1.0, 7.0, 3.0]
    same, reverse = (
        agreement(scores, [10 * s for s in scores]),
        agreement(scores, [-s for s in scores]),
    )
    assert (same.kendall, same.spearman, same.order) == (1.0, pytest.approx(1.0), True)
    assert (reverse.kendall, reverse.spearman, reverse.best) == (-1.0, pytest.approx(-1.0), False)


def test_equal_scores_of_a_side_have_no_coefficient():
    found = agreement([1.0, 1.0], [1.0, 2.0])
    assert (found.kendall, found.spearman, found.ties) == (None, None, 1)


def test_many_against_other_formulas():
    """With ties, against the definitions, pair by pair, and numpy's correlation of ranks."""
    rng = np.random.default_rng(7)
    for _ in range(50):
        a, b = rng.integers(0, 6, (2, 12)).astype(float)
        pairs = list(combinations(range(12), 2))
        products = [np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]) for i, j in pairs]
        decided = [sum(x[i] != x[j] for i, j in pairs) for x in (a, b)]
        ranks = [[(x < v).sum() + ((x == v).sum() + 1) / 2 for v in x] for x in (a, b)]
        found = agreement(a.tolist(), b.tolist())
        assert found.kendall == pytest.approx(sum(products) / sqrt(decided[0] * decided[1]))
        assert found.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])
        assert mean_ranks(a.tolist()).tolist() == ranks[0]


def test_large_scores_have_an_order():
    assert agreement([3e38, -3e38], [1.0, 0.0]).kendall == 1.0


def test_places_keep_the_order_of_equal_scores():
    assert places_of([1.0, 3.0, 3.0, 0.0]) == [3, 1, 2, 4]


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([], [])])
def test_too_few(a, b):
    with pytest.raises(InvalidRequest, match="needs as many scores of both"):
        agreement(a, b)


class TestPage:
    def side(self, name, answer):
        return Side(name, f"{name.lower()}:8001", "reward", answer)

    def reply(self, *scores):
        return Reply(scores, (5,) * len(scores), 12.3)

    def test_both_sides_and_their_differences(self):
        sides = [
            self.side("A", self.reply(1.0, -2.0, 0.5)),
            self.side("B", self.reply(0.25, 0.5, 3.0)),
        ]
        page = sides_page(["x", "<b>y</b>", "z"], sides)
        assert page.count("<li>") == 3 and page.count('<rect class="bar') == 6
        assert "&lt;b&gt;y&lt;/b&gt;" in page
        assert "A, reward at a:8001" in page and "best first: 1 &gt; 3 &gt; 2" in page.replace(
            " > ", " &gt; "
        )
        assert re.findall(r"B minus A ([^;]*);", page) == ["\u22120.7500", "+2.5000", "+2.5000"]
        assert "place 1 in A, 3 in B" in page and "place 3 in A, 2 in B" in page
        assert "They have different best responses." in page
        # One scale: from -2 to 3.
        bars = re.findall(r'class="bar(?: below)?" x="([\d.]+)" width="([\d.]+)"', page)
        assert [tuple(map(float, bar)) for bar in bars] == [
            (40, 20), (40, 5), (0, 40), (40, 10), (40, 10), (40, 60)]  # fmt: skip

    def test_bars_begin_at_zero(self):
        sides = [self.side("A", self.reply(1.0, 2.0)), self.side("B", self.reply(3.0, 4.0))]
        bars = re.findall(r'class="bar" x="([\d.]+)" width="([\d.]+)"', sides_page("xy", sides))
        assert [tuple(map(float, bar)) for bar in bars] == [(0, 25), (0, 75), (0, 50), (0, 100)]

    def test_one_error_leaves_the_other_side(self):
        gone = ServerUnavailable("b:8001: no connection: <refused>")
        page = sides_page(["x", "y"], [self.side("A", self.reply(1.0, 2.0)), self.side("B", gone)])
        assert 'role="alert">B, reward at b:8001: b:8001: no connection: &lt;refused&gt;' in page
        assert page.count('class="bar"') == 2
        assert "Agreement" not in page and "B minus A" not in page

    def test_two_errors_are_two_sentences(self):
        sides = [self.side(name, ServerUnavailable(f"{name} is gone")) for name in "AB"]
        page = sides_page(["x", "y"], sides)
        assert page.count('role="alert"') == 2 and "<li>" not in page
