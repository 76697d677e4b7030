"""Digests of media, by which equal images and videos are found in all requests.

They are computed here, from the pixels that the model is about to see, and not taken from whoever
sends these pixels (docs/engine.md). The device waits for them, so nothing is copied, what came
twice is compared, which is faster, and several threads share what is much.
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
_ALONE = 4 * _PIECE  # a thread that waits for a busy processor costs more than it saves
_THREADS = 8
_SAMPLE = 256  # bytes of an item at least


def digests(media: Sequence[UInt8Array]) -> list[bytes]:
    """Return a digest of each item's shape and pixels.

    That is SHA-256, for which processors have instructions, of the shape and of the digests of all
    pieces of the pixels. hashlib lets other threads run while it reads a piece.

    Args:
        media: uint8 [H, W, 3], or [T, H, W, 3] of a video.
    """
    originals = _originals(media)
    pieces = {index: [*_pieces(media[index])] for index in dict.fromkeys(originals)}
    hashed = _hashed([piece for own in pieces.values() for piece in own])
    found = {}
    for index, own in pieces.items():
        parts = [repr(media[index].shape).encode(), *(next(hashed) for _ in own)]
        found[index] = sha256(b"".join(parts)).digest()
    return [found[index] for index in originals]


def _originals(media: Sequence[UInt8Array]) -> list[int]:
    """For each item return one that is equal to it: an earlier one, or itself.

    An item is compared with one other at most, the first with the same sample. So media that differ
    outside of their samples cost no more than a comparison each; that equal ones among them may be
    missed changes no digest.
    """
    firsts: dict[tuple[tuple[int, ...], bytes], int] = {}
    originals = []
    for index, pixels in enumerate(media):
        sample = pixels.reshape(-1)[:: pixels.size // _SAMPLE + 1].tobytes()
        first = firsts.setdefault((pixels.shape, sample), index)
        equal = first == index or _equal(media[first], pixels)
        originals.append(first if equal else index)
    return originals


def _equal(a: UInt8Array, b: UInt8Array) -> bool:
    return all(map(np.array_equal, _pieces(a), _pieces(b)))


def _pieces(pixels: UInt8Array) -> Iterator[UInt8Array]:
    """Yield the pixels' bytes in order; only pixels that do not lie in one row are copied."""
    flat = np.ascontiguousarray(pixels).reshape(-1)
    for begin in range(0, len(flat), _PIECE):
        yield flat[begin : begin + _PIECE]


def _hashed(pieces: Sequence[UInt8Array]) -> Iterator[bytes]:
    if sum(map(len, pieces)) <= _ALONE:
        return map(_hash, pieces)
    return _pool().map(_hash, pieces)


def _hash(piece: UInt8Array) -> bytes:
    return sha256(piece.data).digest()


@cache
def _pool() -> ThreadPoolExecutor:
    """Threads of this process, which begin with the first large item."""
    threads = min(_THREADS, len(os.sched_getaffinity(0)))
    return ThreadPoolExecutor(threads, thread_name_prefix="digests")
