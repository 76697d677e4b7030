"""What tests look at may go meanwhile: processes that end, files that are removed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.commands import kill_all, logs_since, named

WAITING = [sys.executable, "-c", "import sys; sys.stdin.read()  # waits for its end"]


@pytest.fixture
def family() -> Iterator[list[psutil.Process]]:
    """One that is gone, one that nobody has waited for, and one that runs."""
    running = [subprocess.Popen(WAITING, stdin=subprocess.PIPE) for _ in range(3)]
    family = [psutil.Process(each.pid) for each in running]
    for each in running[:2]:
        each.kill()
    running[0].wait()
    while family[1].status() != psutil.STATUS_ZOMBIE:
        pass
    yield family
    running[2].kill()
    for each in running:
        each.wait()


def test_those_that_have_ended_are_not_named(family: list[psutil.Process]) -> None:
    assert named(family, "python", "waits for its end") == family[2:]
    assert named(family, part="something else") == []


def test_those_that_have_ended_need_no_kill(family: list[psutil.Process]) -> None:
    kill_all(family)
    assert not psutil.wait_procs(family, timeout=60)[1]


def test_a_log_that_goes_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "gone.log").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a" / "here.log").write_text("words")
    assert list(logs_since(tmp_path, 0)) == [(tmp_path / "a" / "here.log", "words")]
    assert list(logs_since(tmp_path / "nowhere", 0)) == []
