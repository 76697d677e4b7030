"""list[Features] -> `PackedBatch`: a radix tree of conversations, laid out in one row.

Conversations that begin alike share the tokens that they begin with, however many requests they
came in: equal ids at equal depth share a *node* of the tree when the images and videos under
their placeholders are byte-equal, and the videos equally fast. All nodes' tokens lie in one row
without padding; every linear layer runs once over it, and in attention a node's tokens see their
ancestors' and their own.

Positions are M-RoPE's (Qwen2-VL, arXiv:2409.12191, section 2.1): text advances all three axes
together; an image holds the first axis still and spreads rows and columns over the other two; a
video advances the first by its seconds. What follows continues behind the rows and columns, which
is less than the token count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise

import numpy as np

from ..schema import Features, Grid, Int32Array, Int64Array, UInt8Array
from .geometry import Geometry

_NONE = np.empty(0, np.int32)


@dataclass(frozen=True)
class MediaItem:
    """A distinct image or video; a video that is shown at two speeds counts as two.

    Attributes:
        pixels: uint8 [H, W, 3], or [T, H, W, 3] of a video.
        grid: its patches.
        digest: of shape and pixels; what has equal digests is embedded alike.
        index: its place among the distinct items of the batch.
        first_token: its first token among those of all distinct items of the batch.
    """

    pixels: UInt8Array
    grid: Grid
    digest: bytes
    index: int
    first_token: int


@dataclass(frozen=True)
class Branch:
    """One conversation.

    Attributes:
        request: which item of the batch it belongs to.
        response: which of that item's responses it ends with.
        keys: int32 [L]. A token's id; for a placeholder -1 - t, where t counts the tokens of all
            distinct media. Behind equal keys stand equal embeddings at equal positions.
        positions: int32 [3, L].
        prompt_length: tokens that it shares with the other responses of its request by
            construction.
        media: which of the batch's distinct media it shows.
    """

    request: int
    response: int
    keys: Int32Array
    positions: Int32Array
    prompt_length: int
    media: frozenset[int]

    @property
    def prompt(self) -> Int32Array:
        """Keys of the prompt."""
        return self.keys[: self.prompt_length]


@dataclass(frozen=True)
class SortedBatch:
    """All conversations of a batch, sorted so that those that begin alike are neighbours.

    Attributes:
        branches: the conversations.
        shared: int64 [C], how many tokens branch i has in common with branch i - 1; 0 for the
            first. Computing branch i after branch i - 1 costs the rest.
        media: distinct ones, in the order of their tokens.
        deterministic: whether nodes end where prompts end and nowhere else, so that how a
            conversation is cut does not depend on its company.
    """

    branches: tuple[Branch, ...]
    shared: Int64Array
    media: tuple[MediaItem, ...]
    deterministic: bool


@dataclass(frozen=True)
class PackedBatch:
    """T tokens in S nodes, for C conversations, on the host.

    Attributes:
        input_ids: int32 [T]; whatever stands at placeholders is not read.
        positions: int32 [3, T], M-RoPE's temporal, height and width axes.
        node_lengths: S lengths, which sum to T; nodes lie one behind the other.
        key_lengths: S counts: what a node's last token sees, its ancestors' tokens and its own.
        key_rows: int64 [sum of key_lengths], the rows of those tokens, node by node.
        scored: int64 [C], the node whose last token scores each conversation.
        media: the items that occur.
        media_rows: int64 [M], rows that hold placeholders.
        media_tokens: int64 [M], for each of them, a row of the items' embeddings.
    """

    input_ids: Int32Array
    positions: Int32Array
    node_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    key_rows: Int64Array
    scored: Int64Array
    media: tuple[MediaItem, ...]
    media_rows: Int64Array
    media_tokens: Int64Array


def sort_batch(
    batch: dict[int, Features], geometry: Geometry, deterministic: bool = False
) -> SortedBatch:
    """Sort a batch's conversations and find what neighbours share.

    Args:
        batch: items by request number, each accepted by `check`.
        geometry: the model's.
        deterministic: share whole prompts or nothing.
    """
    media = _DistinctMedia(geometry)
    branches = [
        branch
        for request, item in batch.items()
        for branch in _branches(request, item, media, geometry)
    ]
    # Any order of byte strings puts those with a common prefix side by side.
    if deterministic:
        branches.sort(key=lambda branch: (branch.prompt.tobytes(), branch.keys.tobytes()))
        shared = [len(a.prompt) * np.array_equal(a.prompt, b.prompt) for a, b in pairwise(branches)]
    else:
        branches.sort(key=lambda branch: branch.keys.tobytes())
        shared = [_common(a.keys, b.keys) for a, b in pairwise(branches)]
    counts = np.array([0, *shared], np.int64)
    return SortedBatch(tuple(branches), counts, media.items, deterministic)


class _DistinctMedia:
    """A batch's media, each once."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        # Positions depend on a video's speed, and what is computed behind it on them.
        self._items: dict[tuple[bytes, float], MediaItem] = {}
        self._tokens = 0

    @property
    def items(self) -> tuple[MediaItem, ...]:
        """All of them, in the order of their tokens."""
        return tuple(self._items.values())

    def add(self, pixels: UInt8Array, seconds: float) -> MediaItem:
        """Add an item unless it is there; seconds from one pair of frames to the next."""
        content = repr(pixels.shape).encode() + pixels.tobytes()
        key = blake2b(content, digest_size=16).digest(), seconds
        if key not in self._items:
            grid = self._geometry.grid(pixels)
            self._items[key] = MediaItem(pixels, grid, key[0], len(self._items), self._tokens)
            self._tokens += self._geometry.tokens(grid)
        return self._items[key]


def _branches(
    request: int, item: Features, media: _DistinctMedia, geometry: Geometry
) -> Iterator[Branch]:
    """Conversations of one item, with the keys and positions of their tokens."""
    seconds = _seconds(item)
    shown = [media.add(*each) for each in zip(item.media, seconds, strict=True)]
    grids = [each.grid for each in shown]
    tokens = [each.first_token + np.arange(geometry.tokens(each.grid)) for each in shown]
    keys = item.prompt_ids.copy()
    keys[np.isin(keys, geometry.media_token_ids)] = -1 - np.concatenate([*tokens, _NONE])
    positions, start = mrope_positions(item.prompt_ids, grids, seconds, geometry)
    for index, ids in enumerate(item.response_ids):
        row = np.concatenate([keys, ids])
        row = row[: geometry.read(row)]
        places = np.concatenate([positions, text_positions(start, len(ids))], axis=1)
        yield Branch(
            request,
            index,
            row,
            places[:, : len(row)],
            min(len(keys), len(row)),
            frozenset(each.index for each in shown),
        )


def _seconds(features: Features) -> list[float]:
    """Return each media item's seconds per grid; 0 for an image, which has one grid."""
    given = iter(features.seconds_per_grid)
    return [next(given) if pixels.ndim == 4 else 0.0 for pixels in features.media]


def _common(a: Int32Array, b: Int32Array) -> int:
    """Length of the common prefix."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


def pack(ordered: SortedBatch, chosen: Sequence[int]) -> PackedBatch:
    """Lay the tree of some branches, by ascending index, out in one row."""
    branches = [ordered.branches[index] for index in chosen]
    # What two branches share is what all between them share.
    shared = [0, *(int(ordered.shared[a + 1 : b + 1].min()) for a, b in pairwise(chosen))]
    ends, parents, owners, scored = _grow(branches, shared, ordered.deterministic)

    # Place every node behind its ancestors, in the order of the branches.
    rows: dict[int, Int64Array] = {0: np.empty(0, np.int64)}  # of a node's path, 0 is the root
    order: list[int] = []
    row = 0
    for leaf in scored:
        path = []
        node = leaf
        while node not in rows:
            path.append(node)
            node = parents[node]
        for node in reversed(path):
            length = ends[node] - ends[parents[node]]
            own = np.arange(row, row + length)
            rows[node] = np.concatenate([rows[parents[node]], own])
            order.append(node)
            row += length

    spans = [(branches[owners[n]], slice(ends[parents[n]], ends[n])) for n in order]
    keys = np.concatenate([branch.keys[span] for branch, span in spans])
    media_rows = np.flatnonzero(keys < 0)
    media, media_tokens = _used(ordered.media, -1 - keys[media_rows].astype(np.int64))
    place = {node: index for index, node in enumerate(order)}
    return PackedBatch(
        input_ids=np.maximum(keys, 0),
        positions=np.concatenate([branch.positions[:, span] for branch, span in spans], axis=1),
        node_lengths=tuple(span.stop - span.start for _, span in spans),
        key_lengths=tuple(ends[node] for node in order),
        key_rows=np.concatenate([rows[node] for node in order]),
        scored=np.array([place[node] for node in scored]),
        media=media,
        media_rows=media_rows,
        media_tokens=media_tokens,
    )


def _grow(
    branches: Sequence[Branch], shared: Sequence[int], deterministic: bool
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Grow the radix tree of sorted branches from what neighbours share.

    A node ends at a depth; it begins where its parent ends. Walking the sorted branches, the path
    to the last one is a stack: whatever lies deeper than what the next one shares is left, and a
    node that the next one leaves half-way is split there.

    Returns:
        For each node its end, its parent and a branch that runs through it; node 0 is the empty
        root. And for each branch the node that it ends with.
    """
    ends, parents, owners = [0], [0], [0]
    stack, scored = [0], []
    for index, (branch, depth) in enumerate(zip(branches, shared, strict=True)):
        left = 0
        while ends[stack[-1]] > depth:
            left = stack.pop()
        if ends[stack[-1]] < depth:  # split: the upper half gets a node of its own
            ends.append(depth)
            parents.append(stack[-1])
            owners.append(index)
            stack.append(len(ends) - 1)
            parents[left] = stack[-1]
        cuts = (branch.prompt_length, len(branch.keys)) if deterministic else (len(branch.keys),)
        for cut in cuts:
            if cut > ends[stack[-1]]:
                ends.append(cut)
                parents.append(stack[-1])
                owners.append(index)
                stack.append(len(ends) - 1)
        scored.append(stack[-1])
    return ends, parents, owners, scored


def _used(
    media: tuple[MediaItem, ...], tokens: Int64Array
) -> tuple[tuple[MediaItem, ...], Int64Array]:
    """Find the items that tokens of all media belong to; count the tokens among those alone."""
    firsts = np.array([item.first_token for item in media], np.int64)
    owner = np.searchsorted(firsts, tokens, side="right") - 1
    used, local = np.unique(owner, return_inverse=True)
    counts = np.diff([*firsts, np.iinfo(np.int64).max])[used]
    starts = np.cumsum([0, *counts[:-1]])
    return tuple(media[i] for i in used), starts[local] + tokens - firsts[owner]


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
    placeholders = np.flatnonzero(np.isin(ids, geometry.media_token_ids))
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
