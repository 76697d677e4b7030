"""The trainers' environment, and servers that its scripts ask."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tritonclient.grpc as triton

from tests.asking import accepted, wait_until
from tests.commands import Command, has_ended, kill_all
from tests.conftest import ROOT, brief
from triward import RewardClient
from triward_server.serving.launch import TritonServer

PYTHON = ROOT / ".venv-trainers" / "bin" / "python"
HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def exact_repository(build: Callable[..., Path]) -> Path:
    """A model whose scores do not depend on what is asked beside it, in their last bit either."""
    return build("--dtype=float32", "--deterministic")


@pytest.fixture
def mortal(exact_repository: Path, tmp_path: Path) -> Iterator[TritonServer]:
    """A server for one test, which may kill it."""
    with brief(exact_repository, tmp_path / "triton.log") as running:
        yield running


@pytest.fixture
def asked(mortal: TritonServer) -> Iterator[RewardClient]:
    with RewardClient(mortal.endpoints.grpc, timeout=120) as client:
        yield client


class Side:
    """A script of this folder as it runs in the trainers' environment, with a Ray of its own.

    Args:
        running: the script.
        folder: where it writes its results.
    """

    def __init__(self, running: Command, folder: Path) -> None:
        self.running = running
        self.folder = folder
        self.family: list[psutil.Process] = []

    def kill_after(self, server: TritonServer, requests: int) -> None:
        """Let the script go on, and kill the server when it has answered so many requests."""
        with triton.InferenceServerClient(server.endpoints.grpc) as raw:
            before = accepted(raw, "reward")
            (self.folder / "go").touch()
            wait_until(lambda: accepted(raw, "reward") >= before + requests)
        psutil.Process(server.pid).kill()
        wait_until(lambda: has_ended(psutil.Process(server.pid)))
        (self.folder / "gone").touch()

    def result(self, name: str) -> Any:
        """What the script has written to a file, when it has."""
        file = self.folder / name
        process = self.running.process
        wait_until(lambda: file.exists() or process.poll() is not None, timeout=400)
        assert file.exists(), self.running.so_far()
        self.family.extend(self.running.family())
        return json.loads(file.read_text())

    def finish(self) -> str:
        """Wait for its end; return all that it wrote."""
        assert self.running.wait() == 0, self.running.output
        return self.running.output


@pytest.fixture
def side(command: Callable[..., Command], tmp_path: Path) -> Iterator[Callable[..., Side]]:
    """Starts a script with a job; nothing of it or of its Ray is left."""
    assert PYTHON.exists(), "run `make trainers`, which makes .venv-trainers"
    # Short, since Ray puts the paths of sockets below it.
    temporary = Path(tempfile.mkdtemp(prefix="ray-"))
    sides: list[Side] = []

    def run(script: str, stubs: bool = False, **job: Any) -> Side:
        file = tmp_path / "job.json"
        file.write_text(json.dumps({**job, "folder": str(tmp_path), "ray": str(temporary)}))
        paths = [*([HERE / "stubs"] if stubs else []), ROOT / "client", ROOT]
        environment = {"TRIWARD_ANSWERS": str(tmp_path / "answers.json")}
        sides.append(
            Side(
                command(
                    PYTHON, HERE / script, file,
                    PYTHONPATH=os.pathsep.join(map(str, paths)),
                    RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="token",
                    RAY_AUTH_TOKEN=secrets.token_hex(32), TOKENIZERS_PARALLELISM="false",
                    OMP_NUM_THREADS="1", **environment,
                ),
                tmp_path,
            )
        )  # fmt: skip
        return sides[-1]

    yield run
    for each in sides:
        each.running.kill()
        kill_all(each.family)
        psutil.wait_procs(each.family, timeout=60)
    shutil.rmtree(temporary)


class Page:
    """A page of docs/integrations with the snippets that users copy."""

    def __init__(self, name: str) -> None:
        text = (ROOT / "docs" / "integrations" / name).read_text(encoding="utf-8")
        self.blocks = re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)

    def code(self, kind: str, part: str) -> str:
        """The one snippet of a kind that has this in it."""
        (found,) = [text for language, text in self.blocks if language == kind and part in text]
        return found

    def words(self, part: str) -> list[str]:
        """The words of a shell snippet."""
        return shlex.split(self.code("bash", part).replace("\\\n", " "), comments=True)
