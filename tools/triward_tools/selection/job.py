"""A file of rows -> a file of what is chosen of them, in a job that can be killed and resumed.

First all rows get their verdicts, in `OUTPUT.parts`. Then the task looks at all scores, and the
input is read once more to write the output, which appears complete or not at all. In memory are a
chunk of rows, and the score and length of every response.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from triward.arguments import check_free
from triward.errors import InvalidRequest

from triward_tools.jobs import check_apart, row_bar
from triward_tools.selection.parts import Parts
from triward_tools.selection.picture import check_picture, draw
from triward_tools.selection.sink import ColumnTypes, Write, check_json, writing
from triward_tools.selection.source import JSONL, PARQUET, Source, check_suffix
from triward_tools.selection.summary import Summary, quantiles
from triward_tools.selection.tasks import Chooser, Task, Values
from triward_tools.selection.verdicts import Judge, Row, Seen, Verdict

Made = tuple[list[Values], list[Values], list[Values]]  # output, dropped, rejected


@dataclass
class Files:
    """Files that a job writes.

    Attributes:
        output: .jsonl or .parquet; beside it lie the parts, and `OUTPUT.rejected.jsonl` if rows
            could not be used.
        dropped: what is left out for its score; None for nowhere.
        picture: .svg or .png; None for none.
        force: whether those that are there may be replaced.
    """

    output: Path
    dropped: Path | None = None
    picture: Path | None = None
    force: bool = False
    parts: Path = field(init=False)
    rejected: Path = field(init=False)

    def __post_init__(self) -> None:
        """Check that the files can be told apart, and written.

        Raises:
            InvalidRequest: they cannot.
        """
        self.parts = self.output.with_name(f"{self.output.name}.parts")
        self.rejected = self.output.with_name(f"{self.output.name}.rejected.jsonl")
        for path in (self.output, self.dropped):
            if path is not None:
                check_suffix(path)
        if self.picture is not None:
            check_picture(self.picture)
        for path in self.written():
            if not path.parent.is_dir():
                raise InvalidRequest(f"{path}: there is no folder {path.parent}")
            if path.is_dir():
                raise InvalidRequest(f"{path}: is a folder")
            if not os.access(path.parent, os.W_OK):
                raise InvalidRequest(f"{path}: the folder {path.parent} cannot be written to")

    def written(self) -> list[Path]:
        """Return the paths of all outputs."""
        named = (self.output, self.rejected, self.dropped, self.picture)
        return [path for path in named if path is not None]

    def check_free(self) -> None:
        """Raise InvalidRequest for a file of an earlier job; one that was begun may go on."""
        if not self.force and not self.parts.is_dir():
            for path in (self.output, self.dropped, self.picture):
                if path is not None:
                    check_free(path)

    def check_apart(self, source: Source) -> None:
        """Raise InvalidRequest for a file that would be written over another one."""
        taken = {path.resolve() for path in source.files()}
        for path in self.written():
            check_apart(source.root.resolve(), path.resolve())
            if path.resolve() in taken:
                raise InvalidRequest(f"{path}: is the input, or another output, too")
            taken.add(path.resolve())


@dataclass(frozen=True)
class Job:
    """A task on a file's rows.

    Attributes:
        source: the input.
        judge: who gives verdicts.
        task: what is made of them.
        files: what is written.
        chunk_rows: how much a killed job repeats.
    """

    source: Source
    judge: Judge
    task: Task
    files: Files
    chunk_rows: int = 1000

    def run(self, progress: bool = False) -> Summary:
        """Do it. Goes on with a job that was killed.

        Raises:
            JobMismatch: `OUTPUT.parts` is another job's.
            InvalidRequest: the input, or the scores as a whole, cannot be used.
            TriwardError: a server failed. What is finished is kept.
        """
        if self.chunk_rows < 1:
            raise InvalidRequest(f"chunk_rows must be at least 1, got {self.chunk_rows}")
        self.files.check_apart(self.source)
        self.files.check_free()
        self._check_formats()
        parts = Parts(self.files.parts, self.source, self.judge, self.chunk_rows)
        parts.pin()
        with row_bar(progress) as bar:
            for rows in parts.fill():
                bar.update(rows)
        seen = Seen.of(parts.all())
        chooser, written, failed, first = self._write(parts, seen)
        rows = len(seen.counts) + failed
        summary = Summary(
            self.task.name, rows, written, failed, first, quantiles(seen.scores), chooser.figures()
        )
        if self.files.picture is not None:
            draw(self.files.picture, chooser, summary, self.files.parts)
        parts.remove()
        return summary

    def _check_formats(self) -> None:
        """Before anything is asked: whether the outputs can hold what the input holds."""
        outputs = [path for path in (self.files.output, self.files.dropped) if path is not None]
        if any(path.suffix in JSONL for path in outputs):
            check_json(self.source.schema)
        if self.source.schema is None and any(path.suffix == PARQUET for path in outputs):
            shape = ColumnTypes()
            for chunk in self.source.chunks(self.chunk_rows):
                shape.see([row.values for row in chunk.rows() if not row.error])
            shape.schema()

    def _write(self, parts: Parts, seen: Seen) -> tuple[Chooser, int, int, str]:
        """Write all but the picture. Also counts rows written and failed; the first error."""
        shapes = self._shapes(parts, seen)
        chooser = self.task.begin(seen)
        written, failed, first = 0, 0, ""
        with ExitStack() as stack:

            def opened(path: Path, schema: Any) -> Write:
                return stack.enter_context(writing(path, schema, self.files.parts))

            outputs = (self.files.output, self.files.dropped)
            writers = [
                opened(path, shape) if path else None
                for path, shape in zip(outputs, shapes, strict=True)
            ]
            for made in self._made(parts, chooser):
                if made[2] and not failed:
                    writers.append(opened(self.files.rejected, None))
                    first = f"{made[2][0]['place']}: {made[2][0]['error']}"
                for write, each in zip(writers, made, strict=False):  # no third yet, no rows
                    if write:
                        write(each)
                written += len(made[0])
                failed += len(made[2])
        if not failed:  # now that there is a new output, what an earlier run rejected is no news
            self.files.rejected.unlink(missing_ok=True)
        return chooser, written, failed, first

    def _shapes(self, parts: Parts, seen: Seen) -> list[Any]:
        """Return the schemas of outputs that are Parquet, from everything that they will hold."""
        paths = [self.files.output, self.files.dropped]
        if not any(path and path.suffix == PARQUET for path in paths):
            return [None, None]
        shapes = [ColumnTypes(self._known()), ColumnTypes(self._known())]
        for made in self._made(parts, self.task.begin(seen)):
            for shape, rows in zip(shapes, made[:2], strict=True):
                shape.see(rows)
        return [shape.schema() for shape in shapes]

    def _known(self) -> Any:
        """Return the columns whose types are the input's."""
        schema = self.source.schema
        if schema is None:
            return None
        gone = {*self.task.removes, *self.task.writes}
        for name in gone.intersection(schema.names):
            # What Hugging Face datasets write there describes every column.
            schema = schema.remove(schema.get_field_index(name)).remove_metadata()
        return schema

    def _made(self, parts: Parts, chooser: Chooser) -> Iterator[Made]:
        """Yield what becomes of each chunk's rows."""
        for number, chunk in enumerate(self.source.chunks(self.chunk_rows)):
            made: Made = ([], [], [])
            for row, verdict in zip(chunk.rows(), parts.verdicts(number), strict=True):
                if verdict.error:
                    made[2].append(_rejected(row, verdict))
                    continue
                conversations = self.judge.scorer.conversations(row.values)
                choice = chooser.choose(row.values, conversations, verdict)
                made[0].extend(choice.rows)
                made[1].extend(choice.dropped)
            yield made


def _rejected(row: Row, verdict: Verdict) -> Values:
    return {"place": row.place, "error": verdict.error, "row": _shown(row.values)}


def _shown(value: Any) -> Any:
    """Return what JSON can hold of a value: bytes are named by their number."""
    if isinstance(value, dict):
        return {key: _shown(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shown(each) for each in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and isfinite(value):
        return value
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)
