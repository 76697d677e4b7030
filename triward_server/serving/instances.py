"""Instances of a forward model, as the metrics page shows them.

Triton gives a request to any instance that is free, and the answer does not say to which. So each
instance shows how many canaries it has answered, and what it scored.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from ..backend.metrics import CANARIES, CANARY, WORKING
from ..schema import ModelNames
from .repository import Canaries
from .triton_http import Series

Page = Callable[[], Sequence[Series]]  # reads the metrics; an empty one if there are none


def answered(page: Sequence[Series], names: ModelNames) -> dict[str, float]:
    """Return a model's instances, each with the canaries that it has answered."""
    return {m.labels["instance"]: m.value for m in _of(page, CANARIES, names)}


def silent(page: Sequence[Series], before: dict[str, float], names: ModelNames) -> list[str]:
    """Return the instances that have answered no canary since `before`, though they are free."""
    busy = {m.labels["instance"] for m in _of(page, WORKING, names) if m.value}
    now = answered(page, names)
    return sorted({name for name, count in before.items() if now.get(name) == count} - busy)


def wrong(page: Sequence[Series], canaries: Canaries, names: ModelNames) -> list[str]:
    """Return the instances whose last canary scored otherwise than at export."""
    found: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for each in _of(page, CANARY, names):
        labels = each.labels
        found[labels["instance"], labels["version"]][labels["response"]] = each.value
    return sorted(
        instance
        for (instance, version), scores in found.items()
        if canaries.of(names, version).problem([scores[place] for place in sorted(scores)])
    )


def _of(page: Sequence[Series], name: str, names: ModelNames) -> list[Series]:
    return [each for each in page if each.name == name and each.labels["model"] == names.forward]
