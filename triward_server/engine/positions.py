"""Positions of tokens: M-RoPE's (Qwen2-VL, arXiv:2409.12191, section 2.1).

Text advances all three axes together; an image holds the first axis still and spreads rows and
columns over the other two; a video advances the first by its seconds. What follows continues
behind the rows and columns, which is less than the token count.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..schema import Grid, Int32Array
from .geometry import Geometry


def mrope_positions(
    ids: Int32Array, grids: Sequence[Grid], seconds: Sequence[float], geometry: Geometry
) -> tuple[Int32Array, int]:
    """M-RoPE positions of a prompt.

    Args:
        ids: int32 [P].
        grids: what its placeholders stand for, in order.
        seconds: from one pair of frames to the next, for each of them.
        geometry: the model's.

    Returns:
        int32 [3, P], and where what follows continues. As in transformers since 5.3 that is behind
        a video's rows and columns even where its last frames stand at a larger position.
    """
    if geometry.tile is not None:  # a token is a position, whatever it shows
        return text_positions(0, len(ids)), len(ids)
    placeholders = np.flatnonzero(geometry.is_media(ids))
    runs: list[Int32Array] = []
    row = position = used = 0
    for grid, pace in zip(grids, seconds, strict=True):
        begin = int(placeholders[used])
        runs.append(text_positions(position, begin - row))
        position += begin - row
        rows, columns = grid.h // geometry.merge_size, grid.w // geometry.merge_size
        places = np.indices((grid.t, rows, columns), np.int32).reshape(3, -1)
        places[0] = places[0].astype(np.float32) * geometry.step(pace)  # truncated
        runs.append(places + position)
        position += max(rows, columns)
        used += geometry.tokens(grid)
        row = begin + geometry.tokens(grid)
    runs.append(text_positions(position, len(ids) - row))
    return np.concatenate(runs, axis=1), position + len(ids) - row


def text_positions(start: int, length: int) -> Int32Array:
    """Positions int32 [3, length] of text that begins at `start`."""
    return np.broadcast_to(np.arange(start, start + length, dtype=np.int32), (3, length))
