"""A scorer's memory, in use and in holes: random shapes, one process, no Triton.

    python -m benchmarks.heap --output benchmarks/results/NAME.json --no-tidy --no-keep

With glibc's mallinfo2(3) and the kernel's count of anonymous pages, every few seconds. The
environment decides about the rest, as MALLOC_MMAP_THRESHOLD_ or ONEDNN_PRIMITIVE_CACHE_CAPACITY.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.commands import run_main
from benchmarks.measure import machine, writable
from triward_server.backend.triton_io import KEPT_BYTES
from triward_server.config import ForwardConfig
from triward_server.engine.geometry import Geometry
from triward_server.engine.scoring import Scorer
from triward_server.export.random_checkpoint import make_checkpoint
from triward_server.memory import Heap
from triward_server.schema import Features, UInt8Array

_SETTINGS = ("MALLOC_", "ONEDNN_")


class _MallInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and newer."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks "
        "keepcost".split()
    ]


def request(rng: np.random.Generator, geometry: Geometry) -> Features:
    """Make a prompt, often with an image, and 1 to 16 responses."""
    text = rng.integers(0, 200, rng.integers(1, 300)).astype(np.int32)
    images: tuple[UInt8Array, ...] = ()
    if rng.random() < 0.6:
        rows, columns = rng.integers(1, 18, 2)
        side = geometry.patch_size * geometry.merge_size
        images = (rng.integers(0, 256, (rows * side, columns * side, 3)).astype(np.uint8),)
        pads = np.full(rows * columns, geometry.image_token_id, np.int32)
        text = np.concatenate([text[: len(text) // 2], pads, text[len(text) // 2 :]])
    count = rng.choice([1, 1, 1, 2, 4, 8, 16])
    responses = (rng.integers(0, 200, rng.integers(1, 250)).astype(np.int32) for _ in range(count))
    return Features(text, tuple(responses), images)


def sample() -> dict[str, int]:
    """Bytes: in use, free inside the heap, mapped on their own, resident and not a file's."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _MallInfo
    info = libc.mallinfo2()
    status = Path("/proc/self/status").read_text()
    resident = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    return {
        "in_use": info.uordblks,
        "holes": info.fordblks,
        "mapped": info.hblkhd,
        "resident": 1024 * int(resident[1]) if resident else 0,
    }


def main(
    output: Annotated[Path, typer.Option(help="JSON file.")],
    minutes: Annotated[float, typer.Option(min=0.1)] = 10.0,
    every: Annotated[float, typer.Option(min=1, help="Seconds between samples.")] = 15.0,
    tidy: Annotated[bool, typer.Option(help="Give free pages back, as the server does.")] = True,
    keep: Annotated[bool, typer.Option(help="Keep some in between, as the server does.")] = True,
) -> None:
    """Score random batches and write down what the heap holds."""
    writable(output)
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint("tiny", 0, Path(folder) / "checkpoint")
        config = ForwardConfig(
            device="cpu", dtype="float32", threads=1, embedding_cache_bytes=16_000_000,
            prefix_cache_bytes=16_000_000,
            compile=False,
        )  # fmt: skip
        scorer = Scorer(Path(folder) / "checkpoint", config)
        scorer.warm_up()
    heap, rng = Heap(KEPT_BYTES if keep else 0), np.random.default_rng(0)
    samples: list[dict[str, float]] = []
    begun, batches = time.monotonic(), 0
    while (seconds := time.monotonic() - begun) < 60 * minutes:
        if seconds >= every * len(samples):
            samples.append({"seconds": round(seconds), "batches": batches, **sample()})
            print(samples[-1])
        if tidy:
            heap.tidy()
        scorer.score([request(rng, scorer.geometry) for _ in range(rng.integers(1, 5))])
        batches += 1
    environment = {k: v for k, v in os.environ.items() if k.startswith(_SETTINGS)}
    how = {"tidy": tidy, "keep": keep, "environment": environment}
    results = {"machine": machine(), **how, "samples": samples}
    output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
