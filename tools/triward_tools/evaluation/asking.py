"""Pairs -> scores, in order, with patience for servers that are away."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing

from triward.client import RewardClient
from triward.conversation import Messages
from triward.errors import InvalidRequest
from triward.retries import Answered, until_answered

from triward_tools.evaluation.results import LabelledPair, Problem, Result


def results_of(
    client: RewardClient,
    rows: Iterable[tuple[str, LabelledPair | Problem]],
    *,
    concurrency: int = 32,
    patience: float = 600.0,
) -> Generator[Result | Problem, None, None]:
    """Yield a result for each pair, in order; problems stay what they are.

    Both responses of a pair travel in one request, with those of its neighbours that have the same
    prompt. A pair that the server refuses becomes a problem.

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
    taken: deque[tuple[str, LabelledPair | Problem]] = deque()

    def conversations() -> Iterator[Messages]:
        for place, row in rows:
            taken.append((place, row))
            if isinstance(row, LabelledPair):
                for response in (row.chosen, row.rejected):
                    yield [*row.prompt, {"role": "assistant", "content": response}]

    answers = until_answered(
        client,
        conversations(),
        concurrency=concurrency,
        patience=patience,
        impatient_at_first=True,
    )
    with closing(answers):
        for chosen in answers:
            rejected = next(answers)
            place, row = taken.popleft()
            while isinstance(row, Problem):  # done when the rows before it are
                yield row
                place, row = taken.popleft()
            yield _result(place, row, chosen, rejected)
    yield from (row for _, row in taken if isinstance(row, Problem))


def _result(
    place: str, pair: LabelledPair, chosen: Answered, rejected: Answered
) -> Result | Problem:
    if isinstance(chosen, float) and isinstance(rejected, float):
        return Result(pair.index, pair.id, pair.subset, chosen, rejected)
    said = {
        name: answer.reason
        for name, answer in (("chosen", chosen), ("rejected", rejected))
        if isinstance(answer, InvalidRequest)
    }
    if len(said) == 2 and said["chosen"] == said["rejected"]:
        reason = said["chosen"]
    else:
        reason = "; ".join(f"the {name} response: {text}" for name, text in said.items())
    return Problem(pair.index, place, reason)
