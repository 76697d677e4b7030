"""Rows of a JSONL or Parquet file, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from triward.errors import InvalidRequest
from triward.jsonvalue import read_object

from triward_tools.inputs import files_below, parquet_file
from triward_tools.selection.verdicts import Row

JSONL = (".jsonl", ".ndjson", ".json")
PARQUET = ".parquet"


class Chunk(Protocol):
    """Some rows, which are decoded when they are asked for."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def rows(self) -> list[Row]:
        """Return the rows."""


class Source(Protocol):
    """An input."""

    @property
    def schema(self) -> Any:
        """The pyarrow schema; None for JSONL."""

    @property
    def root(self) -> Path:
        """The file, or the folder of all files."""

    def names(self, wanted: Iterable[str] = ()) -> list[str]:
        """Return the columns; of JSONL those of the first lines, until all wanted are in."""

    def files(self) -> list[Path]:
        """Return the files that are read, in order."""

    def chunks(self, rows: int) -> Iterator[Chunk]:
        """All rows, in chunks of at most `rows`. Each call gives the same chunks."""


def open_source(path: Path) -> Source:
    """Return the input at a path, by its suffix; a folder holds Parquet files at any depth.

    Raises:
        InvalidRequest: it is not there, or of another kind.
    """
    if path.is_dir():
        files = files_below(path)
        if not files:
            raise InvalidRequest(f"{path}: there is no *.parquet file in it")
        return _Parquet.of(path, files)
    if not path.is_file():
        raise InvalidRequest(f"{path}: there is no such file")
    return _Parquet.of(path, [path]) if check_suffix(path) == PARQUET else _Jsonl(path)


def check_suffix(path: Path) -> str:
    """Return the kind: ".jsonl" or ".parquet".

    Raises:
        InvalidRequest: it is another.
    """
    if path.suffix in JSONL:
        return JSONL[0]
    if path.suffix != PARQUET:
        raise InvalidRequest(f"{path}: must end with .jsonl or .parquet")
    return PARQUET


@dataclass(frozen=True)
class _Lines:
    """Lines and their numbers."""

    lines: Sequence[tuple[int, str]]

    def __len__(self) -> int:
        return len(self.lines)

    def rows(self) -> list[Row]:
        return [_row(number, text) for number, text in self.lines]


@dataclass(frozen=True)
class _Jsonl:
    root: Path
    schema: Any = None

    def names(self, wanted: Iterable[str] = ()) -> list[str]:
        found: dict[str, Any] = {}
        for chunk in self.chunks(1):
            (row,) = chunk.rows()
            if not found and self.root.suffix == ".json" and chunk.lines[0][1].startswith("["):
                raise InvalidRequest(f"{self.root}: is an array, needs an object in each line")
            found.update({} if row.error else row.values)
            if found and found.keys() >= {*wanted}:
                break
        if not found:
            raise InvalidRequest(f"{self.root}: there is no line with an object in it")
        return list(found)

    def files(self) -> list[Path]:
        return [self.root]

    def chunks(self, rows: int) -> Iterator[_Lines]:
        # What is not UTF-8 is that line's error.
        with self.root.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = ((number, text) for number, text in enumerate(file, start=1) if text.strip())
            while held := list(islice(lines, rows)):
                yield _Lines(held)


def _row(number: int, text: str) -> Row:
    place = f"line {number}"
    try:
        text.encode()
        return Row(place, read_object(text))
    except UnicodeEncodeError:
        return Row(place, {"line": text}, "not UTF-8")
    except InvalidRequest as error:
        return Row(place, {"line": text}, str(error))


@dataclass(frozen=True)
class _Table:
    """Rows of a Parquet file, of which the first one's number is `start`."""

    table: Any
    start: int

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def rows(self) -> list[Row]:
        values = self.table.to_pylist()
        return [Row(f"row {self.start + place}", each) for place, each in enumerate(values)]


@dataclass(frozen=True)
class _Parquet:
    root: Path
    paths: Sequence[Path]
    schema: Any

    @classmethod
    def of(cls, root: Path, paths: Sequence[Path]) -> _Parquet:
        """Raise InvalidRequest for files whose columns do not go together."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            schema = pa.unify_schemas([pq.read_schema(path) for path in paths])
        except pa.ArrowException as error:
            raise InvalidRequest(f"{root}: {error}") from error
        return cls(root, paths, schema)

    def names(self, wanted: Iterable[str] = ()) -> list[str]:
        return list(self.schema.names)

    def files(self) -> list[Path]:
        return list(self.paths)

    def chunks(self, rows: int) -> Iterator[_Table]:
        import pyarrow as pa

        start = 0
        for path in self.paths:
            with parquet_file(path) as file:
                for batch in file.iter_batches(rows):
                    yield _Table(pa.Table.from_batches([batch]), start)
                    start += batch.num_rows
