"""Media -> the inputs of `vision.onnx`, the vision tower as an ONNX graph.

A graph has no loops over images and no shapes that depend on values, so everything that follows
from sizes alone is computed here, in numpy: which patches attend to each other, and where they
lie. docs/onnx.md has the tensors for callers in other languages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import torch

from .. import schema
from ..engine.towers import Cut, normalisation
from ..engine.vision import patchify, places, plan_windows
from ..schema import Array, Grid, Int64Array, TensorSpec, UInt8Array


def graph_inputs(
    media: Sequence[UInt8Array], grids: Sequence[Grid], cut: Cut
) -> dict[TensorSpec, Array]:
    """Return the graph's inputs for images and videos.

    Args:
        media: uint8 [H, W, 3] or [T, H, W, 3] each, at least one.
        grids: their patches.
        cut: the checkpoint's.

    Returns:
        `schema.VISION_INPUTS`, each with its array.
    """
    normal, items = normalisation(cut), zip(map(torch.from_numpy, media), grids, strict=True)
    patches = torch.cat([patchify(*item, cut, normal) for item in items])
    return {schema.PATCHES: patches.numpy()} | grid_inputs(grids, cut)


def grid_inputs(grids: Sequence[Grid], cut: Cut) -> dict[TensorSpec, Array]:
    """Return the graph's inputs that follow from the media's sizes alone."""
    # A unit is the square of patches that become one token; a unit's patches are neighbours.
    square = cut.merge_size**2
    ends = np.cumsum([grid.patches for grid in grids])
    runs: list[Int64Array] = []
    for grid, end in zip(grids, ends, strict=True):
        order, lengths = plan_windows(grid, cut.merge_size, cut.window)
        patches = (order[:, None] * square + np.arange(square)).reshape(-1)
        runs += np.split(patches + end - grid.patches, np.cumsum(lengths)[:-1])
    sizes = list(chain.from_iterable([grid.h * grid.w] * grid.t for grid in grids))
    frames = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    windows, window_places = _padded(runs)
    whole, frame_places = _padded(frames)
    return {
        schema.POSITIONS: np.concatenate([places(grid, cut.merge_size) for grid in grids]),
        schema.WINDOWS: windows,
        schema.WINDOW_PLACES: window_places,
        schema.FRAMES: whole,
        schema.FRAME_PLACES: frame_places,
    }


def _padded(runs: Iterable[Int64Array]) -> tuple[Int64Array, Int64Array]:
    """Arrange runs of rows in a rectangle; also return each row's place in it, flattened.

    Together the runs hold every row once. Padding is -1.
    """
    runs = list(runs)
    lengths = np.array([len(run) for run in runs])
    rectangle = np.full((len(runs), lengths.max()), -1, np.int64)
    inside = np.arange(lengths.max()) < lengths[:, None]
    rows = np.concatenate(runs)
    rectangle[inside] = rows
    places = np.empty(len(rows), np.int64)
    places[rows] = np.flatnonzero(inside)
    return rectangle, places
