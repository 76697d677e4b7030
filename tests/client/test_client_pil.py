from __future__ import annotations

import io
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from triward import MediaError
from triward.media import read_media

Image = pytest.importorskip("PIL.Image")


def image_of(mode, size=(7, 5)):
    """An image with arbitrary pixels in a mode that can be built from raw bytes."""
    source = random.Random(mode).randbytes(size[0] * size[1] * 8)
    if mode == "1":
        return Image.frombytes("L", size, source[: size[0] * size[1]]).convert("1")
    if mode == "P":
        image = Image.frombytes("P", size, source[: size[0] * size[1]])
        image.putpalette(source[: 1 * 8] * 96)
        return image
    empty = Image.new(mode, size)
    return Image.frombytes(mode, size, source[: len(empty.tobytes())])


def decoded(image, deadline):
    return Image.open(io.BytesIO(read_media(image, deadline)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_modes_come_back_the_same(mode, deadline):
    image = image_of(mode)
    back = decoded(image, deadline)
    assert back.format == ("BMP" if mode == "RGB" else "PNG")
    assert back.mode == mode
    assert back.size == image.size
    assert back.tobytes() == image.tobytes()
    if mode == "P":
        assert back.convert("RGB").tobytes() == image.convert("RGB").tobytes()


def test_a_transparent_colour_is_kept(deadline):
    image = image_of("RGB")
    image.info["transparency"] = image.getpixel((2, 3))
    back = decoded(image, deadline)
    assert back.tobytes() == image.tobytes()
    assert back.convert("RGBA").tobytes() == image.convert("RGBA").tobytes()


def test_a_large_image_is_compressed(deadline, monkeypatch):
    monkeypatch.setattr("triward.pil._MAX_BMP_PIXELS", 34)
    image = image_of("RGB")
    back = decoded(image, deadline)
    assert back.format == "PNG"
    assert back.tobytes() == image.tobytes()


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "I", "F", "RGBX"])
def test_other_modes_become_rgb(mode, deadline):
    image = image_of(mode) if mode != "F" else image_of("L").convert("F")
    back = decoded(image, deadline)
    assert back.mode == "RGB"
    assert back.tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("colors", [1, 2, 3, 5, 17, 256])
def test_every_size_of_palette(colors, deadline):
    image = Image.new("P", (colors, 1))
    image.putpalette([(i * 37) % 256 for i in range(3 * colors)])
    image.putdata(range(colors))
    back = decoded(image, deadline)
    assert back.mode == "P"
    assert back.tobytes() == image.tobytes()
    assert back.convert("RGB").tobytes() == image.convert("RGB").tobytes()


def test_an_index_beyond_the_palette_keeps_its_colour(deadline):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1, 200])
    back = decoded(image, deadline)
    assert back.convert("RGB").tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("transparency", [3, bytes([0, 100, 255, 7])])
def test_palette_transparency_is_kept(transparency, deadline):
    image = image_of("P")
    image.info["transparency"] = transparency
    back = decoded(image, deadline)
    assert back.mode == "P"
    assert back.info["transparency"] == transparency
    assert back.convert("RGBA").tobytes() == image.convert("RGBA").tobytes()


def test_a_palette_with_alpha_keeps_it(deadline):
    image = Image.new("P", (2, 1))
    image.putpalette([1, 2, 3, 4, 5, 6, 7, 8], "RGBA")
    image.putdata([0, 1])
    back = decoded(image, deadline)
    assert back.convert("RGBA").tobytes() == bytes([1, 2, 3, 4, 5, 6, 7, 8])


@pytest.mark.parametrize(
    ("mode", "stale"),
    [("L", b"\0\1"), ("RGB", 5), ("RGB", (1, 2)), ("RGBA", 5), ("P", (1, 2, 3)), ("I;16", b"")],
)
def test_info_that_breaks_saving_is_left_behind(mode, stale, deadline):
    image = image_of(mode)
    image.info.update(transparency=stale, icc_profile=b"not a profile", dpi="x", exif=b"x")
    back = decoded(image, deadline)
    assert back.tobytes() == image.tobytes()
    assert "icc_profile" not in back.info
    assert "exif" not in back.info
    assert image.info["transparency"] == stale  # the caller's image is not touched


def test_exif_orientation_is_neither_applied_nor_sent(deadline):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image_of("RGB").save(buffer, "PNG", exif=exif)
    image = Image.open(io.BytesIO(buffer.getvalue()))
    assert image.getexif()[0x0112] == 6
    back = decoded(image, deadline)
    assert back.size == (7, 5)
    assert back.tobytes() == image_of("RGB").tobytes()
    assert 0x0112 not in back.getexif()


def test_the_current_frame_of_an_animation(deadline):
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    image = Image.open(buffer)
    image.seek(1)
    assert decoded(image, deadline).convert("RGB").getpixel((0, 0)) == (0, 255, 0)
    assert image.tell() == 1


def test_a_lazy_image_shared_by_threads(deadline):
    pixels = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    for _ in range(5):
        image = Image.open(io.BytesIO(buffer.getvalue()))
        with ThreadPoolExecutor(8) as pool:
            sent = set(pool.map(lambda _, image=image: read_media(image, deadline), range(8)))
        assert len(sent) == 1
        back = Image.open(io.BytesIO(sent.pop()))
        assert np.array_equal(np.asarray(back), pixels)


def test_images_that_cannot_be_sent(deadline):
    with pytest.raises(MediaError, match="no pixels: 0x3"):
        read_media(Image.new("RGB", (0, 3)), deadline)
    with pytest.raises(MediaError, match="mode La"):
        read_media(Image.new("La", (2, 2)), deadline)
    buffer = io.BytesIO()
    image_of("RGB", (64, 64)).save(buffer, "PNG")
    with pytest.raises(MediaError, match="cannot encode"):
        read_media(Image.open(io.BytesIO(buffer.getvalue()[:200])), deadline)
