"""A request with a known score, kept in the repository: what a deep health check asks.

The file is written at export, next to the version that it was scored with:
`<model>/<version>/canary.json`.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from ..errors import LaunchError
from ..schema import REWARD, ModelNames

FILE = "canary.json"

# How far a served score may be from the one at export, which may have run on another device: far
# above rounding (the model card's own bf16 results for one conversation spread by 2 %), far below
# what wrong weights do.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


@dataclass(frozen=True)
class Canary:
    """One request and what it scores.

    Attributes:
        messages: the wire's JSON.
        responses: candidates.
        media: encoded images.
        scores: at export; None when none were taken.
        tolerance: for each score, relative above 1.
    """

    messages: str
    responses: tuple[str, ...]
    media: tuple[bytes, ...]
    scores: tuple[float, ...] | None
    tolerance: float

    def write(self, folder: Path) -> None:
        """Write the file into a version's folder."""
        fields = {
            "messages": self.messages,
            "responses": self.responses,
            "media": [base64.b64encode(item).decode() for item in self.media],
            "scores": self.scores,
            "tolerance": self.tolerance,
        }
        (folder / FILE).write_text(json.dumps(fields, indent=2) + "\n")

    @classmethod
    def of(cls, repository: Path, version: str, names: ModelNames = REWARD) -> Canary:
        """Read the file of a model's version.

        Raises:
            LaunchError: it is missing or damaged.
        """
        path = repository / names.ensemble / version / FILE
        try:
            fields = json.loads(path.read_text())
            return cls(
                messages=str(fields["messages"]),
                responses=tuple(map(str, fields["responses"])),
                media=tuple(base64.b64decode(item) for item in fields["media"]),
                scores=None if fields["scores"] is None else tuple(map(float, fields["scores"])),
                tolerance=float(fields["tolerance"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LaunchError(f"{path}: no canary: {type(error).__name__}: {error}") from None

    def problem(self, scores: list[float]) -> str | None:
        """Return what is wrong with an answer, or None."""
        if len(scores) != len(self.responses) or not all(map(isfinite, scores)):
            return f"the canary scores {scores}"
        for score, expected in zip(scores, self.scores or scores, strict=True):
            if abs(score - expected) > self.tolerance * max(1.0, abs(expected)):
                return f"the canary scores {score:.5g}, at export {expected:.5g}"
        return None
