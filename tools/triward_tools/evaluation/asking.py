"""Rows -> scores, in order, with patience for servers that are away."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing

from triward.client import RewardClient
from triward.conversation import Messages
from triward.errors import InvalidRequest
from triward.retries import Answered, until_answered

from triward_tools.evaluation.results import Labelled, Problem, Result


def results_of(
    client: RewardClient,
    rows: Iterable[tuple[str, Labelled | Problem]],
    *,
    concurrency: int = 32,
    patience: float = 600.0,
) -> Generator[Result | Problem, None, None]:
    """Yield a result for each pair or group, in order; problems stay what they are.

    All responses of a row travel in one request, with those of its neighbours that have the same
    prompt. A row of which the server refuses a response becomes a problem.

    Args:
        client: whom to ask.
        rows: each with its place in front; taken one by one, as earlier ones finish.
        concurrency: how many requests are in flight at once.
        patience: seconds for which servers may answer nothing but UNAVAILABLE.

    Raises:
        ServerUnavailable: for `patience` seconds there was no other answer; or there was none at
            all, and no server is ready.
        TriwardError: a server failed, or the client's timeout ran out.
    """
    taken: deque[tuple[str, Labelled | Problem]] = deque()

    def conversations() -> Iterator[Messages]:
        for place, row in rows:
            taken.append((place, row))
            if not isinstance(row, Problem):
                for response in row.responses.values():
                    yield [*row.prompt, {"role": "assistant", "content": response}]

    answers = until_answered(
        client,
        conversations(),
        concurrency=concurrency,
        patience=patience,
        impatient_at_first=True,
    )
    with closing(answers):
        for first in answers:
            place, row = taken.popleft()
            while isinstance(row, Problem):  # done when the rows before it are
                yield row
                place, row = taken.popleft()
            others = (next(answers) for _ in range(len(row.responses) - 1))
            yield _result(place, row, [first, *others])
    yield from (row for _, row in taken if isinstance(row, Problem))


def _result(place: str, row: Labelled, answers: Sequence[Answered]) -> Result | Problem:
    scores = [answer for answer in answers if isinstance(answer, float)]
    if len(scores) == len(answers):
        return row.result(scores)
    said = {
        name: answer.reason
        for name, answer in zip(row.responses, answers, strict=True)
        if isinstance(answer, InvalidRequest)
    }
    reasons = set(said.values())
    if len(said) == len(answers) and len(reasons) == 1:
        (reason,) = reasons
    else:
        reason = "; ".join(f"the {name} response: {text}" for name, text in said.items())
    return Problem(row.index, place, reason)
