"""What a digest of media costs, in turns with how it was computed before, and with parts of both.

    python -m benchmarks.digests --output benchmarks/results/DATE-digests.json

The device waits for it: until then nobody knows what the caches have. No model, no Triton.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.commands import run_main
from benchmarks.measure import in_turns, machine, writable
from triward_server.engine.digests import digests
from triward_server.schema import UInt8Array

BEFORE = "before: two copies, BLAKE2b"
NOW = "now: SHA-256, equal ones once, threads above 4 MiB"
_SIZE = (756, 1036, 3)  # 1024 x 768 as the processor resizes it: 3,996 patches, 999 tokens


def before(media: Sequence[UInt8Array]) -> list[bytes]:
    """Digest each item as `packing` did."""
    contents = (repr(pixels.shape).encode() + pixels.tobytes() for pixels in media)
    return [blake2b(content, digest_size=16).digest() for content in contents]


WAYS: dict[str, Callable[[Sequence[UInt8Array]], list[bytes]]] = {
    BEFORE: before,
    "BLAKE2b alone, no copies": lambda media: [blake2b(pixels.data).digest() for pixels in media],
    "SHA-256 alone, no copies": lambda media: [sha256(pixels.data).digest() for pixels in media],
    NOW: digests,
}


def media_of_batches() -> dict[str, list[UInt8Array]]:
    """Media of one batch."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, _SIZE, dtype=np.uint8) for _ in range(16)]
    return {
        "one image": images[:1],
        "16 images": images,
        "one image in 64 requests": [images[0].copy() for _ in range(64)],
        "64 images of 28 x 28": [image[:28, :28].copy() for image in images * 4],
    }


def measure_way(media: Sequence[UInt8Array], repeats: int) -> dict[str, Any]:
    """Milliseconds of each way for all of the media: the median, and the least."""
    runs: dict[str, Callable[[], object]] = {n: partial(way, media) for n, way in WAYS.items()}
    seconds = in_turns(runs, repeats)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "bytes": sum(pixels.nbytes for pixels in media),
        "median_ms": {name: round(1e3 * median, 3) for name, median in medians.items()},
        "least_ms": {name: round(1e3 * min(each), 3) for name, each in seconds.items()},
        "ratio": round(medians[BEFORE] / medians[NOW], 2),
        "ratio_of_the_least": round(min(seconds[BEFORE]) / min(seconds[NOW]), 2),
    }


def main(
    output: Annotated[Path, typer.Option(help="JSON file.")],
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each workload.")] = 60,
) -> None:
    """Measure all workloads and write the results."""
    writable(output)
    digests(media_of_batches()["one image"])  # the threads begin
    rows = {name: measure_way(media, repeats) for name, media in media_of_batches().items()}
    print(json.dumps(rows, indent=1))
    output.write_text(json.dumps({"machine": machine(), "workloads": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
