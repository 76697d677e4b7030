"""list[Features] -> `PackedBatch`: one padding-free row that a single forward pass computes.

Every conversation is a run of the row and attends only within itself. Positions are M-RoPE's
(Qwen2-VL, arXiv:2409.12191, section 2.1): text advances all three axes together; an image holds
the first axis still and spreads rows and columns over the other two; what follows continues at
the largest position so far plus one, which is less than the token count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidRequest
from .schema import Features, Grid, Int32Array, UInt8Array

Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class Geometry:
    """What packing must know of a model.

    Attributes:
        image_token_id: the placeholder that one merged patch of an image takes in the text.
        patch_size: side of a vision patch in pixels.
        merge_size: patches that are merged into one token, along each side.
        vocab_size: ids are below this.
        max_tokens: positions that the model has.
    """

    image_token_id: int
    patch_size: int
    merge_size: int
    vocab_size: int
    max_tokens: int

    def grid(self, image: UInt8Array) -> Grid:
        """The patches of an image [H, W, 3]; H and W are multiples of a merged patch."""
        return Grid(1, image.shape[0] // self.patch_size, image.shape[1] // self.patch_size)

    def tokens(self, grid: Grid) -> int:
        """Placeholders that a media item takes."""
        return grid.patches // self.merge_size**2


@dataclass(frozen=True)
class PackedBatch:
    """One row of T tokens from C conversations, on the host.

    Attributes:
        input_ids: int32 [T].
        positions: int32 [3, T], M-RoPE's temporal, height and width axes.
        lengths: int32 [C], tokens of each conversation, in the order of the row.
        scored: int64 [C], the row of each conversation's last token.
        images: the batch's images, each once for all responses of its request.
        image_rows: int64 [M], rows of `input_ids` that hold image placeholders.
        image_tokens: int64 [M], for each of them, which row of the image embeddings to put there.
    """

    input_ids: Int32Array
    positions: Int32Array
    lengths: Int32Array
    scored: Int64Array
    images: tuple[UInt8Array, ...]
    image_rows: Int64Array
    image_tokens: Int64Array


def check(features: Features, geometry: Geometry) -> None:
    """Raise `InvalidRequest` unless the features fit the model.

    Ours always do; a caller of `reward_forward` may send anything.
    """
    ids = np.concatenate([features.prompt_ids, *features.response_ids])
    if not features.response_ids:
        raise InvalidRequest("segment_lengths", "a prompt without a response was given")
    if min(map(len, features.response_ids)) == 0:
        raise InvalidRequest("segment_lengths", "a response segment of 0 tokens was given")
    outside = (ids < 0) | (ids >= geometry.vocab_size)
    if outside.any():
        at = int(outside.argmax())
        raise InvalidRequest(
            f"input_ids[{at}]", f"id {ids[at]}, the vocabulary has {geometry.vocab_size} entries"
        )
    placeholders = np.flatnonzero(ids == geometry.image_token_id)
    if placeholders.size and placeholders[-1] >= len(features.prompt_ids):
        raise InvalidRequest(
            f"input_ids[{placeholders[-1]}]", "an image placeholder stands behind the prompt"
        )
    sizes = [geometry.tokens(geometry.grid(image)) for image in features.images]
    if len(placeholders) != sum(sizes):
        raise InvalidRequest(
            "input_ids",
            f"{len(placeholders)} image placeholders were given, the images take {sum(sizes)}",
        )
    for index, run in enumerate(np.split(placeholders, np.cumsum(sizes)[:-1]) if sizes else []):
        if run[-1] - run[0] != len(run) - 1:
            raise InvalidRequest(
                "input_ids", f"the {len(run)} placeholders of image {index} do not stand together"
            )
    longest = max(features.token_counts)
    if longest > geometry.max_tokens:
        raise InvalidRequest(
            "input_ids", f"a conversation of {longest} tokens, the limit is {geometry.max_tokens}"
        )


def pack(batch: Sequence[Features], geometry: Geometry) -> PackedBatch:
    """Lay all conversations of a batch out in one row.

    Args:
        batch: at least one item, each accepted by `check`.
        geometry: the model's.
    """
    ids: list[Int32Array] = []
    positions: list[Int32Array] = []
    images: list[UInt8Array] = []
    image_rows: list[Int64Array] = []
    image_tokens: list[Int64Array] = []
    lengths: list[int] = []
    row = embedded = 0
    for item in batch:
        grids = [geometry.grid(image) for image in item.images]
        prompt_positions = mrope_positions(item.prompt_ids, grids, geometry)
        start = int(prompt_positions.max(initial=-1)) + 1
        placeholders = np.flatnonzero(item.prompt_ids == geometry.image_token_id)
        for response in item.response_ids:
            ids += [item.prompt_ids, response]
            positions += [prompt_positions, text_positions(start, len(response))]
            image_rows.append(placeholders + row)
            image_tokens.append(np.arange(len(placeholders), dtype=np.int64) + embedded)
            lengths.append(len(item.prompt_ids) + len(response))
            row += lengths[-1]
        images += item.images
        embedded += len(placeholders)
    return PackedBatch(
        input_ids=np.concatenate(ids),
        positions=np.concatenate(positions, axis=1),
        lengths=np.array(lengths, dtype=np.int32),
        scored=np.cumsum(lengths) - 1,
        images=tuple(images),
        image_rows=np.concatenate(image_rows),
        image_tokens=np.concatenate(image_tokens),
    )


def mrope_positions(ids: Int32Array, grids: Sequence[Grid], geometry: Geometry) -> Int32Array:
    """M-RoPE positions int32 [3, P] of a prompt whose placeholders stand for `grids` in order."""
    placeholders = np.flatnonzero(ids == geometry.image_token_id)
    runs: list[Int32Array] = []
    row = position = used = 0
    for grid in grids:
        begin = int(placeholders[used])
        runs.append(text_positions(position, begin - row))
        position += begin - row
        rows, columns = grid.h // geometry.merge_size, grid.w // geometry.merge_size
        runs.append(np.indices((grid.t, rows, columns), np.int32).reshape(3, -1) + position)
        position += max(grid.t, rows, columns)
        used += geometry.tokens(grid)
        row = begin + geometry.tokens(grid)
    runs.append(text_positions(position, len(ids) - row))
    return np.concatenate(runs, axis=1)


def text_positions(start: int, length: int) -> Int32Array:
    """Positions int32 [3, length] of text that begins at `start`."""
    return np.broadcast_to(np.arange(start, start + length, dtype=np.int32), (3, length))
