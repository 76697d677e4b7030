"""The verdicts on an input's rows, in a folder that a job which was killed finds again.

A chunk's verdicts are one file, which appears complete or not at all; a job that goes on makes
those that are missing. What they depend on stands in a manifest beside them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from triward_tools.jobs import fingerprint, pin_manifest, whole_file
from triward_tools.selection.source import Source
from triward_tools.selection.verdicts import Judge, Verdict

_MANIFEST = "_manifest.json"
_FORMAT = 1


@dataclass(frozen=True)
class Parts:
    """A folder of verdicts.

    Attributes:
        folder: where they lie.
        source: on whose rows they are.
        judge: who gives them.
        chunk_rows: rows of a chunk.
    """

    folder: Path
    source: Source
    judge: Judge
    chunk_rows: int

    def pin(self) -> None:
        """Begin the job, or compare it with the one that was begun.

        Raises:
            JobMismatch: that is another one.
        """
        scorer, task = self.judge.scorer, self.judge.task
        manifest: dict[str, Any] = {
            "format": _FORMAT,
            "task": type(task).__name__,
            **scorer.identity,
            **({} if self.judge.scores is None else {"model": None}),  # nobody is asked
            "scores": self.judge.scores,
            "chunk_rows": self.chunk_rows,
            **{
                f"file {number} {path.name}": fingerprint(path)
                for number, path in enumerate(self.source.files())
            },
        }
        pin_manifest(self.folder, _MANIFEST, manifest)

    def fill(self) -> Iterator[int]:
        """Give the verdicts that are missing; yields the number of rows of each chunk.

        Raises:
            ServerUnavailable: no server is ready. One that goes away later is waited for.
            TriwardError: as for `RowScorer.score_rows`. What is finished is kept.
        """
        ready = self.judge.scores is not None
        for number, chunk in enumerate(self.source.chunks(self.chunk_rows)):
            path = self._path(number)
            if not path.exists():
                ready = ready or self._check_ready()
                verdicts = self.judge.verdicts(chunk.rows())
                with whole_file(path) as file:
                    lines = (json.dumps(asdict(each)) + "\n" for each in verdicts)
                    file.writelines(line.encode() for line in lines)
            yield len(chunk)

    def _check_ready(self) -> bool:
        # `patience` is for servers that start again, not for an address that is wrong.
        self.judge.scorer.client.check_ready()
        return True

    def verdicts(self, number: int) -> list[Verdict]:
        """Return the verdicts on the chunk with this number."""
        with self._path(number).open(encoding="utf-8") as lines:
            return [Verdict(**json.loads(line)) for line in lines]

    def all(self) -> Iterator[Verdict]:
        """Yield the verdicts on all rows."""
        for number, _ in enumerate(self.source.chunks(self.chunk_rows)):
            yield from self.verdicts(number)

    def remove(self) -> None:
        """Remove the folder; one that is there is never in part."""
        gone = self.folder.with_name(f".{self.folder.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        self.folder.rename(gone)
        shutil.rmtree(gone)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:09}.jsonl"
