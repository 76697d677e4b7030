"""What is not asked for any more once a group has failed."""

from __future__ import annotations

import pytest

from tests.client.helpers import conversation
from triward.errors import ServerError, ServerUnavailable
from triward.grouping import grouped
from triward.many import Schedule, ask_group


def conversations(count):
    return [conversation("a", f"q{n}") for n in range(count)]


class Done:
    def done(self):
        return True


def schedule_of(count, on_error="raise"):
    return Schedule(conversations(count), 2, on_error), list(grouped(conversations(count)))


def starts_all(schedule):
    started = []
    for _ in schedule.run(lambda group: started.append(group) or Done()):
        pass
    return len(started)


def test_only_what_lies_behind_the_first_failure_is_skipped():
    schedule, some = schedule_of(4)
    schedule.note(some[0], [1.0])
    assert not any(map(schedule.skips, some))
    schedule.note(some[2], [ServerError("gone")])
    assert [schedule.skips(group) for group in some] == [False, False, False, True]
    assert starts_all(schedule) == 0


def test_an_earlier_failure_counts_and_a_later_one_does_not():
    schedule, some = schedule_of(4)
    schedule.note(some[1], [ServerError("gone")])
    schedule.note(some[3], [ServerError("gone")])
    assert [schedule.skips(group) for group in some] == [False, False, True, True]


def test_errors_that_are_returned_end_nothing():
    schedule, some = schedule_of(4, "return")
    schedule.note(some[0], [ServerError("gone")])
    assert not any(map(schedule.skips, some))
    assert starts_all(schedule) == 4


def test_nobody_looks_any_more():
    schedule, some = schedule_of(2)
    schedule.stop()
    assert all(map(schedule.skips, some))


class Later:
    def __init__(self):
        self.is_done = False

    def done(self):
        return self.is_done


def test_a_schedule_keeps_order_and_looks_ahead_no_further_than_twice_the_concurrency():
    schedule = Schedule(conversations(8), 2, "raise")
    started = []
    steps = schedule.run(lambda _: started.append(Later()) or started[-1])
    assert [next(steps) for _ in range(5)] == [None] * 5
    assert next(steps) is started[0]  # to be waited for, though it is not done
    started[1].is_done = True
    assert next(steps) is started[1]
    assert (next(steps), len(started)) == (None, 6)
    assert [each for each in steps if each] == started[2:]


def test_a_group_that_ends_early_has_one_outcome_for_each_conversation():
    """The wrong one is found, then the server goes away: what is left fails for that."""
    [group] = grouped([conversation(a) for a in "abcd"])
    asking = ask_group(group, "return")
    assert next(asking) is group
    answers = [ServerError("one is wrong"), [1.0], ServerError("wrong"), ServerUnavailable("away")]
    asked = [asking.send(answer).first for answer in answers[:-1]]
    with pytest.raises(StopIteration) as ended:
        asking.send(answers[-1])
    assert asked == [0, 1, 2]
    assert ended.value.value[0] == 1.0
    assert [str(each) for each in ended.value.value[1:]] == [
        "conversations[1]: wrong", "conversations[2]: away", "conversations[3]: away",
    ]  # fmt: skip
