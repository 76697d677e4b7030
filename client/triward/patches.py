"""A processor's normalised patches -> the pixels that they were made from.

transformers' Qwen2VLImageProcessor resizes to 8-bit pixels, normalises them and cuts them into
patches. The first of these is all that the server needs; the others it does itself, on the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from triward.errors import InvalidRequest
from triward.tokens import as_array

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

# OpenAI CLIP's, which Qwen2-VL's and Qwen2.5-VL's processors have.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)

_CHANNELS = 3
_FRAMES = 2  # in one patch; an image fills both
# Of 255: float32 is exact to 1e-4 here, bfloat16 errs by 0.5 and more.
_TOLERANCE = 0.05


def pixels_of(
    pixel_values: ArrayLike,
    grid_thw: ArrayLike,
    *,
    video: bool = False,
    patch_size: int = 14,
    merge_size: int = 2,
    mean: Sequence[float] = _MEAN,
    std: Sequence[float] = _STD,
) -> list[NDArray[np.uint8]]:
    """Return the pixels behind `pixel_values` and `image_grid_thw`, for `score_tokens`.

    The exact inverse: a pixel v of channel c is ((v / 255) - mean[c]) / std[c] in `pixel_values`.

    Args:
        pixel_values: floats [sum of t*h*w, 3 * 2 * patch_size**2], of images or of videos
            (`pixel_values_videos`).
        grid_thw: integers [items, 3]: pairs of frames, rows and columns in patches.
        video: whether the items are videos.
        patch_size: pixels of a patch's side.
        merge_size: patches of a merged patch's side.
        mean: the processor's `image_mean`.
        std: the processor's `image_std`.

    Returns:
        For each image uint8 [H, W, 3], for each video uint8 [T, H, W, 3].

    Raises:
        InvalidRequest: sizes that contradict each other, or values that no pixels became.
    """
    import numpy as np

    grids = _grids(grid_thw, merge_size, video)
    values = as_array(pixel_values, "pixel_values")
    width = _CHANNELS * _FRAMES * patch_size**2
    rows = [t * h * w for t, h, w in grids]
    if values.shape != (sum(rows), width):
        raise InvalidRequest(
            f"pixel_values: must be [{sum(rows)}, {width}] by grid_thw, got {list(values.shape)}"
        )
    scale, shift = (np.array(c, np.float64)[:, None] for c in (std, mean))
    spread = values.astype(np.float64).reshape(len(values), _CHANNELS, -1)
    pixels = _rounded((spread * scale + shift) * 255)
    items = np.split(pixels, np.cumsum(rows)[:-1])
    frames = [
        _unfold(item, grid, patch_size, merge_size) for item, grid in zip(items, grids, strict=True)
    ]
    return frames if video else [_still(item, index) for index, item in enumerate(frames)]


def _grids(values: ArrayLike, merge_size: int, video: bool) -> list[tuple[int, int, int]]:
    array = as_array(values, "grid_thw")
    if array.ndim != 2 or array.shape[1] != 3 or not len(array) or array.dtype.kind not in "iu":
        raise InvalidRequest(
            f"grid_thw: must be integers [items, 3], got {array.dtype} {list(array.shape)}"
        )
    grids = [(int(t), int(h), int(w)) for t, h, w in array]
    for index, grid in enumerate(grids):
        t, h, w = grid
        if min(grid) < 1 or h % merge_size or w % merge_size or not (video or t == 1):
            wanted = "t, h, w" if video else "1, h, w"
            raise InvalidRequest(
                f"grid_thw[{index}]: must be {wanted}, h and w multiples of {merge_size}, "
                f"got {list(grid)}"
            )
    return grids


def _rounded(pixels: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Whole numbers from 0 to 255, which they must be already but for rounding."""
    import numpy as np

    whole = np.rint(pixels)
    # A NaN is not near to anything.
    near = (np.abs(pixels - whole) <= _TOLERANCE) & (whole >= 0) & (whole <= 255)
    if not near.all():
        row = int((~near).any(axis=(1, 2)).argmax())
        worst = pixels[row][~near[row]][0]
        raise InvalidRequest(
            f"pixel_values[{row}]: stands for a pixel of {worst:.6g}, not a whole number from 0 to "
            "255; float32 values and the processor's own mean and std are needed"
        )
    return whole.astype(np.uint8)


def _unfold(
    patches: NDArray[np.uint8], grid: tuple[int, int, int], patch: int, merge: int
) -> NDArray[np.uint8]:
    """Patches in the processor's order -> frames [T, H, W, 3]."""
    t, h, w = grid
    blocks = patches.reshape(
        t, h // merge, w // merge, merge, merge, _CHANNELS, _FRAMES, patch, patch
    )
    # In the order of a picture: pairs of frames, frame, rows of blocks, of patches, of pixels, ...
    frames = blocks.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5)
    return frames.reshape(t * _FRAMES, h * patch, w * patch, _CHANNELS)


def _still(frames: NDArray[np.uint8], index: int) -> NDArray[np.uint8]:
    """Return the one picture that both frames of an image are."""
    if (frames[0] != frames[1]).any():
        raise InvalidRequest(f"pixel_values: item {index} has two different frames, as a video has")
    still: NDArray[np.uint8] = frames[0]
    return still
