"""The decoding worker: files in, headers and pixels out, one request at a time.

Its parent's side is `decoding.py`. Each answer is a message, an error or with pixels behind it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image

from ..memory import Heap
from ..schema import UInt8Array
from .image_codec import Manner, decode_image, open_image
from .video_codec import Unusable, VideoFile, open_video
from .workers import Channel

Answer = tuple[dict[str, Any], UInt8Array | None]


def prepare(settings: bytes) -> int:
    """Read, in the zygote, how many bytes a worker may use, for its error messages."""
    return int(json.loads(settings))


def serve(channel: Channel, max_bytes: int) -> None:
    """Answer, in a worker, until the channel closes."""
    heap = Heap()
    items: list[Image.Image | VideoFile | None] = []  # opened and not yet read
    while True:
        heap.tidy()
        message = channel.receive()
        data = bytearray(message.get("bytes", 0))
        channel.receive_into(data)
        try:
            for answer, pixels in _answers(message, bytes(data), items):
                channel.send(answer, [] if pixels is None else [pixels.data.cast("B")])
        except MemoryError:
            problem = f"it takes more memory to decode than the limit, {max_bytes} bytes"
            channel.send({"error": problem})
        except _Refused as refused:
            channel.send({"error": str(refused)})


class _Refused(Exception):
    """A file cannot be used; the text is what its caller is told."""


def _answers(
    message: Any, data: bytes, items: list[Image.Image | VideoFile | None]
) -> Iterator[Answer]:
    kind = message["do"]
    if kind == "open":
        if message["number"] == 0:
            items.clear()
        items.append(None)  # in its place even if it fails
        opened, header = (_open_image if message["kind"] == "image" else _open_video)(data)
        items[-1] = opened
        yield header, None
    elif kind == "read":
        item, items[message["number"]] = items[message["number"]], None
        if isinstance(item, VideoFile):
            frames = item.decoded(message["frames"])
            yield from _blaming("the video cannot be used", frames)
        else:
            assert item
            size, manner = message["size"], Manner(**message["manner"])
            pixels = (decode_image(each, size and tuple(size), manner) for each in [item])
            yield from _blaming("the image cannot be used", pixels)
    else:
        items.clear()
        yield {}, None


def _open_image(data: bytes) -> tuple[Image.Image, dict[str, Any]]:
    if not data:
        raise _Refused("0 bytes were given; an encoded image is needed")
    try:
        image = open_image(data)
    except ValueError as error:
        raise _Refused(str(error)) from None
    return image, {"width": image.width, "height": image.height}


def _open_video(data: bytes) -> tuple[VideoFile, dict[str, Any]]:
    if not data:
        raise _Refused("0 bytes were given; an encoded video is needed")
    try:
        file = _blamed("the video cannot be read", lambda: open_video(data))
    except Unusable as error:
        raise _Refused(str(error)) from None
    header = {"width": file.width, "height": file.height, "frames": file.total, "rate": file.rate}
    return file, header


def _blaming(problem: str, pixels: Iterator[UInt8Array]) -> Iterator[Answer]:
    end = object()
    while (each := _blamed(problem, lambda: next(pixels, end))) is not end:
        yield {}, each


def _blamed(problem: str, call: Callable[[], Any]) -> Any:
    """Whatever fails is the file's fault: decoders raise nearly everything for one."""
    try:
        return call()
    except Unusable:
        raise
    except Exception as error:
        if type(error) is MemoryError:  # a decoder's own, derived one is about what the file asks
            raise
        raise _Refused(f"{problem}: {error}") from None
