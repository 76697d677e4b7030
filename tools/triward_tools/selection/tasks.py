"""The three things that scores are for: what each makes of a row, and tells at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from triward.conversation import Message
from triward.errors import InvalidRequest

from triward_tools.selection.best import best_of, best_of_n_curve, points
from triward_tools.selection.limits import Limits
from triward_tools.selection.rules import Rule
from triward_tools.selection.verdicts import Seen, Verdict, texts_of

Conversations = Sequence[Sequence[Message]]
Values = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """Output rows that a row becomes.

    Attributes:
        rows: of the output.
        dropped: what is left out of it, with the reasons.
    """

    rows: list[Values]
    dropped: list[Values] = field(default_factory=list)


class Chooser(Protocol):
    """Chooses, once all scores have been seen; and counts what it chose."""

    seen: Seen

    def choose(self, values: Values, conversations: Conversations, verdict: Verdict) -> Choice:
        """Return what becomes of a row that has scores."""

    def figures(self) -> Values:
        """Return what there is to tell of all rows; plain JSON values."""


class Task(Protocol):
    """A use of scores: best-of-n, filter or pairs."""

    @property
    def name(self) -> str:
        """Name on the command line."""

    @property
    def removes(self) -> tuple[str, ...]:
        """Columns of the input that the output does not have."""

    @property
    def writes(self) -> tuple[str, ...]:
        """Columns of the output that are not the input's, whatever that holds."""

    def adds(self, several: bool) -> tuple[str, ...]:
        """Columns that the input may not have, or something of it would be lost."""

    def check(self, conversations: Conversations, several: bool) -> None:
        """Raise InvalidRequest for a row that it cannot use."""

    def begin(self, seen: Seen) -> Chooser:
        """Look at all scores."""


@dataclass(frozen=True)
class BestOfN:
    """The best response to each prompt.

    Attributes:
        scores: name of the column of all scores in the output.
    """

    scores: str = "scores"
    name = "best-of-n"
    removes = ()

    @property
    def writes(self) -> tuple[str, ...]:
        """The columns of scores, and what is chosen."""
        return "response", "score", "index", self.scores

    def adds(self, several: bool) -> tuple[str, ...]:
        """Return the columns of the output, for any number of responses."""
        return self.writes

    def check(self, conversations: Conversations, several: bool) -> None:
        """Raise InvalidRequest for a row without a list of responses."""
        check_several(several)

    def begin(self, seen: Seen) -> BestChooser:
        """Look at all scores, which say what more responses bring."""
        return BestChooser(self, seen)


@dataclass
class BestChooser:
    """Chooses the best response."""

    task: BestOfN
    seen: Seen
    best: list[float] = field(default_factory=list)

    def choose(self, values: Values, conversations: Conversations, verdict: Verdict) -> Choice:
        """Return the row with the best one's `response`, `score` and `index`, and all scores."""
        index = best_of(verdict.scores)
        self.best.append(verdict.scores[index])
        found = {
            "response": texts_of(conversations)[index],
            "score": verdict.scores[index],
            "index": index,
            self.task.scores: verdict.scores,
        }
        return Choice([{**values, **found}])

    def figures(self) -> Values:
        """Return the curve, and the mean of the best."""
        ks = points(self.seen.counts)
        curve = best_of_n_curve(self.seen.groups(), ks) if ks else []
        return {
            "mean score": mean_of(self.seen.scores),
            "mean best score": mean_of(self.best),
            "expected best of k": {str(k): value for k, value in zip(ks, curve, strict=True)},
        }


@dataclass(frozen=True)
class Filter:
    """The responses whose scores a rule keeps.

    Attributes:
        rule: is fitted to the scores of all responses.
        scores: name of the output's column of scores where rows hold several responses.
        score: the same where they hold one.
        responses: name of the column of several responses.
        reasons: whether what is dropped is written somewhere, with the reasons.
    """

    rule: Rule
    scores: str = "scores"
    score: str = "score"
    responses: str | None = None
    reasons: bool = False
    name = "filter"
    removes = ()

    @property
    def writes(self) -> tuple[str, ...]:
        """The columns of scores, and those of reasons."""
        return self.score, self.scores, "reason", "reasons"

    def adds(self, several: bool) -> tuple[str, ...]:
        """Return the columns of rows with as many responses."""
        scores, reasons = (self.scores, "reasons") if several else (self.score, "reason")
        return (scores, reasons) if self.reasons else (scores,)

    def check(self, conversations: Conversations, several: bool) -> None:
        """Accept every row."""

    def begin(self, seen: Seen) -> FilterChooser:
        """Fit the rule."""
        limits = Limits((), (0.0,), (0.0,))  # nobody is judged by them
        if len(seen.scores):
            try:
                limits = self.rule.fit(seen.scores, seen.lengths)
            except ValueError as error:
                raise InvalidRequest(str(error)) from error
        return FilterChooser(self, seen, limits)


@dataclass
class FilterChooser:
    """Chooses what lies within limits."""

    task: Filter
    seen: Seen
    limits: Limits
    dropped: Counter[str] = field(default_factory=Counter)
    lost: int = 0

    def choose(self, values: Values, conversations: Conversations, verdict: Verdict) -> Choice:
        """Return the row with the responses that are kept and their scores, if there are any."""
        scored = [*zip(verdict.scores, verdict.lengths, strict=True)]
        reasons = [self.limits.reason(score, length) for score, length in scored]
        self.dropped.update(self.limits.side(score, length) for score, length in scored)
        kept = [index for index, each in enumerate(reasons) if not each]
        gone = [index for index, each in enumerate(reasons) if each]
        self.lost += not kept
        rows = [self._with(values, verdict, kept)] if kept else []
        if not gone:
            return Choice(rows)
        dropped = self._with(values, verdict, gone)
        if verdict.several:
            return Choice(rows, [{**dropped, "reasons": [reasons[index] for index in gone]}])
        return Choice(rows, [{**dropped, "reason": reasons[0]}])

    def _with(self, values: Values, verdict: Verdict, places: Sequence[int]) -> Values:
        if not verdict.several:
            return {**values, self.task.score: verdict.scores[0]}
        assert self.task.responses is not None  # or no row could hold several
        responses = values[self.task.responses]
        return {
            **values,
            self.task.responses: [responses[place] for place in places],
            self.task.scores: [verdict.scores[place] for place in places],
        }

    def figures(self) -> Values:
        """Return counts of responses, and the limits."""
        limits = zip(("from length 0", *(f"from length {edge:.0f}" for edge in self.limits.edges)),
                     self.limits.low, self.limits.high, strict=True)  # fmt: skip
        known = len(self.seen.scores)
        limited = known and np.isfinite([*self.limits.low, *self.limits.high]).any()
        return {
            "responses": known,
            "responses kept": self.dropped[""],
            "dropped for a low score": self.dropped["below"],
            "dropped for a high score": self.dropped["above"],
            "rows without a response left": self.lost,
            "limits": {name: [_number(low), _number(high)] for name, low, high in limits}
            if limited
            else {},
        }


def check_several(several: bool) -> None:
    """Raise InvalidRequest for a row with one response."""
    if not several:
        raise InvalidRequest("needs a list of responses to choose from, has one")


def mean_of(values: Any) -> float | None:
    """Return the mean, if there is anything."""
    return float(np.mean(values)) if len(values) else None


def _number(value: float) -> float | None:
    """JSON has no infinity."""
    return value if np.isfinite(value) else None
