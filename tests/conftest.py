"""One tiny checkpoint, one oracle and one real Triton server for the whole session."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import shutil
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may ask a model hub
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: workers share the cores
    os.environ["OMP_NUM_THREADS"] = "1"

import psutil
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests import groups
from tests.asking import model_processes, wait_until
from tests.commands import BIN, Command, has_ended, logs_since, named
from tests.conversations import Messages, conversations
from tests.fonts import FREE_FONT
from triward import RewardClient
from triward_server.export.prepared import prepared
from triward_server.export.random_checkpoint import make_checkpoint
from triward_server.export.random_ixc_checkpoint import make_ixc_checkpoint
from triward_server.schema import DRAINING, ModelNames
from triward_server.serving.launch import Endpoints, TritonServer
from triward_server.serving.repository import step_folders
from triward_server.serving.triton_http import HttpError
from triward_server.testing.echo import make_echo
from triward_server.testing.oracle import Oracle

ROOT = Path(__file__).resolve().parent.parent
EXPORT = ROOT / "export" / "build_repository.py"
LOCAL = Endpoints("127.0.0.1", grpc_port=0, http_port=0, metrics_port=0)


# Whoever uses one of them is slow: Ray's own processes, and Chromium.
SLOW_FIXTURES = {*groups.STARTS_RAY, "browser"}
TAIL = 60  # lines of each log that a failing test shows
FOLDER = pytest.StashKey[Path]()  # the session's temporary one
COMMANDS = pytest.StashKey[list[Command]]()  # a test's
BEGUN = pytest.StashKey[float]()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(groups)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        slow = SLOW_FIXTURES & {*getattr(item, "fixturenames", ())}
        if slow or item.get_closest_marker("alone"):
            item.add_marker("slow")


def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[BEGUN] = time.time()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show what servers said while a test failed, and where all of it is."""
    report = yield
    if report.failed:
        folder = item.config.stash.get(FOLDER, Path(os.devnull))
        for log, text in logs_since(folder, item.stash[BEGUN]):
            report.sections.append((f"the end of {log}", _tail(text)))
        for command in item.stash.get(COMMANDS, []):
            report.sections.append((f"the end of {command}", _tail(command.so_far())))
    return report


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-TAIL:])


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """After the last test no process and no shared memory of ours may be there.

    Nor may this process have become real-time, as a video encoder once made it: its children then
    starve each other, and Triton takes a model's process for dead after a second.
    """
    pytestconfig.stash[FOLDER] = tmp_path_factory.getbasetemp()
    policy = os.sched_getscheduler(0)
    yield
    assert os.sched_getscheduler(0) == policy
    assert named(psutil.Process().children(recursive=True), "triton") == []
    assert list(Path("/dev/shm").glob(f"triward-{os.getpid()}-*")) == []


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    make_checkpoint("tiny", 0, folder)
    return folder


@pytest.fixture(scope="session")
def ixc_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ixc") / "checkpoint"
    make_ixc_checkpoint("tiny", 0, folder, font=FREE_FONT)
    return folder


@pytest.fixture(scope="session")
def ixc_folder(ixc_checkpoint: Path) -> Iterator[Path]:
    """The same as an export reads it, its tokenizer made."""
    with prepared(ixc_checkpoint) as folder:
        yield folder


@dataclass(frozen=True)
class Exit:
    """How a command ended."""

    code: int
    stderr: str


@pytest.fixture(scope="session")
def export() -> Callable[..., Exit]:
    """Runs the command of export/build_repository.py in this process: imports take seconds."""
    spec = importlib.util.spec_from_file_location("build_repository", EXPORT)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)

    def run(*arguments: object) -> Exit:
        result = CliRunner().invoke(script.app, [str(argument) for argument in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Exit(result.exit_code, result.stderr)

    return run


@pytest.fixture(scope="session")
def build(
    export: Callable[..., Exit],
    checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """Exports the tiny checkpoint for the CPU; extra flags are passed on.

    One thread: many servers start in these tests, and on busy cores OpenMP's threads spend most of
    their time waiting for each other.
    """

    def run(*flags: str) -> Path:
        output = tmp_path_factory.mktemp("repository") / "models"
        result = export(
            "--checkpoint", checkpoint, "--output", output, "--device=cpu",
            "--preprocess-instances=2", "--threads=1", *flags,
        )  # fmt: skip
        assert result.code == 0, result.stderr
        return output

    return run


@pytest.fixture(scope="session")
def repository(build: Callable[..., Path]) -> Path:
    return build("--dtype=float32")


@pytest.fixture(scope="session")
def echo_repository(build: Callable[..., Path]) -> Path:
    """For tests of what stands around the model: it starts in a second or two."""
    repository = build("--dtype=float32", "--no-canary", "--no-verify")
    make_echo(repository)
    return repository


@pytest.fixture(scope="session")
def echo_server(
    echo_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    with brief(echo_repository, tmp_path_factory.mktemp("log") / "triton.log") as running:
        yield running


@pytest.fixture(scope="session")
def echo(echo_server: TritonServer) -> Iterator[RewardClient]:
    """Asks the echo, whose scores are the same wherever it runs."""
    with RewardClient(echo_server.endpoints.grpc, timeout=60) as connected:
        yield connected


@pytest.fixture
def faulty(echo_repository: Path, tmp_path: Path) -> Path:
    """An echo for this test alone, in which `echo.fault` may do damage."""
    return Path(shutil.copytree(echo_repository, tmp_path / "faulty"))


@pytest.fixture(scope="session")
def rack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The session's server looks here, too: `served` adds models and takes them away."""
    return tmp_path_factory.mktemp("rack") / "models"


@pytest.fixture(scope="session")
def server(
    repository: Path, rack: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    log = tmp_path_factory.mktemp("log") / "triton.log"
    rack.mkdir()
    flags = [f"--model-repository={rack}"]
    with log.open("w") as file, TritonServer(repository, LOCAL, flags, log=file) as running:
        yield running


@dataclass(frozen=True)
class Served:
    """A model beside `reward` in the session's server.

    Attributes:
        names: of the model and its steps.
        repository: where it lies, next to others'.
        server: which serves it.
        client: asks it.
    """

    names: ModelNames
    repository: Path
    server: TritonServer
    client: RewardClient


@pytest.fixture(scope="module")
def served(
    server: TritonServer, rack: Path, checkpoint: Path, export: Callable[..., Exit]
) -> Iterator[Callable[..., Served]]:
    """Exports the checkpoint under a name and loads it; it goes with the module.

    To load a model takes less than half of a start, in which four processes import torch.
    """
    with ExitStack() as stack:

        def run(
            name: str,
            *flags: str,
            source: Path = checkpoint,
            change: Callable[[Path], None] = lambda folder: None,
        ) -> Served:
            names = ModelNames(name)
            add_model(export, rack, source, names, *flags)
            stack.callback(_take_away, server, rack, names)
            change(rack)
            _load(server, [*step_folders(rack, names), name])
            client = RewardClient(server.endpoints.grpc, model=name, timeout=120)
            return Served(names, rack, server, stack.enter_context(client))

        yield run


def add_model(
    export: Callable[..., Exit], rack: Path, checkpoint: Path, names: ModelNames, *flags: str
) -> None:
    """Export a model, or a version, into a repository that a running server looks at."""
    if not any(rack.iterdir()):
        rack.rmdir()  # an export writes into repositories or makes them
    result = export(
        "--checkpoint", checkpoint, "--output", rack, "--name", names.ensemble, "--device=cpu",
        "--dtype=float32", "--preprocess-instances=1", "--threads=1", *flags,
    )  # fmt: skip
    assert result.code == 0, result.stderr
    # The session's own repository has it, and Triton wants no name twice.
    shutil.rmtree(rack / DRAINING, ignore_errors=True)


def _load(server: TritonServer, models: Sequence[str]) -> None:
    """Load models one after the other; start the server again if Triton ends or hangs over it.

    As `TritonServer` does while it starts, for the same fault of Triton 24.10 on busy cores
    (`serving/progress.py`). A new one loads whatever lies in its repositories.
    """
    for model in models:
        try:
            server.http.load(model, 180)
        except HttpError as error:
            if error.status:  # it answered: the model is at fault
                raise
            server.stop()
            server.__enter__()
            return


def _take_away(server: TritonServer, rack: Path, names: ModelNames) -> None:
    folders = [names.ensemble, *reversed(step_folders(rack, names))]
    stubs = [p for model in folders for p in model_processes(server.pid, f"/{model}/")]
    family = [each for stub in stubs for each in (stub, *stub.children(recursive=True))]
    for model in folders:
        server.http.unload(model)
    # They end a moment after Triton says so, and the next test may look whether any is gone.
    wait_until(lambda: all(map(has_ended, family)))
    for model in folders:
        shutil.rmtree(rack / model)


@pytest.fixture(scope="session")
def client(server: TritonServer) -> Iterator[RewardClient]:
    with RewardClient(server.endpoints.grpc, timeout=120) as connected:
        yield connected


@pytest.fixture(scope="session")
def oracle(checkpoint: Path) -> Oracle:
    return Oracle(checkpoint)


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Messages]:
    return conversations(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def reference(oracle: Oracle, cases: dict[str, Messages]) -> dict[str, float]:
    """The model card's fp32 score of every case."""
    return {name: oracle.score(messages) for name, messages in cases.items()}


@pytest.fixture(scope="session")
def metric(server: TritonServer) -> Callable[[str, str], float]:
    """Reads one of Triton's Prometheus counters, summed over versions and devices."""

    def read(name: str, model: str) -> float:
        url = f"http://127.0.0.1:{server.endpoints.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as response:
            text = response.read().decode()
        lines = re.findall(rf'^{name}{{[^}}]*model="{model}"[^}}]*}} (\S+)$', text, re.MULTILINE)
        assert lines, f"{name} of {model} is not exported"
        return sum(map(float, lines))

    return read


@pytest.fixture
def command(request: pytest.FixtureRequest) -> Iterator[Callable[..., Command]]:
    commands = request.node.stash[COMMANDS] = []
    with ExitStack() as stack:

        def run(*arguments: object, **environment: str) -> Command:
            started = Command(*arguments, **environment)
            commands.append(started)
            stack.callback(started.kill)
            return started

        yield run


@pytest.fixture
def serve(command: Callable[..., Command], echo_repository: Path) -> Callable[..., Command]:
    """Runs `triward-server serve`, on the echo unless told otherwise."""

    def run(*flags: object, repository: Path = echo_repository, **environment: str) -> Command:
        ports = [f"--{name}-port=0" for name in ("grpc", "http", "metrics")]
        return command(
            BIN / "triward-server", "serve", "--repository", repository, "--host=127.0.0.1",
            *ports, *flags, **environment,
        )  # fmt: skip

    return run


@contextmanager
def brief(repository: Path, log: Path, **options: Any) -> Iterator[TritonServer]:
    """A server that is killed at the end: a clean stop takes Triton seconds, and has its tests."""
    with log.open("w") as file, TritonServer(repository, LOCAL, log=file, **options) as running:
        try:
            yield running
        finally:
            running._kill()


def encode(image: Image.Image, format_: str = "PNG") -> bytes:
    """An image file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format_)
    return buffer.getvalue()
