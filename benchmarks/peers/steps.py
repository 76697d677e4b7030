"""What both sides are asked, and what their times say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.measure import row
from benchmarks.workloads import Messages, PromptGroup, Writer

OURS, PEER = "triward", "vllm"
Wave = tuple[PromptGroup, ...]  # requests that are sent at once

PROMPT = 600  # words, about 2.7 tokens each
QUESTION = (40, 80)
RESPONSE = (40, 120)
TURNS = 10


def draw_round(write: Writer, scale: float = 1.0) -> dict[str, tuple[Wave, ...]]:
    """One round's waves by the row that they are timed for; a wave starts when the last has ended.

    Args:
        write: its prompts are new to both sides, but for the second wave's and the dialogue's.
        scale: factor of all lengths.
    """

    def words(low: int, high: int) -> str:
        return write.text(max(1, round(low * scale)), max(1, round(high * scale)) + 1)

    def group(responses: int, prompt: Messages | None = None) -> PromptGroup:
        prompt = prompt or [_says("user", words(PROMPT, PROMPT))]
        return PromptGroup(prompt, tuple(words(*RESPONSE) for _ in range(responses)))

    first = group(8)
    talk: Messages = []
    dialogue: list[PromptGroup] = []
    for _ in range(TURNS):
        turn = group(1, [*talk, _says("user", words(*QUESTION))])
        dialogue.append(turn)
        talk = turn.conversations()[0]
    return {
        "16 singles at once": (tuple(group(1) for _ in range(16)),),
        "8 responses, one request": ((first,),),
        "a second wave of 8 to the same prompt": ((group(8, first.prompt),),),
        "8 responses, as 8 requests at once": (_apart(group(8)),),
        "8 responses, one after another": tuple((each,) for each in _apart(group(8))),
        "64 responses, one request": ((group(64),),),
        f"a dialogue of {TURNS} turns, scored after each": tuple((turn,) for turn in dialogue),
    }


def _says(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _apart(group: PromptGroup) -> Wave:
    return tuple(PromptGroup(group.prompt, (response,)) for response in group.responses)


def all_conversations(waves: Sequence[Wave]) -> list[Messages]:
    """All conversations of a step, in the order of its scores."""
    return [c for wave in waves for group in wave for c in group.conversations()]


@dataclass
class Times:
    """Seconds of one step: by column, by side, one for each round."""

    conversations: int
    columns: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, column: str, side: str, seconds: float) -> None:
        """Add a round."""
        self.columns.setdefault(column, {}).setdefault(side, []).append(seconds)

    def summary(self) -> dict[str, Any]:
        """Return the step's rows; above 1, a ratio says that the peer took longer."""
        rows = {}
        for column, sides in self.columns.items():
            ratios = [p / o for p, o in zip(sides[PEER], sides[OURS], strict=True)]
            rows[column] = {
                "sides": {side: row(taken, self.conversations) for side, taken in sides.items()},
                "peer_time_over_ours": [round(ratio, 3) for ratio in ratios],
            }
        return {"conversations": self.conversations, "columns": rows}


def distance(scores: Sequence[float], reference: Sequence[float]) -> float:
    """Return the largest difference between scores, relative where the reference is above 1."""
    off = np.abs(np.subtract(scores, reference)) / np.maximum(1.0, np.abs(reference))
    return float(off.max())


def check_parity(distances: Mapping[str, float], tolerance: float) -> None:
    """End the measurement if a side's scores are not the reference's.

    Raises:
        RuntimeError: names the sides whose distance is above `tolerance`, or is not a number.
    """
    far = [f"{side}: {off:.2e}" for side, off in distances.items() if not off <= tolerance]
    if far:
        raise RuntimeError(
            f"scores differ by more than {tolerance:.0e}, nothing is timed: {', '.join(far)}"
        )
