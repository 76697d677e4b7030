"""Encoded images -> RGB pixels with Pillow, in the manner of a model's own code.

EXIF orientation is not applied, and of an animation the first frame is taken.
This runs in a worker (`codec_worker.py`): it may take any time, and nothing heavy is imported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..schema import UInt8Array

# What callers send. Pillow's other decoders call external programs, describe vector graphics, or
# are slow enough to hold a server up.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")

# Limits are checked on the header, before any pixel is decoded, so that errors can name the size;
# Pillow's own check would raise first, without it.
Image.MAX_IMAGE_PIXELS = None
Image.init()  # registers all decoders; `Image.open(formats=…)` knows only registered ones

# Each scan of a progressive JPEG goes over the whole picture again; encoders write about ten.
MAX_SCANS = 100
_SCAN = b"\xff\xda"
_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")  # others are part of a scan's data
_BARE = frozenset(b"\x01\xd8")  # no length follows
_END = 0xD9


@dataclass(frozen=True)
class Manner:
    """How an image becomes RGB of another size; as qwen-vl-utils' `fetch_image` unless said.

    Attributes:
        filter: Pillow's, for resizing.
        on_white: alpha falls on white; else it is dropped.
        mirrors_tall: an image higher than wide is mirrored at its diagonal while it is resized.
            Pillow rounds between its two passes, the first along the width.
    """

    filter: Literal["bicubic", "bilinear"] = "bicubic"
    on_white: bool = True
    mirrors_tall: bool = False


def resized(image: Image.Image, size: tuple[int, int], manner: Manner) -> Image.Image:
    """Resize an RGB image to a height and width."""
    if manner.mirrors_tall and image.width < image.height:
        mirrored = image.transpose(Image.Transpose.TRANSPOSE)
        return resized(mirrored, size[::-1], manner).transpose(Image.Transpose.TRANSPOSE)
    return image.resize(size[::-1], Image.Resampling[manner.filter.upper()])


def open_image(data: bytes) -> Image.Image:
    """Read an image's header; no pixel is decoded yet.

    Raises:
        ValueError: it is none, or has too many scans; says so whole.
        Exception: of any kind: the header is damaged.
    """
    scans = count_scans(data)
    if scans > MAX_SCANS:
        raise ValueError(f"a JPEG of {scans} scans, the limit is {MAX_SCANS}")
    try:
        return Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(
            f"{len(data)} bytes that are no image in a known format ({', '.join(FORMATS)})"
        ) from None
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"the image's header is damaged: {error}") from None


def decode_image(image: Image.Image, size: tuple[int, int] | None, manner: Manner) -> UInt8Array:
    """Decode and resize.

    Args:
        image: not decoded yet; it is closed.
        size: height and width to resize to, or None for the image's own.
        manner: how.

    Returns:
        uint8 [H, W, 3].

    Raises:
        Exception: of any kind: the file is damaged.
    """
    width, height = image.size
    with image:
        rgb = _rgb(image, manner)
    if rgb.size != (width, height):
        raise ValueError(f"it has {rgb.width} x {rgb.height} pixels, its header {width} x {height}")
    return np.array(rgb if size is None else resized(rgb, size, manner), dtype=np.uint8)


def _rgb(image: Image.Image, manner: Manner) -> Image.Image:
    if image.mode != "RGBA" or not manner.on_white:
        return image.convert("RGB")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def count_scans(data: bytes) -> int:
    """Return how often a JPEG's decoder goes over the picture, at most; 0 for other formats."""
    if not data.startswith(b"\xff\xd8"):
        return 0
    # Few files hold as many of its marker as would be too many scans, wherever they stand.
    if (most := data.count(_SCAN)) <= MAX_SCANS:
        return most
    scans = at = 0
    while marker := _MARKER.search(data, at):
        at, kind = marker.end(), data[marker.end() - 1]
        if kind == _END:
            break
        scans += kind == _SCAN[1]
        if kind not in _BARE:
            at += int.from_bytes(data[at : at + 2], "big")
    return scans
