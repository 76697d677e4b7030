"""A row -> its responses' scores and lengths, or why it has none."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from os import PathLike
from typing import Any, Protocol

import numpy as np
from triward.conversation import Message, encode_messages, split_conversation
from triward.errors import InvalidRequest
from triward.integrations.rows import RowScorer

from triward_tools.selection.limits import Floats

# Scores are FP32, and sums of what is within are finite; sums of higher ones may not be.
_HIGHEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Row:
    """A row of the input.

    Attributes:
        place: for a reader, as "line 3" or "row 2".
        values: name of a column -> value.
        error: why it could not be read.
    """

    place: str
    values: dict[str, Any]
    error: str = ""


@dataclass(frozen=True)
class Verdict:
    """Scores and lengths of a row's responses, before anything is chosen.

    Attributes:
        scores: of its responses, in their order; none if there is an error.
        lengths: of its responses, in characters.
        several: whether the row holds a list of responses.
        images: whether its prompt holds an image or a video.
        files: whether one of them is a file's content, not where it is.
        error: why there is no score.
    """

    scores: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    several: bool = False
    images: bool = False
    files: bool = False
    error: str = ""


@dataclass(frozen=True)
class Seen:
    """The scores of all rows that have some.

    Attributes:
        scores: float64 [n], of all responses.
        lengths: int64 [n], in characters.
        counts: int64 [rows], responses of each row.
        images: whether any prompt holds an image.
        files: whether any of them is a file's content.
    """

    scores: Floats
    lengths: Any
    counts: Any
    images: bool
    files: bool

    @classmethod
    def of(cls, verdicts: Iterable[Verdict]) -> Seen:
        """From all rows; those with an error do not count."""
        scores, lengths, counts = array("d"), array("q"), array("q")  # 8 bytes for each
        images = files = False
        for each in verdicts:
            if not each.error:
                scores.extend(each.scores)
                lengths.extend(each.lengths)
                counts.append(len(each.scores))
                images, files = images or each.images, files or each.files
        return cls(np.array(scores), np.array(lengths), np.array(counts), images, files)

    def without_scores(self) -> Seen:
        """Return what a chooser that has been made still needs, which is little to send."""
        return replace(Seen.of([]), images=self.images, files=self.files)

    def groups(self) -> Iterator[Floats]:
        """Yield the scores of each row."""
        start = 0
        for count in self.counts:
            yield self.scores[start : start + count]
            start += count


class Checks(Protocol):
    """Checks of rows that cannot be used, whatever their scores are."""

    @property
    def name(self) -> str:
        """Name on the command line."""

    def adds(self, several: bool) -> tuple[str, ...]:
        """Columns that a row may not have."""

    def check(self, conversations: Sequence[Sequence[Message]], several: bool) -> None:
        """Raise InvalidRequest for such a row."""


@dataclass(frozen=True)
class Judge:
    """Gives verdicts.

    Attributes:
        scorer: names the columns, and asks for scores.
        task: what will be done with the rows.
        scores: name of the column that holds scores already; then nobody is asked.
    """

    scorer: RowScorer
    task: Checks
    scores: str | None = None

    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        """Return a verdict for each row.

        Raises:
            TriwardError: as for `RowScorer.score_rows`.
        """
        read = [self._read(row) for row in rows]
        if self.scores is not None:
            return read
        due = [index for index, each in enumerate(read) if not each.error]
        table = {
            name: [rows[index].values.get(name) for index in due] for name in self.scorer.columns
        }
        for index, found, error in zip(due, *self.scorer.score_rows(table), strict=True):
            scores = found if isinstance(found, list) else [found]
            read[index] = _scored(read[index], scores, error)
        return read

    def check_names(self, names: Iterable[str], several: bool) -> None:
        """Raise InvalidRequest for a column of the input that the task would replace."""
        taken = set(self.task.adds(several)).intersection(names) - {self.scores}
        if taken:
            raise InvalidRequest(
                f"{min(taken)}: the input has this column, and {self.task.name} would replace it"
            )

    def _read(self, row: Row) -> Verdict:
        """Return everything but the scores, where they must be asked for."""
        try:
            if row.error:
                raise InvalidRequest(row.error)
            conversations = self.scorer.conversations(row.values)
            texts = texts_of(conversations)
            several = self._several(row)
            self.check_names(row.values, several)
            self.task.check(conversations, several)
            _, media = encode_messages(conversations[0][:-1])
            scores: list[float] = []
            if self.scores is not None:
                scores = given(row.values.get(self.scores), self.scores, len(texts))
        except InvalidRequest as error:
            return Verdict(error=str(error))
        files = any(not isinstance(each.value, (str, PathLike)) for each in media)
        return Verdict(scores, [len(text) for text in texts], several, bool(media), files)

    def _several(self, row: Row) -> bool:
        """Return True for a list of texts; a list of messages is the end of one conversation."""
        value = row.values.get(self.scorer.responses) if self.scorer.responses else None
        return isinstance(value, (list, tuple)) and not any(
            isinstance(each, Mapping) for each in value
        )


def texts_of(conversations: Sequence[Sequence[Message]]) -> list[str]:
    """Return the response of each conversation.

    Raises:
        InvalidRequest: one does not end with a text of the assistant's.
    """
    return [split_conversation(each)[1] for each in conversations]


def given(value: object, column: str, count: int) -> list[float]:
    """Scores that a row holds already: a number, or a list of `count` numbers.

    Raises:
        InvalidRequest: they are not that.
    """
    found: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(found) != count:
        raise InvalidRequest(f"{column}: holds {len(found)} scores for {count} responses")
    for place, each in enumerate(found):
        number = isinstance(each, Real) and not isinstance(each, bool)
        if not number or not abs(each) <= _HIGHEST:  # nor is NaN
            raise InvalidRequest(f"{column}[{place}]: must be a finite number, got {each!r:.100}")
    return [float(each) for each in found]


def _scored(read: Verdict, scores: list[Any], error: str) -> Verdict:
    if error:
        return Verdict(error=error)
    return replace(read, scores=scores)
