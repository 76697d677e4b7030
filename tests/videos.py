"""Videos and conversations about them in the model card's form, seeded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
from PIL import Image

from tests.conversations import Messages, image, picture, says, user

SMALL = {"min_pixels": 6272, "max_pixels": 12544}  # tiny videos would be enlarged to 100,352


def frames(count: int, width: int = 64, height: int = 48, seed: int = 0) -> list[Image.Image]:
    """A picture that moves to the right, with another seed's block blinking in it."""
    still = np.asarray(picture(width, height, seed))
    shown = []
    for index in range(count):
        moved = np.roll(still, 5 * index, axis=1).copy()
        moved[: height // 3, : width // 3] = (37 * index * (seed + 3)) % 256
        shown.append(Image.fromarray(moved))
    return shown


@contextmanager
def ordinary_scheduling() -> Iterator[None]:
    """Undo what SVT-AV1 4.1 does to the thread that opens it when root runs it.

    It makes the thread real-time (SCHED_FIFO, 99), and so every process that is started from there:
    such processes run until they wait, and whatever shares their core stands still for a second.
    """
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


def film(
    path: Path,
    count: int,
    width: int = 64,
    height: int = 48,
    rate: int = 8,
    codec: str = "libx264",
    seed: int = 0,
    **options: str,
) -> str:
    """Encode `frames` into a file whose name says the container."""
    with ordinary_scheduling(), av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height = width, height
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for frame in frames(count, width, height, seed):
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return str(path)


def film_bytes(count: int) -> bytes:
    """A small mp4 file of `count` frames."""
    with TemporaryDirectory() as folder:
        return Path(film(Path(folder) / "film.mp4", count)).read_bytes()


def video(source: Any, **options: Any) -> dict[str, Any]:
    """A video part; without limits of its own a small one."""
    limits = {} if {"min_pixels", "resized_height"} & options.keys() else SMALL
    return {"type": "video", "video": source, **limits, **options}


def conversations(folder: Path) -> dict[str, Messages]:
    """At least 20 conversations, by name; each ends with the response that is scored."""
    clip = film(folder / "clip.mp4", 20)
    other = film(folder / "other.mp4", 14, seed=1)
    odd = film(folder / "odd.mkv", 17, 90, 122, rate=5, seed=2)
    listed = [str(path) for path in _saved(folder, 5)]
    photo = str(folder / "photo.png")
    picture(100, 70, 9).save(photo)
    shown: dict[str, list[Any]] = {
        "fps/default": [video(clip)],
        "fps/4": [video(clip, fps=4)],
        "fps/all-frames": [video(clip, fps=8)],
        "fps/fraction": [video(clip, fps=2.7, min_frames=2)],
        "fps/min-frames": [video(clip, fps=0.5, min_frames=7)],
        "fps/max-frames": [video(clip, fps=8, max_frames=9)],
        "nframes/2": [video(clip, nframes=2)],
        "nframes/odd": [video(clip, nframes=9)],
        "nframes/all-but-one": [video(odd, nframes=16)],
        "pixels/default": [video(clip, nframes=4, min_pixels=128 * 28 * 28)],
        "pixels/total": [video(odd, fps=5, min_pixels=784, total_pixels=60 * 784)],
        "pixels/resized": [video(odd, resized_height=112, resized_width=70)],
        "pixels/reduced": [video(odd, min_pixels=3136, max_pixels=4000)],
        "pixels/below-the-processors": [video(clip, min_pixels=784, max_pixels=1600)],
        "range/start": [video(clip, video_start=0.9)],
        "range/end": [video(clip, video_end=1.3)],
        "range/both": [video(clip, video_start=0.4, video_end=1.7, fps=6)],
        "frames/even": [video(listed[:4])],
        "frames/odd": [video(listed)],
        "frames/one": [video(listed[:1])],
        "frames/resized": [video(listed[:3], resized_height=100, resized_width=120)],
        "several/two": [video(clip), "and", video(other, fps=4), "Compare."],
        "several/twice-the-same": [video(clip), video(clip), "Same?"],
        "several/sizes": [video(clip, nframes=6), video(odd, nframes=4, max_pixels=20000)],
        "mixed/image-first": [image(photo), video(clip)],
        "mixed/video-first": [video(clip), "then", image(photo)],
        "mixed/all": [image(photo), video(other), video(listed), image(photo, max_pixels=4000)],
        "long/positions-overlap": [video(film(folder / "long.mp4", 120, rate=30), fps=30)],
    }
    for name, codec in (
        ("mpeg4.avi", "mpeg4"), ("vp8.webm", "libvpx"), ("vp9.webm", "libvpx-vp9"),
        ("av1.mp4", "libsvtav1"), ("hevc.mov", "libx265"), ("gif.gif", "gif"),
    ):  # fmt: skip
        shown[f"format/{name}"] = [video(film(folder / name, 12, codec=codec), fps=4)]
    # No key frame but the first, and frames that are stored in another order than shown.
    ordered = film(folder / "reordered.mp4", 20, bf="3", g="100")
    shown["format/reordered"] = [video(ordered, nframes=6, video_start=1)]
    hidden = _with_hidden_frames(folder / "hidden.webm")
    shown["format/hidden-frames"] = [video(hidden, fps=4)]
    cases = {name: [user(*parts, "What?"), says("It moves.")] for name, parts in shown.items()}
    judge = {"role": "system", "content": [video(other), {"type": "text", "text": "Judge."}]}
    cases["turns/system"] = [judge, user("Now."), says("Good.")]
    cases["turns/several"] = [
        user(video(clip), "What is it?"), says("A block."),
        user(video(listed[:2]), image(photo), "And this?"), says("Another one."),
        user("Which?"), says("The first."),
    ]  # fmt: skip
    return cases


def _with_hidden_frames(path: Path) -> str:
    """VP8, some of whose frames say that they are references alone (RFC 6386, 9.1)."""
    with av.open(film(path.with_suffix(".mkv"), 24, codec="libvpx")) as source:
        stream = source.streams.video[0]
        packets = [packet for packet in source.demux(stream) if packet.size]
        with av.open(str(path), "w") as target:
            copied = target.add_stream_from_template(stream)
            for index, packet in enumerate(packets):
                data = bytearray(bytes(packet))
                if index in (3, 7, 8, 23):
                    data[0] &= 0b11101111
                again = av.Packet(bytes(data))
                again.pts, again.dts, again.time_base = packet.pts, packet.dts, packet.time_base
                again.stream = copied
                target.mux(again)
    return str(path)


def _saved(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"frame-{index}.png" for index in range(count)]
    for path, frame in zip(paths, frames(count, 130, 90, seed=4), strict=True):
        frame.save(path)
    return paths
