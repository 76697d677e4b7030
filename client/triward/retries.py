"""Scores of many conversations from servers that are away for a while."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any

from triward.client import RewardClient
from triward.conversation import Messages
from triward.errors import InvalidRequest, ServerUnavailable, relocated

# Between two rounds, for clients that do not pause by themselves before they try again.
_PAUSE = 1.0

Answered = float | InvalidRequest


@dataclass
class _Asked:
    """A conversation, and its answer once there is one."""

    conversation: Messages
    answer: Answered | None = None


def until_answered(
    client: RewardClient,
    conversations: Iterable[Messages],
    *,
    concurrency: int,
    patience: float,
    impatient_at_first: bool = False,
) -> Generator[Answered, None, None]:
    """Yield an answer for each conversation, in order, however often it takes.

    What finds no server is asked for again, before more conversations are taken.

    Args:
        client: whom to ask.
        conversations: taken one by one, as earlier ones finish.
        concurrency: requests in flight at once.
        patience: seconds for which servers may answer nothing but UNAVAILABLE.
        impatient_at_first: give up at once where no server is ready and none has ever answered, as
            at a wrong address.

    Raises:
        ServerUnavailable: for `patience` seconds there was no other answer.
        TriwardError: a server failed, or the client's timeout ran out.
    """
    source = iter(conversations)
    asked: deque[_Asked] = deque()  # and not handed out
    away, met, last_answer = False, False, monotonic()

    def taken() -> Iterator[_Asked]:
        for conversation in source:
            asked.append(_Asked(conversation))
            yield asked[-1]
            if away:
                return

    while True:
        again = [each for each in asked if each.answer is None]
        away, due = False, list[_Asked]()
        outcomes: Any = client.iter_scores(
            _noted(again or taken(), due), concurrency=concurrency, on_error="return"
        )
        with closing(outcomes):  # or requests would go on after an error
            for index, outcome in enumerate(outcomes):
                if isinstance(outcome, (float, InvalidRequest)):
                    due[index].answer = outcome
                    met, last_answer = True, monotonic()
                else:
                    away = isinstance(outcome, ServerUnavailable)
                    late = monotonic() - last_answer > patience
                    wrong = away and impatient_at_first and not (met or client.is_ready())
                    if not away or late or wrong:
                        raise relocated(outcome) from outcome
                while asked and (answer := asked[0].answer) is not None:
                    asked.popleft()
                    yield answer
        if away:
            sleep(_PAUSE)
        elif not again:
            return


def _noted(some: Iterable[_Asked], due: list[_Asked]) -> Iterator[Messages]:
    for each in some:
        due.append(each)
        yield each.conversation
