"""An evaluation's results -> `report.html`, `report.md` and `report.json`.

The same results give the same bytes: there is no date in them and no name of a folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from triward_tools.evaluation.comparison import compare
from triward_tools.evaluation.facts import Facts, gather
from triward_tools.evaluation.results import GroupResult, Labelled, Problem, Result
from triward_tools.evaluation.text import fenced, markdown, visible
from triward_tools.jobs import naming

PairOf = Callable[[Sequence[int]], Mapping[int, Labelled]]


@dataclass(frozen=True)
class Shown:
    """A response on a page.

    Attributes:
        verdict: 'better' or 'worse'.
        score: the model's.
        text: None where its row cannot be read any more.
    """

    verdict: str
    score: float
    text: str | None


@dataclass(frozen=True)
class Report:
    """A report that was written."""

    facts: Facts

    def lines(self) -> list[str]:
        """Return a summary to print: scores with intervals, ties, and rows without a score."""
        facts = self.facts
        noun = facts.wording.noun
        right = f"{facts.correct:,} of {counted(facts.pairs, noun)} right"
        lines = [f"{facts.benchmark}, {facts.model}: {right}"]
        lines += [
            f"  {'  ' if row.level == 'section' else ''}{row.name:<16}{percent(row.value):>6}"
            f"  [{percent(row.interval.low)}, {percent(row.interval.high)}]"
            f"  {counted(row.pairs, noun)}"
            for row in facts.rows
            if row.level != "subset"
        ]
        lines.append(f"  ties, which {facts.wording.ties}: {facts.ties:,}")
        return lines + [f"  {warning}" for warning in warnings(facts)]


def write_report(
    folder: Path,
    benchmark: str,
    results: Sequence[Result],
    problems: Sequence[Problem],
    pair_of: PairOf,
    *,
    model: str,
    seed: int = 0,
) -> Report:
    """Write `report.html`, `report.md` and `report.json`.

    Args:
        folder: an existing one.
        benchmark: a key of `arithmetic.BENCHMARKS`.
        results: every pair with scores, in any order; each index once.
        problems: every row that is no pair or has no scores.
        pair_of: the pairs of given indices, for those that are shown, but for rows that cannot be
            read any more, as when a picture is gone.
        model: the name of the model that gave the scores.
        seed: of the bootstrap.

    Raises:
        ValueError: the benchmark or a subset is unknown, or two results have one index.
        OSError: a file cannot be written.
    """
    from triward_tools.evaluation.charts import calibration_chart, margin_chart
    from triward_tools.evaluation.pictures import turns

    facts = gather(benchmark, results, problems, model=model, seed=seed)
    pairs = pair_of([r.index for r in facts.worst]) if facts.worst else {}
    values = {
        "facts": facts,
        "warnings": warnings(facts),
        "statement": statement(facts),
        "comparison": compare(facts),
        "cases": [
            (r, pair, turns(pair.prompt) if pair else [], _responses(r, pair))
            for r, pair in ((r, pairs.get(r.index)) for r in facts.worst)
        ],
        "margin_chart": margin_chart(results, facts.wording) if results else "",
        "calibration_chart": calibration_chart(facts.calibration) if facts.calibration else "",
    }
    texts = {name: _render(name, values) for name in ("report.html", "report.md")}
    texts["report.json"] = json.dumps(asdict(facts), indent=2) + "\n"
    for name, text in texts.items():
        with naming(folder / name):
            (folder / name).write_bytes(text.encode())
    return Report(facts)


def percent(value: float) -> str:
    """Return a share in percent, with one decimal, as the benchmarks' tables have it."""
    return f"{100 * value:.1f}"


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, as "1 pair" or "1,250 pairs"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def statement(facts: Facts) -> str:
    """Return a sentence that says what the headline means."""
    words = facts.wording
    if not facts.pairs:
        return f"No {words.noun} has scores, so there is nothing to report."
    ties = f"; {facts.ties:,} of the others are ties" if facts.ties else ""
    counts = counted(facts.pairs, words.noun)
    return f"Of {counts}, {facts.model} {words.achieved} {facts.correct:,}{ties}."


def warnings(facts: Facts) -> list[str]:
    """Return what a reader must know before the numbers, a sentence each."""
    found = []
    if facts.problems:
        count = len(facts.problems)
        have = "row has no score and is" if count == 1 else "rows have no score and are"
        found.append(f"{count:,} {have} in no number here.")
    if facts.absent and facts.pairs:
        absent = f"No {facts.wording.noun} of {', '.join(facts.absent)}"
        found.append(f"{absent}: the totals leave it out.")
    if facts.incomplete:
        found.append(
            f"Incomplete: no {facts.wording.noun} of {', '.join(facts.incomplete)}. "
            "Scores that miss a subset do not compare with published ones."
        )
    return found


def _responses(result: Result, row: Labelled | None) -> list[Shown]:
    """Return a row's responses, the correct ones first."""
    correct = len(result.chosen_scores) if isinstance(result, GroupResult) else 1
    texts = list(row.responses.values()) if row else [None] * len(result.scores)
    return [
        Shown("better" if i < correct else "worse", score, text)
        for i, (score, text) in enumerate(zip(result.scores, texts, strict=True))
    ]


def _render(template: str, values: Mapping[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("triward_tools.evaluation", ""),
        autoescape=template.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent, counted=counted, visible=visible, cell=markdown, fenced=fenced
    )
    return str(environment.get_template(template).render(values))
