"""Workloads: conversations built from a seed, as callers of a reward server send them."""

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
class PromptGroup:
    """One prompt in the model card's form with N responses."""

    prompt: Messages
    responses: tuple[str, ...]

    def conversations(self) -> list[Messages]:
        """Return the group as N whole conversations."""
        return [[*self.prompt, {"role": "assistant", "content": r}] for r in self.responses]


@dataclass(frozen=True)
class Workload:
    """Groups to score.

    Attributes:
        groups: all requests of one pass.
        separate: whether each conversation is a request of its own.
    """

    groups: tuple[PromptGroup, ...]
    separate: bool = False

    def conversations(self) -> list[Messages]:
        """All conversations of one pass."""
        return [c for group in self.groups for c in group.conversations()]


@dataclass(frozen=True)
class GroupSizes:
    """Sizes of the groups that share a prompt. Lengths are in words, about 1.5 tokens each.

    Attributes:
        image: width and height; None: text only.
        prompt: words behind the image.
        response: from how many words to how many.
    """

    image: tuple[int, int] | None
    prompt: int
    response: tuple[int, int]


# About 1,000 tokens before the responses: for small models on CPUs, and for 7B, whose image alone
# takes 999 of them and whose responses take about 250.
SMALL_IMAGE = GroupSizes(image=(672, 504), prompt=350, response=(40, 120))
LARGE_IMAGE = GroupSizes(image=(1024, 768), prompt=40, response=(120, 210))
TEXT = GroupSizes(image=None, prompt=600, response=(40, 120))


def workloads(shape: GroupSizes = SMALL_IMAGE, seed: int = 0) -> dict[str, Workload]:
    """All workloads that are measured pass by pass, by name."""
    write = Writer(np.random.default_rng(seed))

    def group(responses: int) -> PromptGroup:
        prompt = write.prompt(shape.prompt, *([shape.image] if shape.image else []))
        return PromptGroup(prompt, tuple(write.text(*shape.response) for _ in range(responses)))

    sizes = [
        (140, 112), (336, 252), (504, 392), (224, 448), (700, 500), (84, 84), (280, 280), (392, 140)
    ]  # fmt: skip
    singles = tuple(
        PromptGroup(write.prompt(write.between(10, 250), size), (write.text(5, 150),))
        for size in sizes * 2
    )
    text_only = tuple(
        PromptGroup(write.prompt(write.between(10, 400)), (write.text(5, 200),)) for _ in range(16)
    )
    return {
        **({"singles": Workload(singles)} if shape.image else {}),
        "text-only": Workload(text_only),
        **{f"group-{n}": Workload((group(n),)) for n in (2, 8, 16, 64)},
        "separate-8": Workload((group(8),), separate=True),
    }


def epochs(seed: int) -> tuple[Workload, Workload]:
    """Two passes over the same images with other text: large pictures, short questions."""
    write = Writer(np.random.default_rng(seed))
    sizes = [(700, 500), (840, 616), (616, 700), (560, 560)]
    images = [photo(write.rng, *size) for size in sizes]

    def one_pass() -> Workload:
        prompts = [write.prompt(write.between(5, 30), image) for image in images]
        return Workload(tuple(PromptGroup(prompt, (write.text(5, 30),)) for prompt in prompts))

    return one_pass(), one_pass()


def odd_sizes(seed: int = 0) -> Workload:
    """Photographs that must all be resized, up and down."""
    write = Writer(np.random.default_rng(seed))
    sizes = [(1000, 750), (640, 480), (333, 221), (1280, 720), (90, 120), (450, 811)]
    return Workload(
        tuple(PromptGroup(write.prompt(20, size), (write.text(5, 30),)) for size in sizes)
    )


class Writer:
    """Draws texts and prompts from one random stream."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def between(self, low: int, high: int) -> int:
        """Draw a number from `low` to `high` - 1."""
        return int(self.rng.integers(low, high))

    def text(self, low: int, high: int) -> str:
        """Make `low` to `high` - 1 words."""
        return " ".join(self.rng.choice(_WORDS, self.between(low, high)))

    def prompt(self, words: int, *images: tuple[int, int] | Image.Image | bytes) -> Messages:
        """One user message: images (a size is drawn, bytes are an encoded file), then words."""
        pictures = [photo(self.rng, *i) if isinstance(i, tuple) else i for i in images]
        parts = [{"type": "image", "image": picture} for picture in pictures]
        text = {"type": "text", "text": self.text(words, words + 1)}
        return [{"role": "user", "content": [*parts, text]}]


def photo(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Make a smooth picture with noise, which neither compresses to nothing nor is pure noise."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [np.sin(rng.uniform(2, 30) * x + rng.uniform(2, 30) * y) for _ in range(3)]
    pixels = 127 + 90 * np.stack(waves, axis=-1) + rng.normal(0, 6, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
