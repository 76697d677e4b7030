"""A video's frames -> one picture of them all, each under its number, as IXC-2.5 sees videos.

Wide frames stand one below the other, others side by side: a strip with the label, the frame, and a
gap with a line in it but after the last. Sizes are height, width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from ..schema import UInt8Array
from .image_codec import Manner, resized
from .tiles import Size

MOST_FRAMES = 32
FONT_SIZE = 40
FRAMES = Manner("bilinear", on_white=False)
_LONGER, _STRIP, _GAP, _LINE = 1120, 40, 10, 2


def frame_size(size: Size) -> Size:
    """Return the size that frames are resized to.

    Raises:
        ValueError: nothing is left of them.
    """
    height, width = size
    if width > height:
        shown = int(_LONGER / (width / height)), _LONGER
    else:
        shown = _LONGER, int(_LONGER * (width / height))
    if min(shown) == 0:
        raise ValueError(f"frames of {width} x {height} pixels are too narrow to be shown")
    return shown


@dataclass(frozen=True)
class Sheet:
    """The layout of one video.

    Attributes:
        count: of its frames.
        frame: their size, resized.
        stacked: below each other.
    """

    count: int
    frame: Size
    stacked: bool

    @property
    def size(self) -> Size:
        """Of the whole picture."""
        height, width = self.frame
        if self.stacked:
            return self.count * (_STRIP + height + _GAP), width
        return _STRIP + height, self.count * (width + _GAP)

    def draw(self, frames: Iterable[UInt8Array], font: Any) -> Image.Image:
        """Draw frames, uint8 [H, W, 3] each, with labels in a font of Pillow's."""
        sheet = Image.new("RGB", self.size[::-1], "white")
        draw = ImageDraw.Draw(sheet)
        height, width = self.frame
        step = (0, _STRIP + height + _GAP) if self.stacked else (width + _GAP, 0)
        for number, frame in enumerate(frames):
            x, y = number * step[0], number * step[1]
            sheet.paste(resized(Image.fromarray(frame), self.frame, FRAMES), (x, y + _STRIP))
            draw.text((x, y), f"<IMAGE {number}>", font=font, fill="black")
            if number + 1 < self.count:
                draw.line(self._line(x, y), fill="black", width=_LINE)
        return sheet

    def _line(self, x: int, y: int) -> list[tuple[int, int]]:
        """Return the ends of the line behind a frame whose strip begins at x, y."""
        (height, width), middle = self.frame, _GAP // 2
        if self.stacked:
            below = y + _STRIP + height + middle
            return [(0, below), (self.size[1], below)]
        right = x + width + middle
        return [(right, 0), (right, self.size[0])]
