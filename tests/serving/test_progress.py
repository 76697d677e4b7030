"""A server that should start and does nothing is told from one that works."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from triward_server.serving.progress import Progress, Work


def work(*done: tuple[float, int], waits_for_disk: bool = False) -> Work:
    return Work(dict(enumerate(done)), waits_for_disk)


@pytest.mark.parametrize(
    ("before", "now", "idle"),
    [
        (work((5.0, 7)), work((5.01, 7)), True),
        (work((5.0, 7), (1.0, 0)), work((5.01, 7), (1.03, 0)), True),  # the ticks of two
        (work((5.0, 7)), work((5.2, 7)), False),
        (work((5.0, 7)), work((5.0, 8)), False),
        (work((5.0, 7)), work((5.0, 6)), True),  # the system took pages back
        (work((5.0, 7)), work((5.0, 7), waits_for_disk=True), False),
        (work((5.0, 7)), work((5.0, 7), (0.0, 0)), False),  # another process has come
        (work((5.0, 7), (0.0, 0)), work((5.0, 7)), False),  # or gone
        (work(), work(), False),  # the server has ended, which others say better
    ],
)
def test_what_work_is(before: Work, now: Work, idle: bool) -> None:
    assert now.is_idle_since(before, seconds=10.0) == idle


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[str]]:
    code = "print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        process.stdout.readline()
        yield process
        process.communicate("\n")


def test_a_process_that_waits_stands_still(sleeper: subprocess.Popen[str]) -> None:
    _, resident = Work.of(sleeper.pid).done[sleeper.pid]
    assert resident > 2**20, "Python has started there"
    progress = Progress(sleeper.pid, patience=0.2)
    assert not progress.stands_still(), "not before its time"
    while not progress.stands_still():
        time.sleep(0.05)


def test_a_process_that_has_ended_does_not_stand_still(sleeper: subprocess.Popen[str]) -> None:
    progress = Progress(sleeper.pid, patience=0.0)
    sleeper.kill()
    sleeper.wait()
    assert not progress.stands_still()
