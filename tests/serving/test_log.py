"""A log that cannot be written never holds up the server."""

from __future__ import annotations

import io
import os
import pty
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from tests.commands import BIN
from tests.conftest import LOCAL
from tests.ports import fixed
from triward import RewardClient
from triward_server.serving.launch import TritonServer
from triward_server.serving.log import LineWriter
from triward_server.serving.triton_http import TritonHttp

LINE = "x" * 99 + "\n"
ROUNDS = 40  # of --log-verbose=1, of which each writes several kilobytes into a pipe of 64


@contextmanager
def pipe() -> Iterator[tuple[IO[bytes], IO[str]]]:
    """What is read, and what writes to it."""
    read, write = os.pipe()
    with os.fdopen(read, "rb", buffering=0) as reader, os.fdopen(write, "w") as writer:
        yield reader, writer


def test_a_reader_that_stands_still_loses_lines_and_is_told_how_many() -> None:
    with pipe() as (reader, out):
        writer = LineWriter(out)
        for _ in range(2000):  # 200 kB; the pipe takes 64
            writer.write(LINE)
        kept = 0
        os.set_blocking(reader.fileno(), False)
        while data := reader.read(4096):
            assert set(data.decode().splitlines(keepends=True)) <= {LINE, *_tails(data)}
            kept += len(data)
        writer.write("after\n")
        told = (reader.read(4096) or b"").decode()
        lost = 2000 - kept // len(LINE)
        assert lost > 1000
        # The line that the pipe took half of is lost, too.
        assert told.lstrip("\n") == (
            f"triward-server: {lost} lines of log could not be written\nafter\n"
        )
        writer.write("more\n")
        assert reader.read(4096) == b"more\n", "it is said once"


def test_a_terminal_that_nobody_reads_is_not_waited_for() -> None:
    """It says that it is ready when it has room for a character, and then waits for the rest."""
    reading, terminal = pty.openpty()
    with os.fdopen(reading, "rb", buffering=0), os.fdopen(terminal, "w") as out:
        writer = LineWriter(out)
        for _ in range(2000):  # 200 kB; a terminal takes 4 or so
            writer.write(LINE)
        assert os.get_blocking(out.fileno()), "others write there, too"
        assert writer.lost > 1000


def test_a_stream_in_memory_takes_all() -> None:
    stream = io.StringIO()
    LineWriter(stream).write(LINE)
    assert stream.getvalue() == LINE


def _tails(data: bytes) -> set[str]:
    """What reading in pieces cuts in two."""
    lines = data.decode().splitlines(keepends=True)
    return {lines[0], lines[-1]}


def test_half_a_line_gets_its_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a disk does that gets full: the first write takes a part, the next fails."""
    file = tmp_path / "log"
    write, room = os.write, 5

    def full(descriptor: int, data: memoryview) -> int:
        nonlocal room
        if room == 0:
            raise OSError(28, "No space left on device")
        taken = write(descriptor, data[:room])
        room -= taken
        return taken

    with file.open("w") as out:
        writer = LineWriter(out)
        monkeypatch.setattr(os, "write", full)
        for line in ("123456789\n", "lost\n"):
            writer.write(line)
        room = 1000
        writer.write("after\n")
    assert file.read_text() == (
        "12345\ntriward-server: 2 lines of log could not be written\nafter\n"
    )


def test_a_reader_that_is_gone() -> None:
    with pipe() as (reader, out):
        writer = LineWriter(out)
        reader.close()
        for _ in range(2000):
            writer.write(LINE)


def score_and_stop(serving: subprocess.Popen[str], url: str, echo: RewardClient) -> None:
    """Everything still works, and the end is clean."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Yes."}]
    expected = echo.score(messages)
    with RewardClient(url, timeout=60, max_attempts=1) as asking:
        for _ in range(ROUNDS):
            assert asking.score(messages) == pytest.approx(expected, abs=1e-4)
    serving.send_signal(signal.SIGTERM)
    assert serving.wait(120) == 0


def command(repository: Path, *flags: str) -> list[str]:
    ports = ["--grpc-port=0", "--http-port=0", "--metrics-port=0"]
    return [
        str(BIN / "triward-server"), "serve", f"--repository={repository}", "--host=127.0.0.1",
        *(flags or ports), "--", "--log-verbose=1",
    ]  # fmt: skip


def test_a_full_disk(echo_repository: Path, echo: RewardClient) -> None:
    with (
        Path("/dev/full").open("w") as full,
        subprocess.Popen(
            command(echo_repository), stdout=subprocess.PIPE, stderr=full, text=True
        ) as serving,
    ):
        assert serving.stdout
        ready = re.search(r"ready\s+grpc\s+(\S+)", serving.stdout.readline())
        assert ready
        score_and_stop(serving, ready[1], echo)


def test_nobody_reads_any_of_it(echo_repository: Path, echo: RewardClient) -> None:
    """Standard output and error are one pipe, as under many supervisors, and its reader dies."""
    ports = fixed()
    flags = [f"--{name}-port={getattr(ports, f'{name}_port')}"
             for name in ("grpc", "http", "metrics")]  # fmt: skip
    with pipe() as (reader, out):
        started = command(echo_repository, *flags)
        serving = subprocess.Popen(started, stdout=out, stderr=out, text=True)
        out.close()
        reader.read(100)
        reader.close()
        http = TritonHttp("127.0.0.1", ports.http_port)
        while not http.is_ready():
            assert serving.poll() is None
        score_and_stop(serving, ports.grpc, echo)


def test_the_log_of_a_failed_start_is_named(echo_repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "triton.log"
    with file.open("w") as log:
        server = TritonServer(echo_repository, LOCAL, log=log, flags=["--no-such-flag=1"])
        with pytest.raises(Exception, match=rf"\(log: {re.escape(str(file))}\)$"), server:
            pass
    assert "--no-such-flag" in file.read_text()
