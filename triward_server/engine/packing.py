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

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize

from ..config import ForwardConfig
from ..errors import InvalidRequest
from ..schema import FRAMES_PER_GRID, Features, Grid, Int32Array, UInt8Array

Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class Geometry:
    """What packing must know of a model.

    Attributes:
        image_token_id: the placeholder that one merged patch of an image takes in the text; None
            for a text model.
        patch_size: side of a vision patch in pixels.
        merge_size: patches that are merged into one token, along each side.
        vocab_size: ids are below this.
        max_tokens: positions that the model has.
        video_token_id: what `image_token_id` is, for videos.
        tokens_per_second: positions that a second of a video takes.
        video_limits: fewest and most pixels of a frame that the processor leaves as it is.
        padding_id: a conversation is scored at its last token of another id; None: at its last.
    """

    image_token_id: int | None
    patch_size: int
    merge_size: int
    vocab_size: int
    max_tokens: int
    video_token_id: int | None = None
    tokens_per_second: int = 0
    video_limits: tuple[int, int] | None = None
    padding_id: int | None = None

    @property
    def media_token_ids(self) -> tuple[int, ...]:
        """The placeholders: an image's and a video's; a text model has none."""
        ids = (self.image_token_id, self.video_token_id)
        return tuple(id_ for id_ in ids if id_ is not None)

    def grid(self, pixels: UInt8Array) -> Grid:
        """The patches of an image [H, W, 3] or a video [T, H, W, 3]."""
        return self.grid_of(pixels.shape)

    def grid_of(self, shape: tuple[int, ...]) -> Grid:
        """The same for a shape; H and W are multiples of a merged patch.

        A video's frames may be resized once more, as the processor does it.
        """
        *frames, height, width, _ = shape
        if frames and self.video_limits:
            side = self.patch_size * self.merge_size
            height, width = smart_resize(height, width, side, *self.video_limits)
        t = frames[0] // FRAMES_PER_GRID if frames else 1
        return Grid(t, height // self.patch_size, width // self.patch_size)

    def step(self, seconds: float) -> np.float32:
        """Positions from one pair of frames to the next, in float32 as the reference has it."""
        return np.float32(self.tokens_per_second) * np.float32(seconds)

    def read(self, ids: Int32Array) -> int:
        """How many of a conversation's tokens are read: up to the one that is scored."""
        if self.padding_id is None:
            return len(ids)
        return int(np.flatnonzero(ids != self.padding_id).max(initial=-1)) + 1

    def tokens(self, grid: Grid) -> int:
        """Placeholders that a media item takes."""
        return grid.patches // self.merge_size**2


@dataclass(frozen=True)
class Cost:
    """What a forward pass takes.

    Attributes:
        per_token: FLOPs of the language model's matrices, for one token that others see.
        per_score: the rest of the last layer, for one token that is scored.
        per_pair: FLOPs of its attention, for one query and one key.
        per_patch: FLOPs of the vision tower's matrices, for one patch.
        token_bytes: intermediate results at their peak, for one token.
        key_bytes: the same for one gathered key with its value.
        patch_bytes: the same for one patch.
        pass_bytes: the same for any pass, however small.
    """

    per_token: int
    per_score: int
    per_pair: int
    per_patch: int
    token_bytes: int
    key_bytes: int
    patch_bytes: int
    pass_bytes: int = 0


@dataclass(frozen=True)
class MediaItem:
    """A distinct image or video; a video that is shown at two speeds counts as two.

    Attributes:
        pixels: uint8 [H, W, 3], or [T, H, W, 3] of a video.
        digest: of shape and pixels; what has equal digests is embedded alike.
        index: its place among the distinct items of the batch.
        first_token: its first token among those of all distinct items of the batch.
    """

    pixels: UInt8Array
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
class Forest:
    """All conversations of a batch, sorted so that those that begin alike are neighbours.

    Attributes:
        branches: the conversations.
        shared: int64 [C], how many tokens branch i has in common with branch i - 1; 0 for the
            first. Computing branch i after branch i - 1 costs the rest.
        media: distinct ones, in the order of their tokens.
        canonical: whether nodes end where prompts end and nowhere else, so that how a
            conversation is cut does not depend on its company.
    """

    branches: tuple[Branch, ...]
    shared: Int64Array
    media: tuple[MediaItem, ...]
    canonical: bool


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


def check(features: Features, geometry: Geometry, limits: ForwardConfig) -> None:
    """Raise `InvalidRequest` unless the features fit the model and its limits.

    Ours always do; a caller of `reward_forward` may send anything.
    """
    responses = len(features.response_ids)
    if not responses:
        raise InvalidRequest("segment_lengths", "a prompt without a response was given")
    if responses > limits.max_responses:
        raise InvalidRequest(
            "segment_lengths", f"{responses} responses, the limit is {limits.max_responses}"
        )
    ids = np.concatenate([features.prompt_ids, *features.response_ids])
    if len(ids) > limits.max_request_tokens:
        raise InvalidRequest(
            "input_ids",
            f"the request has {len(ids)} tokens, the limit is {limits.max_request_tokens}",
        )
    if min(map(len, features.response_ids)) == 0:
        raise InvalidRequest("segment_lengths", "a response segment of 0 tokens was given")
    for index, response in enumerate(features.response_ids):
        if not geometry.read(np.concatenate([features.prompt_ids, response])):
            raise InvalidRequest(
                "input_ids", f"conversation {index} is nothing but padding (id {response[0]})"
            )
    outside = (ids < 0) | (ids >= geometry.vocab_size)
    if outside.any():
        at = int(outside.argmax())
        raise InvalidRequest(
            f"input_ids[{at}]", f"id {ids[at]}, the vocabulary has {geometry.vocab_size} entries"
        )
    _check_placeholders(features, ids, geometry)
    _check_seconds(features, geometry)
    longest = max(features.token_counts)
    if longest > geometry.max_tokens:
        raise InvalidRequest(
            "input_ids", f"a conversation of {longest} tokens, the limit is {geometry.max_tokens}"
        )


def _check_placeholders(features: Features, ids: Int32Array, geometry: Geometry) -> None:
    placeholders = np.flatnonzero(np.isin(ids, geometry.media_token_ids))
    if placeholders.size and placeholders[-1] >= len(features.prompt_ids):
        raise InvalidRequest(
            f"input_ids[{placeholders[-1]}]", "a media placeholder stands behind the prompt"
        )
    sizes = [geometry.tokens(geometry.grid(pixels)) for pixels in features.media]
    if len(placeholders) != sum(sizes):
        raise InvalidRequest(
            "input_ids",
            f"{len(placeholders)} media placeholders were given, the media take {sum(sizes)}",
        )
    runs = np.split(placeholders, np.cumsum(sizes)[:-1]) if sizes else []
    for index, (run, pixels) in enumerate(zip(runs, features.media, strict=True)):
        if run[-1] - run[0] != len(run) - 1:
            raise InvalidRequest(
                "input_ids",
                f"the {len(run)} placeholders of media item {index} do not stand together",
            )
        kind = geometry.media_token_ids[pixels.ndim == 4]
        if (ids[run] != kind).any():
            raise InvalidRequest(
                "input_ids", f"media item {index} has placeholders other than {kind} of its kind"
            )


def _check_seconds(features: Features, geometry: Geometry) -> None:
    videos = [pixels for pixels in features.media if pixels.ndim == 4]
    given = features.seconds_per_grid
    if len(given) != len(videos):
        raise InvalidRequest(
            "seconds_per_grid", f"{len(given)} values were given for {len(videos)} videos"
        )
    for index, (pixels, seconds) in enumerate(zip(videos, given, strict=True)):
        last = (geometry.grid(pixels).t - 1) * float(geometry.step(seconds))
        if not (seconds >= 0 and last < geometry.max_tokens):
            raise InvalidRequest(
                f"seconds_per_grid[{index}]",
                f"{seconds:g} s put the video's last frames at position {last:g}, the model has "
                f"{geometry.max_tokens} and none before 0",
            )


def plant(batch: dict[int, Features], geometry: Geometry, canonical: bool = False) -> Forest:
    """Sort a batch's conversations and find what neighbours share.

    Args:
        batch: items by request number, each accepted by `check`.
        geometry: the model's.
        canonical: share whole prompts or nothing.
    """
    # Positions depend on a video's speed, and what is computed behind it on them.
    media: dict[tuple[bytes, float], MediaItem] = {}
    branches: list[Branch] = []
    first_token = 0
    for request, item in batch.items():
        keys = item.prompt_ids.copy()
        at = 0
        shown: list[int] = []
        placeholders = np.flatnonzero(np.isin(keys, geometry.media_token_ids))
        seconds = _seconds(item)
        for pixels, pace in zip(item.media, seconds, strict=True):
            content = repr(pixels.shape).encode() + pixels.tobytes()
            digest = blake2b(content, digest_size=16).digest()
            count = geometry.tokens(geometry.grid(pixels))
            if (digest, pace) not in media:
                media[digest, pace] = MediaItem(pixels, digest, len(media), first_token)
                first_token += count
            shown.append(media[digest, pace].index)
            tokens = media[digest, pace].first_token + np.arange(count, dtype=np.int32)
            keys[placeholders[at : at + count]] = -1 - tokens
            at += count
        grids = [geometry.grid(pixels) for pixels in item.media]
        positions, start = mrope_positions(item.prompt_ids, grids, seconds, geometry)
        for index, ids in enumerate(item.response_ids):
            row = np.concatenate([keys, ids])
            row = row[: geometry.read(row)]
            places = np.concatenate([positions, text_positions(start, len(ids))], axis=1)
            branches.append(
                Branch(
                    request,
                    index,
                    row,
                    places[:, : len(row)],
                    min(len(keys), len(row)),
                    frozenset(shown),
                )
            )
    # Any order of byte strings puts those with a common prefix side by side.
    if canonical:
        branches.sort(key=lambda branch: (branch.prompt.tobytes(), branch.keys.tobytes()))
        shared = [len(a.prompt) * np.array_equal(a.prompt, b.prompt) for a, b in pairwise(branches)]
    else:
        branches.sort(key=lambda branch: branch.keys.tobytes())
        shared = [_common(a.keys, b.keys) for a, b in pairwise(branches)]
    counts = np.array([0, *shared], np.int64)
    return Forest(tuple(branches), counts, tuple(media.values()), canonical)


def _seconds(features: Features) -> list[float]:
    """For each media item its seconds per grid; an image, which has one grid, takes none."""
    given = iter(features.seconds_per_grid)
    return [next(given) if pixels.ndim == 4 else 0.0 for pixels in features.media]


def _common(a: Int32Array, b: Int32Array) -> int:
    """Length of the common prefix."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


def pack(forest: Forest, chosen: Sequence[int]) -> PackedBatch:
    """Lay the tree of some branches, by ascending index, out in one row."""
    branches = [forest.branches[index] for index in chosen]
    # What two branches share is what all between them share.
    shared = [0, *(int(forest.shared[a + 1 : b + 1].min()) for a, b in pairwise(chosen))]
    ends, parents, owners, scored = _grow(branches, shared, forest.canonical)

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
    media, media_tokens = _used(forest.media, -1 - keys[media_rows].astype(np.int64))
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
    branches: Sequence[Branch], shared: Sequence[int], canonical: bool
) -> tuple[list[int], list[int], list[int], list[int]]:
    """The radix tree of sorted branches, from what neighbours share.

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
        cuts = (branch.prompt_length, len(branch.keys)) if canonical else (len(branch.keys),)
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
    """The items that tokens of all media belong to, and the tokens counted among those alone."""
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
