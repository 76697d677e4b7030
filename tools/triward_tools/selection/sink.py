"""Rows -> a JSONL or Parquet file that appears complete or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from triward.errors import InvalidRequest

from triward_tools.jobs import whole_file
from triward_tools.selection.source import PARQUET

Rows = Sequence[Mapping[str, Any]]
Write = Callable[[Rows], None]


@contextmanager
def writing(path: Path, schema: Any, scratch: Path) -> Iterator[Write]:
    """Open a file, and return a function that writes rows.

    Args:
        path: .jsonl or .parquet.
        schema: the pyarrow schema of a Parquet file.
        scratch: see `whole_file`.
    """
    with whole_file(path, scratch) as file:
        if path.suffix == PARQUET:
            with _parquet(file, schema) as write:
                yield write
        else:
            yield lambda rows: file.writelines(map(json_line, rows))


def json_line(row: Mapping[str, Any]) -> bytes:
    """Return a row as a line of UTF-8.

    Raises:
        InvalidRequest: JSON cannot hold one of its values.
    """
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):  # NaN and infinity are no JSON
        raise InvalidRequest(f"{_culprit(row)}; write Parquet") from None
    try:
        return f"{text}\n".encode()
    except UnicodeEncodeError:  # half of a character came in as an escape, and goes out as one
        return f"{json.dumps(row)}\n".encode()


def check_json(schema: Any) -> None:
    """Raise InvalidRequest for a column that JSON cannot hold."""
    for field in schema or []:
        if not _fits_json(field.type):
            raise InvalidRequest(
                f"{field.name}: JSON cannot hold a column of {field.type}, write .parquet"
            )


class ColumnTypes:
    """The columns of rows, and the types that can hold what is in them.

    Args:
        known: schema whose columns have their types already.
    """

    def __init__(self, known: Any = None) -> None:  # noqa: D107 - the class says it
        import pyarrow as pa

        self._known = known or pa.schema([])
        self._found = pa.schema([])

    def see(self, rows: Rows) -> None:
        """Widen the types so that they hold these rows, too.

        Raises:
            InvalidRequest: a column holds values that no type can hold together.
        """
        import pyarrow as pa

        names = dict.fromkeys(name for row in rows for name in row)
        known = set(self._known.names)
        fields = [pa.field(name, _array(name, rows).type) for name in names if name not in known]
        try:
            schemas = [self._found, pa.schema(fields)]
            self._found = pa.unify_schemas(schemas, promote_options="permissive")
        except pa.ArrowException as error:
            raise InvalidRequest(f"Parquet cannot hold the rows: {error}; write .jsonl") from error

    def schema(self) -> Any:
        """Return the schema of all rows seen, the known columns first.

        Raises:
            InvalidRequest: Parquet cannot hold a column.
        """
        import pyarrow as pa

        for field in self._found:
            if _hollow(field.type):
                raise InvalidRequest(f"{field.name}: Parquet cannot hold {{}}; write .jsonl")
        return pa.schema([*self._known, *self._found], metadata=self._known.metadata)


def table_of(rows: Rows, schema: Any) -> Any:
    """Return a pyarrow table of this schema; what a row lacks is null.

    Raises:
        InvalidRequest: a column cannot hold a row's value.
    """
    import pyarrow as pa

    arrays = [
        _array(name, rows, kind) for name, kind in zip(schema.names, schema.types, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


@contextmanager
def _parquet(file: IO[bytes], schema: Any) -> Iterator[Write]:
    import pyarrow.parquet as pq

    with pq.ParquetWriter(file, schema) as writer:

        def write(rows: Rows) -> None:
            if rows:
                writer.write_table(table_of(rows, schema))

        yield write


def _array(name: str, rows: Rows, kind: Any = None) -> Any:
    """Return a column, of a type of its own if none is given."""
    import pyarrow as pa

    try:
        return pa.array([row.get(name) for row in rows], kind)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise InvalidRequest(f"{name}: Parquet cannot hold it: {error}; write .jsonl") from error


def _hollow(kind: Any) -> bool:
    """Return True if a type has a struct without fields, which is what {} becomes."""
    import pyarrow.types as types

    inner = [kind.field(place).type for place in range(kind.num_fields)]
    return (types.is_struct(kind) and not inner) or any(map(_hollow, inner))


def _fits_json(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return all(_fits_json(kind.field(place).type) for place in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _fits_json(kind.value_type)
    simple = (types.is_null, types.is_boolean, types.is_integer, types.is_floating,
              types.is_string, types.is_large_string)  # fmt: skip
    return any(is_a(kind) for is_a in simple)


def _culprit(row: Mapping[str, Any]) -> str:
    """Return the name of the row's value that is no JSON."""
    for name, value in row.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            return f"{name}: {error}"
    return "the row is no JSON"
