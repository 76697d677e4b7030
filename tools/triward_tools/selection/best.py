"""The best of N responses, and what more of them would bring."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import comb

import numpy as np

from triward_tools.selection.limits import Floats, Numbers, finite_scores


def best_of(scores: Numbers) -> int:
    """Index of the highest score; of equal ones the first.

    Raises:
        ValueError: there is none, or one is not finite.
    """
    found = finite_scores(scores)
    if not len(found):
        raise ValueError("there are no scores to choose from")
    return int(np.argmax(found))


def best_of_n_curve(groups: Iterable[Numbers], ks: Sequence[int]) -> list[float]:
    """Return the expected score of the best of k responses, for each k.

    Of a group of n scores it is the mean maximum of all its subsets of k, so it is unbiased and
    needs no draw at random: the i-th lowest score is the highest of comb(i - 1, k - 1) of the
    comb(n, k) subsets (Tang et al., Showing Your Work Doesn't Always Work, ACL 2020). A point is
    the mean over the groups.

    Args:
        groups: scores of the responses to each prompt. Groups with fewer than max(ks) are left
            out, so that all points tell of the same prompts.
        ks: each at least 1.

    Raises:
        ValueError: no group is large enough, or a score is not finite.
    """
    if not len(ks) or min(ks) < 1:
        raise ValueError(f"ks must be numbers from 1 on, got {list(ks)}")
    totals, count = np.zeros(len(ks)), 0
    for found in map(finite_scores, groups):
        if len(found) >= max(ks):
            ordered = np.sort(found)
            totals += [ordered @ _weights(len(found), k) for k in ks]
            count += 1
    if not count:
        raise ValueError(f"no prompt has {max(ks)} scores")
    return [float(total) / count for total in totals]


def points(sizes: Sequence[int]) -> list[int]:
    """Return the k to show for groups of these sizes: 1, 2, 4, ... and what half of them reach."""
    if not len(sizes):
        return []
    last = sorted(sizes, reverse=True)[(len(sizes) - 1) // 2]
    return sorted({1 << power for power in range(int(last).bit_length())} | {int(last)})


@lru_cache(maxsize=1024)
def _weights(n: int, k: int) -> Floats:
    """In how many of the subsets each score is the highest, from the lowest score on."""
    total = comb(n, k)
    return np.array([comb(place, k - 1) / total for place in range(n)])
