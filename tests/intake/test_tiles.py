"""Canvases and sheets by the rules of IXC-2.5, one by one; `test_ixc.py` has them together."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from tests.conversations import picture
from tests.fonts import FREE_FONT
from triward_server.intake.image_codec import Manner, decode_image, resized
from triward_server.intake.sheet import FONT_SIZE, Sheet, frame_size
from triward_server.intake.tiles import Tiles, frames_shown

TILES = Tiles(560, 14)
BILINEAR = Manner("bilinear", on_white=False, mirrors_tall=True)


@pytest.mark.parametrize(
    ("size", "most", "cut", "tokens"),
    [
        ((720, 1280), 9, (2, 3), 2861),
        ((3000, 4000), 9, (3, 3), 4081),
        ((3000, 4000), 24, (4, 5), 8501),
        ((3000, 4000), 1, (1, 1), 841),
        ((4000, 3000), 24, (5, 4), 8521),
        ((10, 10), 9, (1, 1), 841),
        ((560, 560), 9, (1, 1), 841),
        ((560, 561), 9, (2, 2), 2061),
        ((28, 2000), 9, (1, 4), 2041),
        ((1, 5040), 9, (1, 9), 4041),
    ],
)
def test_published_counts(
    size: tuple[int, int], most: int, cut: tuple[int, int], tokens: int
) -> None:
    canvas = TILES.canvas_size(TILES.picture_size(size, most))
    assert (canvas[0] // 560, canvas[1] // 560) == cut
    assert TILES.tokens(canvas) == tokens


def test_as_many_tiles_as_are_allowed_and_needed() -> None:
    rng = np.random.default_rng(0)
    for height, width, most in rng.integers(1, [4000, 4000, 65], (300, 3)).tolist():
        if max(height, width) // min(height, width) > 100:
            continue
        longer, shorter = max(height, width), min(height, width)
        ratio = longer / shorter
        allowed = max(s for s in range(1, 65) if s * math.ceil(s / ratio) <= most)
        columns = min(math.ceil(longer / 560), allowed)
        expected = int(columns * 560 / ratio), columns * 560
        if not expected[0]:
            continue
        if height > width:
            expected = expected[::-1]
        assert TILES.picture_size((height, width), most) == expected


@pytest.mark.parametrize("size", [(1, 5041), (5041, 1)])
def test_what_is_flat_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="0 pixels long, the longer one 5040"):
        TILES.picture_size(size, 9)


def test_padding_is_white_below_and_right() -> None:
    for height, width in ((560, 300), (300, 560)):
        pixels = np.full((height, width, 3), 7, np.uint8)
        canvas = TILES.canvas(pixels)
        assert canvas.shape == (560, 560, 3)
        assert (canvas[:height, :width] == 7).all()
        assert (canvas == 255).sum() == 260 * 560 * 3


def test_tall_images_are_mirrored_while_they_are_resized() -> None:
    """Pillow's first pass rounds, so that the order of its passes shows."""
    tall = picture(300, 500, 4)
    ours = np.asarray(resized(tall, (933, 560), BILINEAR))
    wide = tall.transpose(Image.Transpose.TRANSPOSE)
    expected = np.asarray(wide.resize((933, 560), Image.Resampling.BILINEAR)).swapaxes(0, 1)
    np.testing.assert_array_equal(ours, expected)
    direct = np.asarray(tall.resize((560, 933), Image.Resampling.BILINEAR))
    assert (direct != ours).any()
    np.testing.assert_array_equal(
        resized(wide, (560, 933), BILINEAR),
        wide.resize((933, 560), Image.Resampling.BILINEAR),
    )


def test_alpha_is_dropped_or_falls_on_white() -> None:
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert (decode_image(image.copy(), None, BILINEAR) == (200, 0, 0)).all()
    assert (decode_image(image.copy(), None, Manner()) == 255).all()


@pytest.mark.parametrize(
    ("count", "rate", "shown"),
    [
        (1, 24.0, [0]),
        (60, 24.0, [0, 24, 48]),
        (4, 1.4, [0, 1, 2, 3]),
        (5, 1.6, [0, 2, 4]),
        (32 * 30, 29.97, [*range(0, 960, 30)]),
        (33, 1.0, [*range(32)]),  # a step of one: the last is left out
        (66, 1.0, [*range(0, 64, 2)]),
        (9, 2.5, [0, 2, 4, 6, 8]),  # halves are rounded to even
    ],
)
def test_frames_of_a_video(count: int, rate: float, shown: list[int]) -> None:
    assert list(frames_shown(count, rate, 32)) == shown


def test_a_video_without_frames() -> None:
    with pytest.raises(ValueError, match="0 frames, at least 1 is needed"):
        frames_shown(0, 24.0, 32)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5])
def test_a_video_of_too_few_frames_a_second(rate: float) -> None:
    with pytest.raises(ValueError, match=f"{rate:g} frames a second"):
        frames_shown(10, rate, 32)


@pytest.mark.parametrize(
    ("size", "frame"),
    [
        ((720, 1280), (630, 1120)),
        ((1280, 720), (1120, 630)),
        ((50, 50), (1120, 1120)),
        ((333, 500), (745, 1120)),
    ],
)
def test_size_of_frames(size: tuple[int, int], frame: tuple[int, int]) -> None:
    assert frame_size(size) == frame


def test_frames_that_are_too_narrow() -> None:
    with pytest.raises(ValueError, match="1 x 2000 pixels are too narrow"):
        frame_size((2000, 1))


@pytest.mark.parametrize("stacked", [True, False])
def test_sheet(stacked: bool) -> None:
    """Strip, frame, gap; stacked or side by side; a line in each gap but the last."""
    frame = (630, 1120) if stacked else (1120, 630)
    frames = [np.full((*frame, 3), 50 + n, np.uint8) for n in range(3)]
    sheet = Sheet(3, frame, stacked)
    font = ImageFont.truetype(FREE_FONT, FONT_SIZE)
    pixels = np.asarray(sheet.draw(frames, font)).astype(int)
    assert pixels.shape == ((3 * 680, 1120, 3) if stacked else (1160, 3 * 640, 3))
    step = 680 if stacked else 640
    for n in range(3):
        at = n * step
        if stacked:
            strip, shown, gap = (
                pixels[at : at + 40], pixels[at + 40 : at + 670], pixels[at + 670 : at + 680]
            )  # fmt: skip
        else:
            strip, shown, gap = (
                pixels[:40, at : at + 630], pixels[40:, at : at + 630],
                pixels[:, at + 630 : at + 640].swapaxes(0, 1),
            )  # fmt: skip
        assert (strip == 0).any() and (strip[:, 400:] == 255).all(), "a label at its left"
        assert (shown[60:] == 50 + n).all()
        dark = (gap == 0).all(axis=(1, 2))
        assert dark.sum() == (2 if n < 2 else 0) and (gap[~dark] == 255).all()
    assert sheet.size == pixels.shape[:2]


def test_labels_count_from_zero() -> None:
    font = ImageFont.truetype(FREE_FONT, FONT_SIZE)
    frames = [np.full((560, 1120, 3), 255, np.uint8)] * 2
    drawn = Sheet(2, (560, 1120), stacked=True).draw(frames, font)
    for number in range(2):
        alone = Image.new("RGB", (1120, 600), "white")
        ImageDraw.Draw(alone).text((0, 0), f"<IMAGE {number}>", font=font, fill="black")
        strip = drawn.crop((0, 610 * number, 1120, 610 * number + 600))
        np.testing.assert_array_equal(np.asarray(strip), np.asarray(alone))


@pytest.mark.parametrize(
    ("size", "canvas", "tokens"),
    [((32 * 680, 1120), (20, 1), 8821), ((680, 1120), (1, 2), 1241), ((1160, 640), (2, 1), 1261)],
)
def test_size_of_a_sheet(size: tuple[int, int], canvas: tuple[int, int], tokens: int) -> None:
    """Its shorter side fills one tile, whatever `hd_num` is."""
    resized_to = TILES.sheet_size(size)
    assert min(resized_to) == 560
    full = TILES.canvas_size(resized_to)
    assert (full[0] // 560, full[1] // 560) == canvas
    assert TILES.tokens(full) == tokens
