"""The three tasks on rows in memory, as functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import chain, islice
from typing import Any

from triward.client import RewardClient
from triward.errors import InvalidRequest

from triward_tools.selection.columns import Columns
from triward_tools.selection.files import filtering, pairing_of
from triward_tools.selection.pairing import Pairing
from triward_tools.selection.rules import Rule
from triward_tools.selection.tasks import BestOfN, Task
from triward_tools.selection.verdicts import Judge, Row, Seen, Verdict

AnyRow = Mapping[str, Any]

# Rows that are scored in one go.
_CHUNK = 1000


def best_of_n(
    rows: Iterable[AnyRow],
    client: RewardClient | None = None,
    *,
    columns: Columns = Columns(),  # noqa: B008 - it is frozen
) -> Iterator[dict[str, Any]]:
    """Each row with `response`, `score` and `index` of its best response, and all `scores`.

    Args:
        rows: are taken in chunks, so they need not fit into memory.
        client: who is asked; None if `columns` names scores.
        columns: what the rows hold.

    Raises:
        InvalidRequest: a row cannot be used; the message names it.
        TriwardError: a server failed.
    """
    columns, taken = _begun(rows, columns, several=True)
    task = BestOfN(columns.scores or "scores")
    chooser = task.begin(Seen.of([]))
    judge = Judge(columns.scorer(client), task, columns.scores)
    for row, verdict in _judged(taken, judge):
        conversations = judge.scorer.conversations(row.values)
        yield from chooser.choose(row.values, conversations, verdict).rows


def filter_rows(
    rows: Iterable[AnyRow],
    rule: Rule,
    client: RewardClient | None = None,
    *,
    columns: Columns = Columns(),  # noqa: B008
) -> Iterator[dict[str, Any]]:
    """Yield the rows whose scores a rule keeps, with `score` or `scores`; see `filter_file`.

    All rows are held in memory until the rule is fitted. Arguments and errors are those of
    `best_of_n`.
    """
    columns, taken = _begun(rows, columns)
    return _chosen(taken, filtering(rule, columns), columns, client)


def pair_rows(
    rows: Iterable[AnyRow],
    pairing: Pairing = Pairing(),  # noqa: B008
    client: RewardClient | None = None,
    *,
    columns: Columns = Columns(),  # noqa: B008
    shift: bool = False,
) -> Iterator[dict[str, Any]]:
    """Preference pairs for TRL; see `pairs_file`.

    All rows are held in memory. Arguments and errors are those of `best_of_n`.
    """
    columns, taken = _begun(rows, columns, several=True)
    return _chosen(taken, pairing_of(pairing, columns, shift=shift), columns, client)


def _chosen(
    rows: Iterator[AnyRow], task: Task, columns: Columns, client: RewardClient | None
) -> Iterator[dict[str, Any]]:
    judge = Judge(columns.scorer(client), task, columns.scores)
    judged = list(_judged(rows, judge))
    chooser = task.begin(Seen.of(verdict for _, verdict in judged))
    for row, verdict in judged:
        conversations = judge.scorer.conversations(row.values)
        yield from chooser.choose(row.values, conversations, verdict).rows


def _begun(
    rows: Iterable[AnyRow], columns: Columns, several: bool = False
) -> tuple[Columns, Iterator[AnyRow]]:
    """All names of columns, which the first row tells; and the rows, none of them taken."""
    taken = iter(rows)
    first = list(islice(taken, 1))
    usual = ["messages", "responses"]
    names = [*first[0]] if first else [*filter(None, asdict(columns).values()), *usual]
    return columns.among(names, several=several), chain(first, taken)


def _judged(rows: Iterator[AnyRow], judge: Judge) -> Iterator[tuple[Row, Verdict]]:
    """Rows and their verdicts.

    Raises:
        InvalidRequest: a row cannot be used.
    """
    numbered = (Row(f"rows[{number}]", dict(row)) for number, row in enumerate(rows))
    while chunk := list(islice(numbered, _CHUNK)):
        for row, verdict in zip(chunk, judge.verdicts(chunk), strict=True):
            if verdict.error:
                raise InvalidRequest(f"{row.place}: {verdict.error}")
            yield row, verdict
