"""`Pages`: keys as a kernel with a block table reads them, what sequences share only once.

The i-th key of a sequence lies at place i % 256 of the page that its table names i // 256-th. A
prompt's full pages are there once, however many responses see it; the page in which their paths
part is there once for each. No page has a row that any of its readers does not see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..schema import Int32Array, Int64Array
from .arena import Arena

PAGE = 256  # keys; FlashAttention 2 takes no pages but of multiples of it


@dataclass(frozen=True)
class Pages:
    """Where the keys of S sequences lie.

    Attributes:
        rows: int64 [P, 256], which row of keys lies at each place of each page; places behind a
            sequence's end repeat their page's first row.
        table: int32 [S, the most pages of a sequence], which pages each has, in order; 0 behind
            its last one.
        used: int32 [S], how many keys each has.
    """

    rows: Tensor
    table: Tensor
    used: Tensor


def lay_out(key_rows: Int64Array, key_lengths: Sequence[int], arena: Arena) -> Pages | None:
    """Lay the keys of sequences out in pages; None if these are no fewer rows than all keys.

    Args:
        key_rows: int64 [sum of key_lengths], rows of the keys, one sequence behind the other.
        key_lengths: S lengths, each at least 1.
        arena: of the device where the tensors are; it is to be sent.
    """
    rows, table = find_pages(key_rows, key_lengths)
    if rows.size >= len(key_rows):
        return None
    used = np.array(key_lengths, np.int32)
    return Pages(arena.add(rows), arena.add(table), arena.add(used))


def find_pages(key_rows: Int64Array, key_lengths: Sequence[int]) -> tuple[Int64Array, Int32Array]:
    """Return `rows` and `table` of `Pages`: pages of equal rows are one page."""
    counts = [-(-length // PAGE) for length in key_lengths]
    seen = np.full((sum(counts), PAGE), -1)
    places, first = seen.reshape(-1), 0
    for keys, count, length in zip(
        np.split(key_rows, np.cumsum(key_lengths)[:-1]), counts, key_lengths, strict=True
    ):
        places[first : first + length] = keys
        first += count * PAGE
    known: dict[bytes, int] = {}
    pages = [known.setdefault(page.tobytes(), len(known)) for page in seen]
    rows = np.frombuffer(b"".join(known), np.int64).reshape(-1, PAGE)
    table = np.zeros((len(counts), max(counts)), np.int32)
    table[np.arange(max(counts)) < np.array(counts)[:, None]] = pages
    return np.where(rows < 0, rows[:, :1], rows), table
