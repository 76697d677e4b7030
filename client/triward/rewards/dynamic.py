"""Dynamic sampling: groups whose rewards say nothing are left out, until a batch is full."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from triward.errors import InvalidRequest
from triward.moments import Array, Rewards, finite_rewards
from triward.rewards.shaping import Groups, deviations_within, membership

Sample = TypeVar("Sample")
Round = tuple[Sequence[Sample], Rewards, Groups]


@dataclass(frozen=True)
class SampleGroup(Generic[Sample]):
    """A prompt's samples and their rewards, in the order in which they came."""

    samples: list[Sample]
    rewards: list[float]


@dataclass(frozen=True)
class Filled(Generic[Sample]):
    """A batch, and what it took.

    Attributes:
        groups: those kept, in the order in which they came; as many as asked for if `full`.
        full: False if the rounds ended first.
        rounds: how many were generated.
        seen: groups in them.
        kept: groups in them that were not left out; those beyond a full batch are cut off.
    """

    groups: list[SampleGroup[Sample]]
    full: bool
    rounds: int
    seen: int
    kept: int


def group_spreads(rewards: Rewards, groups: Groups) -> Array:
    """Return the std (n - 1) of each reward's group; 0 in a group of one. float64 [N].

    Arguments and errors are `group_advantages`'s.
    """
    values = finite_rewards(rewards, "rewards")
    member, counts = membership(groups, len(values))
    squares = np.bincount(member, deviations_within(values, member, counts) ** 2)
    return np.asarray(np.sqrt(squares / np.maximum(counts - 1, 1))[member], dtype=np.float64)


def varied(rewards: Rewards, groups: Groups, threshold: float = 0.0) -> npt.NDArray[np.bool_]:
    """Return True for each reward whose group's std is above a threshold; bool [N].

    With 0 it is DAPO's condition (Yu et al. 2025, arXiv:2503.14476, section 3.2) for rewards of
    rules. A reward model's are practically never equal, and need a threshold in their own unit.

    Raises:
        InvalidRequest: as for `group_spreads`, or the threshold is negative or not finite.
    """
    if not 0 <= threshold < math.inf:
        raise InvalidRequest(f"threshold: must be 0 or more and finite, got {threshold}")
    return group_spreads(rewards, groups) > threshold


def fill_batch(
    rounds: Iterable[Round[Sample]], size: int, *, threshold: float = 0.0, max_rounds: int
) -> Filled[Sample]:
    """Generate until a batch is full of groups whose spread is above a threshold, as DAPO does.

    Args:
        rounds: generates and scores the next prompts each time it is asked: samples, their rewards
            and groups as `group_advantages` takes them. Asked no more often than needed.
        size: groups of a full batch.
        threshold: see `varied`.
        max_rounds: the most rounds.

    Returns:
        The batch. If the rounds end before it is full, that is a RuntimeWarning, and it has
        fewer groups: none is made up, and none without a spread is taken in.

    Raises:
        InvalidRequest: see `varied`; or samples and rewards differ in number.
    """
    if size < 1 or max_rounds < 1:
        raise InvalidRequest(f"size, max_rounds: must be at least 1, got {size}, {max_rounds}")
    kept: list[SampleGroup[Sample]] = []
    number = seen = 0
    for samples, rewards, groups in islice(rounds, max_rounds):
        number += 1
        all_groups, good = _read(samples, rewards, groups, threshold)
        seen += all_groups
        kept += good
        if len(kept) >= size:
            break
    full = len(kept) >= size
    if not full:
        warnings.warn(
            f"dynamic sampling: {len(kept)} of {size} groups after {number} rounds "
            f"(max_rounds {max_rounds}): of {seen} groups the others' spread was not above "
            f"{threshold}",
            RuntimeWarning,
            stacklevel=2,
        )
    return Filled(kept[:size], full, number, seen, len(kept))


def _read(
    samples: Sequence[Sample], rewards: Rewards, groups: Groups, threshold: float
) -> tuple[int, list[SampleGroup[Sample]]]:
    """Return the number of a round's groups, and those that are varied."""
    values = finite_rewards(rewards, "rewards")
    if len(samples) != len(values):
        raise InvalidRequest(f"rewards: {len(values)} for {len(samples)} samples")
    member, counts = membership(groups, len(values))
    good = varied(values, member, threshold)
    found: dict[int, SampleGroup[Sample]] = {}
    for place in np.flatnonzero(good):
        group = found.setdefault(int(member[place]), SampleGroup([], []))
        group.samples.append(samples[place])
        group.rewards.append(float(values[place]))
    return len(counts), list(found.values())
