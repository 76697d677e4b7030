"""Patience with servers that are away."""

from __future__ import annotations

import pytest

from triward.errors import InvalidRequest, ServerError, ServerUnavailable, located
from triward.retries import until_answered


class Client:
    """Answers `n` with float(n), but for what each round's faults say; takes two ahead."""

    def __init__(self, *faults, ready=True):
        self.faults = list(faults)
        self.ready = ready
        self.rounds = []

    def is_ready(self):
        return self.ready

    def iter_scores(self, conversations, *, concurrency, on_error):
        assert (concurrency, on_error) == (4, "return")
        faults = self.faults.pop(0) if self.faults else {}
        asked, given = [], 0
        self.rounds.append(asked)
        for conversation in conversations:
            asked.append(conversation)
            if len(asked) - given == 3:
                yield self.outcome(faults, asked, given)
                given += 1
        while given < len(asked):
            yield self.outcome(faults, asked, given)
            given += 1

    @staticmethod
    def outcome(faults, asked, index):
        fault = faults.get(asked[index])
        return located(fault, f"conversations[{index}]") if fault else float(asked[index])


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    pauses = []
    monkeypatch.setattr("triward.retries.sleep", pauses.append)
    return pauses


def ask(client, count, patience=60.0, **options):
    answers = until_answered(
        client, iter(range(count)), concurrency=4, patience=patience, **options
    )
    return list(answers)


AWAY = ServerUnavailable("away")


def test_only_what_found_no_server_is_asked_again_and_before_anything_else(pauses):
    client = Client({1: AWAY}, {1: AWAY})
    assert ask(client, 6) == [0, 1, 2, 3, 4, 5]
    assert client.rounds == [[0, 1, 2, 3], [1], [1], [4, 5]]
    assert pauses == [1.0, 1.0]


def test_a_refusal_is_an_answer():
    wrong = InvalidRequest("wrong")
    found = ask(Client({2: wrong, 3: AWAY}), 5)
    assert (found[2].place, found[2].reason) == ("conversations[2]", "wrong")
    assert [*found[:2], *found[3:]] == [0, 1, 3, 4]


def test_a_failure_is_raised_without_a_place_among_conversations():
    with pytest.raises(ServerError, match=r"^broken$"):
        ask(Client({1: ServerError("broken")}), 3)


def test_patience_begins_anew_with_each_answer(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("triward.retries.monotonic", lambda: next(clock))
    with pytest.raises(ServerUnavailable, match=r"^away$"):
        ask(Client(*[{0: AWAY}] * 9), 1, patience=3)
    client = Client({0: AWAY, 1: AWAY}, {1: AWAY}, {1: AWAY})
    assert ask(client, 2, patience=3) == [0, 1]


@pytest.mark.parametrize(("ready", "rounds"), [(False, 1), (True, 4)])
def test_a_wrong_address_is_told_at_once(ready, rounds):
    client = Client({0: AWAY}, {0: AWAY}, {}, ready=ready)
    if ready:
        assert ask(client, 1, impatient_at_first=True) == [0]
    else:
        with pytest.raises(ServerUnavailable):
            ask(client, 1, impatient_at_first=True)
    assert len(client.rounds) == rounds  # the last finds that there is nothing more
