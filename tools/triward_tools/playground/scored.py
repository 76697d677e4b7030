"""A file with scores -> the numbers of all its rows, and the rows without a score.

The file is read row by row: what stays in memory are numbers, some problems and the worst pairs.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from triward.errors import InvalidRequest

from triward_tools.evaluation.results import Problem
from triward_tools.inputs import parquet_file
from triward_tools.playground.scoredrows import ScoredRow, Values, WithoutScore, read_scored
from triward_tools.selection.source import PARQUET, Chunk, check_suffix, open_source
from triward_tools.selection.verdicts import Row

FILE_BYTES = 256 * 2**20
UNPACKED_BYTES = 2**30  # of a Parquet file's columns
ROWS = 1_000_000

WORST = 10
LISTED = 100  # problems; the others are counted

_CHUNK = 32  # rows that are held at once; they may hold pictures

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class ScoredPair:
    """A pair of a chosen and a rejected response.

    Attributes:
        place: of its row, for a reader.
        values: of the row.
        chosen: score of the better response.
        rejected: score of the other one.
    """

    place: str
    values: Values
    chosen: float
    rejected: float

    @property
    def margin(self) -> float:
        """Difference of the scores, below 0 where the model prefers the rejected response."""
        return self.chosen - self.rejected


@dataclass(frozen=True)
class ScoredFile:
    """Content of a file. Every row is in `counts`, in `without` or in `unread`.

    Attributes:
        name: of the file.
        scores: float64 [n], of all responses.
        characters: int64 [n], or empty where a row with scores does not hold its responses.
        tokens: int64 [n], or empty where a row with scores does not count them.
        counts: int64 [rows with scores], how many scores each has.
        margins: float64 [pairs], chosen minus rejected score.
        worst: at most WORST pairs of the lowest margins, lowest first.
        without: how many rows hold an error in place of scores.
        unread: how many rows hold neither, or cannot be read.
        problems: the first LISTED of both.
    """

    name: str
    scores: Floats
    characters: Counts
    tokens: Counts
    counts: Counts
    margins: Floats
    worst: tuple[ScoredPair, ...]
    without: int
    unread: int
    problems: tuple[Problem, ...]

    @property
    def rows(self) -> int:
        """Number of the file's rows."""
        return len(self.counts) + self.without + self.unread


def read_scored_file(path: Path, column: str = "") -> ScoredFile:
    """Read a .jsonl or .parquet file.

    Args:
        path: of the file.
        column: which holds scores; "" finds it.

    Raises:
        InvalidRequest: it is of another kind, cannot be read, holds no row or is over a limit.
    """
    size = path.stat().st_size
    if size > FILE_BYTES:
        raise InvalidRequest(f"{path.name}: has {size:,} bytes, at most {FILE_BYTES:,} are read")
    try:
        return _collected(path, column)
    except InvalidRequest as error:
        # Where the upload lies is nothing that its reader knows.
        named = str(error).replace(str(path), path.name)
        named = named if named.startswith(path.name) else f"{path.name}: {named}"
        raise InvalidRequest(named) from error


def _collected(path: Path, column: str) -> ScoredFile:
    seen = _Seen()
    for row in _rows(path):
        if seen.rows == ROWS:
            raise InvalidRequest(f"has more than {ROWS:,} rows, the most that are read")
        seen.add(row, column)
    if not seen.rows:
        raise InvalidRequest("holds no row")
    return seen.finish(path.name)


def _rows(path: Path) -> Iterator[Row]:
    if check_suffix(path) == PARQUET:
        _check_unpacked(path)
    source = open_source(path)
    for chunk in source.chunks(_CHUNK):
        yield from _decoded(chunk)


def _decoded(chunk: Chunk) -> list[Row]:
    try:
        return chunk.rows()
    except (ArithmeticError, ValueError) as error:  # not UTF-8, or a date that Python lacks
        raise InvalidRequest(f"cannot be read as Parquet: {error}") from error


def _check_unpacked(path: Path) -> None:
    with parquet_file(path) as file:
        groups = (file.metadata.row_group(n) for n in range(file.metadata.num_row_groups))
        unpacked = sum(group.total_byte_size for group in groups)
    if unpacked > UNPACKED_BYTES:
        raise InvalidRequest(
            f"has {unpacked:,} bytes when unpacked, at most {UNPACKED_BYTES:,} are read"
        )


def _read(values: Values, column: str) -> ScoredRow:
    try:
        return read_scored(values, column)
    except RecursionError as error:  # some 500 levels, which JSON may have
        raise InvalidRequest("is nested too deeply") from error


@dataclass
class _Lengths:
    """Lengths of one kind, until a row lacks them."""

    values: array[int] = field(default_factory=lambda: array("q"))
    complete: bool = True

    def add(self, lengths: tuple[int, ...] | None) -> None:
        if lengths is None:
            self.values, self.complete = array("q"), False
        elif self.complete:
            self.values.extend(lengths)


@dataclass
class _Seen:
    """Numbers of the rows that were read so far."""

    scores: array[float] = field(default_factory=lambda: array("d"))
    characters: _Lengths = field(default_factory=_Lengths)
    tokens: _Lengths = field(default_factory=_Lengths)
    counts: array[int] = field(default_factory=lambda: array("q"))
    margins: array[float] = field(default_factory=lambda: array("d"))
    heap: list[tuple[float, int, ScoredPair]] = field(default_factory=list)
    order: Any = field(default_factory=lambda: count(0, -1))
    without: int = 0
    unread: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return len(self.counts) + self.without + self.unread

    def add(self, row: Row, column: str) -> None:
        try:
            if row.error:
                raise InvalidRequest(row.error)
            found = _read(row.values, column)
        except InvalidRequest as error:
            if len(self.problems) < LISTED:
                self.problems.append(Problem(self.rows, row.place, str(error)))
            told = isinstance(error, WithoutScore)
            self.without, self.unread = self.without + told, self.unread + (not told)
            return
        self.counts.append(len(found.scores))
        self.scores.extend(found.scores)
        self.characters.add(found.characters)
        self.tokens.add(found.tokens)
        self._pair(row, found)

    def _pair(self, row: Row, found: ScoredRow) -> None:
        if found.pair is None:
            return
        pair = ScoredPair(row.place, row.values, *found.pair)
        self.margins.append(pair.margin)
        # The root is the best of the worst; of equal ones the last.
        held = (-pair.margin, next(self.order), pair)
        push = heapq.heappush if len(self.heap) < WORST else heapq.heappushpop
        push(self.heap, held)

    def finish(self, name: str) -> ScoredFile:
        return ScoredFile(
            name=name,
            scores=np.array(self.scores),
            characters=np.array(self.characters.values),
            tokens=np.array(self.tokens.values),
            counts=np.array(self.counts),
            margins=np.array(self.margins),
            worst=tuple(pair for _, _, pair in sorted(self.heap, reverse=True)),
            without=self.without,
            unread=self.unread,
            problems=tuple(self.problems),
        )
