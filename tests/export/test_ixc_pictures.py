"""The restated rules by which IXC-2.5 cuts images and videos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conversations import picture
from tests.fonts import FREE_FONT
from tests.videos import film
from triward_server.export.ixc_pictures import (
    at_most,
    film_frames,
    image_canvas,
    normalized,
    patch_rows,
    sheet,
    sheet_canvas,
    whole_and_tiles,
)
from triward_server.export.ixc_reference import token_count


def tokens(canvas: np.ndarray) -> int:
    return token_count(canvas.shape[0] // 560, canvas.shape[1] // 560, 20)


@pytest.mark.parametrize(
    ("size", "hd_num", "tiles", "expected"),
    [
        ((1280, 720), 9, (2, 3), 2861),
        ((720, 1280), 9, (3, 2), 2881),
        ((4000, 3000), 9, (3, 3), 4081),
        ((4000, 3000), 24, (4, 5), 8501),
        ((1, 1), 9, (1, 1), 841),
        ((560, 560), 9, (1, 1), 841),
        ((5000, 100), 9, (1, 9), 4041),
    ],
)
def test_tiles_and_tokens(
    size: tuple[int, int], hd_num: int, tiles: tuple[int, int], expected: int
) -> None:
    canvas = image_canvas(Image.new("RGB", size), hd_num, 560)
    assert canvas.shape == (tiles[0] * 560, tiles[1] * 560, 3)
    assert tokens(canvas) == expected


def test_a_long_video_of_the_card() -> None:
    """32 frames of 1280x720: 20 tiles."""
    page = sheet([Image.new("RGB", (1280, 720))] * 32, FREE_FONT)
    assert page.size == (1120, 32 * 680)
    canvas = sheet_canvas(page, 560)
    assert canvas.shape == (20 * 560, 560, 3)
    assert tokens(canvas) == 8821


def test_a_tall_image_is_mirrored_at_its_diagonal() -> None:
    tall = picture(100, 260, 1)
    wide = tall.transpose(Image.Transpose.TRANSPOSE)
    canvas = image_canvas(tall, 9, 56)
    np.testing.assert_array_equal(canvas, image_canvas(wide, 9, 56).transpose(1, 0, 2))
    height, width = 4 * 56, int(4 * 56 / 2.6)
    assert canvas.shape == (height, 2 * 56, 3)
    assert (canvas[:, width:] == 255).all() and (canvas[:, :width] != 255).any()


def test_white_stands_below_a_wide_image() -> None:
    canvas = image_canvas(Image.new("RGB", (130, 100), "red"), 9, 56)
    height = int(3 * 56 / 1.3)
    assert canvas.shape == (3 * 56, 3 * 56, 3)
    assert (canvas[:height] == (255, 0, 0)).all() and (canvas[height:] == 255).all()


def test_too_flat_an_image_is_refused() -> None:
    assert image_canvas(Image.new("RGB", (5040, 1)), 9, 560).shape == (560, 5040, 3)
    with pytest.raises(ValueError, match="5041x1 pixels is too flat"):
        image_canvas(Image.new("RGB", (5041, 1)), 9, 560)


def test_the_whole_image_comes_first_and_tiles_row_by_row() -> None:
    canvas = image_canvas(picture(130, 60, 2), 6, 56)
    images = whole_and_tiles(canvas, 56)
    rows, columns = canvas.shape[0] // 56, canvas.shape[1] // 56
    assert (rows, columns) == (2, 3)
    pixels = normalized(canvas)
    for row in range(rows):
        for column in range(columns):
            part = pixels[:, 56 * row : 56 * row + 56, 56 * column : 56 * column + 56]
            torch.testing.assert_close(images[1 + row * columns + column], part, rtol=0, atol=0)
    assert float((images[0] - pixels[:, :56, :56]).abs().max()) > 0.1
    cut = patch_rows(images, 14)
    assert cut.shape == (7 * 16, 588)
    patch = images[1, :, 14:28, 28:42].flatten()  # the first tile's second row, third column
    torch.testing.assert_close(cut[16 + 4 + 2], patch, rtol=0, atol=0)


def test_frames_of_a_film(tmp_path: Path) -> None:
    """One a second from the first; of more than 32 those at multiples of count / 33."""
    assert len(film_frames(film(tmp_path / "a.mp4", 20, rate=8))) == 3
    assert len(film_frames(film(tmp_path / "b.mp4", 33, rate=1))) == 32
    numbered = [Image.new("RGB", (number + 1, 1)) for number in range(40)]
    kept = [frame.width - 1 for frame in at_most(numbered)]
    assert kept == [int(index * 40 / 33) for index in range(32)]
    assert at_most(numbered[:32]) == numbered[:32]


def test_a_sheet_of_wide_frames() -> None:
    """Below each other: label, frame, gap with a line; none behind the last."""
    frames = [Image.new("RGB", (160, 80), colour) for colour in ("red", "blue")]
    page = np.asarray(sheet(frames, FREE_FONT))
    assert page.shape == (2 * (560 + 50), 1120, 3)
    assert (page[40:600] == (255, 0, 0)).all() and (page[650:1210] == (0, 0, 255)).all()
    line = (page[600:610] == 0).all(axis=(1, 2))
    assert line.sum() == 2 and line[5:7].all()
    assert (page[1210:] == 255).all()
    assert (page[:40] < 128).any() and (page[610:650] < 128).any()
    assert (page[:40] != page[610:650]).any(), "labels are numbered"


def test_a_sheet_of_tall_frames() -> None:
    frames = [Image.new("RGB", (80, 160), colour) for colour in ("red", "blue")]
    page = np.asarray(sheet(frames, FREE_FONT))
    assert page.shape == (1160, 2 * 570, 3)
    assert (page[40:, :560] == (255, 0, 0)).all() and (page[40:, 570:1130] == (0, 0, 255)).all()
    line = (page[:, 560:570] == 0).all(axis=(0, 2))
    assert line.sum() == 2 and line[5:7].all()
    assert (page[:, 1130:] == 255).all()
