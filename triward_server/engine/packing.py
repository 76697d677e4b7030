"""list[Features] -> `PackedBatch`: a radix tree of conversations, laid out in one row.

Conversations that begin alike share the tokens that they begin with, however many requests they
came in: equal ids at equal depth share a *node* of the tree when the images and videos under
their placeholders are byte-equal, and the videos equally fast. All nodes' tokens lie in one row
without padding; every linear layer runs once over it, and in attention a node's tokens see their
ancestors' and their own.

Nodes whose keys and values an earlier pass has left in the prefix cache are not in the row: their
tokens are seen, and not computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
from cachetools import LRUCache

from ..schema import Features, Grid, Int32Array, Int64Array, UInt8Array
from .digests import digests
from .geometry import Geometry
from .positions import mrope_positions, text_positions
from .tree import Tree, grow

_NONE = np.empty(0, np.int64)
_KNOWN_MEDIA = 65_536  # whose numbers are remembered


@dataclass(frozen=True)
class MediaItem:
    """A distinct image or video; a video that is shown at two speeds counts as two.

    Attributes:
        pixels: uint8 [H, W, 3], or [T, H, W, 3] of a video.
        grid: its patches.
        digest: of shape and pixels; what has equal digests is embedded alike.
        index: its place among the distinct items of the batch.
        first_token: number of its first token (`MediaNumbers`).
        tokens: how many it has.
        patches: rows that it takes in the vision tower.
    """

    pixels: UInt8Array
    grid: Grid
    digest: bytes
    index: int
    first_token: int
    tokens: int
    patches: int


class MediaNumbers:
    """Numbers of media's tokens: the same ones whenever the same item is shown.

    No number is given twice, so that an item that was forgotten is a new one when it comes back.
    """

    def __init__(self) -> None:
        self._firsts: LRUCache[tuple[bytes, float], int] = LRUCache(_KNOWN_MEDIA)
        self._next = 0

    def first(self, item: tuple[bytes, float], tokens: int) -> int:
        """Return the number of an item's first token.

        Args:
            item: its digest, and the seconds from one pair of frames to the next.
            tokens: how many it has.
        """
        if item not in self._firsts:
            self._firsts[item] = self._next
            self._next += tokens
        return self._firsts[item]


@dataclass(frozen=True)
class Branch:
    """One conversation.

    Attributes:
        request: which item of the batch it belongs to.
        response: which of that item's responses it ends with.
        keys: int64 [L]. A token's id; for a placeholder -1 - t, where t is its number among the
            tokens of all media. Equal keys up to a place mean equal embeddings and positions there.
        positions: int32 [3, L].
        prompt_length: tokens that it shares with the other responses of its request by
            construction.
        lasting: its first tokens that later requests may begin with: the prompt's, and where there
            is one response, which a dialogue may continue, all; none of a probe's.
        media: which of the batch's distinct media it shows.
    """

    request: int
    response: int
    keys: Int64Array
    positions: Int32Array
    prompt_length: int
    lasting: int
    media: frozenset[int]

    @property
    def prompt(self) -> Int64Array:
        """Keys of the prompt."""
        return self.keys[: self.prompt_length]


@dataclass(frozen=True)
class SortedBatch:
    """All conversations of a batch, sorted so that those that begin alike are neighbours.

    Attributes:
        branches: the conversations.
        shared: int64 [C], how many tokens branch i has in common with branch i - 1; 0 for the
            first. Computing branch i after branch i - 1 costs the rest.
        media: distinct ones.
        deterministic: whether nodes end where prompts end and nowhere else, so that how a
            conversation is cut does not depend on its company.
        cached: int64 [C], how many of a branch's first tokens the prefix cache has.
    """

    branches: tuple[Branch, ...]
    shared: Int64Array
    media: tuple[MediaItem, ...]
    deterministic: bool
    cached: Int64Array


@dataclass(frozen=True)
class Kept:
    """What later passes may see of a node: the last tokens of a path, and where they lie.

    Attributes:
        path: int64 [L], keys of its tokens and of all before them.
        count: how many are the node's.
        row: of the first of them.
    """

    path: Int64Array
    count: int
    row: int


@dataclass(frozen=True)
class PackedBatch:
    """T tokens in S nodes, for C conversations, on the host.

    Attributes:
        input_ids: int32 [T]; whatever stands at placeholders is not read.
        positions: int32 [3, T], M-RoPE's temporal, height and width axes.
        node_lengths: S lengths, which sum to T; nodes lie one behind the other.
        key_lengths: S counts: what a node's last token sees, its ancestors' tokens and its own.
        key_rows: int64 [sum of key_lengths], the rows of those tokens, node by node. Rows below R
            are those of `slots`; row R + t is token t.
        slots: int64 [R], tokens of the prefix cache that this batch sees.
        kept: what it may keep of this batch, parents before children.
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
    slots: Int64Array
    kept: tuple[Kept, ...]
    scored: Int64Array
    media: tuple[MediaItem, ...]
    media_rows: Int64Array
    media_tokens: Int64Array


def sort_batch(
    batch: dict[int, Features],
    geometry: Geometry,
    deterministic: bool = False,
    numbers: MediaNumbers | None = None,
) -> SortedBatch:
    """Sort a batch's conversations and find what neighbours share.

    Args:
        batch: items by request number, each accepted by `check`.
        geometry: the model's.
        deterministic: share whole prompts or nothing.
        numbers: those of earlier batches, so that equal media have equal keys in all of them.
    """
    media = _DistinctMedia(geometry, numbers or MediaNumbers())
    found = iter(digests([pixels for item in batch.values() for pixels in item.media]))
    branches = [
        branch
        for request, item in batch.items()
        for branch in _branches(request, item, media, [*islice(found, len(item.media))], geometry)
    ]
    # Any order of byte strings puts those with a common prefix side by side.
    if deterministic:
        branches.sort(key=lambda branch: (branch.prompt.tobytes(), branch.keys.tobytes()))
        shared = [len(a.prompt) * np.array_equal(a.prompt, b.prompt) for a, b in pairwise(branches)]
    else:
        branches.sort(key=lambda branch: branch.keys.tobytes())
        shared = [common(a.keys, b.keys) for a, b in pairwise(branches)]
    counts = np.array([0, *shared], np.int64)
    nothing = np.zeros_like(counts)
    return SortedBatch(tuple(branches), counts, media.items, deterministic, nothing)


class _DistinctMedia:
    """A batch's media, each once."""

    def __init__(self, geometry: Geometry, numbers: MediaNumbers) -> None:
        self._geometry = geometry
        self._numbers = numbers
        # Positions depend on a video's speed, and what is computed behind it on them.
        self._items: dict[tuple[bytes, float], MediaItem] = {}

    @property
    def items(self) -> tuple[MediaItem, ...]:
        """All of them, by index."""
        return tuple(self._items.values())

    def add(self, pixels: UInt8Array, digest: bytes, seconds: float) -> MediaItem:
        """Add an item unless it is there; seconds from one pair of frames to the next."""
        key = digest, seconds
        if key not in self._items:
            grid = self._geometry.grid(pixels)
            tokens, patches = self._geometry.tokens(grid), self._geometry.patches(grid)
            first, index = self._numbers.first(key, tokens), len(self._items)
            self._items[key] = MediaItem(pixels, grid, digest, index, first, tokens, patches)
        return self._items[key]


def _branches(
    request: int,
    item: Features,
    media: _DistinctMedia,
    known: Sequence[bytes],
    geometry: Geometry,
) -> Iterator[Branch]:
    """Conversations of one item, with the keys and positions of their tokens.

    `known` has the digests of its media.
    """
    seconds = _seconds(item)
    shown = [media.add(*each) for each in zip(item.media, known, seconds, strict=True)]
    grids = [each.grid for each in shown]
    tokens = [each.first_token + np.arange(each.tokens) for each in shown]
    keys = item.prompt_ids.astype(np.int64)
    keys[geometry.is_media(keys)] = -1 - np.concatenate([*tokens, _NONE])
    positions, start = mrope_positions(item.prompt_ids, grids, seconds, geometry)
    for index, ids in enumerate(item.response_ids):
        row = np.concatenate([keys, ids])
        row = row[: geometry.read(row)]
        places = np.concatenate([positions, text_positions(start, len(ids))], axis=1)
        prompt_length = min(len(keys), len(row))
        yield Branch(
            request,
            index,
            row,
            places[:, : len(row)],
            prompt_length,
            0 if item.probe else len(row) if len(item.response_ids) == 1 else prompt_length,
            frozenset(each.index for each in shown),
        )


def _seconds(features: Features) -> list[float]:
    """Return each media item's seconds per grid; 0 for an image, which has one grid."""
    given = iter(features.seconds_per_grid)
    return [next(given) if pixels.ndim == 4 else 0.0 for pixels in features.media]


def common(a: Int64Array, b: Int64Array) -> int:
    """Length of the common prefix of two rows of keys."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


def pack(
    ordered: SortedBatch,
    chosen: Sequence[int],
    cached: Sequence[Int64Array] | None = None,
) -> PackedBatch:
    """Lay the tree of some branches out in one row.

    Args:
        ordered: all branches.
        chosen: which of them, by ascending index.
        cached: for each of them slots of the first tokens that are in the prefix cache; all but the
            last token at most. None: nothing is.
    """
    branches = [ordered.branches[index] for index in chosen]
    slots = [_NONE] * len(branches) if cached is None else cached
    # What two branches share is what all between them share.
    shared = [0, *(int(ordered.shared[a + 1 : b + 1].min()) for a, b in pairwise(chosen))]
    tree = grow(shared, [_cuts(ordered, *each) for each in zip(branches, slots, strict=True)])
    order = tree.order()
    computed = [node for node in order if tree.ends[node] > len(slots[tree.owners[node]])]
    known = [node for node in order if tree.ends[node] <= len(slots[tree.owners[node]])]

    firsts = dict(zip([*known, *computed], _firsts(tree, [*known, *computed]), strict=True))
    rows: dict[int, Int64Array] = {0: _NONE}  # of a node's path; 0 is the root
    for node in order:
        own = firsts[node] + np.arange(tree.length(node))
        rows[node] = np.concatenate([rows[tree.parents[node]], own])

    spans = [(branches[tree.owners[n]], tree.span(n)) for n in computed]
    keys = np.concatenate([branch.keys[span] for branch, span in spans])
    media_rows = np.flatnonzero(keys < 0)
    media, media_tokens = _used(ordered.media, -1 - keys[media_rows])
    place = {node: index for index, node in enumerate(computed)}
    seen = sum(map(tree.length, known))
    return PackedBatch(
        input_ids=np.maximum(keys, 0).astype(np.int32),
        positions=np.concatenate([branch.positions[:, span] for branch, span in spans], axis=1),
        node_lengths=tuple(map(tree.length, computed)),
        key_lengths=tuple(tree.ends[node] for node in computed),
        key_rows=np.concatenate([rows[node] for node in computed]),
        slots=np.concatenate([_NONE, *(slots[tree.owners[n]][tree.span(n)] for n in known)]),
        kept=tuple(_kept(tree, branches, computed, {n: firsts[n] - seen for n in computed})),
        scored=np.array([place[node] for node in tree.leaves]),
        media=media,
        media_rows=media_rows,
        media_tokens=media_tokens,
    )


def _cuts(ordered: SortedBatch, branch: Branch, slots: Int64Array) -> tuple[int, ...]:
    """Depths at which nodes end on a branch: where the prefix cache does, and at its own end."""
    prompt = (branch.prompt_length,) if ordered.deterministic else ()
    return (len(slots), *prompt, len(branch.keys))


def _firsts(tree: Tree, nodes: Sequence[int]) -> list[int]:
    """First rows of nodes that lie one behind the other."""
    return [0, *np.cumsum([tree.length(node) for node in nodes[:-1]]).tolist()]


def _kept(
    tree: Tree, branches: Sequence[Branch], computed: Sequence[int], rows: dict[int, int]
) -> Iterator[Kept]:
    """Yield what may last of the computed nodes: as much as the branches through a node say."""
    lasting = [0] * len(tree.ends)
    for branch, leaf in zip(branches, tree.leaves, strict=True):
        for node in tree.path(leaf):
            lasting[node] = max(lasting[node], min(tree.ends[node], branch.lasting))
    for node in computed:
        begin = tree.span(node).start
        if lasting[node] > begin:
            path = branches[tree.owners[node]].keys[: lasting[node]]
            yield Kept(path, lasting[node] - begin, rows[node])


def _used(
    media: tuple[MediaItem, ...], tokens: Int64Array
) -> tuple[tuple[MediaItem, ...], Int64Array]:
    """Find the items that tokens of all media belong to; count the tokens among those alone."""
    firsts = np.array([item.first_token for item in media], np.int64)
    ascending = np.argsort(firsts)
    owner = ascending[np.searchsorted(firsts, tokens, side="right", sorter=ascending) - 1]
    used, local = np.unique(owner, return_inverse=True)
    starts = np.cumsum([0, *(media[i].tokens for i in used[:-1])])
    return tuple(media[i] for i in used), starts[local] + tokens - firsts[owner]
