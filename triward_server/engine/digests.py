"""Digests of media, by which equal images and videos are found in all requests.

They are computed here, from the pixels that the model is about to see, and not taken from whoever
sends these pixels (docs/engine.md). The device waits for them, so nothing is copied, and several
threads share the work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from hashlib import sha256

import numpy as np

from ..schema import UInt8Array

_PIECE = 1024**2  # bytes; takes a thread about half a millisecond
_THREADS = 8


def digests(media: Sequence[UInt8Array]) -> list[bytes]:
    """Return a digest of each item's shape and pixels.

    That is SHA-256, for which processors have instructions, of the shape and of the digests of all
    pieces of the pixels. hashlib lets other threads run while it reads a piece.

    Args:
        media: uint8 [H, W, 3], or [T, H, W, 3] of a video.
    """
    pieces = [[*_pieces(pixels)] for pixels in media]
    hashed = _hashed([piece for own in pieces for piece in own])
    return [
        sha256(b"".join([repr(pixels.shape).encode(), *(next(hashed) for _ in own)])).digest()
        for pixels, own in zip(media, pieces, strict=True)
    ]


def _pieces(pixels: UInt8Array) -> Iterator[memoryview]:
    """Yield the pixels' bytes in order; only pixels that do not lie in one row are copied."""
    flat = np.ascontiguousarray(pixels).reshape(-1)
    for begin in range(0, len(flat), _PIECE):
        yield flat[begin : begin + _PIECE].data


def _hashed(pieces: Sequence[memoryview]) -> Iterator[bytes]:
    if sum(map(len, pieces)) <= _PIECE:
        return map(_hash, pieces)  # done before a thread would have begun
    return _pool().map(_hash, pieces)


def _hash(piece: memoryview) -> bytes:
    return sha256(piece).digest()


@cache
def _pool() -> ThreadPoolExecutor:
    """Threads of this process, which begin with the first large item."""
    threads = min(_THREADS, len(os.sched_getaffinity(0)))
    return ThreadPoolExecutor(threads, thread_name_prefix="digests")
