"""Pairs -> scores, in order, with patience for servers that are away."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from time import monotonic, sleep
from typing import Any

from triward.client import RewardClient
from triward.conversation import Messages
from triward.errors import InvalidRequest, ServerUnavailable, TriwardError

from triward_tools.evaluation.results import Pair, Problem, Result

# Between two attempts, for clients that do not pause by themselves before they try again.
_PAUSE = 1.0

_Answer = float | InvalidRequest


def results_of(
    client: RewardClient,
    rows: Iterable[tuple[str, Pair | Problem]],
    *,
    concurrency: int = 32,
    patience: float = 600.0,
) -> Generator[Result | Problem, None, None]:
    """A result for each pair, in order; problems stay what they are.

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
    taken: deque[tuple[str, Pair | Problem]] = deque()

    def conversations() -> Iterator[Messages]:
        for place, row in rows:
            taken.append((place, row))
            if isinstance(row, Pair):
                for response in (row.chosen, row.rejected):
                    yield [*row.prompt, {"role": "assistant", "content": response}]

    with closing(_answers(client, conversations(), concurrency, patience)) as answers:
        for chosen in answers:
            rejected = next(answers)
            place, row = taken.popleft()
            while isinstance(row, Problem):  # done when the rows before it are
                yield row
                place, row = taken.popleft()
            yield _result(place, row, chosen, rejected)
    yield from (row for _, row in taken if isinstance(row, Problem))


def _result(place: str, pair: Pair, chosen: _Answer, rejected: _Answer) -> Result | Problem:
    if isinstance(chosen, float) and isinstance(rejected, float):
        return Result(pair.index, pair.id, pair.subset, chosen, rejected)
    said = {
        name: str(_unplaced(answer))
        for name, answer in (("chosen", chosen), ("rejected", rejected))
        if isinstance(answer, InvalidRequest)
    }
    if len(said) == 2 and said["chosen"] == said["rejected"]:
        reason = said["chosen"]
    else:
        reason = "; ".join(f"the {name} response: {text}" for name, text in said.items())
    return Problem(pair.index, place, reason)


def _unplaced(error: TriwardError) -> TriwardError:
    """The error without its place among conversations, which a reader of rows never sees."""
    cause = error.__cause__
    return cause if isinstance(cause, TriwardError) else error


def _answers(
    client: RewardClient, conversations: Iterable[Messages], concurrency: int, patience: float
) -> Generator[_Answer, None, None]:
    """An answer for each conversation, in order, however often it takes.

    When one finds no server, it and those behind it are asked for again.
    """
    source = iter(conversations)
    waiting: deque[Messages] = deque()

    def unanswered() -> Iterator[Messages]:
        yield from list(waiting)
        for conversation in source:
            waiting.append(conversation)
            yield conversation

    answered, last_answer = False, monotonic()
    while True:
        outcomes: Any = client.iter_scores(unanswered(), concurrency=concurrency, on_error="return")
        with closing(outcomes):  # or requests would go on after an error
            for outcome in outcomes:
                if isinstance(outcome, ServerUnavailable):
                    # Who names a wrong address should not wait until patience ends.
                    wrong = not answered and not client.is_ready()
                    if wrong or monotonic() - last_answer > patience:
                        raise _unplaced(outcome)
                    break
                if not isinstance(outcome, (float, InvalidRequest)):
                    raise _unplaced(outcome)
                waiting.popleft()
                answered, last_answer = True, monotonic()
                yield outcome
            else:
                return
        sleep(_PAUSE)
