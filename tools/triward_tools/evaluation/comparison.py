"""The published rows with ours between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from triward_tools.evaluation.facts import Facts

SUSPECT = "†"


@dataclass(frozen=True)
class Line:
    """A row of the table.

    Attributes:
        model: its name.
        source: the table that it was published in; empty for ours.
        cells: percent for each column, marked where a published one does not follow from its row;
            a dash where there is none.
        ours: whether it is this evaluation's.
    """

    model: str
    source: str
    cells: tuple[str, ...]
    ours: bool


@dataclass(frozen=True)
class Comparison:
    """A table.

    Attributes:
        columns: sections and totals.
        ranked_by: the column that decides the order, best first.
        lines: the rows.
        suspect: whether a cell is marked.
    """

    columns: tuple[str, ...]
    ranked_by: str
    lines: tuple[Line, ...]
    suspect: bool


def compare(facts: Facts) -> Comparison | None:
    """Put this evaluation between the published rows; None where nothing is published."""
    if not facts.published:
        return None
    columns = tuple(facts.published[0].values)
    own = {row.name: 100 * row.value for row in facts.rows if row.level != "subset"}
    ranked = [
        (
            p.values[facts.headline],
            Line(p.model, p.source, _cells(columns, p.values, p.doubtful), False),
        )
        for p in facts.published
    ]
    ranked.append(
        (own.get(facts.headline, -1.0), Line(facts.model, "", _cells(columns, own, ()), True))
    )
    lines = tuple(line for _, line in sorted(ranked, key=lambda r: -r[0]))
    suspect = any(p.doubtful for p in facts.published)
    return Comparison(columns, facts.headline, lines, suspect)


def _cells(
    columns: tuple[str, ...], values: Mapping[str, float], doubtful: tuple[str, ...]
) -> tuple[str, ...]:
    return tuple(
        f"{values[c]:.1f}{SUSPECT if c in doubtful else ''}" if c in values else "-"
        for c in columns
    )
