"""Words of reports, which differ where a row has several responses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """Sentences and words of a report about its rows.

    Attributes:
        noun: what a row is called.
        achieved: what the model does in a row that is right; a count follows.
        rule: when a row is right.
        ties: how ties count.
        margin: what a margin is.
    """

    noun: str
    achieved: str
    rule: str
    ties: str
    margin: str


PAIRS = Wording(
    noun="pair",
    achieved="scores the better response higher in",
    rule="A pair is right when the better response scores higher; a tie is wrong.",
    ties="count as wrong",
    margin="chosen minus rejected score",
)
GROUPS = Wording(
    noun="prompt",
    achieved="scores every correct response above all others in",
    rule="A prompt is right when each correct response scores higher than every other one. Outside "
    "of Ties, a correct response that shares the highest score with others counts 1/n.",
    ties="count as wrong in Ties, in part elsewhere",
    margin="lowest correct minus highest other score",
)
