"""Encoded media -> headers and pixels within a time limit, whatever the files do to the codecs.

A codec's C code cannot be interrupted, takes what memory a file asks for, and may crash. So it runs
in a worker (`workers.py`, `codec_worker.py`), which is killed when the request's time is over; what
happens to it is blamed on the media item that it was busy with.

A request has two phases: all its media's headers are read first, which tells how many tokens they
take, and only then are pixels decoded. They are received into the array that goes on to the model.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..config import PreprocessConfig
from ..errors import InvalidRequest, TriwardError, Unavailable
from ..schema import UInt8Array
from . import workers
from .image_codec import Manner
from .workers import TimeIsOver, Worker, WorkerLost

Size = tuple[int, int]  # height, width

QWENS = Manner()

_WORKERS = f"{__package__}.codec_worker"

# What decoding may hold beside the files: the largest picture in up to four copies of four bytes
# and half as much again, or the frames to which a codec refers.
_BYTES_PER_PIXEL = 24
_LEAST_BYTES = 256 * 2**20
_FAULTS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
_MOMENT = 5.0  # seconds in which a worker that has nothing to do must answer


@dataclass(frozen=True)
class Header:
    """Properties that a file's headers name.

    Attributes:
        number: of the item among those of its request.
        size: height and width of the image, or of a frame.
        frames: of a video.
        rate: frames in a second.
    """

    number: int
    size: Size
    frames: int = 0
    rate: float = 0.0


class Decoder:
    """Reads media, one request at a time.

    Args:
        config: limits on one request.
        progress: called while a worker is waited for, each second.
    """

    def __init__(
        self, config: PreprocessConfig, progress: Callable[[], None] = lambda: None
    ) -> None:
        self._seconds = config.max_decode_seconds
        self._max_bytes = (
            _LEAST_BYTES + _BYTES_PER_PIXEL * config.max_image_pixels + config.max_request_bytes
        )
        self._progress = progress
        self._running: Worker | None = None
        self.killed = 0  # workers whose time was over

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        """Read one request's media in a block; nothing of them stays in the worker after it."""
        if self._running and not self._running.channel.is_alive:
            self.end()  # the kernel has taken it while it was idle
        reading = Reading(self, self._seconds)
        try:
            yield reading
        finally:
            if reading.unread:
                self._forget()

    @property
    def worker(self) -> Worker:
        """The one that runs; starting it is not counted against a request's time.

        Raises:
            Unavailable: none can be started.
        """
        if self._running is None:
            settings = json.dumps(self._max_bytes).encode()
            try:
                zygote = workers.zygote(_WORKERS)
                self._running = zygote.fork(settings, self._max_bytes, self._progress)
            except (WorkerLost, TimeIsOver) as error:
                raise Unavailable(f"no process can be started for decoding: {error}") from None
        return self._running

    def blame(self, error: TimeIsOver | WorkerLost, field: str) -> TriwardError:
        """End the worker and say what a media item has done to it.

        A signal of a fault is the codec's, over this file. A worker that was killed is nobody's
        fault: the kernel does so when memory runs out, and workers come first.
        """
        status = self.end()
        if isinstance(error, TimeIsOver):
            self.killed += 1
            return InvalidRequest(
                field, f"the request's media take longer than {self._seconds:g} s to decode"
            )
        if -status in _FAULTS:
            name = signal.Signals(-status).name
            return InvalidRequest(field, f"the file crashes its decoder ({name})")
        if status == -signal.SIGKILL:
            return Unavailable(f"{field}: decoding was killed; the machine lacks memory")
        if status < 0:
            name = signal.Signals(-status).name
            return Unavailable(f"{field}: decoding was ended by {name}")
        return TriwardError(f"{field}: the decoder ended by itself ({status}); the log says why")

    def _forget(self) -> None:
        """Have the worker drop what it holds; one that does not is ended."""
        if self._running is None:
            return
        end = time.monotonic() + _MOMENT
        try:
            self._running.channel.send({"do": "forget"}, end=end)
            self._running.channel.receive(end)
        except (TimeIsOver, WorkerLost):
            self.end()

    def end(self) -> int:
        """End the worker; another one is started when it is needed. Returns how it ended."""
        assert self._running
        worker, self._running = self._running, None
        return worker.kill()


class Reading:
    """One request's media.

    Args:
        decoder: whose worker reads.
        seconds: that it may take.
    """

    def __init__(self, decoder: Decoder, seconds: float) -> None:
        self._decoder = decoder
        self._left = seconds
        self._opened = 0
        self.unread = 0  # items that the worker holds

    def open(self, field: str, kind: str, data: bytes) -> Header:
        """Read the headers of one file.

        Args:
            field: its name in error messages, `media[0]`.
            kind: `image` or `video`.
            data: the file.

        Raises:
            InvalidRequest: it is none, or takes too long.
            Unavailable: the machine lacks memory.
        """
        number, self._opened = self._opened, self._opened + 1
        self.unread += 1
        message = {"do": "open", "kind": kind, "number": number, "bytes": len(data)}
        with self._timed(field) as end:
            channel = self._decoder.worker.channel
            channel.send(message, [data], end)
            answer = _checked(field, channel.receive(end))
        size = int(answer["height"]), int(answer["width"])
        return Header(number, size, int(answer.get("frames", 0)), float(answer.get("rate", 0)))

    def image(
        self, field: str, header: Header, size: Size | None, manner: Manner = QWENS
    ) -> UInt8Array:
        """Decode an image; errors as of `open`.

        Args:
            field: its name.
            header: its own.
            size: height and width to which Pillow resizes, or None for the image's own.
            manner: how it does.

        Returns:
            uint8 [H, W, 3].
        """
        message = {
            "do": "read", "number": header.number, "size": size, "manner": asdict(manner)
        }  # fmt: skip
        [pixels] = self._read(field, message, size or header.size, 1)
        return pixels

    def frames(self, field: str, header: Header, numbers: Sequence[int]) -> Iterator[UInt8Array]:
        """Decode frames of a video, uint8 [H, W, 3] each; errors as of `open`.

        Args:
            field: its name.
            header: its own.
            numbers: which, ascending.
        """
        message = {"do": "read", "number": header.number, "frames": list(numbers)}
        return self._read(field, message, header.size, len(numbers))

    def _read(self, field: str, message: Any, size: Size, count: int) -> Iterator[UInt8Array]:
        self.unread -= 1
        with self._timed(field) as end:
            channel = self._decoder.worker.channel
            channel.send(message, end=end)
            for _ in range(count):
                _checked(field, channel.receive(end))
                pixels = np.empty((*size, 3), np.uint8)
                channel.receive_into(pixels.data.cast("B"), end)
                yield pixels

    @contextmanager
    def _timed(self, field: str) -> Iterator[float]:
        """Ask the worker in a block, which gets the time until which it may.

        What is done with frames between two of them counts, too.
        """
        _ = self._decoder.worker  # is started on nobody's time
        begun = time.monotonic()
        try:
            yield begun + self._left
        except (TimeIsOver, WorkerLost) as error:
            raise self._decoder.blame(error, field) from None
        except InvalidRequest:  # the worker's answer, which ends what it has to say
            raise
        except BaseException:  # nobody takes what it still sends
            self._decoder.end()
            raise
        self._left -= time.monotonic() - begun


def _checked(field: str, answer: Any) -> Any:
    if "error" in answer:
        raise InvalidRequest(field, answer["error"])
    return answer
