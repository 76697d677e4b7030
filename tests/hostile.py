"""Files that were made to hurt whoever decodes them; each is rebuilt from its name and seed.

Formats are those that the server takes: seven of images, six containers and eight codecs of videos,
and lists of frames.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import av
from PIL import Image, PngImagePlugin

from tests import mutations
from tests.conversations import picture
from tests.videos import film

SEED = 14
CODECS = {
    "h264.mp4": "libx264", "hevc.mov": "libx265", "vp8.webm": "libvpx", "vp9.mkv": "libvpx-vp9",
    "av1.mp4": "libsvtav1", "mpeg4.avi": "mpeg4", "mjpeg.avi": "mjpeg", "gif.gif": "gif",
    "h264.mkv": "libx264",
}  # fmt: skip


@dataclass(frozen=True)
class Hostile:
    """One media part and its files.

    Attributes:
        name: says what is wrong with it.
        kind: `image`, `video`, or `frames` for a list of images.
        make: its entries of `media`; some take a second to write.
    """

    name: str
    kind: str
    make: Callable[[], tuple[bytes, ...]]


def corpus() -> list[Hostile]:
    """More than 300, the crafted ones first."""
    return [*crafted(), *damaged()]


def crafted() -> Iterator[Hostile]:
    """One for each known way to make a small file expensive, or to lie."""
    for name, make in IMAGES.items():
        yield Hostile(name, "image", lambda make=make: (make(),))
    for name, make in IMAGES.items():
        if name.startswith(("jpeg", "png")):
            frames = f"frames of {name}"
            yield Hostile(frames, "frames", lambda make=make: (_file("PNG"), make()))
    for name, make in VIDEOS.items():
        yield Hostile(name, "video", lambda make=make: (make(),))


def damaged() -> Iterator[Hostile]:
    """Good files with bits flipped, blocks cut, numbers changed and chunks moved."""
    for number in range(150):
        yield Hostile(f"image {number}", "image", partial(_damaged_images, number, 1))
    for number in range(150, 170):
        yield Hostile(f"frames {number}", "frames", partial(_damaged_images, number, 2))
    for name in CODECS:
        for number in range(12):
            yield Hostile(f"{name} {number}", "video", partial(_damaged_film, name, number))


def _damaged_images(number: int, count: int) -> tuple[bytes, ...]:
    rng = Random(f"{SEED}:image:{number}")
    return tuple(mutations.damaged_image(rng, _images()) for _ in range(count))


def _damaged_film(name: str, number: int) -> tuple[bytes, ...]:
    return (mutations.damaged(Random(f"{SEED}:{name}:{number}"), films()[name]),)


_images = cache(mutations.image_files)


@cache
def films() -> dict[str, bytes]:
    """A good file for every container and codec."""
    with TemporaryDirectory() as folder:
        paths = {name: Path(folder, name) for name in CODECS}
        for name, codec in CODECS.items():
            if codec == "mjpeg":
                paths[name].write_bytes(_mjpeg(_file("JPEG"), 12))
            else:
                film(paths[name], 12, codec=codec)
        return {name: path.read_bytes() for name, path in paths.items()}


# --- JPEG


@cache
def jpeg_of_scans(scans: int, side: int = 7000) -> bytes:
    """A grey progressive JPEG that shows its picture again and again, some hundred bytes a time."""
    whole = _file("JPEG", Image.new("L", (side, side), 128), progressive=True)
    places = [at for at in range(len(whole)) if whole.startswith(b"\xff\xda", at)]
    # The last one refines all coefficients of all blocks, and may do so again: some bytes say that
    # the next 32,767 blocks do not change, and the decoder looks at each of their values.
    scan = whole[places[-1] : -2]
    assert scans >= len(places)
    return whole[:-2] + scan * (scans - len(places)) + whole[-2:]


# --- PNG


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG of any chunks."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join([_chunk(b"IHDR", header), *chunks, _chunk(b"IEND", b"")])


def _zeros(count: int) -> bytes:
    packer = zlib.compressobj(9)
    block = bytes(2**20)
    parts = [packer.compress(block) for _ in range(count // len(block))]
    return b"".join([*parts, packer.flush()])


def _png_text(kind: bytes) -> bytes:
    bomb = _zeros(256 * 2**20)
    body = {
        b"zTXt": b"key\0\0" + bomb,
        b"iTXt": b"key\0\x01\0\0\0" + bomb,
        b"iCCP": b"profile\0\0" + bomb,
    }[kind]
    return png(64, 64, _chunk(kind, body), _chunk(b"IDAT", _zeros(2**20)))


def _apng(frames: int) -> bytes:
    first = Image.new("RGB", (300, 300))
    more = [Image.new("RGB", (300, 300), (n % 256, 0, 0)) for n in range(frames)]
    return _file("PNG", first, save_all=True, append_images=more)


def _texts(count: int) -> bytes:
    info = PngImagePlugin.PngInfo()
    for number in range(count):
        info.add_text(f"key {number}", "x" * 100)
    return _file("PNG", pnginfo=info)


# --- TIFF


def _entry(tag: int, kind: int, count: int, value: int) -> bytes:
    return struct.pack("<HHII", tag, kind, count, value)


def tiff(
    width: int, height: int, data: bytes, compression: int = 1, next_: int = 0, **extra: int
) -> bytes:
    """A grey TIFF of one strip, its directory at 8."""
    entries = [
        _entry(256, 4, 1, width), _entry(257, 4, 1, height), _entry(258, 3, 1, 8),
        _entry(259, 3, 1, compression), _entry(262, 3, 1, 1),
        _entry(273, 4, 1, 200), _entry(277, 3, 1, 1), _entry(278, 4, 1, extra.get("rows", height)),
        _entry(279, 4, 1, extra.get("bytes", len(data))),
    ]  # fmt: skip
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", next_)
    return (b"II*\0" + struct.pack("<I", 8) + directory).ljust(200, b"\0") + data


# --- others


def _gif_screen(width: int, height: int, frame: tuple[int, int]) -> bytes:
    """A logical screen, and a frame of another size with nothing in it."""
    header = b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0" + bytes(6)
    image = b"," + struct.pack("<HHHH", 0, 0, *frame) + b"\0"
    return header + image + b"\x08" + b"\x02\x00\x01" + b"\0;"


def _gif_clears(blocks: int) -> bytes:
    """LZW codes that only ever clear the table."""
    header = b"GIF89a" + struct.pack("<HH", 4000, 4000) + b"\x80\0\0" + bytes(6)
    image = b"," + struct.pack("<HHHH", 0, 0, 4000, 4000) + b"\0"
    block = b"\xff" + b"\x00\x01\x02\x04\x08\x10\x20\x40\x80" * 28 + bytes(3)
    return header + image + b"\x08" + block[:256] * blocks + b"\0;"


def _gif_frames(count: int, side: int = 16) -> bytes:
    more = [Image.new("RGB", (side, side), (n % 256, n // 256, 9)) for n in range(count)]
    return _file("GIF", more[0], save_all=True, append_images=more[1:], loop=0)


def _gif_copies(count: int, side: int) -> bytes:
    """Very many frames, each the same block of bytes."""
    whole = _gif_frames(3, side)
    first = whole.index(b"\x21\xf9")
    second = whole.index(b"\x21\xf9", first + 1)
    return whole[:second] + whole[second:-1] * count + b";"


def _bmp(width: int, height: int, bits: int, compression: int, data: bytes) -> bytes:
    header = struct.pack(
        "<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, 0, 0
    )
    palette = bytes(4 * 256) if bits == 8 else b""
    start = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + header + palette + data


def _file(format_: str, image: Image.Image | None = None, **options: object) -> bytes:
    buffer = BytesIO()
    (image or picture(90, 60, 0)).save(buffer, format_, **options)
    return buffer.getvalue()


def _patched(data: bytes, where: bytes, shift: int, value: bytes) -> bytes:
    at = data.index(where) + shift
    return data[:at] + value + data[at + len(value) :]


IMAGES: dict[str, Callable[[], bytes]] = {
    "jpeg of 682 scans": lambda: jpeg_of_scans(682),
    "jpeg of 101 scans": lambda: jpeg_of_scans(101),
    "jpeg of 100 slow scans": lambda: jpeg_of_scans(100),
    "jpeg of 65535 x 65535": lambda: _patched(_file("JPEG"), b"\xff\xc0", 5, b"\xff\xff\xff\xff"),
    "jpeg that ends in its scan": lambda: jpeg_of_scans(9)[:-5000],
    "jpeg with 60 kB of comments": lambda: (
        b"\xff\xd8" + b"\xff\xfe\x00\x02" * 15_000 + _file("JPEG")[2:]
    ),
    "jpeg inside a jpeg": lambda: (
        b"\xff\xd8\xff\xe1\xff\xff" + _file("JPEG") * 200 + _file("JPEG")[2:]
    ),
    "png whose text is a bomb": lambda: _png_text(b"zTXt"),
    "png whose international text is a bomb": lambda: _png_text(b"iTXt"),
    "png whose profile is a bomb": lambda: _png_text(b"iCCP"),
    "png whose pixels are a bomb": lambda: png(64, 64, _chunk(b"IDAT", _zeros(256 * 2**20))),
    "png of 64 million pixels": lambda: png(8000, 8000, _chunk(b"IDAT", _zeros(193 * 2**20))),
    "png of 16 bits": lambda: png(
        7900, 8000, _chunk(b"IDAT", _zeros(490 * 2**20)), depth=16, colour=6
    ),
    "png of 2**31 pixels a side": lambda: png(2**31 - 1, 2**31 - 1, _chunk(b"IDAT", b"")),
    "png of 4000 texts": lambda: _texts(4000),
    "png of 200 frames": lambda: _apng(200),
    "png without pixels": lambda: png(3000, 3000),
    "png of empty chunks": lambda: png(64, 64, _chunk(b"IDAT", b"") * 200_000),
    "png that says it is a gigabyte": lambda: png(64, 64)[:33] + b"\x40\0\0\0IDAT" + bytes(99),
    "tiff whose directory is its next": lambda: tiff(64, 64, bytes(4096), next_=8),
    "tiff of a strip of 4 GB": lambda: tiff(64, 64, bytes(64), bytes=2**32 - 1),
    "tiff that deflates": lambda: tiff(8000, 8000, _zeros(256 * 2**20), compression=8),
    "tiff that deflates too little": lambda: tiff(8000, 8000, _zeros(2**20), compression=8),
    "tiff of runs": lambda: tiff(8000, 8000, b"\x81\0" * 500_000, compression=32773),
    "tiff of LZW": lambda: tiff(8000, 8000, b"\x80\0" * 100_000, compression=5),
    "tiff that holds a jpeg": lambda: tiff(7000, 7000, jpeg_of_scans(99), compression=7),
    "tiff of fax": lambda: tiff(8000, 8000, bytes(100_000), compression=4),
    "tiff of rows beyond it": lambda: tiff(64, 64, bytes(64), rows=2**32 - 1),
    "tiff without an end": lambda: tiff(2**16, 1, bytes(9))[:120],
    "gif whose frame exceeds its screen": lambda: _gif_screen(1, 1, (65535, 65535)),
    "gif whose screen is huge": lambda: _gif_screen(65535, 65535, (1, 1)),
    "gif of 64 million pixels": lambda: _gif_screen(8000, 8000, (8000, 8000)),
    "gif of clears": lambda: _gif_clears(4000),
    "gif of 3000 frames": lambda: _gif_frames(3000),
    "bmp of 64 million pixels": lambda: _bmp(8000, 8000, 8, 1, b"\xff\0" * 300_000),
    "bmp whose runs go back": lambda: _bmp(4000, 4000, 8, 1, b"\0\x02\0\0" * 300_000),
    "bmp of 2**31 pixels": lambda: _bmp(2**31 - 1, 1, 24, 0, bytes(99)),
    "bmp upside down": lambda: _bmp(64, -(2**31), 24, 0, bytes(99)),
    "webp of 16383 pixels a side": lambda: _patched(
        _file("WEBP"), b"VP8 ", 14, b"\xff\x3f\xff\x3f"
    ),
    "webp without loss": lambda: _file("WEBP", Image.new("RGB", (6000, 6000)), lossless=True),
    "webp of 300 frames": lambda: _file(
        "WEBP", save_all=True, append_images=[picture(90, 60, n) for n in range(300)], method=0
    ),
    "avif that is large": lambda: _file("AVIF", Image.new("RGB", (5000, 5000)), speed=10),
    "avif cut short": lambda: _file("AVIF")[:-90],
}
VIDEOS: dict[str, Callable[[], bytes]] = {
    "gif of 60,000 large frames": lambda: _gif_copies(60_000, 900),
    "gif of 3000 frames as a video": lambda: _gif_frames(3000),
    "gif whose screen is huge as a video": lambda: _gif_screen(8000, 8000, (8000, 8000)),
    "mjpeg of pictures of many scans": lambda: _mjpeg(jpeg_of_scans(80, 2000), 40),
    "mjpeg of huge pictures": lambda: _mjpeg(_file("JPEG", Image.new("L", (7900, 8000))), 20),
}


def _mjpeg(packet: bytes, count: int) -> bytes:
    """An AVI whose pictures are these bytes."""
    width, height = Image.open(BytesIO(packet)).size
    buffer = BytesIO()
    with av.open(buffer, "w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuvj420p"
        for _ in range(count):
            each = av.Packet(packet)
            each.stream, each.time_base = stream, Fraction(1, 8)
            container.mux(each)
    return buffer.getvalue()
