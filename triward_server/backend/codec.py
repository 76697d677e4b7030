"""`Features` <-> the tensors between the two models, `schema.FORWARD_INPUTS`."""

from __future__ import annotations

import math

import numpy as np

from .. import schema
from ..engine.geometry import Geometry
from ..errors import InvalidRequest
from ..schema import Array, Features, Grid, TensorSpec, UInt8Array


def features_to_arrays(features: Features, patch_size: int) -> dict[TensorSpec, Array]:
    """Return the tensors of `reward_forward` for one request, without the leading dimension.

    Segment 0 of `segment_lengths` is the prompt; `pixels` is all media flattened, one behind the
    other; `grids` has a row (t, h, w) in patches for each, t pairs of frames of a video.
    """
    segments = [features.prompt_ids, *features.response_ids]
    grids = [Grid.of(item.shape, patch_size) for item in features.media]
    flat = [np.empty(0, np.uint8), *(item.reshape(-1) for item in features.media)]
    return {
        schema.INPUT_IDS: np.concatenate(segments),
        schema.SEGMENT_LENGTHS: np.array([len(s) for s in segments], np.int32),
        schema.PIXELS: np.concatenate(flat),
        schema.GRIDS: np.array(grids, np.int32).reshape(-1, 3),
        schema.SECONDS_PER_GRID: np.array(features.seconds_per_grid, np.float32),
    }


def arrays_to_features(
    input_ids: Array,
    segment_lengths: Array,
    pixels: Array,
    grids: Array,
    seconds_per_grid: Array,
    *,
    geometry: Geometry,
) -> Features:
    """Invert `features_to_arrays`; a trainer may have made the arrays itself.

    Raises:
        InvalidRequest: the arrays' sizes contradict each other.
    """
    lengths = segment_lengths.tolist()
    if not lengths or min(lengths) < 0 or sum(lengths) != len(input_ids):
        raise InvalidRequest(
            "segment_lengths",
            f"{len(lengths)} lengths of {sum(lengths)} tokens in all, the smallest "
            f"{min(lengths, default=0)}; input_ids has {len(input_ids)}",
        )
    prompt, *responses = np.split(input_ids, np.cumsum(lengths)[:-1])
    media = _split_media(prompt, pixels, grids, geometry)
    return Features(prompt, tuple(responses), media, tuple(seconds_per_grid.tolist()))


def _split_media(
    prompt: Array, pixels: Array, grids: Array, geometry: Geometry
) -> tuple[UInt8Array, ...]:
    """Split the media into items; a placeholder says whether its item is a video."""
    kinds = prompt[geometry.is_media(prompt)]
    shapes: list[tuple[int, ...]] = []
    used = 0
    for index, row in enumerate(grids.tolist()):
        # Where too few placeholders stand, `geometry.check` says so.
        video = kinds[used] == geometry.video_token_id if used < len(kinds) else row[0] != 1
        shapes.append(_shape(index, Grid(*row), bool(video), geometry))
        try:
            used += geometry.tokens(geometry.grid_of(shapes[-1]))
        except ValueError as error:  # the processor resizes no frame of such a shape
            raise InvalidRequest(f"grids[{index}]", f"{row}: {error}") from None
    sizes = [math.prod(shape) for shape in shapes]
    if sum(sizes) != len(pixels):
        raise InvalidRequest(
            "pixels", f"{len(pixels)} values were given, the media in grids have {sum(sizes)}"
        )
    parts = np.split(pixels, np.cumsum(sizes)[:-1]) if shapes else []
    return tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))


def _shape(index: int, grid: Grid, video: bool, geometry: Geometry) -> tuple[int, ...]:
    unit, side = geometry.unit, geometry.patch_size
    if min(grid) <= 0 or grid.h % unit or grid.w % unit or (grid.t != 1 and not video):
        kind = "a video is t x h x w" if video else "an image is 1 x h x w"
        raise InvalidRequest(f"grids[{index}]", f"{[*grid]}; {kind}, h and w multiples of {unit}")
    size = (grid.h * side, grid.w * side, 3)
    return (grid.t * schema.FRAMES_PER_GRID, *size) if video else size
