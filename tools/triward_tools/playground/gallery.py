"""Images that a file names -> small pictures, without reading any other file of this machine.

Whoever opens the page chooses the file, so a path in it is not to be trusted: it is read only below
the folder that the command line names.
"""

from __future__ import annotations

import io
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

from triward.deadline import Deadline
from triward.errors import InvalidRequest
from triward.media import read_media

from triward_tools.evaluation.pictures import Part, thumbnail
from triward_tools.evaluation.text import visible

IMAGE_BYTES = 32 * 2**20
PIXELS = 64 * 10**6

# Decoders of others, such as PostScript's, run programs.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")

_TIMEOUT = 60.0


@dataclass(frozen=True)
class Gallery:
    """Images that may be shown.

    Attributes:
        folder: below it lie the images that are read by path; None reads none by path.
    """

    folder: Path | None = None

    def show(self, value: object) -> Part:
        """Return a small copy of an image, or words that say why there is none.

        Args:
            value: bytes, a data: URL, the struct of `bytes` and `path` that Hugging Face datasets
                write, or a path.
        """
        try:
            data = self._bytes(value)
            _check_decoded(data)
        except InvalidRequest as error:
            return Part(visible(f"image, not shown: {error}"))
        return thumbnail(data)

    def _bytes(self, value: object) -> bytes:
        if isinstance(value, Mapping):
            held = value.get("path") if value.get("bytes") is None else value["bytes"]
            if isinstance(held, Mapping):
                raise InvalidRequest("its struct holds another struct")
            return self._bytes(held)
        if isinstance(value, bytes):
            return _checked(value)
        if not isinstance(value, str):
            kind = "no value" if value is None else type(value).__name__
            raise InvalidRequest(f"must be bytes, a data: URL or a path, got {kind}")
        if value[:5].lower() == "data:":
            return _checked(read_media(value, Deadline(_TIMEOUT)))
        return _checked(self._file(value))

    def _file(self, name: str) -> bytes:
        """Return a file below the folder; where it leads is decided before anything is read."""
        told = repr(name if len(name) <= 100 else f"{name[:100]}...")
        if "://" in name or name[:5].lower() == "file:":
            raise InvalidRequest(f"{told} is a URL, which the playground does not fetch")
        if self.folder is None:
            raise InvalidRequest(
                f"{told} is a path; start the playground with --images FOLDER to show images "
                "below that folder"
            )
        if ".." in PurePath(name).parts:
            raise InvalidRequest(f"{told} holds '..', which leads out of a folder")
        root = self.folder.resolve()
        try:
            path = (root / name).resolve()
            if not path.is_relative_to(root):
                raise InvalidRequest(f"{told} is not below the folder of --images")
            kind = path.stat()
            if not stat.S_ISREG(kind.st_mode):
                raise InvalidRequest(f"{told} is no regular file")
            if kind.st_size > IMAGE_BYTES:
                raise InvalidRequest(_too_large(kind.st_size))
            return path.read_bytes()
        except InvalidRequest:
            raise
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, or a null byte
            reason = getattr(error, "strerror", None) or "not a path"
            raise InvalidRequest(f"{told}: {reason}") from error


def _checked(data: bytes) -> bytes:
    if not data:
        raise InvalidRequest("holds 0 bytes")
    if len(data) > IMAGE_BYTES:
        raise InvalidRequest(_too_large(len(data)))
    return data


def _too_large(size: int) -> str:
    return f"has {size:,} bytes, at most {IMAGE_BYTES:,} are read"


def _check_decoded(data: bytes) -> None:
    """Raise InvalidRequest for what is no image, or one that takes too much memory to decode."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
    except Exception as error:  # decoders raise whatever they like for a broken file
        raise InvalidRequest(f"cannot be decoded ({type(error).__name__})") from error
    if width * height > PIXELS:
        raise InvalidRequest(f"has {width} x {height} pixels, at most {PIXELS:,} are decoded")
