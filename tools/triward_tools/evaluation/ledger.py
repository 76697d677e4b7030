"""results.jsonl: one line for each row of the data, in the rows' order.

A line is whole or not there: what a killed run left of its last line, or a power cut of its last
lines, is cut off and done again. So a run that goes on writes the same file as one that was never
interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from triward_tools.evaluation.results import GroupResult, Problem, Result
from triward_tools.jobs import JobMismatch, naming

Entry = Result | Problem

NAME = "results.jsonl"


class Ledger:
    """The file, open to append. One at a time may be.

    Args:
        folder: where it is, or will be.

    Raises:
        JobMismatch: there is a file whose lines are not results in order.
    """

    def __init__(self, folder: Path) -> None:  # noqa: D107 - the class says it
        self._path = folder / NAME
        self._file: IO[bytes] = self._path.open("ab+")
        self._file.seek(0)
        lines = self._file.read().split(b"\n")[:-1]  # behind the last newline is a torn line
        while lines and not _is_json(lines[-1]):  # a power cut leaves zeros
            lines.pop()
        self._file.truncate(sum(len(line) + 1 for line in lines))
        self.entries = self._read(lines)

    def append(self, entry: Entry) -> None:
        """Add a line, which is in the file when this returns."""
        self.entries.append(entry)
        with naming(self._path):
            self._file.write(json.dumps(_line(entry)).encode() + b"\n")
            self._file.flush()

    def results(self) -> Sequence[Result]:
        """Return the rows that have scores."""
        return [entry for entry in self.entries if isinstance(entry, Result)]

    def problems(self) -> Sequence[Problem]:
        """Return the rows that have none."""
        return [entry for entry in self.entries if isinstance(entry, Problem)]

    def __enter__(self) -> Ledger:
        """Return the ledger itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        with naming(self._path):  # what could not be written is tried once more
            self._file.close()

    def _read(self, lines: Sequence[bytes]) -> list[Entry]:
        entries: list[Entry] = []
        for index, line in enumerate(lines):
            entry = _entry(line)
            if entry is None or entry.index != index:
                self._file.close()
                raise JobMismatch(
                    f"{self._path}: line {index + 1} is no result of row {index}; "
                    "remove the folder, or name another output"
                )
            entries.append(entry)
        return entries


def _line(entry: Entry) -> dict[str, Any]:
    if isinstance(entry, Problem):
        return {"index": entry.index, "error": {"place": entry.place, "reason": entry.reason}}
    held: tuple[Any, Any] = entry.chosen, entry.rejected
    if isinstance(entry, GroupResult):
        held = entry.chosen_scores, entry.rejected_scores
    return {
        "index": entry.index,
        "id": entry.id,
        "subset": entry.subset,
        "chosen": held[0],
        "rejected": held[1],
        "margin": entry.margin,
        "correct": entry.correct,
    }


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _entry(line: bytes) -> Entry | None:
    try:
        row = json.loads(line)
        if "error" in row:
            return Problem(row["index"], **row["error"])
        made = GroupResult.of if isinstance(row["chosen"], list) else Result
        return made(*(row[name] for name in ("index", "id", "subset", "chosen", "rejected")))
    except (ValueError, LookupError, TypeError):
        return None
