"""Scored responses -> preference pairs in the conversational format of TRL's trainers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from triward.conversation import encode_messages
from triward.errors import InvalidRequest
from triward.rewards import RunningMoments

from triward_tools.selection.limits import Floats
from triward_tools.selection.pairing import Pairing, correlation_of, slope_of, within
from triward_tools.selection.tasks import Choice, Conversations, Values, check_several, mean_of
from triward_tools.selection.verdicts import Seen, Verdict, texts_of


@dataclass(frozen=True)
class Pairs:
    """Preference pairs in TRL's conversational format.

    Attributes:
        pairing: which responses are paired.
        removes: the input's columns that the pairs hold in another form.
        shift: whether a pair has the reward shift of MPO as it was at this pair.
    """

    pairing: Pairing
    removes: tuple[str, ...] = ()
    shift: bool = False
    name = "pairs"

    @property
    def writes(self) -> tuple[str, ...]:
        """The columns of TRL, and those of scores."""
        scores = ("score_chosen", "score_rejected", "margin", *(("score_shift",) * self.shift))
        return ("prompt", "chosen", "rejected", "images", *scores)

    def adds(self, several: bool) -> tuple[str, ...]:
        """None: a pair is a new row, with the columns of TRL."""
        return ()

    def check(self, conversations: Conversations, several: bool) -> None:
        """Raise InvalidRequest for a row with one response, or with a video, unknown to TRL."""
        check_several(several)
        for message in _prompt(conversations)[0]:
            content = message["content"]
            if isinstance(content, list) and any(part["type"] == "video" for part in content):
                raise InvalidRequest("a preference pair for TRL cannot hold a video")

    def begin(self, seen: Seen) -> PairChooser:
        """Find how scores depend on length."""
        past = RunningMoments() if self.shift else None
        return PairChooser(self.pairing, self.removes, seen, slope_of(*_within(seen)), past)


@dataclass
class PairChooser:
    """Chooses pairs."""

    pairing: Pairing
    removes: tuple[str, ...]
    seen: Seen
    slope: float
    past: RunningMoments | None = None
    margins: list[float] = field(default_factory=list)
    longer: list[int] = field(default_factory=list)
    empty: int = 0

    def choose(self, values: Values, conversations: Conversations, verdict: Verdict) -> Choice:
        """Return a row for each pair."""
        texts = texts_of(conversations)
        prompt, images = _prompt(conversations)
        if self.seen.files:
            images = [_file(each) for each in images]
        prompt = [{**each, "content": self._content(each["content"])} for each in prompt]
        rest = {key: value for key, value in values.items() if key not in self.removes}
        rows = []
        for pair in self.pairing.pairs(texts, verdict.scores, self.slope):
            self.margins.append(pair.margin)
            self.longer.append(len(texts[pair.chosen]) - len(texts[pair.rejected]))
            rows.append({
                **rest,
                "prompt": prompt,
                "chosen": [{"role": "assistant", "content": texts[pair.chosen]}],
                "rejected": [{"role": "assistant", "content": texts[pair.rejected]}],
                **({"images": images} if self.seen.images else {}),
                "score_chosen": verdict.scores[pair.chosen],
                "score_rejected": verdict.scores[pair.rejected],
                "margin": pair.margin,
                **self._shift(verdict.scores[pair.chosen], verdict.scores[pair.rejected]),
            })  # fmt: skip
        self.empty += not rows
        return Choice(rows)

    def _shift(self, chosen: float, rejected: float) -> dict[str, float]:
        """Return the mean of both scores of all pairs so far, this one included."""
        if self.past is None:
            return {}
        self.past.update([chosen, rejected])
        return {"score_shift": self.past.mean}

    def _content(self, content: Any) -> Any:
        """Return a list of parts in data with images, else a text: a column has one type."""
        if self.seen.images:
            return [{"type": "text", "text": content}] if isinstance(content, str) else content
        return content if isinstance(content, str) else "".join(part["text"] for part in content)

    def figures(self) -> Values:
        """Margins, and how much of them may be length."""
        longer = np.array(self.longer, np.int64)
        decided = longer[longer != 0]
        return {
            "pairs": len(self.margins),
            "rows without a pair": self.empty,
            "mean margin": mean_of(self.margins),
            "chosen is longer": mean_of(decided > 0),
            "mean characters more in chosen": mean_of(longer),
            "correlation of score and length within prompts": correlation_of(*_within(self.seen)),
            "slope of score per 1000 characters within prompts": self.slope,
            "penalty per 1000 characters": self.pairing.penalty(self.slope),
        }


def _within(seen: Seen) -> tuple[Floats, Floats]:
    return within(seen.scores, seen.lengths, seen.counts)


def _file(image: Any) -> Any:
    """Return an image as Hugging Face datasets store it: one type for contents and places."""
    if isinstance(image, bytes):
        return {"bytes": image, "path": None}
    return {"bytes": None, "path": image} if isinstance(image, str) else image


def _prompt(conversations: Conversations) -> tuple[list[Values], list[Any]]:
    """Return the messages before the response as they are on the wire, and their images."""
    encoded, media = encode_messages(conversations[0][:-1])
    return json.loads(encoded), [each.value for each in media]
