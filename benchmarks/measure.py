"""Parts that all measurements share: where they ran, turns, medians, and the workloads."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import typer

from benchmarks.workloads import PromptGroup, Workload
from triward_server.engine import packing
from triward_server.engine.geometry import Geometry
from triward_server.engine.planning import Cost, price
from triward_server.engine.scoring import Scorer
from triward_server.intake.preprocess import Preprocessor
from triward_server.schema import Features, Scores

if TYPE_CHECKING:  # a machine with a GPU and no Triton measures without either
    from triward import RewardClient
    from triward_server.serving.launch import TritonServer

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "trl", "numpy", "tritonclient", "nvidia-pytriton")
CONCURRENCY = 16


def writable(output: Path | None, *beside: str) -> None:
    """Ask before anything is measured whether the results can be written.

    Args:
        output: the file of the results; None: there is none.
        beside: suffixes of further files that go beside it.

    Raises:
        typer.BadParameter: the folder is not there, or a file cannot be created or changed.
    """
    if output is None:
        return
    for path in (output, *map(output.with_suffix, beside)):
        new = not path.exists()
        try:
            path.open("a").close()
        except OSError as error:
            raise typer.BadParameter(f"--output: {path} cannot be written: {error}") from None
        if new:
            path.unlink()


def machine() -> dict[str, Any]:
    """Return where and with what the numbers are taken."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or None,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
        "cuda": torch.version.cuda if gpu else None,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo").read_text()
    lines = [line for line in info.splitlines() if line.startswith("model name")]
    return lines[0].split(":")[1].strip() if lines else platform.machine()


def in_turns(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, all in turns, so that a slow moment of the machine meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(timed(run))
    return seconds


def timed(run: Callable[[], object]) -> float:
    """Seconds of one run; whatever it left on a GPU's queue is waited for."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def row(seconds: Sequence[float], conversations: int) -> dict[str, Any]:
    """Return a median and what it was taken from."""
    median = statistics.median(seconds)
    return {
        "median_s": round(median, 5),
        "all_s": [round(s, 5) for s in seconds],
        "conversations_per_s": round(conversations / median, 3),
    }


def features(preprocessor: Preprocessor, group: PromptGroup) -> Features:
    """Make one request as the server's preprocessing does."""
    media: list[bytes] = []
    for message in group.prompt:
        for part in message["content"]:
            if isinstance(part, dict) and part["type"] == "image":  # content may be a text
                buffer = BytesIO()
                part["image"].save(buffer, "BMP")
                media.append(buffer.getvalue())
    wire = json.dumps(group.prompt, default=lambda image: None).replace(', "image": null', "")
    responses = [response.encode() for response in group.responses]
    return preprocessor.features(wire.encode(), responses, media)


@contextmanager
def triton(
    checkpoint: Path,
    *flags: str,
    log: Path | None = None,
    change: Callable[[Path], object] | None = None,
) -> Iterator[TritonServer]:
    """Serve a checkpoint, exported with `flags`, with a real Triton.

    Args:
        checkpoint: what is exported.
        flags: of the export.
        log: where Triton's log is kept, if it is.
        change: is given the exported repository before it is served.
    """
    from triward_server.serving.launch import Endpoints, TritonServer

    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder, "repository")
        script = ROOT / "export" / "build_repository.py"
        subprocess.run(
            [sys.executable, str(script), f"--checkpoint={checkpoint}", f"--output={repository}",
             "--preprocess-instances=2", *flags],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        if change:
            change(repository)
        free = Endpoints("127.0.0.1", grpc_port=0, http_port=0, metrics_port=0)
        with (
            (log or Path(folder, "triton.log")).open("w") as file,
            TritonServer(repository, free, log=file) as server,
        ):
            yield server


@contextmanager
def serving(checkpoint: Path, *flags: str) -> Iterator[RewardClient]:
    """Yield a client of `triton`."""
    with triton(checkpoint, *flags) as server, connected(server) as client:
        yield client


def connected(server: TritonServer) -> RewardClient:
    """Return a client of a server, to be closed."""
    from triward import RewardClient

    return RewardClient(server.endpoints.grpc, timeout=600)


def served(client: RewardClient, workload: Workload) -> list[float]:
    """Send a group as one request, all else many requests at a time."""
    if workload.separate or len(workload.groups) > 1:
        return client.score_many(workload.conversations(), concurrency=CONCURRENCY)
    (group,) = workload.groups
    return client.score_responses(group.prompt, group.responses)


def scores(scorer: Scorer, batch: Sequence[Features]) -> list[float]:
    """All scores of a batch in order; a request that failed ends the measurement."""
    values: list[float] = []
    for result in scorer.score(batch):
        if not isinstance(result, Scores):
            raise RuntimeError(f"the Scorer answered {result!r}")
        values += result.scores.tolist()
    return values


@dataclass(frozen=True)
class PredictedWork:
    """Cost of a batch, as the Scorer's plan predicts it.

    Attributes:
        flops: with everything shared that can be.
        flops_alone: with nothing shared.
        size: bytes of intermediate results, of one pass over all of it.
    """

    flops: float
    flops_alone: float
    size: float


def work(batch: Sequence[Features], geometry: Geometry, cost: Cost) -> PredictedWork:
    """Predict what a batch takes."""
    ordered = packing.sort_batch(dict(enumerate(batch)), geometry)
    shown: frozenset[int] = frozenset()
    flops = alone = size = 0.0
    for index, branch in enumerate(ordered.branches):
        shared = int(ordered.shared[index])
        _, _, more, extra = price(ordered, index, shared, shown, cost)
        flops, size = flops + more, size + extra
        alone += price(ordered, index, 0, frozenset(), cost)[2]
        shown |= branch.media
    return PredictedWork(flops, alone, size)
