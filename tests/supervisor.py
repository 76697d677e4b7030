"""`triward-server serve` that is started again whenever it ends, as a container's runtime does."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from tests.commands import BIN, assert_gone, named
from tests.ports import fixed

ADMIN_KEY = "soak"
RECONNECTING = 1.0  # seconds for which gRPC may repeat its last error, with a backoff of half of it


@dataclass(frozen=True)
class Outage:
    """Seconds of `time.monotonic` between which nothing has to score."""

    begin: float
    end: float

    def touches(self, begin: float, end: float) -> bool:
        """Whether a call that lasted so long met it."""
        return begin <= self.end and end >= self.begin


class Supervised:
    """A server on fixed ports, with as many lives as it needs.

    Its logs go where nobody can read them: life 0 writes to a pipe whose reader is gone, life 1 to
    a full disk, and so on in turns.

    Args:
        repository: what it serves.
        folder: for the admin key.
        noticed_within: seconds that a fault may last before `serve` ends over it.
    """

    def __init__(self, repository: Path, folder: Path, noticed_within: float) -> None:
        self.endpoints = fixed()
        self.outages: list[Outage] = []
        self.exits: list[int] = []
        self.ready = threading.Event()
        self._noticed_within = noticed_within
        self._stopping = False
        key = folder / "key"
        key.write_text(ADMIN_KEY)
        e = self.endpoints
        self._command = [
            str(BIN / "triward-server"), "serve", f"--repository={repository}", "--host=127.0.0.1",
            f"--grpc-port={e.grpc_port}", f"--http-port={e.http_port}",
            f"--metrics-port={e.metrics_port}", f"--admin-key-file={key}",
        ]  # fmt: skip
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Supervised:
        """Start it and wait until it scores."""
        self._thread.start()
        assert self.ready.wait(300)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it and see that nothing is left."""
        self._stopping = True
        if self._process and self._process.poll() is None:
            family = self.family()
            self._process.terminate()
            self._thread.join(120)
            assert_gone(family)

    def family(self) -> list[psutil.Process]:
        """`serve` and all below it."""
        assert self._process
        process = psutil.Process(self._process.pid)
        return [process, *process.children(recursive=True)]

    def member(self, name: str) -> psutil.Process:
        """Tritonserver, or the first process of a model."""
        family = self.family()
        return next(iter(named(family, name) or named(family, "triton", f"/{name}/")))

    def kill(self, name: str) -> None:
        """Kill a process, and wait until `serve` has ended over it and the next one scores."""
        lives = len(self.exits)
        with suppress(psutil.Error, StopIteration):  # it has just ended by itself
            self.member(name).kill()
        self.ready.clear()  # else callers would spend their requests on a server that is gone
        end = time.monotonic() + 120
        while len(self.exits) == lives:
            assert time.monotonic() < end, f"{name} was killed and nobody noticed"
            time.sleep(0.1)
        assert self.ready.wait(300)

    def _run(self) -> None:
        ended = time.monotonic()
        while not self._stopping:
            with self._log(len(self.exits)) as log:
                self._process = subprocess.Popen(
                    self._command, stdout=subprocess.PIPE, stderr=log, text=True,
                    env=os.environ | {"PYTHONUNBUFFERED": "1"}, start_new_session=True,
                )  # fmt: skip
            assert self._process.stdout
            for line in self._process.stdout:
                if line.startswith("ready"):
                    back = time.monotonic() + RECONNECTING
                    self.outages.append(Outage(ended - self._noticed_within, back))
                    self.ready.set()
            code = self._process.wait()
            self.ready.clear()
            self.exits.append(code)
            ended = time.monotonic()
        self.outages.append(Outage(ended - self._noticed_within, ended))

    def _log(self, life: int) -> IO[str]:
        if life % 2:
            return Path("/dev/full").open("w")
        reading, writing = os.pipe()
        os.close(reading)
        return os.fdopen(writing, "w")
