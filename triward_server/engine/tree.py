"""The radix tree of a batch: `grow`. A node is a run of tokens that the branches below it share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tree:
    """Nodes of a radix tree; node 0 is the root, which is empty.

    Attributes:
        ends: the depth at which each node ends; it begins where its parent ends.
        parents: each one's parent; the root's is the root.
        owners: for each a branch that runs through it.
        leaves: for each branch the node that it ends with.
    """

    ends: list[int]
    parents: list[int]
    owners: list[int]
    leaves: list[int]

    def add(self, end: int, parent: int, owner: int) -> int:
        """Add a node and return it."""
        self.ends.append(end)
        self.parents.append(parent)
        self.owners.append(owner)
        return len(self.ends) - 1

    def span(self, node: int) -> slice:
        """Tokens of a branch through it that are the node's."""
        return slice(self.ends[self.parents[node]], self.ends[node])

    def length(self, node: int) -> int:
        """Count its tokens."""
        return self.ends[node] - self.ends[self.parents[node]]

    def path(self, node: int) -> list[int]:
        """Nodes from the root's child down to it."""
        nodes = []
        while node:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def order(self) -> list[int]:
        """All nodes, each behind its ancestors, in the order of the branches."""
        return list(dict.fromkeys(node for leaf in self.leaves for node in self.path(leaf)))


def grow(shared: Sequence[int], cuts: Sequence[Sequence[int]]) -> Tree:
    """Grow the radix tree of sorted branches.

    Walking the sorted branches, the path to the last one is a stack: whatever lies deeper than what
    the next one shares is left, and a node that the next one leaves half-way is split there.

    Args:
        shared: tokens that each branch shares with the one before it; 0 for the first.
        cuts: depths at which nodes of each branch end, ascending; its length last.
    """
    tree, stack = Tree([0], [0], [0], []), [0]
    for index, depth in enumerate(shared):
        left = 0
        while tree.ends[stack[-1]] > depth:
            left = stack.pop()
        if tree.ends[stack[-1]] < depth:  # split: the upper half gets a node of its own
            stack.append(tree.add(depth, stack[-1], index))
            tree.parents[left] = stack[-1]
        for cut in cuts[index]:
            if cut > tree.ends[stack[-1]]:
                stack.append(tree.add(cut, stack[-1], index))
        tree.leaves.append(stack[-1])
    return tree
