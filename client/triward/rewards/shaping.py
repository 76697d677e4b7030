"""Shaping of scores before a policy learns from them.

All standard deviations divide by n - 1, as torch's does and with it TRL's, verl's and OpenRLHF's.
Everything is float64, and what is not finite in float32, as scores are, is refused.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from triward.errors import InvalidRequest
from triward.moments import EPS, Array, Rewards, RunningMoments, as_list, finite_rewards

Groups = int | Sequence[Hashable] | npt.NDArray[Any]


def group_advantages(
    rewards: Rewards, groups: Groups, *, scale: str | None = "group", eps: float = EPS
) -> Array:
    """(r - mean of its group) / (std + eps), the advantages of GRPO.

    Shao et al. 2024, arXiv:2402.03300, section 4.1.2. Without a scale it is Dr. GRPO's (Liu et al.
    2025, arXiv:2503.20783). A group of one, and one of equal rewards, has advantage 0.

    Args:
        rewards: finite, [N].
        groups: the id of each reward's prompt, in any order; or a group's size, for groups that
            stand one after another.
        scale: whose std divides: "group", "batch" (all N rewards, TRL's `scale_rewards="batch"`),
            or None.
        eps: added to the std. TRL has 1e-4, verl 1e-6, OpenRLHF 1e-9.

    Returns:
        float64 [N].

    Raises:
        InvalidRequest: a reward is not finite, or the groups do not fit.
    """
    if scale not in ("group", "batch", None):
        raise ValueError(f"scale must be 'group', 'batch' or None, not {scale!r}")
    values = finite_rewards(rewards, "rewards")
    member, counts = membership(groups, len(values))
    deviations = deviations_within(values, member, counts)
    if scale is None:
        return deviations
    if scale == "batch":
        std = np.full_like(values, values.std(ddof=1) if len(values) > 1 else 0.0)
    else:
        squares = np.bincount(member, deviations**2)
        std = np.sqrt(squares / np.maximum(counts - 1, 1))[member]
    # With eps 0, too, equal rewards are 0 and not 0 / 0.
    divisor = std + eps
    return np.divide(deviations, divisor, out=np.zeros_like(values), where=divisor > 0)


def leave_one_out(rewards: Rewards, groups: Groups) -> Array:
    """r - mean of the others in its group, the advantages of RLOO.

    Ahmadian et al. 2024, arXiv:2402.14740. A group of one has no others: advantage 0,
    as in TRL. Arguments, result and errors are `group_advantages`'s.
    """
    values = finite_rewards(rewards, "rewards")
    member, counts = membership(groups, len(values))
    # r - (sum - r) / (n - 1) = (r - mean) * n / (n - 1)
    scale: Array = counts / np.maximum(counts - 1, 1)
    return deviations_within(values, member, counts) * scale[member]


def clip_rewards(rewards: Rewards, low: float, high: float) -> Array:
    """Each reward, but not below `low` nor above `high`; float64 [N].

    Raises:
        InvalidRequest: a reward is not finite.
    """
    return np.clip(finite_rewards(rewards, "rewards"), *_range(low, high))


def mix(
    components: Mapping[str, Sequence[float | None] | npt.NDArray[Any]],
    weights: Mapping[str, float],
    *,
    optional: Collection[str] = (),
) -> Array:
    """Return the weighted sum of a reward model's and rules' rewards, as format and accuracy.

    Such hybrids are common; Skywork R1V2 (arXiv:2504.16656) is one. For components on one scale
    (TRL's `normalize_then_sum`) hand over the `group_advantages` of each.

    Args:
        components: rewards by name, each [N].
        weights: of each component, by the same names.
        optional: names of the rules whose None means that they do not apply, as in TRL: nothing is
            added for them. In all others, so in a reward model's, None is an error and not 0.

    Returns:
        float64 [N].

    Raises:
        InvalidRequest: a reward is missing or not finite, or no component applies to a row; or
            names or lengths differ.
    """
    if not components or set(components) != set(weights) or not set(optional) <= set(components):
        names = f"{sorted(components)}, {sorted(weights)} and {sorted(optional)}"
        raise InvalidRequest(f"components, weights and optional must name the same, got {names}")
    lengths = {name: len(rewards) for name, rewards in components.items()}
    if len(set(lengths.values())) > 1:
        raise InvalidRequest(f"components must be equally long, got {lengths}")
    size = next(iter(lengths.values()))
    total, applied = np.zeros(size), np.zeros(size, dtype=bool)
    for name, given in components.items():
        rewards = as_list(given)
        there = np.array([name not in optional or reward is not None for reward in rewards], bool)
        known = [reward if here else 0.0 for reward, here in zip(rewards, there, strict=True)]
        total += _weight(weights[name], name) * finite_rewards(known, f"components[{name!r}]")
        applied |= there
    if not applied.all():
        raise InvalidRequest(f"row {int(np.argmin(applied))}: no component applies")
    return total


@dataclass(frozen=True)
class Shape:
    """Shaping of a model's scores: standardise, clip, weigh, in this order.

    Attributes:
        running: standardise by it.
        learn: take the scores into `running` first; off, it stays as it was loaded.
        center: subtract its mean, too.
        clip: lowest and highest reward.
        weight: what each is multiplied with at last.
    """

    running: RunningMoments | None = None
    learn: bool = True
    center: bool = True
    clip: tuple[float, float] | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:  # noqa: D105
        _weight(self.weight, "model")
        if self.clip is not None:
            _range(*self.clip)

    def __call__(self, scores: Sequence[float]) -> list[float]:
        """Return the rewards of scores [N], which trainers call together or one by one.

        Raises:
            InvalidRequest: a score is not finite.
        """
        values = finite_rewards(scores, "scores")
        if self.running is not None and len(values):
            if self.learn:
                self.running.update(values)
            values = self.running.normalise(values, center=self.center)
        if self.clip is not None:
            values = clip_rewards(values, *self.clip)
        return [float(value) for value in values * self.weight]


def shape_of(settings: Shape | Mapping[str, Any] | None) -> Shape | None:
    """Return a shape, also from a trainer's configuration, whose keys are `Shape`'s.

    There `running` is true, or what `RunningMoments.state_dict` gave.

    Raises:
        InvalidRequest: a key or value is wrong.
    """
    if settings is None or isinstance(settings, Shape):
        return settings
    options = dict(settings)
    running, clip = options.pop("running", None) or None, options.pop("clip", None)
    if running is True and not options.get("learn", True):
        raise InvalidRequest("shape: with learn off, running must be what state_dict gave")
    try:
        if running is not None and not isinstance(running, RunningMoments):
            running = RunningMoments(**({} if running is True else running))
        return Shape(running=running, clip=clip if clip is None else tuple(clip), **options)
    except TypeError as error:
        raise InvalidRequest(f"shape: {error}") from None


def with_rules(
    scores: Sequence[float],
    rules: Mapping[str, Sequence[float | None]],
    weights: Mapping[str, float],
) -> list[float]:
    """Mix a model's rewards, by weight 1, with those of rules, whose None does not apply.

    Raises:
        InvalidRequest: see `mix`.
    """
    if "model" in {*rules, *weights}:
        raise InvalidRequest("rules: 'model' is the name of the model's own reward")
    components = {"model": scores, **rules}
    mixed = mix(components, {"model": 1.0, **weights}, optional=list(rules))
    return [float(value) for value in mixed]


def membership(groups: Groups, count: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return each reward's group, counted from 0, and each group's size."""
    if isinstance(groups, (int, np.integer)):
        if groups < 1 or count % groups:
            raise InvalidRequest(f"groups: {count} rewards are not whole groups of {groups}")
        member = np.arange(count) // groups
    else:
        ids = groups.tolist() if hasattr(groups, "tolist") else groups
        if len(ids) != count:
            raise InvalidRequest(f"groups: {len(ids)} for {count} rewards")
        places: dict[Hashable, int] = {}
        member = np.array([places.setdefault(name, len(places)) for name in ids], dtype=np.intp)
    return member, np.bincount(member)


def deviations_within(
    values: Array, member: npt.NDArray[np.intp], counts: npt.NDArray[np.intp]
) -> Array:
    """Return each one's deviation from the mean of its group; exactly 0 where all are equal."""
    # Off the group's first, or the mean of equal rewards could be off by a rounding, which a small
    # std would make large.
    first = np.unique(member, return_index=True)[1]
    shifted: Array = values - values[first][member]
    mean: Array = np.bincount(member, shifted) / counts
    deviations: Array = shifted - mean[member]
    return deviations


def _range(low: Any, high: Any) -> tuple[float, float]:
    if isinstance(low, str) or isinstance(high, str) or not low < high:  # also for a NaN
        raise InvalidRequest(
            f"clip: the lowest reward must be below the highest, got {low}, {high}"
        )
    return low, high


def _weight(weight: float, name: str) -> float:
    if not math.isfinite(weight):
        raise InvalidRequest(f"weights[{name!r}]: {weight} is not finite")
    return float(weight)
