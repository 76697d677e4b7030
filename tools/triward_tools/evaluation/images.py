"""Pictures of a data set's rows, as a message may hold them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path

from triward.deadline import Deadline
from triward.errors import InvalidRequest
from triward.media import read_media

Picture = bytes | Path

_SHOWN = 100  # characters of a value in a message


def picture(value: object, folder: Path, column: str) -> Picture:
    """Return a picture's bytes, or its path, at which there is a file.

    Args:
        value: bytes; the struct of `bytes` and `path` that Hugging Face datasets write; a data:
            URL; a path, told by its suffix; or base64.
        folder: where a relative path starts.
        column: its name, for messages.

    Raises:
        InvalidRequest: it is none of these, or holds nothing.
    """
    if isinstance(value, Mapping):
        held = value.get("path") if value.get("bytes") is None else value["bytes"]
        if held is None:
            raise InvalidRequest(f"{column}: has neither bytes nor a path")
        return picture(held, folder, column)
    if isinstance(value, str):
        value = _read(value, folder, column)
    if isinstance(value, (bytes, Path)):
        if value == b"":
            raise InvalidRequest(f"{column}: holds 0 bytes")
        return value
    got = "no value" if value is None else type(value).__name__
    raise InvalidRequest(f"{column}: must be bytes, base64, a data: URL or a path, got {got}")


def _read(text: str, folder: Path, column: str) -> Picture:
    if text[:5].lower() == "data:":
        try:
            return read_media(text, Deadline(1))
        except InvalidRequest as error:
            raise InvalidRequest(f"{column}: {error}") from error
    shown = ascii(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
    if len(text) < 1024 and Path(text).suffix:
        path = folder / text
        if not _is_file(path):
            raise InvalidRequest(f"{column}: there is no file {shown} in {folder.name or folder}")
        return path
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (ValueError, binascii.Error) as error:
        reason = f"neither a path with a suffix nor base64: {error}"
        raise InvalidRequest(f"{column}: {shown} is {reason}") from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # its name is too long
        return False
