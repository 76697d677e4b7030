"""Encoded image bytes -> uint8 pixels, exactly as the model card's code would resize them.

Decoding, alpha and resizing are qwen-vl-utils' own (`fetch_image`: Pillow, alpha on white, EXIF
orientation not applied). The checkpoint's image processor then applies its own pixel limits, a
second resize that only happens where they are tighter than qwen-vl-utils' defaults.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from qwen_vl_utils import vision_process
from transformers.image_utils import SizeDict

from .conversation import ImagePart, MediaPart
from .errors import InvalidRequest
from .schema import UInt8Array

# What callers send. Pillow's other decoders call external programs, describe vector graphics, or
# are slow enough to hold a server up.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")

# `max_image_pixels` below is checked on the header, before any pixel is decoded, so that the
# error can name the size; Pillow's own check would raise first, without it.
Image.MAX_IMAGE_PIXELS = None
Image.init()  # registers all decoders; `Image.open(formats=…)` knows only registered ones


class ImageLoader:
    """Turns one encoded image into resized pixels.

    Args:
        image_processor: the checkpoint's `Qwen2VLImageProcessor`.
        max_image_pixels: largest image that is decoded, and that one may be enlarged to.
    """

    def __init__(self, image_processor: Any, max_image_pixels: int) -> None:
        self._processor = image_processor
        self._max_pixels = max_image_pixels
        self._patch = int(image_processor.patch_size)
        self._factor = self._patch * int(image_processor.merge_size)

    def load(self, field: str, data: bytes, part_field: str, part: MediaPart) -> UInt8Array:
        """Decode and resize.

        Args:
            field: name of the bytes in error messages, `media[0]`.
            data: an encoded image.
            part_field: name of the part in error messages.
            part: its size limits.

        Returns:
            uint8 [H, W, 3], H and W multiples of the merged patch size.

        Raises:
            InvalidRequest: not an image, damaged, too large, too narrow, or limits that
                contradict each other.
        """
        if not isinstance(part, ImagePart):
            raise InvalidRequest(part_field, "videos are not supported yet")
        size_limits = part.model_dump(exclude={"type"}, exclude_none=True)
        self._check_limits(part_field, size_limits)
        with self._open(field, data) as image:
            self._check_size(field, *image.size)
            try:
                resized = vision_process.fetch_image(
                    {"image": image, **size_limits}, image_patch_size=self._patch
                )
                return self._apply_processor_limits(resized)
            except Exception as error:  # decoders raise nearly everything for hostile bytes
                if isinstance(error, MemoryError):
                    raise
                raise InvalidRequest(field, f"the image cannot be used: {error}") from None

    def _open(self, field: str, data: bytes) -> Image.Image:
        if not data:
            raise InvalidRequest(field, "0 bytes were given; an encoded image is needed")
        try:
            return Image.open(BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            problem = (
                f"{len(data)} bytes that are no image in a known format ({', '.join(FORMATS)})"
            )
            raise InvalidRequest(field, problem) from None
        except Exception as error:
            raise InvalidRequest(field, f"the image's header is damaged: {error}") from None

    def _check_size(self, field: str, width: int, height: int) -> None:
        if min(width, height) < 1:
            raise InvalidRequest(field, f"{width} x {height} pixels; an image has at least one")
        if width * height > self._max_pixels:
            raise InvalidRequest(
                field,
                f"{width} x {height} pixels are {width * height}, the limit is {self._max_pixels}",
            )
        ratio = max(width, height) / min(width, height)
        if ratio > vision_process.MAX_RATIO:
            raise InvalidRequest(
                field,
                f"{width} x {height} pixels have an aspect ratio of {ratio:.1f}, "
                f"the limit is {vision_process.MAX_RATIO}",
            )

    def _check_limits(self, field: str, limits: dict[str, int]) -> None:
        """qwen-vl-utils asserts the first, with its defaults for the limit that is not given."""
        area = self._factor**2
        low = limits.get("min_pixels", vision_process.IMAGE_MIN_TOKEN_NUM * area)
        high = limits.get("max_pixels", vision_process.IMAGE_MAX_TOKEN_NUM * area)
        if low > high:
            raise InvalidRequest(field, f"min_pixels {low} is above max_pixels {high}")
        if (
            limits.get("min_pixels", 0) > self._max_pixels
        ):  # a tiny image would be blown up to that size
            raise InvalidRequest(field, f"min_pixels {low}, the limit is {self._max_pixels}")

    def _apply_processor_limits(self, image: Image.Image) -> UInt8Array:
        """The processor's own resize, on the contiguous [1, 3, H, W] tensor it would build."""
        pixels = np.array(image, dtype=np.uint8)
        if not self._processor.do_resize:
            return pixels
        batch = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()
        size = SizeDict(**dict(self._processor.size))
        resized = self._processor.resize(batch, size, self._processor.resample, factor=self._factor)
        return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())
