"""Data files -> rows, one by one: Parquet by batch, JSONL by line, JSON at once.

A row that cannot be read is a row with an error. A file that cannot be read, or that lacks a
column, ends everything: its rows could not even be counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triward.errors import InvalidRequest
from triward.jsonvalue import as_object, read_object

from triward_tools.inputs import files_below, parquet_file

# What a row holds, or why it cannot be read.
Values = Mapping[str, Any] | str

# Names of which a file must have one, for each column.
Columns = Sequence[tuple[str, ...]]

# Rows of Parquet that are held at once. They may have pictures of a megabyte in them.
_BATCH = 32


@dataclass(frozen=True)
class DataRow:
    """A row of a file.

    Attributes:
        index: over all files, from 0.
        place: file and row, for a reader. Rows count from 1; of JSONL they are the file's lines.
        folder: of the file; what it names lies beside it.
        values: name of a column -> value.
        error: why the row cannot be read; it has no values then.
    """

    index: int
    place: str
    folder: Path
    values: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


def data_files(data: Path) -> list[Path]:
    """Return the file itself, or a folder's files of data, at any depth, by path.

    What has another suffix than .parquet, .json or .jsonl, as pictures, is no data.

    Raises:
        InvalidRequest: there are none, or they have several formats.
    """
    known = ", ".join(_READERS)
    if not data.is_dir():
        if not data.is_file():
            raise InvalidRequest(f"{data}: there is no such file or folder")
        if data.suffix.lower() not in _READERS:
            raise InvalidRequest(f"{data}: the suffix must be one of {known}, got {data.suffix!r}")
        return [data]
    files = files_below(data, _READERS)
    if not files:
        raise InvalidRequest(f"{data}: holds no file of {known}")
    first = {path.suffix.lower(): path.relative_to(data).as_posix() for path in reversed(files)}
    if len(first) > 1:
        named = " and ".join(sorted(first.values()))
        raise InvalidRequest(f"{data}: holds several formats, as {named}; name one file of them")
    return files


def read_rows(files: Sequence[Path], columns: Columns) -> Iterator[DataRow]:
    """Yield the rows of all files.

    Raises:
        InvalidRequest: a file cannot be read, or no row of it has one of the columns.
    """
    index = 0
    for path in files:
        try:
            for number, values in _READERS[path.suffix.lower()](path, columns):
                place = f"{path.name}: row {number}"
                if isinstance(values, str):
                    yield DataRow(index, place, path.parent, error=values)
                else:
                    yield DataRow(index, place, path.parent, values)
                index += 1
        except OSError as error:
            raise InvalidRequest(f"{path}: {error.strerror or error}") from error


def _read_parquet(path: Path, columns: Columns) -> Iterator[tuple[int, Values]]:
    with parquet_file(path) as file:
        names = file.schema_arrow.names
        _check_columns(path, columns, [names])
        wanted = [name for same in columns for name in same if name in names]
        batches = file.iter_batches(_BATCH, columns=wanted)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from enumerate(rows, start=1)


def _read_jsonl(path: Path, columns: Columns) -> Iterator[tuple[int, Values]]:
    lines = (values for _, values in _lines(path) if not isinstance(values, str))
    _check_columns(path, columns, lines)
    return _lines(path)


def _lines(path: Path) -> Iterator[tuple[int, Values]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _row(read_object, line)


def _row(read: Callable[..., Mapping[str, Any]], value: Any) -> Values:
    try:
        return read(value)
    except InvalidRequest as error:
        return str(error)


def _read_json(path: Path, columns: Columns) -> Iterator[tuple[int, Values]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{path}: not JSON: {error}") from error
    rows = [_row(as_object, values) for values in _elements(path, content)]
    _check_columns(path, columns, (row for row in rows if not isinstance(row, str)))
    return iter(list(enumerate(rows, start=1)))


def _elements(path: Path, content: object) -> list[Any]:
    """Return the rows of an array, an object with an array `data`, or an object of columns."""
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if isinstance(content, dict):
        content = _transposed(path, content)
    if not isinstance(content, list):
        raise InvalidRequest(f"{path}: must be an array of rows, got {type(content).__name__}")
    return content


def _transposed(path: Path, content: Mapping[str, Any]) -> list[Any]:
    """Columns -> rows. A column is a list, or an object whose values are in order, as pandas'."""
    columns: dict[str, list[Any]] = {}
    for name, column in content.items():
        values = list(column.values()) if isinstance(column, dict) else column
        if not isinstance(values, list):
            raise InvalidRequest(f"{path}: {name!r} is neither rows ('data') nor a column of them")
        columns[name] = values
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise InvalidRequest(f"{path}: columns of several lengths: {lengths}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=False)]


def _check_columns(path: Path, columns: Columns, rows: Iterable[Iterable[str]]) -> None:
    """Look for all columns in the rows, which are read only as far as it takes."""
    missing, seen = list(columns), set[str]()
    for row in rows:
        seen.update(row)
        missing = [same for same in missing if seen.isdisjoint(same)]
        if not missing:
            return
    if missing:
        named = " or ".join(map(repr, missing[0]))
        has = ", ".join(sorted(seen)) or "none"
        raise InvalidRequest(f"{path}: has no column {named}, it has {has}")


_READERS: dict[str, Callable[[Path, Columns], Iterator[tuple[int, Values]]]] = {
    ".parquet": _read_parquet,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
}
