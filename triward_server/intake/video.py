"""Video files and lists of frames -> uint8 frames, exactly as the model card's code has them.

As qwen-vl-utils' `fetch_video` does it: its own functions choose the frames of a file, torch's
antialiased bicubic filter resizes them and rounds to uint8. None of the readers that it knows need
be there: `video_codec.py` reads. A list of frames is resized twice: each frame like an image,
then all like a file's.

The checkpoint's processor has pixel limits of its own. Where they ask for another resize, it is in
float32 and its result no longer uint8: `vision.py` does that one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import torch
from qwen_vl_utils import vision_process
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize
from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize

from ..errors import InvalidRequest
from ..schema import UInt8Array
from .conversation import VideoPart
from .decoding import Header, Reading, Size
from .media import ImageLoader, Picture


@dataclass(frozen=True)
class Clip:
    """A video whose headers have been read.

    Attributes:
        field: its name in error messages.
        frames: how many are shown, an even number.
        size: height and width after qwen-vl-utils' resize.
        final_size: and after the processor's, multiples of the merged patch size.
        decoded: yields the frames that are shown, uint8 [H, W, 3] each, of one size.
    """

    field: str
    frames: int
    size: Size
    final_size: Size
    decoded: Callable[[], Iterator[UInt8Array]]

    def read(self) -> UInt8Array:
        """Decode and resize, one frame at a time.

        Returns:
            uint8 [T, H, W, 3] of `frames` and `size`.

        Raises:
            InvalidRequest: the video is damaged, or decoding takes too long.
        """
        pixels = np.empty((self.frames, *self.size, 3), np.uint8)
        for index, frame in enumerate(self.decoded()):
            pixels[index] = _resized(frame, self.size)
        return pixels


class VideoLoader:
    """Reads the headers of videos and decides which frames of what size are shown.

    Args:
        video_processor: the checkpoint's `Qwen2VLVideoProcessor`.
        images: opens the frames of a list, and knows how large one may be.
        max_frames: that one video may show.
    """

    def __init__(self, video_processor: Any, images: ImageLoader, max_frames: int) -> None:
        self._processor = video_processor
        self._images = images
        self._max_frames = max_frames
        self._factor = int(video_processor.patch_size * video_processor.merge_size)

    def open(
        self, reading: Reading, field: str, data: bytes, part_field: str, part: VideoPart
    ) -> Clip:
        """Read a file's packets; no frame is decoded yet.

        Args:
            reading: what reads it.
            field: name of the bytes in error messages, `media[0]`.
            data: an encoded video.
            part_field: name of the part in error messages.
            part: which frames are shown, and their size limits.

        Raises:
            InvalidRequest: not a video, too long, too large, or limits that contradict each other.
        """
        header = reading.open(field, "video", data)
        self._images.check_size(field, header.size)
        numbers = _chosen(field, header, part)
        if len(numbers) > self._max_frames:
            raise InvalidRequest(
                field,
                f"{len(numbers)} of its frames are asked for, the limit is {self._max_frames}",
            )
        sizes = self._sizes(field, part_field, part, len(numbers), header.size)
        return Clip(field, len(numbers), *sizes, lambda: reading.frames(field, header, numbers))

    def open_frames(
        self,
        reading: Reading,
        fields: Sequence[str],
        data: Sequence[bytes],
        part_field: str,
        part: VideoPart,
    ) -> Clip:
        """Read the headers of a list of encoded images, a frame each; errors as of `open`."""
        pictures = [
            self._images.open_frame(reading, field, item, part_field, part)
            for field, item in zip(fields, data, strict=True)
        ]
        first = pictures[0].first_size
        for field, picture in zip(fields, pictures, strict=True):
            if picture.first_size != first:
                raise InvalidRequest(
                    field,
                    f"the frame's size is {_shown(picture)}, the first's {_shown(pictures[0])}",
                )
        count = vision_process.ceil_by_factor(len(pictures), vision_process.FRAME_FACTOR)
        sizes = self._sizes(fields[0], part_field, part, count, first)
        return Clip(fields[0], count, *sizes, lambda: _decoded_pictures(reading, pictures, count))

    def _sizes(
        self, field: str, part_field: str, part: VideoPart, frames: int, size: Size
    ) -> tuple[Size, Size]:
        """Return the sizes after qwen-vl-utils' resize and after the processor's."""
        try:
            if part.resized_height and part.resized_width:
                resized = vision_process.smart_resize(
                    part.resized_height, part.resized_width, self._factor
                )
            else:
                low, high = self._limits(part_field, part, frames)
                resized = vision_process.smart_resize(*size, self._factor, low, high)
            if min(resized) == 0:
                raise ValueError(f"its limits leave {resized[1]} x {resized[0]} pixels of it")
            return resized, self._final_size(*resized)
        except ValueError as error:
            raise InvalidRequest(field, f"the video cannot be used: {error}") from None

    def _limits(self, field: str, part: VideoPart, frames: int) -> tuple[int, float]:
        """Fewest and most pixels of a frame, as `fetch_video` has them."""
        area = self._factor**2
        low = part.min_pixels or vision_process.VIDEO_MIN_TOKEN_NUM * area
        total = part.total_pixels or vision_process.MODEL_SEQ_LEN * area * 0.9
        share = total / frames * vision_process.FRAME_FACTOR
        high = max(min(vision_process.VIDEO_MAX_TOKEN_NUM * area, share), int(low * 1.05))
        high = min(part.max_pixels or high, high)
        if low > high:
            raise InvalidRequest(field, f"min_pixels {low} is above max_pixels {high}")
        return low, high

    def _final_size(self, height: int, width: int) -> Size:
        if not self._processor.do_resize:
            return height, width
        limits = dict(self._processor.size)
        height, width = smart_resize(
            height, width, self._factor, limits["shortest_edge"], limits["longest_edge"]
        )
        return height, width


def _chosen(field: str, header: Header, part: VideoPart) -> list[int]:
    """Numbers of the frames that qwen-vl-utils shows, ascending."""
    options = part.model_dump(exclude={"type"}, exclude_none=True)
    try:
        first, last, total = vision_process.calculate_video_frame_range(
            options, header.frames, header.rate
        )
        count = vision_process.smart_nframes(options, total_frames=total, video_fps=header.rate)
    except Exception as error:  # it asserts some of what it asks for
        raise InvalidRequest(field, f"no frames can be chosen: {error}") from None
    numbers: list[int] = torch.linspace(first, last, count).round().long().tolist()
    return numbers


def _decoded_pictures(
    reading: Reading, pictures: Sequence[Picture], count: int
) -> Iterator[UInt8Array]:
    """Frames as `fetch_image` leaves them; the last fills up a pair."""
    for picture in pictures:
        pixels = reading.image(picture.field, picture.header, picture.first_size)
        yield pixels
    yield from repeat(pixels, count - len(pictures))


def _resized(frame: UInt8Array, size: Size) -> UInt8Array:
    channels_first = torch.from_numpy(frame).permute(2, 0, 1)
    resized = resize(
        channels_first, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    pixels: UInt8Array = resized.permute(1, 2, 0).numpy()
    return pixels


def _shown(picture: Picture) -> str:
    height, width = picture.first_size
    return f"{width} x {height}"
