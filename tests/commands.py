"""Commands that run beside a test."""

from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent


class Command:
    """A command in a process group of its own, with its output as it comes."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        self.process = subprocess.Popen(
            [*map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | environment | {"PYTHONUNBUFFERED": "1"}, start_new_session=True,
        )  # fmt: skip
        self.output = ""
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def __str__(self) -> str:
        return f"what process {self.process.pid} wrote: {self.process.args[0]} …"

    def so_far(self) -> str:
        """All that it has written, read or not."""
        with suppress(queue.Empty):
            while (line := self._lines.get_nowait()) is not None:
                self.output += line
        return self.output

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Read until a line matches."""
        while (line := self._lines.get(timeout=120)) is not None:
            self.output += line
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"ended without {pattern!r}:\n{self.output}")

    def wait(self) -> int:
        while (line := self._lines.get(timeout=120)) is not None:
            self.output += line
        return self.process.wait(timeout=120)

    def family(self) -> list[psutil.Process]:
        """The process and all below it."""
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def kill(self) -> None:
        if self.process.poll() is None:  # the test failed
            kill_all(self.family())
            for region in regions(self.process.pid):
                region.unlink(missing_ok=True)


def named(family: Iterable[psutil.Process], name: str = "", part: str = "") -> list[psutil.Process]:
    """Those of some processes, any of which may end while they are looked at.

    Args:
        family: the processes.
        name: what their names begin with.
        part: what their arguments contain.
    """
    found = []
    for process in family:
        with suppress(psutil.NoSuchProcess):
            if process.name().startswith(name) and part in " ".join(process.cmdline()):
                found.append(process)
    return found


def kill_all(family: Iterable[psutil.Process]) -> None:
    """Kill those that are still there."""
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def has_ended(process: psutil.Process) -> bool:
    """Whether it does nothing any more, waited for by its parent or not."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def assert_gone(family: list[psutil.Process]) -> None:
    """No process of a launcher and none of its shared memory is there any more."""
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []
    assert regions(family[0].pid) == []


def regions(launcher: int) -> list[Path]:
    """A launcher's regions; other servers may run on this machine."""
    return list(Path("/dev/shm").glob(f"triward-{launcher}-*"))


def logs_since(folder: Path, moment: float) -> Iterator[tuple[Path, str]]:
    """What was written since, with its path; folders and files may go while they are looked at."""
    for place, _, names in os.walk(folder):
        for log in (Path(place) / name for name in sorted(names) if name.endswith(".log")):
            with suppress(FileNotFoundError):
                if log.stat().st_mtime >= moment:
                    yield log, log.read_text("utf-8", "replace")
