"""Requests of a model that reads images as tiles, and a checkpoint of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from triward_server.engine.geometry import Geometry
from triward_server.schema import Features, UInt8Array

TILE = 56  # pixels of the tiny checkpoint's tiles

rng = np.random.default_rng(0)


def canvas(rows: int, columns: int) -> UInt8Array:
    """Noise of so many tiles."""
    return rng.integers(0, 256, (rows * TILE, columns * TILE, 3), dtype=np.uint8)


# One tile, wide, tall, 9 and 24 tiles; two of one shape.
CANVASES = [canvas(*size) for size in ((1, 1), (1, 3), (4, 1), (3, 3), (4, 6), (1, 1), (2, 2))]

runs = st.lists(st.integers(3, 5), min_size=1, max_size=4).map(tuple)
shown = st.sampled_from([0, 0, 1, 2, 5, 5, 6]).map(lambda index: ("image", index))
prompts = st.lists(st.one_of(runs, shown), max_size=4)
responses = st.lists(st.lists(runs, min_size=1, max_size=3), min_size=1, max_size=4)
batches = st.lists(st.tuples(prompts, responses), min_size=1, max_size=3)


def conversation(
    prompt: Sequence[Any], answers: Sequence[Sequence[Sequence[int]]], geometry: Geometry
) -> Features:
    """Make a request of runs of ids and images `("image", index)`, which stand where they stand."""
    ids, media = [1], []
    for item in prompt:
        if item[0] == "image":
            media.append(CANVASES[item[1]])
            count = geometry.tokens(geometry.grid(media[-1]))
            ids += [geometry.image_token_id or 0] * count
        else:
            ids += item
    end = [] if geometry.read_id is None else [geometry.read_id]
    flat = [np.array([*(i for run in answer for i in run), *end], np.int32) for answer in answers]
    return Features(np.array(ids, np.int32), tuple(flat), tuple(media))
