"""Pairs of an evaluation, their results, and the problems of those that have none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from triward.conversation import Message


@dataclass(frozen=True)
class LabelledPair:
    """A pair that people, or a rule, have decided.

    Attributes:
        index: of its row in the data, from 0; it names the pair in an evaluation.
        id: the data's own name for it.
        subset: what the benchmark counts it under.
        prompt: the messages before the response, with their images.
        chosen: the better response.
        rejected: the other one.
    """

    index: int
    id: str
    subset: str
    prompt: Sequence[Message]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Problem:
    """A row that is no pair, or a pair that the server refuses.

    Attributes:
        index: of its row in the data, from 0.
        place: file and row, for a reader.
        reason: one sentence that names field and value.
    """

    index: int
    place: str
    reason: str


@dataclass(frozen=True)
class Result:
    """The scores of a pair.

    Attributes:
        index: the pair's.
        id: likewise.
        subset: likewise.
        chosen: score of the better response.
        rejected: score of the other one.
    """

    index: int
    id: str
    subset: str
    chosen: float
    rejected: float

    @property
    def margin(self) -> float:
        """Difference of the scores, above 0 where the better response scores higher."""
        return self.chosen - self.rejected

    @property
    def correct(self) -> bool:
        """True if the better response scores higher; a tie is a loss, as in RewardBench."""
        return self.chosen > self.rejected
