"""Rows of an evaluation, their results, and the problems of those that have none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    @property
    def responses(self) -> Mapping[str, str]:
        """Responses to be scored, by a name for messages."""
        return {"chosen": self.chosen, "rejected": self.rejected}

    def result(self, scores: Sequence[float]) -> Result:
        """Return the result for the scores of `responses`."""
        return Result(self.index, self.id, self.subset, *scores)


@dataclass(frozen=True)
class LabelledGroup:
    """Responses to one prompt of which some are correct.

    Attributes:
        index: of its row in the data, from 0; it names the group in an evaluation.
        id: the data's own name for it.
        subset: what the benchmark counts it under.
        prompt: the messages before the response.
        chosen: the correct responses, at least 1.
        rejected: the others, at least 1.
    """

    index: int
    id: str
    subset: str
    prompt: Sequence[Message]
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]

    @property
    def responses(self) -> Mapping[str, str]:
        """Responses to be scored, by a name for messages; the correct ones come first."""
        named = (("chosen", self.chosen), ("rejected", self.rejected))
        return {f"{name}[{i}]": text for name, held in named for i, text in enumerate(held)}

    def result(self, scores: Sequence[float]) -> Result:
        """Return the result for the scores of `responses`."""
        correct = len(self.chosen)
        return GroupResult.of(self.index, self.id, self.subset, scores[:correct], scores[correct:])


Labelled = LabelledPair | LabelledGroup


@dataclass(frozen=True)
class Problem:
    """A row that is no pair or group, or one that the server refuses.

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

    @property
    def tie(self) -> bool:
        """True if the two scores are equal."""
        return self.chosen == self.rejected

    @property
    def scores(self) -> tuple[float, ...]:
        """Scores of all responses, in the order of the row's `responses`."""
        return self.chosen, self.rejected


@dataclass(frozen=True)
class GroupResult(Result):
    """The scores of a group, whose `chosen` and `rejected` are those that its margin is between.

    Attributes:
        chosen: the lowest score of a correct response.
        rejected: the highest score of another.
        chosen_scores: of the correct responses.
        rejected_scores: of the others.
    """

    chosen_scores: tuple[float, ...]
    rejected_scores: tuple[float, ...]

    @classmethod
    def of(
        cls, index: int, name: str, subset: str, chosen: Sequence[float], rejected: Sequence[float]
    ) -> GroupResult:
        """Return the result of a group of this index, id and subset; each needs a score."""
        held = tuple(chosen), tuple(rejected)
        return cls(index, name, subset, min(chosen), max(rejected), *held)

    @property
    def scores(self) -> tuple[float, ...]:
        """Scores of all responses; those of the correct ones come first."""
        return self.chosen_scores + self.rejected_scores
