"""A file's numbers, charts, problems and worst pairs as HTML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from triward.conversation import Message
from triward.errors import InvalidRequest
from triward.integrations.images import illustrated

from triward_tools.evaluation.pictures import Turn, turns
from triward_tools.evaluation.report import counted
from triward_tools.evaluation.text import visible
from triward_tools.playground.figures import length_figures, margin_chart_of, score_chart
from triward_tools.playground.gallery import Gallery
from triward_tools.playground.scored import ScoredFile, ScoredPair
from triward_tools.playground.scoredrows import text_of, without_nulls


@dataclass(frozen=True)
class PairCard:
    """A pair for a reader.

    Attributes:
        pair: with its scores.
        verdict: "wrong", "tie" or "right".
        turns: of the prompt, with small pictures.
        chosen: the text; None where the row does not hold it.
        rejected: likewise.
        words: about what cannot be shown.
    """

    pair: ScoredPair
    verdict: str
    turns: list[Turn]
    chosen: str | None
    rejected: str | None
    words: str


def file_page(found: ScoredFile, gallery: Gallery) -> str:
    """Return what the tab shows of a file."""
    lengths = length_figures(found) if len(found.scores) else None
    return _render("scored.html", {
        "file": found,
        "facts": facts_of(found),
        "sentences": sentences(found),
        "score_chart": score_chart(found.scores) if len(found.scores) else "",
        "margin_chart": margin_chart_of(found) if len(found.margins) else "",
        "lengths": lengths,
        "cards": [card(pair, gallery) for pair in found.worst],
    })  # fmt: skip


def facts_of(found: ScoredFile) -> dict[str, str]:
    """Return the summary's names and values."""
    facts = {
        "rows": f"{found.rows:,}",
        "with scores": f"{len(found.counts):,}",
        "with an error": f"{found.without:,}",
        "not read": f"{found.unread:,}",
        "scores": f"{len(found.scores):,}",
    }
    if len(found.scores):
        for name, value in (
            ("mean", float(np.mean(found.scores))),
            ("median", float(np.median(found.scores))),
            ("lowest", float(np.min(found.scores))),
            ("highest", float(np.max(found.scores))),
        ):
            facts[name] = signed("%.4g", value)
    if len(found.margins):
        facts["pairs"] = f"{len(found.margins):,}"
        facts["wrong pairs"] = f"{int((found.margins < 0).sum()):,}"
    return facts


def sentences(found: ScoredFile) -> list[str]:
    """Return what a reader must know before the numbers."""
    told = []
    if not len(found.counts):
        told.append("No row has a score, so there is nothing to draw.")
    elif found.without + found.unread:
        missing = counted(found.without + found.unread, "row")
        told.append(f"{missing} without a score: in no number and no chart here, listed below.")
    if len(found.margins):
        wrong, ties = int((found.margins < 0).sum()), int((found.margins == 0).sum())
        told.append(
            f"Of {counted(len(found.margins), 'pair')}, the chosen response scores below the "
            f"rejected one in {wrong:,}, and the same in {ties:,}."
        )
    elif len(found.counts):
        told.append(
            "No row names a chosen and a rejected response, so there are no pairs to show; "
            "`triward pairs` makes them."
        )
    return told


def card(pair: ScoredPair, gallery: Gallery) -> PairCard:
    """Return a pair with its prompt, pictures and responses."""
    verdict = "wrong" if pair.margin < 0 else "right" if pair.margin > 0 else "tie"
    words, shown = "", list[Turn]()
    chosen = rejected = None
    try:
        chosen, rejected = (text_of(pair.values.get(name)) for name in ("chosen", "rejected"))
        prompt = _prompt(pair.values)
        shown = turns(prompt, gallery.show)
        if not prompt:
            words = "The row does not hold the prompt" + _named(pair.values)
    except InvalidRequest as error:
        words = f"The prompt cannot be shown: {error}"
    except RecursionError:
        words = "The prompt cannot be shown: it is nested too deeply"
    return PairCard(pair, verdict, shown, chosen, rejected, words)


def _prompt(values: Mapping[str, Any]) -> list[Message]:
    """Return a row's prompt with its images in their places; empty where it holds none.

    Raises:
        InvalidRequest: the prompt is of another form, or its images do not fit.
    """
    held = values.get("prompt", values.get("messages"))
    if held is None:
        return []
    if isinstance(held, str):
        held = [{"role": "user", "content": held}]
    messages = without_nulls(held)
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise InvalidRequest("it must be a text or a list of messages")
    images = values.get("images", values.get("image"))
    if images is None:
        return messages
    several = images if isinstance(images, (list, tuple)) else [images]
    return illustrated(messages, several)


def _named(values: Mapping[str, Any]) -> str:
    """Return how to find the row elsewhere: an evaluation's line has an id and a subset."""
    known = [f"{name} {values[name]}" for name in ("id", "subset") if values.get(name) is not None]
    return f": {', '.join(known)}." if known else "."


def signed(form: str, value: float) -> str:
    """Return a number in a printf form, with a true minus sign."""
    return (form % value).replace("-", "\N{MINUS SIGN}")


def share(value: float | None) -> str:
    """Return a correlation in words."""
    return "not defined" if value is None else signed("%.2f", value)


def _render(template: str, values: Mapping[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("triward_tools.playground", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(visible=visible, counted=counted, signed=signed, share=share)
    return str(environment.get_template(template).render(values))
