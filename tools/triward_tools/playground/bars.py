"""Scores as bars, and sentences, in HTML that follows the page's colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import exp

# Gradio's own variables change with its dark mode, so that the bars do.
STYLE = """
.tw-bars { border: 0; margin: 0; padding: 0; }
.tw-bars h3 { font-size: 1rem; font-weight: 600; margin: 0 0 .6rem; }
.tw-bars p { margin: 0 0 .6rem; color: var(--body-text-color-subdued); }
.tw-bars ol { list-style: none; margin: 0; padding: 0; }
.tw-bars li { display: grid; grid-template-columns: 1.9rem minmax(0, 1fr) auto; gap: .1rem .6rem;
  align-items: baseline; margin: 0; padding: .5rem 0;
  border-top: 1px solid var(--border-color-primary); }
.tw-bars li > b { font-variant-numeric: tabular-nums; color: var(--body-text-color-subdued);
  font-weight: 600; }
.tw-bars li > span { overflow-wrap: anywhere; display: -webkit-box; -webkit-line-clamp: 2;
  -webkit-box-orient: vertical; overflow: hidden; }
.tw-bars li > strong { font-variant-numeric: tabular-nums; font-weight: 600; text-align: right; }
.tw-bars li > svg { grid-column: 2 / 4; width: 100%; height: .55rem; display: block; }
.tw-bars li > small { grid-column: 2 / 4; color: var(--body-text-color-subdued); }
.tw-bars rect.track, .tw-side rect.track { fill: var(--border-color-primary); opacity: .45; }
.tw-bars rect.zero, .tw-side rect.zero { fill: var(--body-text-color); }
.tw-bars rect.bar { fill: #0f9488; }
.tw-bars rect.below { fill: #e0893b; }
.dark .tw-bars rect.bar { fill: #2aa79a; }
.dark .tw-bars rect.below { fill: #d9863d; }
.tw-bars li.first > b { color: var(--color-accent); }
.tw-said { margin: 0; padding: .6rem .8rem; border-radius: var(--radius-md);
  border: 1px solid var(--border-color-primary); overflow-wrap: anywhere; }
.tw-said[role=alert] { color: var(--error-text-color); background: var(--error-background-fill);
  border-color: var(--error-border-color); }
"""


@dataclass(frozen=True)
class Bar:
    """A row of a chart.

    Attributes:
        name: short, as "1" for the first response.
        text: what was scored.
        score: a finite number.
        note: a line below the bar; "" for none.
        first: whether it stands out.
    """

    name: str
    text: str
    score: float
    note: str = ""
    first: bool = False


def bars(title: str, rows: Sequence[Bar]) -> str:
    """Return a titled list in HTML: each row has its number as text, and a bar from zero.

    All bars of a chart have one scale, from the lowest score or 0 to the highest or 0. Negative
    scores reach to the left of zero, in another colour.
    """
    low, span = scale([row.score for row in rows])
    items = "".join(_item(row, low, span) for row in rows)
    below = all(row.score < 0 for row in rows)
    note = "<p>All scores are negative: the longest bar is the lowest.</p>" if below else ""
    return f'<section class="tw-bars"><h3>{escape(title)}</h3>{note}<ol>{items}</ol></section>'


def scale(scores: Sequence[float]) -> tuple[float, float]:
    """Return the lowest score or 0, and how far the highest or 0 is from it; at least above 0."""
    low, high = min([0.0, *scores]), max([0.0, *scores])
    return low, (high - low) or 1.0


def drawn(score: float, low: float, span: float) -> str:
    """Return a bar from zero to the score on a scale, as SVG that its surroundings colour."""
    zero, end = (100 * (x - low) / span for x in (0.0, score))
    left, width = min(zero, end), abs(end - zero)
    kind = "bar below" if score < 0 else "bar"
    return (
        '<svg viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" width="100" height="6"/>'
        f'<rect class="{kind}" x="{left:.3f}" width="{width:.3f}" height="6"/>'
        f'<rect class="zero" x="{min(zero, 99.6):.3f}" width="0.4" height="6"/></svg>'
    )


def _item(row: Bar, low: float, span: float) -> str:
    note = f"<small>{escape(row.note)}</small>" if row.note else ""
    return (
        f"<li{' class=first' if row.first else ''}><b>{escape(row.name)}</b>"
        f'<span dir="auto">{escape(row.text)}</span><strong>{score_text(row.score)}</strong>'
        f"{drawn(row.score, low, span)}{note}</li>"
    )


def score_text(score: float) -> str:
    """Return a score as the page writes it, with a true minus sign."""
    return f"{score:.4f}".replace("-", "\N{MINUS SIGN}")


def preferred(margin: float) -> float:
    """Return the chance that a response is preferred to one that scores `margin` less.

    Bradley and Terry's: the sigmoid of the difference of the rewards.
    """
    if margin >= 0:
        return 1 / (1 + exp(-margin))
    return exp(margin) / (1 + exp(margin))


def refused(sentence: object) -> str:
    """Return an error's sentence in HTML, which a screen reader says at once."""
    return f'<p class="tw-said" role="alert">{escape(str(sentence))}</p>'


def said(sentence: str) -> str:
    """Return a sentence in HTML, for a place that page.js makes a live region."""
    return f'<p class="tw-said">{escape(sentence)}</p>'
