"""Whatever a message calls an image or video -> the bytes that the server decodes."""

from __future__ import annotations

import base64
import binascii
import os
import stat
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from triward.deadline import Deadline
from triward.download import DOWNLOAD_LIMIT, download
from triward.errors import MediaError
from triward.pil import encode_image


def read_media(value: object, deadline: Deadline, *, download_limit: int = DOWNLOAD_LIMIT) -> bytes:
    """Read one image or video.

    Args:
        value: a path, a file://, data: or http(s) URL, bytes-like, or a PIL image. Files are
            returned as they are on disk; a PIL image is encoded losslessly.
        deadline: bounds the fetching of a URL.
        download_limit: bytes that an http(s) URL may deliver.

    Returns:
        An encoded file, at least one byte.

    Raises:
        MediaError: nothing can be read from `value`.
        DeadlineExceeded: a URL did not deliver in time.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        data = bytes(value)
    elif isinstance(value, str):
        data = _read_string(value, deadline, download_limit)
    elif isinstance(value, os.PathLike):
        data = _read_file(os.fsdecode(value))
    elif _is_pil_image(value):
        data = encode_image(value)
    else:
        raise MediaError(
            "media must be a path, a file://, data: or http(s) URL, bytes or a PIL image, "
            f"got {type(value).__name__}"
        )
    if not data:
        raise MediaError("media holds 0 bytes")
    return data


def _read_string(value: str, deadline: Deadline, download_limit: int) -> bytes:
    scheme = value[:8].lower()
    if scheme.startswith(("http://", "https://")):
        return download(value, deadline, limit=download_limit)
    if scheme.startswith("data:"):
        return _decode_data_url(value)
    if scheme.startswith("file://"):
        from urllib.request import url2pathname  # which loads all of HTTP

        path = value[len("file://") :]
        return _read_file(url2pathname(path[len("localhost") :] if _names_host(path) else path))
    return _read_file(value)


def _names_host(path: str) -> bool:
    return path.lower().startswith("localhost/")


def _decode_data_url(url: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise MediaError(f"a data URL must hold ';base64,', got {_shown(header)}")
    # Encoders wrap lines and browsers escape '+', '/' and '='. Nothing else outside the alphabet
    # is let by.
    packed = b"".join(unquote_to_bytes(payload).split())
    try:
        return base64.b64decode(packed, validate=True)
    except binascii.Error as error:
        raise MediaError(f"a data URL holds invalid base64: {error}") from error


def _read_file(name: str) -> bytes:
    try:
        path = Path(name)
        # Opening a pipe or a device could block past any deadline.
        if not stat.S_ISREG(path.stat().st_mode):
            raise MediaError(f"not a regular file: {_shown(name)}")
        return path.read_bytes()
    except OSError as error:
        raise MediaError(f"cannot read {_shown(name)}: {error.strerror or error}") from error
    except ValueError as error:  # a null byte or a lone surrogate
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"not a path: {_shown(name)}: {error}") from error


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 100 else f"{text[:100]}...")


def _is_pil_image(value: Any) -> bool:
    # Only a program that imported PIL can hold one, so PIL need not be imported to know.
    image = sys.modules.get("PIL.Image")
    return image is not None and isinstance(value, image.Image)
