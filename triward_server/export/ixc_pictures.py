"""IXC-2.5's rules for images and videos, restated with Pillow and torch.

Part of the plain restatement of IXC-2.5-Reward (`ixc_reference.py`). A picture becomes a canvas:
uint8 [rows * tile, columns * tile, 3].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont
from torch import Tensor
from torch.nn import functional

from ..schema import UInt8Array

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_FRAMES = 32
_FRAME = 1120  # pixels of a frame's longer side
_STRIP, _GAP = 40, 10  # pixels above a frame, for its label, and between two


def image_canvas(image: Image.Image, hd_num: int, tile: int, antialias: bool = True) -> UInt8Array:
    """Resize an image to at most `hd_num` tiles, white below or, where it is tall, to the right."""
    image = image.convert("RGB")
    tall = image.width < image.height
    if tall:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    ratio = image.width / image.height
    scale = 1
    while (scale + 1) * math.ceil((scale + 1) / ratio) <= hd_num:
        scale += 1
    scale = min(math.ceil(image.width / tile), scale)
    width, height = scale * tile, int(scale * tile / ratio)
    if not height:
        raise ValueError(f"an image of {image.width}x{image.height} pixels is too flat")
    pixels = _padded(_resized(image, width, height, antialias), tile)
    return pixels.transpose(1, 0, 2) if tall else pixels


def sheet_canvas(sheet: Image.Image, tile: int) -> UInt8Array:
    """Resize a video's sheet: its shorter side to a tile, white behind its longer side."""
    tall = sheet.width < sheet.height
    if tall:
        sheet = sheet.transpose(Image.Transpose.TRANSPOSE)
    width = int(tile * (sheet.width / sheet.height))
    pixels = _resized(sheet, width, tile).transpose(1, 0, 2)
    padded = _padded(pixels, tile)
    return padded if tall else padded.transpose(1, 0, 2)


def _resized(image: Image.Image, width: int, height: int, antialias: bool = True) -> UInt8Array:
    if antialias:
        return np.array(image.resize((width, height), Image.Resampling.BILINEAR))
    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    resized = functional.interpolate(planes, (height, width), mode="bilinear")
    return resized[0].round().to(torch.uint8).permute(1, 2, 0).numpy()


def _padded(pixels: UInt8Array, tile: int) -> UInt8Array:
    missing = -len(pixels) % tile
    return np.pad(pixels, ((0, missing), (0, 0), (0, 0)), constant_values=255)


def film_frames(file: str | Path) -> list[Image.Image]:
    """Return the frames of a video file that are shown: one a second, 32 at most."""
    with av.open(str(file)) as container:
        rate = float(container.streams.video[0].average_rate or 0)
        shown = (frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))
        frames = [Image.fromarray(pixels) for pixels in shown]
    stride = round(rate)
    if stride < 1:
        raise ValueError(f"{file} has {rate} frames a second")
    return at_most(frames[::stride])


def at_most(frames: Sequence[Image.Image], limit: int = MAX_FRAMES) -> list[Image.Image]:
    """Return all frames, or `limit` evenly spread ones; the last is never among those."""
    if len(frames) <= limit:
        return list(frames)
    step = len(frames) / (limit + 1)
    return [frames[int(index * step)] for index in range(limit)]


def sheet(frames: Sequence[Image.Image], font: Path) -> Image.Image:
    """Draw frames below each other, or side by side where the last is not wider than high."""
    wide = frames[-1].width > frames[-1].height
    shown = [_frame(frame) for frame in frames]
    if wide:
        width = max(frame.width for frame in shown)
        height = sum(frame.height + _STRIP + _GAP for frame in shown)
    else:
        width = sum(frame.width + _GAP for frame in shown)
        height = max(frame.height for frame in shown) + _STRIP
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    letters: FreeTypeFont = ImageFont.truetype(str(font), _STRIP)
    at = 0
    for number, frame in enumerate(shown):
        corner = (0, at) if wide else (at, 0)
        page.paste(frame, (corner[0], corner[1] + _STRIP))
        draw.text(corner, f"<IMAGE {number}>", font=letters, fill="black")
        at += frame.height + _STRIP if wide else frame.width
        if number + 1 < len(shown):
            middle = at + _GAP // 2
            ends = [(0, middle), (width, middle)] if wide else [(middle, 0), (middle, height)]
            draw.line(ends, fill="black", width=2)
        at += _GAP
    return page


def _frame(frame: Image.Image) -> Image.Image:
    frame = frame.convert("RGB")
    ratio = frame.width / frame.height
    if frame.width > frame.height:
        size = (_FRAME, int(_FRAME / ratio))
    else:
        size = (int(_FRAME * ratio), _FRAME)
    return frame.resize(size, Image.Resampling.BILINEAR)


def normalized(canvas: UInt8Array) -> Tensor:
    """Return float32 [3, H, W]."""
    pixels = torch.from_numpy(np.ascontiguousarray(canvas)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def whole_and_tiles(canvas: UInt8Array, tile: int) -> Tensor:
    """Return float32 [1 + rows * columns, 3, tile, tile]: the whole image, then its tiles."""
    pixels = normalized(canvas)
    whole = functional.interpolate(pixels[None], (tile, tile), mode="bicubic")
    tiles = [
        pixels[:, top : top + tile, left : left + tile]
        for top in range(0, pixels.shape[1], tile)
        for left in range(0, pixels.shape[2], tile)
    ]
    return torch.cat([whole, torch.stack(tiles)])


def patch_rows(images: Tensor, patch: int) -> Tensor:
    """Cut [N, 3, S, S] into rows of one patch each, float32 [N * (S / patch)^2, 3 * patch^2]."""
    grid = images.unfold(2, patch, patch).unfold(3, patch, patch)
    return grid.permute(0, 2, 3, 1, 4, 5).reshape(-1, images.shape[1] * patch * patch)
