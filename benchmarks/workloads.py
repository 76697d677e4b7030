"""What is measured: conversations built from a seed, as callers of a reward server send them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

Messages = list[dict[str, Any]]

_WORDS = (
    "the of and is a in to answer question image value bar chart purple highest because first "
    "second shows between while each larger colour axis therefore option correct not does"
).split()


@dataclass(frozen=True)
class Group:
    """One prompt in the model card's form with N responses."""

    prompt: Messages
    responses: tuple[str, ...]

    def conversations(self) -> list[Messages]:
        """The group as N whole conversations."""
        return [[*self.prompt, {"role": "assistant", "content": r}] for r in self.responses]


@dataclass(frozen=True)
class Workload:
    """Groups to score.

    Attributes:
        groups: all requests of one pass.
        separate: whether each conversation is a request of its own.
    """

    groups: tuple[Group, ...]
    separate: bool = False

    def conversations(self) -> list[Messages]:
        """All conversations of one pass."""
        return [c for group in self.groups for c in group.conversations()]


def workloads(seed: int = 0) -> dict[str, Workload]:
    """All workloads by name. Lengths are in words, about 1.5 tokens each here."""
    rng = np.random.default_rng(seed)

    def text(words: int) -> str:
        return " ".join(rng.choice(_WORDS, words))

    def prompt(words: int, *images: tuple[int, int]) -> Messages:
        parts: list[dict[str, Any]] = [
            {"type": "image", "image": photo(rng, *size)} for size in images
        ]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": text(words)}]}]

    def group(responses: int, *, image: tuple[int, int] = (672, 504), words: int = 350) -> Group:
        answers = tuple(text(int(rng.integers(40, 120))) for _ in range(responses))
        return Group(prompt(words, image), answers)

    singles = tuple(
        Group(prompt(int(rng.integers(10, 250)), size), (text(int(rng.integers(5, 150))),))
        for size in [(140, 112), (336, 252), (504, 392), (224, 448), (700, 500), (84, 84)] * 2
    )
    text_only = tuple(
        Group(prompt(int(rng.integers(10, 400))), (text(int(rng.integers(5, 200))),))
        for _ in range(16)
    )
    return {
        "singles": Workload(singles),
        "text-only": Workload(text_only),
        **{f"group-{n}": Workload((group(n),)) for n in (2, 8, 16, 64)},
        "separate-8": Workload((group(8),), separate=True),
    }


def photo(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A smooth picture with noise, so that it neither compresses to nothing nor is pure noise."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [np.sin(rng.uniform(2, 30) * x + rng.uniform(2, 30) * y) for _ in range(3)]
    pixels = 127 + 90 * np.stack(waves, axis=-1) + rng.normal(0, 6, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
