"""Data files: where they lie, and Parquet whose errors name the file."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from triward.errors import InvalidRequest


def files_below(folder: Path, suffixes: Collection[str] = (".parquet",)) -> list[Path]:
    """Return a folder's files of these suffixes, at any depth, by path.

    By the custom of those who write Parquet, files and folders whose name begins with a dot or an
    underscore are no data, or not yet.
    """
    found = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    return sorted(path for path in found if path.is_file() and not _is_hidden(path, folder))


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.relative_to(root).parts)


@contextmanager
def parquet_file(path: Path) -> Iterator[Any]:
    """Open a `pyarrow.parquet.ParquetFile`.

    Raises:
        InvalidRequest: it cannot be read, now or while the context lasts.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).strip()
        raise InvalidRequest(f"{path}: cannot be read as Parquet: {reason}") from error
