"""Encoded videos -> RGB frames with PyAV, from memory, numbered as they are shown, from the first.

What was recorded rotated stays so. This runs in a worker (`codec_worker.py`): it may take any time,
and nothing heavy is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np

from ..schema import UInt8Array

# FFmpeg's names. Other demuxers open what a file names, or are read by nobody.
FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "gif")
CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg", "gif")

_TIME_BASE = 1_000_000  # FFmpeg's ticks in a second of a container's duration
_CUT = 1.0  # seconds that a file may end before its header says


@dataclass(frozen=True)
class VideoFile:
    """An encoded video and what its packets tell, before any frame is decoded.

    Attributes:
        data: the file.
        total: frames that it holds.
        rate: of them in a second.
        width: of a frame in pixels.
        height: likewise.
    """

    data: bytes
    total: int
    rate: float
    width: int
    height: int

    def decoded(self, numbers: Sequence[int]) -> Iterator[UInt8Array]:
        """Decode the frames of ascending numbers, uint8 [H, W, 3] each.

        All before the last are decoded: seeking is a guess.

        Raises:
            Exception: of any kind: the file is damaged.
        """
        with _open(self.data) as container:
            stream = container.streams.best("video")
            # A frame larger than the header says is not even allocated; decoders add edges to it.
            largest = (self.width + 256) * (self.height + 256)
            stream.codec_context.options = {"max_pixels": str(largest)}
            stream.codec_context.thread_count = 1  # several instances share the machine
            wanted = iter(numbers)
            next_ = next(wanted, None)
            for number, frame in enumerate(container.decode(stream)):
                while next_ == number:
                    yield self._rgb(number, frame)
                    next_ = next(wanted, None)
                if next_ is None:
                    return
        raise ValueError(f"it decodes to fewer frames than the {self.total} that it lists")

    def _rgb(self, number: int, frame: Any) -> UInt8Array:
        if (frame.width, frame.height) != (self.width, self.height):
            raise ValueError(
                f"frame {number} is {frame.width} x {frame.height} pixels, "
                f"the header says {self.width} x {self.height}"
            )
        if frame.is_corrupt:
            raise ValueError(f"frame {number} is damaged")
        return np.ascontiguousarray(frame.to_ndarray(format="rgb24"))


class Unusable(ValueError):
    """A video that is refused for what it is, in a whole sentence."""


def open_video(data: bytes) -> VideoFile:
    """Read all packets of a file.

    Raises:
        Unusable: it has no video that is decoded here.
        Exception: of any kind: it cannot be read.
    """
    with _open(data) as container:
        stream = container.streams.best("video")
        if stream is None:
            raise Unusable(f"a file of {len(data)} bytes without a video")
        name = stream.codec_context.codec.canonical_name
        if name not in CODECS:  # FFmpeg's own list holds while it probes, not when PyAV decodes
            raise Unusable(f"codec {name}; only {', '.join(CODECS)} are decoded")
        shown = listed = 0
        end = 0.0
        for packet in container.demux():
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream is stream:
                # An empty packet repeats the frame before it; one without a time ends the stream.
                listed += packet.size > 0 or packet.dts is not None
                shown += packet.size > 0 and not (packet.is_discard or _is_hidden(packet))
        _check_whole(container, stream.frames, listed, end)
        rate, codec = float(stream.average_rate or 0), stream.codec_context
        return VideoFile(data, shown, rate, codec.width, codec.height)


def _open(data: bytes) -> Any:
    """PyAV's container; nothing but these bytes is ever opened."""
    import av  # late: images alone need no PyAV

    options = {"format_whitelist": ",".join(FORMATS), "codec_whitelist": ",".join(CODECS)}
    try:
        return av.open(BytesIO(data), io_open=_refuse, container_options=options)
    except (av.error.InvalidDataError, av.error.ArgumentError):  # unknown, or not in the list
        raise ValueError(
            f"{len(data)} bytes in no known format (mp4, mov, mkv, webm, avi, gif)"
        ) from None


def _refuse(url: str, *_: object) -> Any:
    raise PermissionError(f"the file asks for another one, {url!r}")


def _is_hidden(packet: Any) -> bool:
    """Return True for a packet that is not shown: VP8 keeps such references (RFC 6386, 9.1)."""
    return packet.stream.codec_context.name == "vp8" and not bytes(packet)[0] & 0b10000


def _check_whole(container: Any, announced: int, found: int, end: float) -> None:
    if found < announced:
        raise Unusable(f"the file ends after {found} of its {announced} frames")
    duration = (container.duration or 0) / _TIME_BASE
    if end + _CUT < duration:
        raise Unusable(f"the file ends after {end:g} of its {duration:g} s")
