"""Images and video sheets as canvases of whole tiles, as IXC-2.5 cuts them.

A canvas is uint8 [rows * tile, columns * tile, 3]: the resized picture, white below or to the right
of it. The vision tower reads the whole canvas, shrunk to one tile, and then its tiles row by row.

A picture that is higher than wide is mirrored at its diagonal, so that the rules know only wide
ones, and mirrored back. Sizes are height, width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..schema import UInt8Array

Size = tuple[int, int]

CHANNELS = 3
WHITE = 255
MERGE = 2  # patches that become one token, along each side


@dataclass(frozen=True)
class Tiles:
    """Rules of one checkpoint.

    Attributes:
        tile: side of a tile in pixels; the vision tower reads nothing larger.
        patch: side of a patch in pixels.
    """

    tile: int
    patch: int

    @property
    def side(self) -> int:
        """Tokens of a tile along each side."""
        return self.tile // self.patch // MERGE

    def picture_size(self, size: Size, most: int) -> Size:
        """Return the size that a picture is resized to.

        Args:
            size: its own.
            most: tiles that it may fill (`hd_num`).

        Raises:
            ValueError: it is so flat that nothing is left of it.
        """
        height, width = size
        if width < height:
            return self.picture_size((width, height), most)[::-1]
        ratio = width / height
        columns = 1
        while columns < most and (columns + 1) * math.ceil((columns + 1) / ratio) <= most:
            columns += 1
        width = min(math.ceil(width / self.tile), columns) * self.tile
        return _not_flat(int(width / ratio), width)

    def sheet_size(self, size: Size) -> Size:
        """Return the size that a video's sheet is resized to: its shorter side fills one tile."""
        height, width = size
        if width < height:
            return self.sheet_size((width, height))[::-1]
        return self.tile, int(self.tile * (width / height))

    def canvas_size(self, resized: Size) -> Size:
        """Return the size of the canvas that holds a resized picture."""
        height, width = (-(-side // self.tile) * self.tile for side in resized)
        return height, width

    def tokens(self, canvas: Size) -> int:
        """Count the tokens of a canvas: of the whole and its tiles, and what separates them."""
        rows, columns = canvas[0] // self.tile, canvas[1] // self.tile
        return (rows * columns + 1) * self.side**2 + 1 + (rows + 1) * self.side

    def canvas(self, pixels: UInt8Array) -> UInt8Array:
        """Place a resized picture, uint8 [H, W, 3], on its canvas."""
        height, width, _ = pixels.shape
        canvas = np.full((*self.canvas_size((height, width)), CHANNELS), WHITE, np.uint8)
        canvas[:height, :width] = pixels
        return canvas


def _not_flat(height: int, width: int) -> Size:
    if height == 0:
        raise ValueError(f"its shorter side would be 0 pixels long, the longer one {width}")
    return height, width


def frames_shown(count: int, rate: float, most: int) -> Sequence[int]:
    """Return the numbers of a video's frames that are shown, one of each second.

    Args:
        count: frames that it has.
        rate: of them in a second.
        most: that are shown; of more, so many from the beginning on, evenly spaced.

    Raises:
        ValueError: it has no frame, or no more than one in two seconds.
    """
    if count < 1:
        raise ValueError(f"{count} frames, at least 1 is needed")
    stride = round(rate)
    if stride < 1:
        raise ValueError(f"{rate:g} frames a second, more than one in two seconds is needed")
    numbers = range(0, count, stride)
    if len(numbers) <= most:
        return numbers
    step = len(numbers) / (most + 1)
    return [numbers[int(i * step)] for i in range(most)]
