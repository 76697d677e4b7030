"""`PrefixIndex`: which tokens' keys and values are kept, and in which slots of the pool.

A radix tree over `Branch.keys`, as in SGLang's RadixAttention (arXiv:2312.07104, section 3), whose
nodes hold a slot for each of their tokens. Least recently used first out; a node is used whenever
one of its descendants is, so that what goes first is always a leaf.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from ..schema import Int64Array
from .packing import common

_NO_SLOTS = np.empty(0, np.int64)


class _Node:
    """Keys and slots int64 [n] of a run of tokens, n > 0 but for the root."""

    __slots__ = ("children", "keys", "parent", "slots", "used")

    def __init__(self, keys: Int64Array, slots: Int64Array, parent: _Node | None) -> None:
        self.keys = keys
        self.slots = slots
        self.parent = parent
        self.children: dict[int | bytes, _Node] = {}
        self.used = 0


class PrefixIndex:
    """Tokens that are kept.

    What a batch has found or added stays until the next one begins.

    Args:
        slots: how many tokens there is room for.
        whole: find a path as a whole or not at all, and let no two share slots. Keys and values of
            a prompt are then bitwise those of one that was computed alone.
    """

    def __init__(self, slots: int, whole: bool = False) -> None:
        self._whole = whole
        self._batch = 0
        self.evicted = 0
        self.clear(slots)

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return len(self._free)

    @property
    def size(self) -> int:
        """Tokens that are kept."""
        return self.capacity - self._available

    def begin(self) -> None:
        """Begin a batch: what earlier ones used may go."""
        self._batch += 1

    def match(self, keys: Int64Array) -> Int64Array:
        """Return the slots of the longest beginning of a path that is kept."""
        node, path, found = self._root, list[_Node](), [_NO_SLOTS]
        while len(keys):
            child = node.children.get(self._first(keys))
            length = 0 if child is None else common(child.keys, keys)
            if child is None or not length or (self._whole and length < len(keys)):
                break
            path.append(child)
            found.append(child.slots[:length])
            if length < len(child.keys):
                break
            node, keys = child, keys[length:]
        self._use(path)
        return np.concatenate(found)

    def keep(self, keys: Int64Array, computed: int) -> tuple[int, Int64Array]:
        """Make room for a path, as far as there is any.

        Args:
            keys: the path's.
            computed: how many of its last tokens can be written; those before them may be kept
                already, or the path is not.

        Returns:
            How many of its first tokens are kept already, and the slots of those behind them, which
            the caller is to fill.
        """
        known = len(self.match(keys))
        if known < len(keys) - computed:
            return known, _NO_SLOTS
        slots = self._reserve(len(keys) - known)
        if len(slots):
            self._add(keys[: known + len(slots)], slots)
        return known, slots

    def clear(self, slots: int) -> None:
        """Forget everything; from now on there is room for `slots` tokens."""
        self._free = np.arange(slots)  # the first `_available` of them
        self._available = slots
        self._root = _Node(_NO_SLOTS, _NO_SLOTS, None)
        self._order: OrderedDict[_Node, None] = OrderedDict()  # the oldest first

    def _reserve(self, count: int) -> Int64Array:
        """Take `count` slots, or as many as this batch leaves; none but all of them if `whole`."""
        while self._available < count and self._evict():
            pass
        if self._available < count:
            count = 0 if self._whole else self._available
        self._available -= count
        return self._free[self._available : self._available + count].copy()

    def _add(self, keys: Int64Array, slots: Int64Array) -> None:
        """Keep the last tokens of a path, one for each slot; those before them are kept already."""
        node, path = self._root, list[_Node]()
        while len(keys) > len(slots):
            child = node.children[self._first(keys)]
            length = common(child.keys, keys)
            if length < len(child.keys):
                child = self._split(child, length)
            path.append(child)
            node, keys = child, keys[length:]
        node.children[self._first(keys)] = new = _Node(keys.copy(), slots, node)
        self._order[new] = None
        self._use([*path, new])

    def _first(self, keys: Int64Array) -> int | bytes:
        """Name of the child that goes on with these keys."""
        return keys.tobytes() if self._whole else int(keys[0])

    def _use(self, path: list[_Node]) -> None:
        for node in reversed(path):
            node.used = self._batch
            self._order.move_to_end(node)

    def _split(self, node: _Node, length: int) -> _Node:
        """Give the first tokens of a node a node of their own and return that."""
        parent = node.parent
        assert parent is not None
        upper = _Node(node.keys[:length], node.slots[:length], parent)
        parent.children[self._first(node.keys)] = upper
        node.keys, node.slots, node.parent = node.keys[length:], node.slots[length:], upper
        upper.children[self._first(node.keys)] = node
        self._order[upper] = None  # behind `node`, which it must outlive
        return upper

    def _evict(self) -> bool:
        """Forget the node that was used longest ago; False if this batch uses all there are."""
        node = next(iter(self._order), None)
        if node is None or node.used == self._batch:
            return False
        assert node.parent is not None and not node.children
        del node.parent.children[self._first(node.keys)]
        del self._order[node]
        self._free[self._available : self._available + len(node.slots)] = node.slots
        self._available += len(node.slots)
        self.evicted += len(node.slots)
        return True
