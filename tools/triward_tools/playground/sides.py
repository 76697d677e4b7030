"""The answers of two sides to one input, side by side in HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from triward.errors import TriwardError

from triward_tools.evaluation.text import visible
from triward_tools.playground.agreement import Agreement, agreement, places_of
from triward_tools.playground.asking import Reply
from triward_tools.playground.bars import drawn, refused, scale, score_text

STYLE = """
.tw-sides { color: var(--body-text-color); }
.tw-sides h3 { font-size: 1rem; font-weight: 600; margin: 1.2rem 0 .4rem; }
.tw-sides p { margin: 0 0 .4rem; overflow-wrap: anywhere; }
.tw-sides .muted { color: #5b6472; font-size: .85rem; }
.dark .tw-sides .muted { color: #a8b2c0; }
.tw-sides ol { list-style: none; margin: 0; padding: 0; }
.tw-sides li { margin: 0; padding: .7rem 0; border-top: 1px solid var(--border-color-primary); }
.tw-sides li > p { display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical;
  overflow: hidden; }
.tw-side { display: grid; grid-template-columns: 1.2rem minmax(0, 1fr) 4.8rem 3.2rem; gap: .4rem;
  align-items: center; font-variant-numeric: tabular-nums; }
.tw-side strong, .tw-side small { text-align: right; }
.tw-side svg { width: 100%; height: .6rem; display: block; }
.tw-side[data-side=A] .bar { fill: #0d7a70; }
.tw-side[data-side=B] .bar { fill: #b4541f; }
.dark .tw-side[data-side=A] .bar { fill: #5ecfc2; }
.dark .tw-side[data-side=B] .bar { fill: #f0936f; }
"""


@dataclass(frozen=True)
class Side:
    """A side of a comparison.

    Attributes:
        name: "A" or "B".
        url: of the server.
        model: name of the ensemble.
        answer: scores, or why there are none.
    """

    name: str
    url: str
    model: str
    answer: Reply | TriwardError


def sides_page(responses: Sequence[str], sides: Sequence[Side]) -> str:
    """Return both sides' scores of the responses, and how far they agree; or their errors."""
    answered = [(side, side.answer) for side in sides if isinstance(side.answer, Reply)]
    parts = [
        _headline(side) if isinstance(side.answer, Reply)
        else refused(f"{_title(side)}: {side.answer}")
        for side in sides
    ]  # fmt: skip
    if len(answered) == 2:
        a, b = (reply.scores for _, reply in answered)
        parts += ["<h3>Agreement</h3>", _agreement(agreement(a, b))]
        parts.append(
            '<p class="muted">Both were asked at once: where one server or machine has both sides, '
            "each takes longer than alone.</p>"
        )
    if answered:
        parts += ["<h3>Scores in the order given</h3>", _rows(responses, answered)]
    return f'<section class="tw-sides">{"".join(parts)}</section>'


def _title(side: Side) -> str:
    return f"{side.name}, {side.model} at {side.url}"


def _headline(side: Side) -> str:
    assert isinstance(side.answer, Reply)
    order = " > ".join(str(index + 1) for index in side.answer.ranking)
    return (
        f"<p><strong>{escape(visible(_title(side)))}</strong> "
        f'<span class="muted">{side.answer.milliseconds:.0f} ms; best first: {order}</span></p>'
    )


def _agreement(found: Agreement) -> str:
    if found.order:
        words = "Both rank the responses alike."
    elif found.best:
        words = "Both have the same best response, but not the same ranking."
    else:
        words = "They have different best responses."
    ties = f", {found.ties} are ties on a side" if found.ties else ""
    return (
        f"<p>{words}</p><p>Of {found.pairs} {'pair' if found.pairs == 1 else 'pairs'} of responses,"
        f" both order {found.same} alike and {found.opposite} the other way round{ties}.</p>"
        f'<p class="muted">Kendall\'s tau-b {_share(found.kendall)}, '
        f"Spearman's rho {_share(found.spearman)}</p>"
    )


def _share(value: float | None) -> str:
    if value is None:
        return "not defined: all scores of a side are equal"
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def _rows(responses: Sequence[str], answered: Sequence[tuple[Side, Reply]]) -> str:
    low, span = scale([score for _, reply in answered for score in reply.scores])
    places = [places_of(reply.scores) for _, reply in answered]
    items = []
    for index, text in enumerate(responses):
        both = [
            _side(side.name, reply.scores[index], places[n][index], low, span)
            for n, (side, reply) in enumerate(answered)
        ]
        note = ""
        if len(answered) == 2:
            before, after = (reply.scores[index] for _, reply in answered)
            note = _difference(after - before, places[0][index], places[1][index])
        items.append(
            f'<li><p dir="auto"><b>{index + 1}</b> {escape(visible(text))}</p>'
            f"{''.join(both)}{note}</li>"
        )
    return f"<ol>{''.join(items)}</ol>"


def _side(name: str, score: float, place: int, low: float, span: float) -> str:
    return (
        f'<div class="tw-side" data-side="{name}"><b>{name}</b>{drawn(score, low, span)}'
        f"<strong>{score_text(score)}</strong><small>place {place}</small></div>"
    )


def _difference(difference: float, before: int, after: int) -> str:
    sign = "+" if difference > 0 else ""
    moved = "same place" if before == after else f"place {before} in A, {after} in B"
    return f'<p class="muted">B minus A {sign}{score_text(difference)}; {moved}</p>'
