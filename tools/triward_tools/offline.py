"""Parquet files -> the same rows with scores, so that a job that was killed can go on.

The input is cut into chunks of at most `chunk_rows` rows, each from one row group of one file. A
chunk with its scores becomes one file, whose name is the chunk's place in the input and which
appears complete or not at all. So

- a chunk is finished when its file exists; a job that goes on does the other ones;
- each row is in the output once: a chunk that is scored twice has one name.

What chunks and scores depend on stands in a manifest beside them. A job that differs is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from triward.integrations.rows import RowScorer

from triward_tools.inputs import files_below, parquet_file
from triward_tools.jobs import (
    JobMismatch,
    check_apart,
    footer_fingerprint,
    pin_manifest,
    whole_file,
)

__all__ = [
    "JobMismatch",
    "OutputCounts",
    "RowGroup",
    "ScoringJob",
    "begin",
    "score_parquet",
    "score_table",
]

AnyPath = str | os.PathLike[str]

MANIFEST = "_manifest.json"

# Of the manifest, and of the chunks' names.
_FORMAT = 1


@dataclass(frozen=True)
class OutputCounts:
    """Counts of a finished job's output.

    Attributes:
        rows: as many as the input.
        failed: those that have an error in place of a score.
    """

    rows: int
    failed: int


@dataclass(frozen=True)
class RowGroup:
    """A row group of a file, which one worker reads in one go.

    Attributes:
        path: of the file, below the input folder.
        file: place of the file among all, by path.
        number: of the row group in its file.
        rows: how many it has.
    """

    path: str
    file: int
    number: int
    rows: int


def score_parquet(
    source: AnyPath,
    output: AnyPath,
    scorer: RowScorer,
    *,
    keep: Sequence[str] | None = None,
    chunk_rows: int = 1000,
) -> OutputCounts:
    """Score the rows of Parquet files on this machine. Goes on with a job that was interrupted.

    Args:
        source: a file, or a folder with *.parquet files at any depth.
        output: a folder, new or this job's. In the order of their names its files hold the rows in
            the order of the input's. One job at a time may write to it.
        scorer: what of a row is scored, and by whom.
        keep: the input's columns that go into the output; None for all.
        chunk_rows: how much a killed job repeats. A chunk is held in memory.

    Raises:
        JobMismatch: the output is another job's.
        ValueError: the input has no files, or lacks a column.
        TriwardError: as for `RowScorer.score_rows`. What is finished is kept.
    """
    job = begin(source, output, scorer, keep=keep, chunk_rows=chunk_rows)
    for group in job.unfinished():
        job.run(group)
    return job.finish()


@dataclass(frozen=True)
class ScoringJob:
    """A job that was begun. Workers may run its row groups in any order, and more than once."""

    source: Path
    output: Path
    scorer: RowScorer
    keep: Sequence[str] | None
    chunk_rows: int
    groups: Sequence[RowGroup]

    def unfinished(self) -> list[RowGroup]:
        """Return the row groups that have chunks to do."""
        done = {path.name for path in self.output.iterdir()}
        return [group for group in self.groups if not done.issuperset(self._chunks(group))]

    def run(self, group: RowGroup) -> None:
        """Do the chunks of a row group that are not done.

        Raises:
            TriwardError: as for `RowScorer.score_rows`.
        """
        columns = None if self.keep is None else [*{*self.keep, *self.scorer.columns}]
        with pq.ParquetFile(self.source / group.path) as file:
            batches = file.iter_batches(self.chunk_rows, row_groups=[group.number], columns=columns)
            tables = _cut(batches, self.chunk_rows)
            for name, table in zip(self._chunks(group), tables, strict=True):
                path = self.output / name
                if not path.exists():
                    scored = score_table(self.scorer, table, self.keep)
                    with whole_file(path) as chunk:
                        pq.write_table(scored, chunk)

    def finish(self) -> OutputCounts:
        """Check that the output has every row once, and count.

        Raises:
            RuntimeError: a chunk's file is missing, foreign, or has not the chunk's rows.
        """
        due = {name: rows for group in self.groups for name, rows in self._chunks(group).items()}
        found = {path.name: path for path in self.output.glob("*.parquet")}
        failed = 0
        for name in sorted(due.keys() | found.keys()):
            if name not in due or name not in found:
                state = "missing" if name in due else "no chunk of this job"
                raise RuntimeError(f"{self.output / name} is {state}")
            with pq.ParquetFile(found[name]) as file:
                errors = file.read([self.scorer.error]).column(0)
            if len(errors) != due[name]:
                raise RuntimeError(f"{found[name]} has {len(errors)} rows instead of {due[name]}")
            failed += pc.sum(pc.not_equal(errors, "")).as_py()
        for left in self.output.glob(".*.tmp"):
            left.unlink()
        return OutputCounts(sum(due.values()), failed)

    def _chunks(self, group: RowGroup) -> dict[str, int]:
        """Name of the file -> number of rows, in order."""
        return {
            f"{group.file:06}-{group.number:06}-{start:09}.parquet": min(
                self.chunk_rows, group.rows - start
            )
            for start in range(0, group.rows, self.chunk_rows)
        }


def begin(
    source: AnyPath,
    output: AnyPath,
    scorer: RowScorer,
    *,
    keep: Sequence[str] | None = None,
    chunk_rows: int = 1000,
) -> ScoringJob:
    """Look at the input, and write the output's manifest or compare with it.

    Arguments and errors are those of `score_parquet`.
    """
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    source, output = Path(source).absolute(), Path(output).absolute()
    check_apart(source, output)
    root = source if source.is_dir() else source.parent
    groups: list[RowGroup] = []
    manifest: dict[str, Any] = {
        "format": _FORMAT,
        **scorer.identity,
        "score": scorer.score,
        "keep": None if keep is None else [*keep],
        "chunk_rows": chunk_rows,
    }
    for place, path in enumerate(_files(source)):
        name = path.relative_to(root).as_posix()
        with parquet_file(path) as file:
            _check_columns(name, file.schema_arrow.names, scorer, keep)
            rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        groups += [RowGroup(name, place, number, count) for number, count in enumerate(rows)]
        manifest[f"file {name}"] = footer_fingerprint(path)
    pin_manifest(output, MANIFEST, manifest)
    return ScoringJob(root, output, scorer, keep, chunk_rows, groups)


def score_table(scorer: RowScorer, table: pa.Table, keep: Sequence[str] | None = None) -> pa.Table:
    """Return the columns to keep, and those of scores and errors.

    Scores are float32, as the server's are, or lists of them; null where there is an error.
    """
    read = {name: table.column(name).to_pylist() for name in scorer.columns}
    scores, errors = scorer.score_rows(read)
    kept = table if keep is None else table.select(keep)
    kept = kept.append_column(scorer.score, pa.array(scores, _score_type(scorer, table.schema)))
    return kept.append_column(scorer.error, pa.array(errors, pa.string()))


def _score_type(scorer: RowScorer, schema: pa.Schema) -> pa.DataType:
    """Return the whole column's type, also where a chunk holds no score to tell it from."""
    kind = schema.field(scorer.responses).type if scorer.responses else pa.null()
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    several = any(is_a(kind) for is_a in lists) and not pa.types.is_struct(kind.value_type)
    return pa.list_(pa.float32()) if several else pa.float32()


def _files(source: Path) -> list[Path]:
    if not source.is_dir():
        return [source]
    files = files_below(source)
    if not files:
        raise ValueError(f"there is no *.parquet file in {source}")
    return files


def _check_columns(
    file: str, names: Iterable[str], scorer: RowScorer, keep: Sequence[str] | None
) -> None:
    names = list(names)
    for name in [*scorer.columns, *(keep or [])]:
        if name not in names:
            raise ValueError(f"{file} has no column {name!r}, it has {', '.join(names)}")
    for name in (scorer.score, scorer.error):
        if name in (names if keep is None else keep):
            raise ValueError(f"{file} has a column {name!r} already")


def _cut(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """Tables of `rows` rows, the last one with what is left. A reader may end a batch early."""
    held: pa.Table | None = None
    for batch in batches:
        more = pa.Table.from_batches([batch])
        held = more if held is None else pa.concat_tables([held, more])
        while held.num_rows >= rows:
            yield held.slice(0, rows)
            held = held.slice(rows)
    if held is not None and held.num_rows:
        yield held
