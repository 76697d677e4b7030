"""Lines of JSON with conversations -> the same lines with scores, as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from triward.client import RewardClient
from triward.conversation import Message
from triward.errors import InvalidRequest, TriwardError, located, relocated
from triward.jsonvalue import read_object
from triward.many import Outcome, ranked

# What an earlier run may have said; all other keys are handed on.
_SAID = ("score", "scores", "ranking", "error")


@dataclass
class _Line:
    """A line that was taken up.

    Attributes:
        number: in the file, from 1.
        row: what it holds, for the output.
        count: responses that are asked for.
        many: whether the line names several responses, and so gets several scores.
        error: why nothing is asked for.
    """

    number: int
    row: dict[str, Any] = field(default_factory=dict)
    count: int = 0
    many: bool = False
    error: TriwardError | None = None


def score_lines(
    client: RewardClient,
    lines: Iterable[str],
    *,
    ranking: bool = False,
    concurrency: int = 32,
    progress: bool = False,
) -> Iterator[tuple[dict[str, Any], TriwardError | None]]:
    """Score JSONL. Empty lines are left out.

    Args:
        client: who is asked.
        lines: each an object with `messages` and `responses`, or with `messages` whose last is the
            assistant's.
        ranking: add the responses' indices, best first.
        concurrency: see `RewardClient.score_many`.
        progress: likewise; it counts responses.

    Yields:
        For each line its keys with `score`, or `scores` where it has `responses`, or `error`
        with a `type` and a `message`; and that error.
    """
    taken: deque[_Line] = deque()

    def conversations() -> Iterator[list[Message]]:
        for number, text in enumerate(lines, start=1):
            if text.strip():
                line, found = _read(text, number)
                taken.append(line)
                yield from found

    outcomes = client.iter_scores(
        conversations(), concurrency=concurrency, on_error="return", progress=progress
    )
    scored: list[Outcome] = []
    for outcome in outcomes:
        # A line without conversations is done when the ones before it are.
        while taken[0].count == 0:
            yield _finish(taken.popleft(), [], ranking)
        scored.append(outcome)
        if len(scored) == taken[0].count:
            yield _finish(taken.popleft(), scored, ranking)
            scored = []
    while taken:
        yield _finish(taken.popleft(), [], ranking)


def _read(text: str, number: int) -> tuple[_Line, list[list[Message]]]:
    """Return a line and the conversations it asks for."""
    line = _Line(number)
    try:
        row = read_object(text)
        line.row = {key: value for key, value in row.items() if key not in _SAID}
        if not isinstance(row.get("messages"), list):
            raise InvalidRequest("needs 'messages', a list")
        if "responses" not in row:
            line.count = 1
            return line, [row["messages"]]
        responses = row["responses"]
        if not isinstance(responses, list) or not responses:
            raise InvalidRequest("'responses' must be a list with at least one text")
        line.count, line.many = len(responses), True
        prompt = row["messages"]
        return line, [[*prompt, {"role": "assistant", "content": text}] for text in responses]
    except InvalidRequest as error:
        line.error = located(error, f"line {number}")
        return line, []


def _finish(
    line: _Line, outcomes: list[Outcome], ranking: bool
) -> tuple[dict[str, Any], TriwardError | None]:
    error = line.error
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, TriwardError) and error is None:
            place = f"line {line.number}" + (f": responses[{index}]" if line.many else "")
            # A reader of lines never sees the conversations' numbers.
            error = relocated(outcome, place)
    if error:
        return {**line.row, "error": {"type": type(error).__name__, "message": str(error)}}, error
    scores = [outcome for outcome in outcomes if not isinstance(outcome, TriwardError)]
    if not line.many:
        return {**line.row, "score": scores[0]}, None
    order = {"ranking": ranked(scores)} if ranking else {}
    return {**line.row, "scores": scores, **order}, None
