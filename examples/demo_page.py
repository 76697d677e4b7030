"""The demo's outcome as one page for a browser, which needs no network and no script."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import exp
from pathlib import Path
from string import Template

from PIL import Image

TEMPLATE = Path(__file__).with_name("demo_page.html")
Steps = Sequence[tuple[str, Sequence[str]]]


@dataclass(frozen=True)
class Outcome:
    """What was sent, and what came back.

    Attributes:
        picture: the file that was sent.
        question: likewise.
        answers: likewise, [N].
        served: Triton's scores, [N].
        reference: those of the model card's code, [N].
    """

    picture: Path
    question: str
    answers: Sequence[str]
    served: Sequence[float]
    reference: Sequence[float]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture, in pixels."""
        with Image.open(self.picture) as image:
            return image.size

    @property
    def rows(self) -> list[tuple[str, float, float, float]]:
        """Of each answer: its text, its chance to be the best, Triton's score, the reference.

        The chance is Bradley and Terry's, exp(score) over the sum of all.
        """
        highest = max(self.served)
        odds = [exp(score - highest) for score in self.served]
        chances = [each / sum(odds) for each in odds]
        return list(zip(self.answers, chances, self.served, self.reference, strict=True))


def write_page(outcome: Outcome, steps: Steps, path: Path) -> None:
    """Write the page, and its folder where there is none.

    Args:
        outcome: of the demo.
        steps: what to do next, each with its commands.
        path: of the HTML file.
    """
    width, height = outcome.size
    best = max(outcome.served)
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        picture=base64.b64encode(outcome.picture.read_bytes()).decode(),
        width=width,
        height=height,
        question=escape(outcome.question),
        answers="".join(
            f"<li{' class=best' if ours == best else ''}>"
            f"<div class=line><span>{escape(answer)}</span><b>{chance:.1%}</b></div>"
            f'<div class=bar><i style="width:{chance:.1%}"></i></div>'
            f"<div class=line><small>Triton {ours:.5f}</small>"
            f"<small>model card’s code {card:.5f}</small></div></li>"
            for answer, chance, ours, card in outcome.rows
        ),
        apart=f"{max(abs(ours - card) for *_, ours, card in outcome.rows):.1e}",
        steps="".join(
            f"<dt>{escape(what)}</dt><dd><pre>{escape(chr(10).join(commands))}</pre></dd>"
            for what, commands in steps
        ),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
