"""Token ids and pixels that a trainer has already -> the tensors of the forward model.

A caller of `score_tokens` comes past the server's preprocessing: nothing is decoded, resized or
tokenized again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from triward import protocol
from triward.errors import InvalidRequest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

_MERGE = 2  # patches that the vision tower merges into one token, on each side
_FRAMES = 2  # of a video in one patch
_LARGEST_ID = 2**31 - 1


@dataclass(frozen=True)
class TokenRequest:
    """A row for the forward model.

    Attributes:
        tensors: its inputs, without the leading dimension.
        responses: how many scores come back.
    """

    tensors: dict[protocol.TensorSpec, NDArray[Any]]
    responses: int


def token_request(
    prompt_ids: ArrayLike,
    response_ids: Sequence[ArrayLike],
    media: Sequence[ArrayLike],
    seconds_per_grid: ArrayLike,
    patch_size: int,
) -> TokenRequest:
    """Check and join everything; the arguments are those of `RewardClient.score_tokens`.

    Raises:
        InvalidRequest: the input cannot be sent; the message names the place.
    """
    import numpy as np

    segments = [_ids(prompt_ids, "prompt_ids"), *_responses(response_ids)]
    items = [_item(item, f"media[{i}]", patch_size) for i, item in enumerate(_items(media))]
    seconds = _seconds(seconds_per_grid, sum(item.ndim == 4 for item in items))
    grids = [_grid(item, patch_size) for item in items]
    flat = [np.empty(0, np.uint8), *(item.reshape(-1) for item in items)]
    tensors: dict[protocol.TensorSpec, NDArray[Any]] = {
        protocol.INPUT_IDS: np.concatenate(segments),
        protocol.SEGMENT_LENGTHS: np.array([len(ids) for ids in segments], np.int32),
        protocol.PIXELS: np.concatenate(flat),
        protocol.GRIDS: np.array(grids, np.int32).reshape(-1, 3),
        protocol.SECONDS_PER_GRID: seconds,
    }
    return TokenRequest(tensors, len(segments) - 1)


def _responses(values: Sequence[ArrayLike]) -> list[NDArray[np.int32]]:
    responses = [_ids(ids, f"response_ids[{i}]") for i, ids in enumerate(_rows(values))]
    if not responses:
        raise InvalidRequest("response_ids: holds 0 responses, needs at least 1")
    for index, ids in enumerate(responses):
        if not len(ids):
            raise InvalidRequest(f"response_ids[{index}]: holds 0 tokens, needs at least 1")
    return responses


def _rows(values: Any) -> list[Any]:
    if isinstance(values, (str, bytes, dict)) or not hasattr(values, "__iter__"):
        raise InvalidRequest(
            f"response_ids: must be a list of token lists, got {type(values).__name__}"
        )
    return list(values)


def _items(values: Any) -> list[Any]:
    # One array would be taken for a list of its rows.
    if not isinstance(values, (list, tuple)):
        raise InvalidRequest(f"media: must be a list of arrays, got {type(values).__name__}")
    return list(values)


def _ids(values: ArrayLike, place: str) -> NDArray[np.int32]:
    """Token ids, int32 [L]."""
    import numpy as np

    array = as_array(values, place)
    if array.ndim != 1:
        raise InvalidRequest(f"{place}: must be one list of token ids, got shape {_shape(array)}")
    if not array.size:
        return np.empty(0, np.int32)
    if array.dtype.kind not in "iu":
        raise InvalidRequest(f"{place}: token ids must be integers, got {array.dtype}")
    wrong = (array < 0) | (array > _LARGEST_ID)
    if wrong.any():
        index = int(wrong.argmax())
        raise InvalidRequest(f"{place}[{index}]: {array[index]}, token ids are 0 to {_LARGEST_ID}")
    return array.astype(np.int32)


def _item(values: ArrayLike, place: str, patch_size: int) -> NDArray[np.uint8]:
    """Return an image, uint8 [H, W, 3], or a video, uint8 [T, H, W, 3]."""
    import numpy as np

    array = as_array(values, place)
    if array.dtype != np.uint8:
        raise InvalidRequest(f"{place}: must be uint8, got {array.dtype}")
    if array.ndim not in (3, 4) or array.shape[-1] != 3 or not array.size:
        raise InvalidRequest(
            f"{place}: must be an image [H, W, 3] or a video [T, H, W, 3], got {_shape(array)}"
        )
    unit = _MERGE * patch_size
    height, width = array.shape[-3:-1]
    if height % unit or width % unit:
        raise InvalidRequest(
            f"{place}: height and width must be multiples of {unit}, got {height} x {width}"
        )
    if array.ndim == 4 and len(array) % _FRAMES:
        raise InvalidRequest(f"{place}: a video needs an even number of frames, got {len(array)}")
    return array


def _grid(item: NDArray[np.uint8], patch_size: int) -> tuple[int, int, int]:
    """Size in patches: pairs of frames, rows, columns."""
    height, width = item.shape[-3:-1]
    frames = len(item) // _FRAMES if item.ndim == 4 else 1
    return frames, height // patch_size, width // patch_size


def _seconds(values: ArrayLike, videos: int) -> NDArray[np.float32]:
    """Return a finite number above 0 for each video, float32 [videos]."""
    import numpy as np

    array = as_array(values, "seconds_per_grid")
    if array.shape != (videos,):
        raise InvalidRequest(
            f"seconds_per_grid: needs one number for each of {videos} videos, got {_shape(array)}"
        )
    if array.dtype.kind not in "iuf":
        raise InvalidRequest(f"seconds_per_grid: must be numbers, got {array.dtype}")
    wrong = ~(np.isfinite(array) & (array > 0))
    if wrong.any():
        index = int(wrong.argmax())
        raise InvalidRequest(
            f"seconds_per_grid[{index}]: {array[index]}, must be finite and above 0"
        )
    return array.astype(np.float32)


def as_array(values: ArrayLike, place: str) -> NDArray[Any]:
    """Return an array of what numpy can take, a CPU tensor of torch's among it.

    Raises:
        InvalidRequest: it cannot; the message names the place.
    """
    import numpy as np

    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidRequest(f"{place}: is no array: {reason}") from error


def _shape(array: NDArray[Any]) -> list[int]:
    return list(array.shape)
