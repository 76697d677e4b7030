"""Images of a request: what size they get, and their pixels, exactly as the model card's code.

As in qwen-vl-utils' `fetch_image`, sizes follow from an image's own and its part's limits;
`image_codec.py` decodes and resizes. The checkpoint's image processor then applies its own pixel
limits, a second resize that only happens where they are tighter than qwen-vl-utils' defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwen_vl_utils import vision_process

from ..errors import InvalidRequest
from .conversation import MediaPart
from .decoding import Header, Reading, Size


@dataclass(frozen=True)
class Picture:
    """An encoded image whose header has been read.

    Attributes:
        field: its name in error messages.
        header: its own.
        first_size: height and width after qwen-vl-utils' resize.
        final_size: and after the processor's, multiples of the merged patch size.
    """

    field: str
    header: Header
    first_size: Size
    final_size: Size


class ImageLoader:
    """Reads images' headers and decides what size they get.

    Args:
        image_processor: the checkpoint's `Qwen2VLImageProcessor`.
        max_image_pixels: largest image that is decoded, and that one may be enlarged to.
    """

    def __init__(self, image_processor: Any, max_image_pixels: int) -> None:
        self._processor = image_processor
        self._max_pixels = max_image_pixels
        self._patch = int(image_processor.patch_size)
        self._factor = self._patch * int(image_processor.merge_size)

    def open(
        self, reading: Reading, field: str, data: bytes, part_field: str, part: MediaPart
    ) -> Picture:
        """Read an image's header; no pixel is decoded yet.

        Args:
            reading: what reads it.
            field: name of the bytes in error messages, `media[0]`.
            data: an encoded image.
            part_field: name of the part in error messages.
            part: its size limits.

        Raises:
            InvalidRequest: not an image, too slow, too large, too narrow, or limits that
                contradict each other.
        """
        return self._sized(reading, field, data, part_field, part, self._factor, self._final_size)

    def open_frame(
        self, reading: Reading, field: str, data: bytes, part_field: str, part: MediaPart
    ) -> Picture:
        """Open a frame of a list: qwen-vl-utils takes a merged patch for the patch of an image.

        Arguments and errors as of `open`.
        """
        factor = self._factor * vision_process.SPATIAL_MERGE_SIZE
        return self._sized(reading, field, data, part_field, part, factor, lambda *size: size)

    def _sized(
        self,
        reading: Reading,
        field: str,
        data: bytes,
        part_field: str,
        part: MediaPart,
        factor: int,
        final_size: Callable[[int, int], Size],
    ) -> Picture:
        size_limits = part.model_dump(include=set(MediaPart.model_fields), exclude_none=True)
        self._check_limits(part_field, size_limits, factor)
        header = reading.open(field, "image", data)
        self.check_size(field, header.size)
        try:
            height, width = self._first_size(header.size, size_limits, factor)
            if min(height, width) == 0:
                raise ValueError(f"its limits leave {width} x {height} pixels of it")
            final = final_size(height, width)
        except ValueError as error:
            raise InvalidRequest(field, f"the image cannot be used: {error}") from None
        return Picture(field, header, (height, width), final)

    def _first_size(self, encoded: Size, limits: dict[str, int], factor: int) -> Size:
        """Return the size after qwen-vl-utils' resize."""
        height, width = encoded
        if "resized_height" in limits and "resized_width" in limits:
            height, width = limits["resized_height"], limits["resized_width"]
            limits = {}
        low = limits.get("min_pixels", vision_process.IMAGE_MIN_TOKEN_NUM * factor**2)
        high = limits.get("max_pixels", vision_process.IMAGE_MAX_TOKEN_NUM * factor**2)
        return self._smart_resize(height, width, low, high, factor)

    def _final_size(self, height: int, width: int) -> Size:
        """Return the size after the processor's resize of that."""
        if not self._processor.do_resize:
            return height, width
        limits = dict(self._processor.size)
        low, high = limits["shortest_edge"], limits["longest_edge"]
        return self._smart_resize(height, width, low, high, self._factor)

    def _smart_resize(self, height: int, width: int, low: int, high: int, factor: int) -> Size:
        height, width = vision_process.smart_resize(
            height, width, factor=factor, min_pixels=low, max_pixels=high
        )
        return height, width

    def check_size(self, field: str, size: Size) -> None:
        """Raise `InvalidRequest` for an image, or a video's frame, of an unusable size."""
        check_pixels(field, size, self._max_pixels)
        height, width = size
        ratio = max(width, height) / min(width, height)
        if ratio > vision_process.MAX_RATIO:
            raise InvalidRequest(
                field,
                f"{width} x {height} pixels have an aspect ratio of {ratio:.1f}, "
                f"the limit is {vision_process.MAX_RATIO}",
            )

    def _check_limits(self, field: str, limits: dict[str, int], factor: int) -> None:
        """qwen-vl-utils asserts the first, with its defaults for the limit that is not given."""
        low = limits.get("min_pixels", vision_process.IMAGE_MIN_TOKEN_NUM * factor**2)
        high = limits.get("max_pixels", vision_process.IMAGE_MAX_TOKEN_NUM * factor**2)
        if low > high:
            raise InvalidRequest(field, f"min_pixels {low} is above max_pixels {high}")
        # A tiny image would be blown up to that size.
        if limits.get("min_pixels", 0) > self._max_pixels:
            raise InvalidRequest(field, f"min_pixels {low}, the limit is {self._max_pixels}")


def check_pixels(field: str, size: Size, most: int) -> None:
    """Raise `InvalidRequest` for an image, or a video's frame, of no pixel or more than a limit."""
    height, width = size
    if min(width, height) < 1:
        raise InvalidRequest(field, f"{width} x {height} pixels; an image has at least one")
    if width * height > most:
        raise InvalidRequest(
            field, f"{width} x {height} pixels are {width * height}, the limit is {most}"
        )
