"""PIL image -> a file that decodes to the same mode and pixels."""

from __future__ import annotations

import io
import threading
from typing import Any

from triward.errors import MediaError

# The modes that PNG holds exactly.
_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})

# Beyond it PNG, which is smaller: servers limit a file's bytes, by default to 64 MiB.
_MAX_BMP_PIXELS = 4_000_000

# Conversations share images, and PIL's lazy loading is not safe in two threads at once.
_LOADING = threading.Lock()


def encode_image(image: Any) -> bytes:
    """Encode the current frame of a `PIL.Image.Image`.

    RGB becomes BMP, which costs a copy and 3 bytes a pixel; other modes become PNG. What PNG cannot
    hold is converted to RGB first, as the model card's preprocessing would.
    EXIF orientation is not applied, and no metadata but transparency is carried over.

    Raises:
        MediaError: the image is empty, cannot be loaded, or cannot be converted.
    """
    if 0 in image.size:
        raise MediaError(f"the PIL image has no pixels: {image.width}x{image.height}")
    try:
        with _LOADING:
            frame = image.copy()
        if frame.mode not in _PNG_MODES or _exceeds_palette(frame):
            frame = frame.convert("RGB")
            frame.info = {}
        frame.info = _transparency(frame)
        buffer = io.BytesIO()
        small = frame.width * frame.height <= _MAX_BMP_PIXELS
        if frame.mode == "RGB" and small and not frame.info:
            frame.save(buffer, format="BMP")
        else:
            frame.save(buffer, format="PNG", compress_level=1)
    except (OSError, ValueError, SyntaxError) as error:
        raise MediaError(f"cannot encode the PIL image of mode {image.mode}: {error}") from error
    return buffer.getvalue()


def _exceeds_palette(frame: Any) -> bool:
    # PNG packs indices into as few bits as the palette needs, which would change larger indices.
    if frame.mode != "P":
        return False
    colors = len(frame.getpalette() or ()) // 3
    return bool(frame.getextrema()[1] >= colors)


def _transparency(frame: Any) -> dict[str, Any]:
    # Other metadata changes no pixel, and saving fails on some of it (a stale transparency, too).
    value = frame.info.get("transparency")
    fits = {
        "P": isinstance(value, (bytes, int)),
        "RGB": isinstance(value, tuple) and len(value) == 3,
        "L": isinstance(value, int),
        "1": isinstance(value, int),
        "I;16": isinstance(value, int),
    }
    return {"transparency": value} if fits.get(frame.mode, False) else {}
