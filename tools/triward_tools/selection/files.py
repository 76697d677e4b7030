"""The three tasks on files, as functions."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from triward.client import RewardClient

from triward_tools.selection.columns import Columns
from triward_tools.selection.job import Files, Job
from triward_tools.selection.pairing import Pairing
from triward_tools.selection.preference import Pairs
from triward_tools.selection.rules import Rule
from triward_tools.selection.source import Source, open_source
from triward_tools.selection.summary import Summary
from triward_tools.selection.tasks import BestOfN, Filter, Task
from triward_tools.selection.verdicts import Judge

AnyPath = str | os.PathLike[str]


def best_of_n_file(
    source: AnyPath,
    output: AnyPath,
    client: RewardClient | None = None,
    *,
    columns: Columns = Columns(),  # noqa: B008 - it is frozen
    picture: AnyPath | None = None,
    concurrency: int = 32,
    chunk_rows: int = 1000,
    progress: bool = False,
    force: bool = False,
) -> Summary:
    """Write each row with its best response. Goes on with a job that was killed.

    The rows get `response`, `score` and `index` of the best response, and the `scores` of all.

    Args:
        source: a .jsonl or .parquet file, or a folder of Parquet files.
        output: .jsonl or .parquet.
        client: who is asked; None if `columns` names scores.
        columns: what the input's columns hold.
        picture: .svg or .png; None for none.
        concurrency: how many requests are in flight at once.
        chunk_rows: how much a killed job repeats. A chunk is held in memory.
        progress: show a bar on standard error.
        force: replace outputs that are there. A job that was killed goes on without it.

    Raises:
        InvalidRequest: the input or the arguments cannot be used, or an output is there already.
        JobMismatch: `OUTPUT.parts` was begun with other input or other settings.
        TriwardError: a server failed. What is finished is kept, in `OUTPUT.parts`.
    """
    found, columns = _open(source, columns, several=True)
    task = BestOfN(columns.scores or "scores")
    files = Files(Path(output), None, _path(picture), force)
    return _job(found, columns, task, files, client, concurrency, chunk_rows).run(progress)


def filter_file(
    source: AnyPath,
    output: AnyPath,
    rule: Rule,
    client: RewardClient | None = None,
    *,
    columns: Columns = Columns(),  # noqa: B008
    dropped: AnyPath | None = None,
    picture: AnyPath | None = None,
    concurrency: int = 32,
    chunk_rows: int = 1000,
    progress: bool = False,
    force: bool = False,
) -> Summary:
    """Write the rows whose scores a rule keeps. Goes on with a job that was killed.

    A row with several responses keeps those whose scores are kept, and is left out if there is
    none. Rows get `score`, or `scores` for several responses.

    Args:
        source: see `best_of_n_file`, as the other arguments.
        output: likewise.
        rule: is fitted to the scores of all responses.
        client: likewise.
        columns: likewise.
        dropped: file for what is left out, with the `reason` (`reasons`, for several responses).
        picture: likewise.
        concurrency: likewise.
        chunk_rows: likewise.
        progress: likewise.
        force: likewise.

    Raises:
        TriwardError: see `best_of_n_file`.
    """
    found, columns = _open(source, columns)
    task = filtering(rule, columns, reasons=dropped is not None)
    files = Files(Path(output), _path(dropped), _path(picture), force)
    return _job(found, columns, task, files, client, concurrency, chunk_rows).run(progress)


def pairs_file(
    source: AnyPath,
    output: AnyPath,
    pairing: Pairing = Pairing(),  # noqa: B008
    client: RewardClient | None = None,
    *,
    columns: Columns = Columns(),  # noqa: B008
    picture: AnyPath | None = None,
    concurrency: int = 32,
    chunk_rows: int = 1000,
    progress: bool = False,
    force: bool = False,
    shift: bool = False,
) -> Summary:
    """Write preference pairs for TRL's DPO trainer. Goes on with a job that was killed.

    A row is a pair: `prompt`, `chosen` and `rejected` as messages, `images` if any prompt has one,
    `score_chosen`, `score_rejected`, `margin`, and the input's other columns.

    `score_shift`, if asked for, is MPO's absolute quality shift of scores: the mean of both scores
    of all pairs so far.

    Args:
        source: see `best_of_n_file`, as the other arguments.
        output: likewise.
        pairing: which responses become pairs.
        client: likewise.
        columns: likewise.
        picture: likewise.
        concurrency: likewise.
        chunk_rows: likewise.
        progress: likewise.
        force: likewise.
        shift: whether pairs have `score_shift`.

    Raises:
        TriwardError: see `best_of_n_file`.
    """
    found, columns = _open(source, columns, several=True)
    files = Files(Path(output), None, _path(picture), force)
    task = pairing_of(pairing, columns, shift=shift)
    return _job(found, columns, task, files, client, concurrency, chunk_rows).run(progress)


def filtering(rule: Rule, columns: Columns, *, reasons: bool = False) -> Filter:
    """Return the task for a table with these columns; `reasons` if what it drops is written."""
    named = columns.scores
    return Filter(rule, named or "scores", named or "score", columns.responses, reasons)


def pairing_of(pairing: Pairing, columns: Columns, *, shift: bool = False) -> Pairs:
    """Return the task for a table with these columns."""
    held = (columns.prompt, columns.messages, columns.responses, columns.images, columns.scores)
    # TRL would take the last two for the prompt's images, which stand in `images` anew.
    removes = (*(name for name in held if name is not None), "image", "images")
    return Pairs(pairing, removes, shift)


def _open(source: AnyPath, columns: Columns, several: bool = False) -> tuple[Source, Columns]:
    found = open_source(Path(source))
    named = [name for name in asdict(columns).values() if name is not None]
    return found, columns.among(found.names(named), several=several)


def _job(
    source: Source,
    columns: Columns,
    task: Task,
    files: Files,
    client: RewardClient | None,
    concurrency: int,
    chunk_rows: int,
) -> Job:
    judge = Judge(columns.scorer(client, concurrency=concurrency), task, columns.scores)
    judge.check_names(source.names(), several=columns.responses is not None)
    return Job(source, judge, task, files, chunk_rows)


def _path(path: AnyPath | None) -> Path | None:
    return None if path is None else Path(path)
