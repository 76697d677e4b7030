"""Input files for perf_analyzer: requests of real shapes, drawn from a seed.

    python -m benchmarks.perf_analyzer.inputs --mix mixed --output mixed.json

A request is what `triward.RewardClient` would send for the same messages: JSON text, responses,
and images as encoded files.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.commands import run_main
from benchmarks.measure import writable
from benchmarks.workloads import Messages, Writer, photo
from triward.conversation import RewardRequest, build_request
from triward.deadline import Deadline

# perf_analyzer's thread t of T sends entries t, t + T, t + 2T, … modulo the file's length. With a
# prime length every thread comes by every entry, so each mix keeps its proportions.
REQUESTS = 211

# Formats as callers have them; most photographs are JPEG.
FORMATS = ("JPEG", "JPEG", "PNG", "BMP")


@dataclass(frozen=True)
class InputSizes:
    """Ranges of the contents of a request.

    Attributes:
        images: widths and heights, in pixels.
        prompt: words behind the image, about 1.5 tokens each.
        response: words of a response.
    """

    images: tuple[tuple[int, int], ...]
    prompt: tuple[int, int]
    response: tuple[int, int]


class Scale(str, Enum):
    """`full` for 7B on a GPU; `short` keeps its proportions for small models on CPUs."""

    SHORT = "short"
    FULL = "full"


SHAPES = {
    Scale.SHORT: InputSizes(
        images=((56, 56), (84, 56), (56, 112), (112, 84), (140, 112), (196, 140)),
        prompt=(5, 30),
        response=(3, 20),
    ),
    Scale.FULL: InputSizes(
        images=((448, 448), (640, 480), (800, 1000), (1024, 768), (1280, 720), (1600, 1200)),
        prompt=(40, 400),
        response=(120, 210),
    ),
}


@dataclass(frozen=True)
class RequestKind:
    """One sort of request: how many responses, and whether the prompt shows an image."""

    responses: int
    image: bool


SINGLE = RequestKind(responses=1, image=True)
GROUP = RequestKind(responses=8, image=True)
TEXT = RequestKind(responses=1, image=False)

# What share of each mix's requests is of which kind.
MIXES: dict[str, dict[RequestKind, float]] = {
    "single": {SINGLE: 1.0},
    "group8": {GROUP: 1.0},
    "text": {TEXT: 1.0},
    "mixed": {SINGLE: 0.5, TEXT: 0.3, GROUP: 0.2},
}


def requests(
    mix: str, seed: int = 0, count: int = REQUESTS, scale: Scale = Scale.SHORT
) -> list[RewardRequest]:
    """Make the requests of a mix, in order; equal seeds, equal bytes."""
    write = Writer(np.random.default_rng(seed))
    kinds, shares = zip(*MIXES[mix].items(), strict=True)
    # Shares are met to one request, not by luck; the order is drawn.
    ends = np.rint(np.cumsum(shares) * count).astype(int)
    order = np.repeat(np.arange(len(kinds)), np.diff(ends, prepend=0))
    write.rng.shuffle(order)
    return [_request(write, SHAPES[scale], kinds[index]) for index in order]


def _request(write: Writer, shape: InputSizes, kind: RequestKind) -> RewardRequest:
    images = [_file(write, shape)] if kind.image else []
    prompt: Messages = write.prompt(write.between(*shape.prompt), *images)
    responses = [write.text(*shape.response) for _ in range(kind.responses)]
    return build_request(prompt, responses, Deadline(60.0))


def _file(write: Writer, shape: InputSizes) -> bytes:
    picture = photo(write.rng, *shape.images[write.between(0, len(shape.images))])
    buffer = BytesIO()
    picture.save(buffer, FORMATS[write.between(0, len(FORMATS))])
    return buffer.getvalue()


def encode(batch: Sequence[RewardRequest]) -> str:
    """Return the text of an input file."""
    return json.dumps({"data": [_step(request) for request in batch]})


def _step(request: RewardRequest) -> dict[str, Any]:
    return {
        "messages": _tensor([request.messages]),
        "responses": _tensor(request.responses),
        "media": _tensor(request.media),
    }


def _tensor(values: Sequence[bytes]) -> dict[str, Any]:
    """BYTES as perf_analyzer passes them on: each value behind its length, all in base64."""
    if not values:  # perf_analyzer dies of empty base64
        return {"content": [], "shape": [0]}
    raw = b"".join(struct.pack("<I", len(value)) + value for value in values)
    return {"content": {"b64": base64.b64encode(raw).decode()}, "shape": [len(values)]}


def main(
    output: Annotated[Path, typer.Option(help="File for perf_analyzer's --input-data.")],
    mix: Annotated[str, typer.Option(help=f"One of {', '.join(MIXES)}.")] = "mixed",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    count: Annotated[int, typer.Option(min=1, help="Requests; best a prime.")] = REQUESTS,
    scale: Annotated[Scale, typer.Option()] = Scale.SHORT,
) -> None:
    """Write one input file."""
    if mix not in MIXES:
        raise typer.BadParameter(f"no mix {mix!r}; there are {', '.join(MIXES)}")
    writable(output)
    output.write_text(encode(requests(mix, seed, count, scale)))


if __name__ == "__main__":
    run_main(main)
