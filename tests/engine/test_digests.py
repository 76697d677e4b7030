"""Digests of media: every pixel counts, nothing else does, and several threads share the work."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier

import numpy as np
import pytest

from triward_server.engine import digests as module
from triward_server.engine.digests import digests
from triward_server.schema import UInt8Array

IMAGE = np.random.default_rng(0).integers(0, 256, (28, 56, 3), dtype=np.uint8)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    """74 pieces an image, the last one shorter, shared by threads."""
    monkeypatch.setattr(module, "_PIECE", 64)
    monkeypatch.setattr(module, "_ALONE", 64)
    assert IMAGE.size % 64
    return 64


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a machine with a single processor, too."""
    with ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(module, "_pool", lambda: pool)
        yield


@pytest.mark.parametrize("pieces", [64, 1024**2])
def test_every_byte_counts(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", pieces)
    monkeypatch.setattr(module, "_ALONE", pieces)
    changed = []
    for index in range(0, IMAGE.size, 1 if pieces > IMAGE.size else 31):
        other = IMAGE.copy()
        other.reshape(-1)[index] ^= 1
        changed.append(other)
    assert len({*digests([IMAGE, *changed])}) == 1 + len(changed)


def test_places_count(small_pieces: int) -> None:
    """Of pixels, of whole pieces, and of rows: the same bytes under another shape."""
    flat = IMAGE.reshape(-1)
    swapped = np.concatenate([flat[small_pieces : 2 * small_pieces], flat[:small_pieces]])
    swapped = np.concatenate([swapped, flat[2 * small_pieces :]]).reshape(IMAGE.shape)
    shapes = [(56, 28, 3), (2, 28, 28, 3), (2, 14, 56, 3), (4, 14, 28, 3)]
    others = [IMAGE[::-1], IMAGE[:, ::-1], swapped, *map(IMAGE.reshape, shapes)]
    assert len({*digests([IMAGE, *others])}) == 1 + len(others)


def test_nothing_else_counts(small_pieces: int) -> None:
    """Not the company, nor how the pixels lie in memory."""
    other = IMAGE[::-1].copy()
    tiny = np.zeros((2, 2, 3), np.uint8)
    frozen = IMAGE.copy()
    frozen.flags.writeable = False
    alone = [*digests([tiny]), *digests([IMAGE]), *digests([other])]
    assert digests([tiny, IMAGE, other]) == alone
    assert digests([IMAGE.copy(order="F"), other[::-1], frozen]) == [alone[1]] * 3
    assert digests([]) == []


def test_pieces_are_read_at_the_same_time(
    small_pieces: int, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of the even number at once, or the barrier breaks."""
    right = digests([IMAGE])
    together, hashed = Barrier(2), module._hash

    def wait(piece: UInt8Array) -> bytes:
        together.wait(timeout=20)
        return hashed(piece)

    monkeypatch.setattr(module, "_hash", wait)
    assert digests([IMAGE]) == right


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many pieces are hashed, how many items compared."""
    found, originals = Counter[str](), {name: getattr(module, name) for name in ("_hash", "_equal")}

    def count(name: str, *arguments: UInt8Array) -> object:
        found[name] += 1
        return originals[name](*arguments)

    for name in originals:
        monkeypatch.setattr(module, name, partial(count, name))
    return found


def test_what_came_twice_is_hashed_once(counts: Counter[str]) -> None:
    other = IMAGE[::-1].copy()
    alone = [*digests([IMAGE]), *digests([other])]
    counts.clear()
    assert digests([IMAGE, other, IMAGE.copy(), other.copy(), IMAGE]) == [*alone, *alone, alone[0]]
    assert counts == {"_hash": 2, "_equal": 3}


def test_media_with_equal_samples_are_compared_once_each(counts: Counter[str]) -> None:
    """Not every one with every other, which would let one request stop the device for seconds."""
    images = [IMAGE.copy() for _ in range(20)]
    for number, image in enumerate(images):
        image.reshape(-1)[-1] = number
    assert IMAGE.size % (IMAGE.size // module._SAMPLE + 1) != 1, "the last byte is in no sample"
    assert len({*digests([*images, images[7].copy()])}) == 20
    assert counts == {"_hash": 21, "_equal": 20}


def test_nothing_is_copied(two_threads: None) -> None:
    """Copies took most of the time that a digest took."""
    image = np.zeros((2048, 2048, 3), np.uint8)
    digests([image])  # the threads have begun
    tracemalloc.start()
    try:
        digests([image] * 4)
        assert tracemalloc.get_traced_memory()[1] < 1.5 * module._PIECE < image.nbytes / 4
    finally:
        tracemalloc.stop()
