"""A row of a file with scores -> its scores, lengths and pair, or why it has none.

The forms are those that `triward score`, `rank`, `best-of-n`, `filter`, `pairs` and `eval` write,
and the columns of `RowScorer`: a score in a column, and an error in `<column>_error`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from triward.conversation import split_conversation
from triward.errors import InvalidRequest

from triward_tools.selection.verdicts import given

Values = Mapping[str, Any]

_SUFFIX = "_error"
_MOST_TOKENS = 2**31 - 1
_PAIR = ("chosen", "rejected")
_PAIR_SCORES = ("score_chosen", "score_rejected")


class WithoutScore(InvalidRequest):
    """The file itself says that the row has no score, and why."""


@dataclass(frozen=True)
class ScoredRow:
    """Numbers of a row.

    Attributes:
        scores: of its responses, at least one.
        characters: of each response; None where the row does not hold the responses.
        tokens: likewise, from `tokens`, or `tokens_chosen` and `tokens_rejected`.
        pair: scores of the chosen and of the rejected response, where the row says which is which;
            of several correct ones the lowest, of several others the highest.
    """

    scores: tuple[float, ...]
    characters: tuple[int, ...] | None = None
    tokens: tuple[int, ...] | None = None
    pair: tuple[float, float] | None = None


def read_scored(values: Values, column: str = "") -> ScoredRow:
    """Return a row's numbers.

    Args:
        values: name of a column -> value.
        column: which holds scores; "" finds it.

    Raises:
        WithoutScore: the row holds an error in place of scores.
        InvalidRequest: it holds no scores, or some that are no numbers; the message names the
            column.
    """
    if not column and _is_evaluated(values):
        return _evaluated(values)
    if not column and all(values.get(name) is not None for name in _PAIR_SCORES):
        return _preference(values)
    found = column or score_column(values)
    _check_told(values, found)
    if not column and values.get(found) is None and all(name in values for name in _PAIR_SCORES):
        return _preference(values)  # which says what of it is missing
    if found not in values:
        held = ", ".join(values) or "nothing"
        raise InvalidRequest(
            f"holds no score: needs {column or 'scores, score, or score_chosen and score_rejected'}"
            f", has {held:.300}"
        )
    texts = texts_of_row(values, several=isinstance(values[found], (list, tuple)))
    scores = _numbers(values[found], found, None if texts is None else len(texts))
    return ScoredRow(tuple(scores), _lengths(texts), _tokens(values.get("tokens"), len(scores)))


def score_column(values: Values) -> str:
    """Return the column of a row's scores; "" where there is none."""
    # As RowScorer names them, whose columns have any name.
    others = [name for name in values if f"{name}{_SUFFIX}" in values]
    found = [name for name in ("scores", "score", *others) if name in values]
    return next((name for name in found if values[name] is not None), found[0] if found else "")


def texts_of_row(values: Values, several: bool) -> list[str] | None:
    """Return the responses that a row's scores belong to; None where it holds none."""
    responses = values.get("responses")
    if several:
        if isinstance(responses, (list, tuple)) and all(isinstance(x, str) for x in responses):
            return list(responses)
        return None
    for name in ("response", "responses", "completion"):
        text = text_of(values.get(name))
        if text is not None:
            return [text]
    text = text_of(values.get("messages"))
    return None if text is None else [text]


def text_of(value: object) -> str | None:
    """Return a response that is a str, or messages that end with the assistant's; else None."""
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)) or not value:
        return None
    try:
        return split_conversation([without_nulls(each) for each in value])[1]
    except InvalidRequest:
        return None


def without_nulls(value: Any) -> Any:
    """Return a message without what a table's other rows have and this one has not."""
    if isinstance(value, Mapping):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, (list, tuple)) else value


def _check_told(values: Values, column: str) -> None:
    """Raise WithoutScore for a row that holds an error."""
    if values.get(column) is not None:
        return
    names = ["error", *(name for name in values if name.endswith(_SUFFIX))]
    for name in names:
        error = values.get(name)
        if isinstance(error, Mapping):
            raise WithoutScore(_joined(error, ("place", "type", "message", "reason")))
        if error:  # of RowScorer, whose error is "" where there is none; or of a rejected row
            raise WithoutScore(_joined({**values, "error": str(error)}, ("place", "error")))


def _joined(values: Values, names: Sequence[str]) -> str:
    """Return the texts of these names, as in "line 3: the reason"; all values where none is one."""
    texts = [values[name] for name in names if isinstance(values.get(name), str)]
    return ": ".join(texts) or str(dict(values))


def _is_evaluated(values: Values) -> bool:
    """Return True for a line of `triward eval`: `chosen` and `rejected` are scores."""
    return all(_is_score(values.get(name)) for name in _PAIR)


def _is_score(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(_is_score(each) for each in value)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _evaluated(values: Values) -> ScoredRow:
    chosen, rejected = (_numbers(values[name], name, None) for name in _PAIR)
    return ScoredRow((*chosen, *rejected), pair=(min(chosen), max(rejected)))


def _preference(values: Values) -> ScoredRow:
    """Return the numbers of a row of `triward pairs`."""
    chosen, rejected = (_numbers(values[name], name, 1)[0] for name in _PAIR_SCORES)
    texts = [text_of(values.get(name)) for name in _PAIR]
    known = [text for text in texts if text is not None]
    counts = [values.get(f"tokens_{name}") for name in _PAIR]
    return ScoredRow(
        scores=(chosen, rejected),
        characters=_lengths(known) if len(known) == len(_PAIR) else None,
        tokens=_tokens(counts, len(counts)),
        pair=(chosen, rejected),
    )


def _numbers(value: object, column: str, count: int | None) -> list[float]:
    """Return the scores of a column, which are as many as responses, where these are known."""
    if value is None:
        raise InvalidRequest(f"{column}: has no value, and the row no error that says why")
    held = len(value) if isinstance(value, (list, tuple)) else 1
    if held == 0:
        raise InvalidRequest(f"{column}: holds 0 scores, needs at least 1")
    return given(value, column, held if count is None else count)


def _tokens(value: object, count: int) -> tuple[int, ...] | None:
    """Return counts of tokens, one for each score; None where the value is something else.

    Raises:
        InvalidRequest: a count is higher than a server's INT32 holds.
    """
    found = list(value) if isinstance(value, (list, tuple)) else [value]
    counts = [each for each in found if _is_count(each)]
    if max(counts, default=0) > _MOST_TOKENS:
        raise InvalidRequest(f"tokens: must be at most {_MOST_TOKENS}, got {max(counts)!s:.40}")
    return tuple(counts) if len(counts) == len(found) == count else None


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _lengths(texts: Sequence[str] | None) -> tuple[int, ...] | None:
    return None if texts is None else tuple(len(text) for text in texts)
