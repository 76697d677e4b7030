"""Summary of a job."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from triward_tools.selection.limits import Floats

_QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "50%": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}


@dataclass(frozen=True)
class Summary:
    """Counts and figures of a finished job.

    Attributes:
        command: which one.
        rows: of the input.
        written: rows of the output.
        failed: rows that could not be used; they are in `OUTPUT.rejected.jsonl`.
        first_error: of these rows, or "".
        scores: quantiles of the scores of all responses.
        figures: what the command has to tell.
    """

    command: str
    rows: int
    written: int
    failed: int
    first_error: str
    scores: dict[str, float]
    figures: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For a reader."""
        found = [f"{self.command}: {self.rows} rows in, {self.written} rows out"]
        if self.failed:
            found.append(f"without a score: {self.failed}")
        told = {"scores": self.scores, **self.figures}
        return found + [f"{name}: {_told(value)}" for name, value in told.items()]


def quantiles(scores: Floats) -> dict[str, float]:
    """Return the quantiles of some scores; nothing if there are none."""
    if not len(scores):
        return {}
    values = np.quantile(scores, list(_QUANTILES.values()))
    return {name: float(value) for name, value in zip(_QUANTILES, values, strict=True)}


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{name} {_told(each)}" for name, each in value.items()) or "none"
    if isinstance(value, list):
        return " to ".join("no limit" if each is None else _told(each) for each in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return "none" if value is None else str(value)
