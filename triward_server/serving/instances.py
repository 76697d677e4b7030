"""Instances of a forward model, as the metrics page shows them.

Triton gives a request to any instance that is free, and the answer does not say to which. So each
instance shows how many canaries it has answered, and what it scored.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..backend.metrics import CANARIES, CANARY, WORKING
from ..schema import ModelNames
from .repository import Canaries
from .triton_http import Series

Page = Callable[[], Sequence[Series]]  # reads the metrics; an empty one if there are none


class Instance(NamedTuple):
    """An instance; those of two versions have one name."""

    version: str
    instance: str


def answered(page: Sequence[Series], names: ModelNames) -> dict[Instance, float]:
    """Return a model's instances, each with the canaries that it has answered."""
    return {_place(each): each.value for each in _of(page, CANARIES, names)}


def silent(page: Sequence[Series], before: dict[Instance, float], names: ModelNames) -> list[str]:
    """Return the instances that have answered no canary since `before`, though they are free.

    Only of versions that have answered some: others may be loaded that nobody is sent to.
    """
    busy = {_place(each) for each in _of(page, WORKING, names) if each.value}
    now = answered(page, names)
    idle = {place for place, count in before.items() if now.get(place) == count}
    served = {place.version for place in before.keys() - idle}
    return sorted(place.instance for place in idle - busy if place.version in served)


def wrong(page: Sequence[Series], canaries: Canaries, names: ModelNames) -> list[str]:
    """Return the instances whose last canary scored otherwise than at export."""
    found: dict[Instance, dict[str, float]] = defaultdict(dict)
    for each in _of(page, CANARY, names):
        found[_place(each)][each.labels["response"]] = each.value
    return sorted(
        place.instance
        for place, scores in found.items()
        if canaries.of(names, place.version).problem([scores[name] for name in sorted(scores)])
    )


def _place(series: Series) -> Instance:
    return Instance(series.labels["version"], series.labels["instance"])


def _of(page: Sequence[Series], name: str, names: ModelNames) -> list[Series]:
    return [each for each in page if each.name == name and each.labels["model"] == names.forward]
