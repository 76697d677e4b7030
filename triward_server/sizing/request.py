"""The request that is planned for, as the engine's planner sees it: what it computes and holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from math import isfinite

import numpy as np
from qwen_vl_utils import vision_process

from ..config import ForwardConfig, PreprocessConfig, token_limit
from ..engine.geometry import Geometry
from ..engine.packing import Branch, MediaItem, SortedBatch
from ..engine.planning import Cost, plan, price
from ..errors import ConfigError
from ..intake.ixc import HD_NUM, HD_NUM_OF_SEVERAL
from ..intake.tiles import Tiles
from ..schema import Grid

_NO_PIXELS = np.empty(0, np.uint8)
_ALL_TOKENS = "--max-request-tokens"
_NO_PLACES = np.empty((3, 0), np.int32)


@dataclass(frozen=True)
class RequestShape:
    """A request: one prompt with its images, and N responses.

    Attributes:
        prompt_tokens: of its text, chat template included.
        response_tokens: of one response.
        responses: how many.
        images: in the prompt.
        image_size: width and height of each, in pixels.
        repeat_share: of requests whose prompt the prefix cache still has.
    """

    prompt_tokens: int
    response_tokens: int
    responses: int
    images: int = 0
    image_size: tuple[int, int] = (1024, 768)
    repeat_share: float = 0.0


@dataclass(frozen=True)
class Footing:
    """A shape in one model.

    Attributes:
        grid: patches of an image; None: the request has none.
        image_tokens: that all its images take.
        prompt: tokens, images included.
        total: tokens of the request, the prompt once.
        pixels: bytes of its images as they reach the model, uint8.
    """

    grid: Grid | None
    image_tokens: int
    prompt: int
    total: int
    pixels: int


@dataclass(frozen=True)
class Counts:
    """What a batch computes, in the units of the engine's `Cost`; it is linear in them."""

    tokens: float
    scores: float
    pairs: float
    patches: float
    media_tokens: float

    def flops(self, cost: Cost) -> float:
        """FLOPs in one model."""
        return (
            self.tokens * cost.per_token
            + self.scores * cost.per_score
            + self.pairs * cost.per_pair
            + self.patches * cost.per_patch
            + self.media_tokens * cost.per_media_token
        )


_UNITS = {
    "tokens": "per_token", "scores": "per_score", "pairs": "per_pair", "patches": "per_patch",
    "media_tokens": "per_media_token",
}  # fmt: skip
_FREE = Cost(0, 0, 0, 0, 0, 0, 0)


def count(ordered: SortedBatch) -> Counts:
    """Count what a batch computes: `planning.price` with one unit at a time."""
    units = {
        name: sum(row[2] for row in _prices(ordered, replace(_FREE, **{unit: 1})))
        for name, unit in _UNITS.items()
    }
    return Counts(**{field.name: float(units[field.name]) for field in fields(Counts)})


def _prices(ordered: SortedBatch, cost: Cost) -> Iterator[list[float]]:
    shown: frozenset[int] = frozenset()
    for index, branch in enumerate(ordered.branches):
        shared = int(ordered.shared[index])
        yield price(ordered, index, shared, shown, cost).tolist()
        shown |= branch.media


def micro_batches(
    ordered: SortedBatch, cost: Cost, config: ForwardConfig
) -> list[tuple[float, float]]:
    """Cut a batch as the engine does: tokens and bytes of each forward pass."""
    found = []
    for chosen in plan(ordered, cost, config):
        part = replace(
            ordered,
            branches=tuple(ordered.branches[i] for i in chosen),
            shared=np.array([0, *ordered.shared[chosen[1:]]], np.int64),
            cached=ordered.cached[chosen],
        )
        tokens, _, _, size = np.sum(list(_prices(part, cost)), axis=0).tolist()
        found.append((tokens, size + cost.pass_bytes))
    return found


def footing(shape: RequestShape, geometry: Geometry) -> Footing:
    """Return what a shape is in a model.

    Raises:
        ConfigError: the model reads no images, or such an image cannot be shown to it.
    """
    if not shape.images:
        size = shape.prompt_tokens + shape.responses * shape.response_tokens
        return Footing(None, 0, shape.prompt_tokens, size, 0)
    if geometry.image_token_id is None:
        raise ConfigError(f"--images {shape.images}: the model reads no images")
    grid = _grid(shape, geometry)
    tokens = shape.images * geometry.tokens(grid)
    prompt = shape.prompt_tokens + tokens
    pixels = shape.images * 3 * grid.patches * geometry.patch_size**2
    return Footing(grid, tokens, prompt, prompt + shape.responses * shape.response_tokens, pixels)


def _grid(shape: RequestShape, geometry: Geometry) -> Grid:
    """Patches of an image after resizing, by the rules of its family with their defaults."""
    width, height = shape.image_size
    side = geometry.patch_size * geometry.merge_size
    try:
        if geometry.tile:
            tiles = Tiles(geometry.tile * geometry.patch_size, geometry.patch_size)
            most = HD_NUM if shape.images == 1 else HD_NUM_OF_SEVERAL
            size = tiles.canvas_size(tiles.picture_size((height, width), most))
        else:
            low, high = vision_process.IMAGE_MIN_TOKEN_NUM, vision_process.IMAGE_MAX_TOKEN_NUM
            size = vision_process.smart_resize(
                height, width, factor=side, min_pixels=low * side**2, max_pixels=high * side**2
            )
    except ValueError as error:
        raise ConfigError(f"--image-size {width}x{height}: {error}") from None
    return Grid.of((*size, 3), geometry.patch_size)


def alike(
    shape: RequestShape, footing: Footing, geometry: Geometry, requests: int, seen: bool = False
) -> SortedBatch:
    """Make a batch of such requests, which share nothing with each other.

    Args:
        shape: of each.
        footing: of the shape.
        geometry: the model's.
        requests: how many.
        seen: whether the prefix cache has their prompts.
    """
    per_image = footing.image_tokens // max(1, shape.images)
    media: list[MediaItem] = []
    branches: list[Branch] = []
    shared: list[int] = []
    for request in range(requests):
        first = len(media)
        for index in range(first, first + shape.images):
            assert footing.grid is not None
            patches = geometry.patches(footing.grid)
            start = index * per_image
            media.append(MediaItem(_NO_PIXELS, footing.grid, b"", index, start, per_image, patches))
        shown = frozenset() if seen else frozenset(range(first, len(media)))
        pads = -1 - (first * per_image + np.arange(footing.image_tokens))
        length = footing.prompt + shape.response_tokens
        keys = np.concatenate([pads, np.arange(length - len(pads))]).astype(np.int64)
        for response in range(shape.responses):
            branches.append(Branch(request, response, keys, _NO_PLACES, footing.prompt, 0, shown))
            shared.append(footing.prompt if response else 0)
    cached = np.full(len(branches), footing.prompt if seen else 0, np.int64)
    return SortedBatch(tuple(branches), np.array(shared), tuple(media), False, cached)


def check_shape(
    shape: RequestShape, footing: Footing, geometry: Geometry, forward: ForwardConfig
) -> None:
    """Raise `ConfigError` where the server would refuse such a request, naming the limit's flag."""
    limits = PreprocessConfig()
    width, height = shape.image_size
    positions = token_limit(forward.max_tokens, geometry.max_tokens)
    longest = footing.prompt + shape.response_tokens
    for given, value, most, limit in (
        ("--responses", shape.responses, forward.max_responses, "--max-responses"),
        ("--images", shape.images, limits.max_media, "--max-media"),
        ("--image-size", width * height, limits.max_image_pixels, "--max-image-pixels"),
        ("--prompt-tokens, images, a response", longest, positions, "the model's positions"),
        ("--responses, all tokens", footing.total, forward.max_request_tokens, _ALL_TOKENS),
    ):
        if value > most:
            raise ConfigError(f"{given}: {value:,}, the limit is {most:,} ({limit})")


def at_least(field: str, value: float, least: float, most: float = float("inf")) -> None:
    """Raise `ConfigError` for a value outside its limits, or one that is no number."""
    if not isfinite(value) or not least <= value <= most:
        above = "" if most == float("inf") else f" and at most {most:,g}"
        raise ConfigError(f"{field} {value:,g}: must be at least {least:,g}{above}")
