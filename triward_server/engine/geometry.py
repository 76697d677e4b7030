"""A model's geometry: its placeholders, patches and positions; and which features fit it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize

from ..config import ForwardConfig
from ..errors import InvalidRequest
from ..schema import Array, Features, Grid, Int32Array, UInt8Array


@dataclass(frozen=True)
class Geometry:
    """Properties of a model that packing needs.

    Attributes:
        image_token_id: the placeholder that one merged patch of an image takes in the text; None
            for a text model.
        patch_size: side of a vision patch in pixels.
        merge_size: patches that are merged into one token, along each side.
        vocab_size: ids are below this.
        max_tokens: positions that the model has.
        video_token_id: what `image_token_id` is, for videos.
        tokens_per_second: positions that a second of a video takes.
        video_limits: fewest and most pixels of a frame that the processor leaves as it is.
        padding_id: a conversation is scored at its last token of another id; None: at its last.
        any_padding: it is scored in front of the first token of that id, not of the last ones.
        read_id: what the last token of a conversation must be; None: anything.
        tile: side in patches of the tiles that images consist of. The tower reads each of them, and
            first the whole image as large as one; a token is a position. None: an image is read as
            it is, and its tokens have rows and columns.
    """

    image_token_id: int | None
    patch_size: int
    merge_size: int
    vocab_size: int
    max_tokens: int
    video_token_id: int | None = None
    tokens_per_second: int = 0
    video_limits: tuple[int, int] | None = None
    padding_id: int | None = None
    any_padding: bool = False
    read_id: int | None = None
    tile: int | None = None

    @property
    def unit(self) -> int:
        """Patches of which an image's sides are multiples."""
        return self.tile or self.merge_size

    @property
    def media_token_ids(self) -> tuple[int, ...]:
        """The placeholders: an image's and a video's; a text model has none."""
        ids = (self.image_token_id, self.video_token_id)
        return tuple(id_ for id_ in ids if id_ is not None)

    def is_media(self, ids: Array) -> Array:
        """Tell which of some ids are placeholders: integers [N] -> bool [N]."""
        found = np.zeros(len(ids), np.bool_)
        for placeholder in self.media_token_ids:  # np.isin takes twelve times as long for two
            found |= ids == placeholder
        return found

    def grid(self, pixels: UInt8Array) -> Grid:
        """Return the patches of an image [H, W, 3] or a video [T, H, W, 3]."""
        return self.grid_of(pixels.shape)

    def grid_of(self, shape: tuple[int, ...]) -> Grid:
        """Return the patches of a shape; H and W are multiples of a merged patch.

        A video's frames may be resized once more, as the processor does it.
        """
        *frames, height, width, channels = shape
        if frames and self.video_limits:
            side = self.patch_size * self.merge_size
            height, width = smart_resize(height, width, side, *self.video_limits)
        return Grid.of((*frames, height, width, channels), self.patch_size)

    def step(self, seconds: float) -> np.float32:
        """Positions from one pair of frames to the next, in float32 as the reference has it."""
        return np.float32(self.tokens_per_second) * np.float32(seconds)

    def read(self, ids: Int32Array) -> int:
        """Count the tokens of a conversation up to the one that is scored."""
        if self.padding_id is None:
            return len(ids)
        if self.any_padding:  # a padding that stands first counts as none
            return int(np.append(np.flatnonzero(ids == self.padding_id), len(ids))[0]) or len(ids)
        return int(np.flatnonzero(ids != self.padding_id).max(initial=-1)) + 1

    def tokens(self, grid: Grid) -> int:
        """Placeholders that a media item takes.

        Between tiles: a separator behind each row of tokens, and one behind the whole image.
        """
        if self.tile is None:
            return grid.tokens(self.merge_size)
        rows = (self.tile + grid.h) // self.merge_size
        return self.patches(grid) // self.merge_size**2 + rows + 1

    def patches(self, grid: Grid) -> int:
        """Patches of a media item that the tower reads."""
        return grid.patches + (self.tile or 0) ** 2

    def largest(self, tokens: int) -> Grid | None:
        """Return the grid of an image, rather square, that takes so many tokens or fewer.

        None: there is no such image.
        """
        fits = None
        grid = Grid(1, self.unit, self.unit)
        while self.tokens(grid) <= tokens:
            fits = grid
            grid = Grid(1, grid.w, max(grid.w, grid.h + self.unit))
        return fits


def check(features: Features, geometry: Geometry, limits: ForwardConfig) -> None:
    """Raise `InvalidRequest` unless the features fit the model and its limits.

    Ours always do; a caller of `reward_forward` may send anything.
    """
    responses = len(features.response_ids)
    if not responses:
        raise InvalidRequest("segment_lengths", "a prompt without a response was given")
    if responses > limits.max_responses:
        raise InvalidRequest(
            "segment_lengths", f"{responses} responses, the limit is {limits.max_responses}"
        )
    ids = np.concatenate([features.prompt_ids, *features.response_ids])
    if len(ids) > limits.max_request_tokens:
        raise InvalidRequest(
            "input_ids",
            f"the request has {len(ids)} tokens, the limit is {limits.max_request_tokens}",
        )
    if min(map(len, features.response_ids)) == 0:
        raise InvalidRequest("segment_lengths", "a response segment of 0 tokens was given")
    for index, response in enumerate(features.response_ids):
        if not geometry.read(np.concatenate([features.prompt_ids, response])):
            raise InvalidRequest(
                "input_ids", f"conversation {index} is nothing but padding (id {response[0]})"
            )
        if geometry.read_id not in (None, response[-1]):
            raise InvalidRequest(
                "input_ids",
                f"conversation {index} ends with id {response[-1]}, the head is read at "
                f"{geometry.read_id}",
            )
    outside = (ids < 0) | (ids >= geometry.vocab_size)
    if outside.any():
        at = int(outside.argmax())
        raise InvalidRequest(
            f"input_ids[{at}]", f"id {ids[at]}, the vocabulary has {geometry.vocab_size} entries"
        )
    grids = [geometry.grid(pixels) for pixels in features.media]
    _check_sides(features, grids, geometry)
    _check_placeholders(features, ids, grids, geometry)
    _check_seconds(features, grids, geometry)
    longest = max(features.token_counts)
    if longest > geometry.max_tokens:
        raise InvalidRequest(
            "input_ids", f"a conversation of {longest} tokens, the limit is {geometry.max_tokens}"
        )


def _check_sides(features: Features, grids: list[Grid], geometry: Geometry) -> None:
    unit = geometry.unit
    for index, (grid, pixels) in enumerate(zip(grids, features.media, strict=True)):
        if pixels.ndim == 4 and geometry.video_token_id is None:
            raise InvalidRequest(f"grids[{index}]", f"{[*grid]} is a video's, only images are read")
        if grid.h % unit or grid.w % unit or not grid.patches:
            raise InvalidRequest(
                f"grids[{index}]", f"{[*grid]}: rows and columns are no multiples of {unit}"
            )


def _check_placeholders(
    features: Features, ids: Int32Array, grids: list[Grid], geometry: Geometry
) -> None:
    placeholders = np.flatnonzero(geometry.is_media(ids))
    if placeholders.size and placeholders[-1] >= len(features.prompt_ids):
        raise InvalidRequest(
            f"input_ids[{placeholders[-1]}]", "a media placeholder stands behind the prompt"
        )
    sizes = [geometry.tokens(grid) for grid in grids]
    if len(placeholders) != sum(sizes):
        raise InvalidRequest(
            "input_ids",
            f"{len(placeholders)} media placeholders were given, the media take {sum(sizes)}",
        )
    runs = np.split(placeholders, np.cumsum(sizes)[:-1]) if sizes else []
    for index, (run, pixels) in enumerate(zip(runs, features.media, strict=True)):
        if run[-1] - run[0] != len(run) - 1:
            raise InvalidRequest(
                "input_ids",
                f"the {len(run)} placeholders of media item {index} do not stand together",
            )
        kind = geometry.media_token_ids[pixels.ndim == 4]
        if (ids[run] != kind).any():
            raise InvalidRequest(
                "input_ids", f"media item {index} has placeholders other than {kind} of its kind"
            )


def _check_seconds(features: Features, grids: list[Grid], geometry: Geometry) -> None:
    videos = [g for pixels, g in zip(features.media, grids, strict=True) if pixels.ndim == 4]
    given = features.seconds_per_grid
    if len(given) != len(videos):
        raise InvalidRequest(
            "seconds_per_grid", f"{len(given)} values were given for {len(videos)} videos"
        )
    for index, (grid, seconds) in enumerate(zip(videos, given, strict=True)):
        last = (grid.t - 1) * float(geometry.step(seconds))
        if not (seconds >= 0 and last < geometry.max_tokens):
            raise InvalidRequest(
                f"seconds_per_grid[{index}]",
                f"{seconds:g} s put the video's last frames at position {last:g}, the model has "
                f"{geometry.max_tokens} and none before 0",
            )
